"""`python -m kvcompress` is the same command line as the installed command `kvcompress`."""

import sys
from importlib.util import find_spec


def main() -> int:
    """Runs the command line; if packages it needs are not installed, says so in one line, with exit status 2."""
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
