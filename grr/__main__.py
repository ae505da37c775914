"""python -m grr, the command `grr`."""

from grr.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
