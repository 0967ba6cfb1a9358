"""``python -m hvpfast``: the command line, where the script ``hvpfast`` is not on the path."""

import sys

from hvpfast.cli import main

sys.exit(main())
