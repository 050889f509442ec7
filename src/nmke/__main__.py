"""`python -m nmke`: the same as the `nmke` command."""

import sys

from nmke.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
