#!/usr/bin/env bash
# dit 2.3: the cumulative residual entropy is, by dit's documentation and by the paper that it cites, an integral of -S log S with S the
# probability to lie above x. What is integrated is -F log F with F the probability to lie at or below x, which is another quantity, the
# entropy of the past. For symmetric distributions both are the same. A die labeled 1 to 5 and 100, the example of the
# documentation, gets 22.67 instead of 42.57; the distribution of the mirrored numbers gets the value that was meant.
#
# Seen: [1, 2, 3, 4, 5, 6], a sixth each: 2.07, residual 2.07, past 2.07; of the mirrored numbers 2.07
#       [1, 2, 3, 4, 5, 100], a sixth each: 22.67, residual 42.57, past 22.67; of the mirrored numbers 42.57
#       [0, 10], 0.9 and 0.1: 1.37, residual 3.32, past 1.37; of the mirrored numbers 3.32
#       [0, 10], 0.1 and 0.9: 3.32, residual 1.37, past 3.32; of the mirrored numbers 1.37
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile dit==2.3 numpy==2.4.6 scipy==1.17.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import dit
import numpy as np
from dit.other import generalized_cumulative_residual_entropy


def integral(numbers, weights, above):
    """The integral of -P log P, where P is the probability to lie above x, or at or below it."""
    order = np.argsort(numbers)
    numbers, below = np.asarray(numbers, float)[order], np.cumsum(np.asarray(weights)[order])[:-1]
    part = 1 - below if above else below
    return float(-(np.diff(numbers) * part * np.log2(part)).sum())


rows = []
for numbers, weights in (
    ([1, 2, 3, 4, 5, 6], [1 / 6] * 6),
    ([1, 2, 3, 4, 5, 100], [1 / 6] * 6),
    ([0, 10], [0.9, 0.1]),
    ([0, 10], [0.1, 0.9]),
):
    found = float(generalized_cumulative_residual_entropy(dit.Distribution(numbers, weights)))
    mirrored = float(generalized_cumulative_residual_entropy(dit.Distribution([-x for x in numbers], weights)))
    residual, past = integral(numbers, weights, True), integral(numbers, weights, False)
    rows.append((found, mirrored, residual, past))
    shares = "a sixth each" if len(set(weights)) == 1 else " and ".join(map(str, weights))
    print(f"{numbers}, {shares}: {found:.2f}, residual {residual:.2f}, past {past:.2f}; of the mirrored numbers {mirrored:.2f}")
as_stated = all(abs(found - past) < 1e-9 and abs(mirrored - residual) < 1e-9 for found, mirrored, residual, past in rows)
sys.exit(0 if as_stated and abs(rows[1][0] - rows[1][2]) > 10 and abs(rows[0][0] - rows[0][2]) < 1e-9 else 1)
PYTHON
