"""``python -m hvpfast.bench``."""

import sys

from hvpfast.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
