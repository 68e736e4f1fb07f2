"""python -m tests.fuzz"""

from tests.fuzz.run import main

# its processes import functions from a module that is not the one that runs
if __name__ == "__main__":
    raise SystemExit(main())
