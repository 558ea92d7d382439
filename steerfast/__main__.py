"""`python -m steerfast` is the command `steerfast`."""

import sys

from .cli.main import main

sys.exit(main())
