#!/usr/bin/env bash
# dit 2.3: the earth mover's distance of two distributions over numbers takes |x - y| as the cost. The matrix of these costs is built by
# meshgrid, with a row for each number of the second distribution, and read with a row for each of the first: mass from the first number to
# the second of the other side pays for the way from the second to the first. Where both have the same numbers nothing is seen of
# it. Otherwise the distance is wrong, may be below the difference of the means, and another count of numbers is refused.
#
# Seen: [0.9, 0.1] at [0, 1], [0.5, 0.5] at [0, 1]: 0.4, true 0.4, difference of the means 0.4
#       [0.9, 0.1] at [0, 1], [0.5, 0.5] at [1, 5]: 0.9, true 2.9, difference of the means 2.9
#       [0.2, 0.3, 0.5] at [0, 1, 2], [0.6, 0.3, 0.1] at [1, 2, 9]: 4.8, true 1.0, difference of the means 0.8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile dit==2.3 numpy==2.4.6 scipy==1.17.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import dit
from dit.divergences import earth_movers_distance
from scipy.stats import wasserstein_distance

cases = (
    ([0, 1], [0.9, 0.1], [0, 1], [0.5, 0.5]),
    ([0, 1], [0.9, 0.1], [1, 5], [0.5, 0.5]),
    ([0, 1, 2], [0.2, 0.3, 0.5], [1, 2, 9], [0.6, 0.3, 0.1]),
)
rows = []
for first, p, second, q in cases:
    found = float(earth_movers_distance(dit.Distribution(first, p), dit.Distribution(second, q)))
    true = wasserstein_distance(first, second, p, q)
    means = abs(sum(x * weight for x, weight in zip(first, p)) - sum(y * weight for y, weight in zip(second, q)))
    rows.append((found, true, means))
    print(f"{p} at {first}, {q} at {second}: {found:.1f}, true {true:.1f}, difference of the means {means:.1f}")
(same, right, _), (less, more, bound), (above, true, _) = rows
sys.exit(0 if abs(same - right) < 1e-9 and less < bound - 1 and abs(more - 2.9) < 1e-9 and above > true + 1 else 1)
PYTHON
