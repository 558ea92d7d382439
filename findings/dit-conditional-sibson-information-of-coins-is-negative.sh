#!/usr/bin/env bash
# dit 2.3: the two conditional mutual informations of Sibson are to be those of X and Y where Z is known. Both are computed from the slices
# p(x, y, z) for each z as if these were p(x, y | z): none is divided by p(z), and the weights p(z) come on top. Three independent coins,
# which share nothing, get -1 bit at order 2 and +2 bits at order 1/2. At order 1 the first is not Shannon's conditional information. Where Z
# is constant both are right.
#
# Seen: three coins, order 0.5: Q(Y|Z) +2.00, Q(Z) +3.00, true 0
#       three coins, order 1: Q(Y|Z) +0.50, Q(Z) +0.00, true 0
#       three coins, order 2: Q(Y|Z) -1.00, Q(Z) +0.00, true 0
#       three coins, order inf: Q(Y|Z) +0.00, Q(Z) +1.00, true 0
#       three coins, Shannon's conditional information 0.00
#       Z constant, order 2: Q(Y|Z) 0.2212, without Z 0.2212
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile dit==2.3 numpy==2.4.6 scipy==1.17.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import dit
import numpy as np
from dit.multivariate import coinformation
from dit.other import sibson_conditional_mutual_information_y_given_z as y_given_z
from dit.other import sibson_conditional_mutual_information_z as over_z
from dit.other import sibson_mutual_information

words = [x + y + z for x in "01" for y in "01" for z in "01"]
coins = dit.Distribution(words, [1 / 8] * 8)
still = dit.Distribution(["000", "010", "100", "110"], [0.4, 0.1, 0.2, 0.3])
found = {}
for order in (0.5, 1, 2, np.inf):
    found[order] = first, second = tuple(float(measure(coins, [0], [1], [2], order)) + 0.0 for measure in (y_given_z, over_z))
    print(f"three coins, order {order}: Q(Y|Z) {first:+.2f}, Q(Z) {second:+.2f}, true 0")
shannon = abs(float(coinformation(coins, [[0], [1]], [2])))
print(f"three coins, Shannon's conditional information {shannon:.2f}")
constant, plain = y_given_z(still, [0], [1], [2], 2), sibson_mutual_information(still, [0], [1], 2)
print(f"Z constant, order 2: Q(Y|Z) {constant:.4f}, without Z {plain:.4f}")
as_stated = abs(found[2][0] + 1) < 1e-9 and abs(found[0.5][0] - 2) < 1e-9 and abs(found[np.inf][1] - 1) < 1e-9
as_stated &= shannon < 1e-9 and abs(found[1][0] - 0.5) < 1e-9
sys.exit(0 if as_stated and abs(constant - plain) < 1e-9 else 1)
PYTHON
