"""`python -m fsmount`."""

import sys

from fsmount.cli.main import main

sys.exit(main())
