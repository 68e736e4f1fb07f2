"""`python -m kvcompress` is the command line, as `kvcompress` is where the package is installed."""

import sys

from kvcompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
