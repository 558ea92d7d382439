"""The static model: what a kernel will do on a GPU, counted from its machine code and from its loads and stores.

Nothing here runs on a GPU. Counts (registers, programs per SM, bytes in flight, instructions, launches) are read; times are
predicted from them and the constants of constants.py, as ranges, and are called predictions wherever they stand.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the suites' own cases, whichever way this package is found
