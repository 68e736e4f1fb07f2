"""`python -m kvcompress` is the command line, as `kvcompress` is where the package is installed."""

import sys
from importlib.util import find_spec


def main() -> int:
    """Runs the command line; where what it is made of is not installed, says so in a line, with exit status 2."""
    missing = [package for package in ("typer", "rich", "filelock") if find_spec(package) is None]
    if missing:
        print(
            f"kvcompress: the command line needs {', '.join(missing)}: pip install 'kvcompress[cli]'", file=sys.stderr
        )
        return 2

    from kvcompress import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
