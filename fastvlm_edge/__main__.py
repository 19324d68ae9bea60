"""`python -m fastvlm_edge`, the same as the `fastvlm-edge` command."""

import sys

from fastvlm_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
