"""`python -m fastvlm_edge` is the same as the command `fastvlm-edge`."""

import signal
import sys


def main() -> int:
    """Run the command line. Ctrl-C before it is loaded ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from fastvlm_edge.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
