"""`python -m lensmith` is `lensmith`, also where the package is on the path without being installed."""

import sys

from lensmith.cli import main

if __name__ == "__main__":
    sys.exit(main())
