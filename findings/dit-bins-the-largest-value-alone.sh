#!/usr/bin/env bash
# dit 2.3: binned(..., style="uniform") divides the range of the values into equal bins. So that the largest value falls into the last bin, an
# absolute 1e-12 is added to the range. In float32, as activations are, and in float64 from a range of some ten thousand on, the sum is
# the range again, and the largest value gets a bin of its own: two bins have three symbols, and entropies and informations change with the
# dtype and with the unit.
#
# Seen: float64                  two bins hold [16, 24], entropy 0.971 bits
#       float32                  two bins hold [16, 23, 1], entropy 1.121 bits
#       float64, in another unit two bins hold [16, 23, 1], entropy 1.121 bits
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile dit==2.3 numpy==2.4.6 scipy==1.17.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
from dit.inference import binned, entropy_0

values = np.random.default_rng(0).random(40)
found = {}
for name, rows in (
    ("float64", values),
    ("float32", values.astype(np.float32)),
    ("float64, in another unit", 1e5 * values),
):
    symbols = binned(rows, bins=2, style="uniform")
    found[name] = np.bincount(symbols).tolist()
    print(f"{name:<24} two bins hold {found[name]}, entropy {entropy_0(symbols.tolist()):.3f} bits")
sys.exit(0 if [len(counts) for counts in found.values()] == [2, 3, 3] and found["float32"][2] == 1 else 1)
PYTHON
