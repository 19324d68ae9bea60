"""`python -m fastvlm_edge` is the same as the command `fastvlm-edge`."""

import sys

from fastvlm_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
