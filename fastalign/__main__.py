"""`python -m fastalign`."""

import sys

from fastalign.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
