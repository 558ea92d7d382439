"""`python -m steerfast` is the command `steerfast`."""

import sys

from .cli import main

sys.exit(main())
