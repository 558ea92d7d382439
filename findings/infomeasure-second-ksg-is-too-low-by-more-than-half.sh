#!/usr/bin/env bash
# infomeasure 0.6.3: mutual_information(approach="ksg") has both KSG estimators, by nearest neighbours. The second
# (ksg_id=2) counts neighbours within the rectangle that holds the k nearest points, each axis with its own width. The package
# counts on both axes within the joint distance, which is right for the first one only, and uses the formula of the second: the
# information of independent numbers is about -1/k, and that of a correlation of 0.8 less than half of what it is.
#
# Seen: correlation 0.0, true 0.000: first -0.017, second -0.281, second with a width per axis -0.022
#       correlation 0.8, true 0.511: first 0.491, second 0.223, second with a width per axis 0.489
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile infomeasure==0.6.3 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import infomeasure
import numpy as np
from scipy.special import digamma

K, N = 4, 2000
rng = np.random.default_rng(0)


def second(x, y):
    """The second estimator, by its definition: the rectangle around the K nearest points in the maximum norm."""
    dx, dy = np.abs(x[:, None] - x), np.abs(y[:, None] - y)
    joint = np.maximum(dx, dy)
    np.fill_diagonal(joint, np.inf)
    nearest = np.argpartition(joint, K - 1, axis=1)[:, :K]
    counts = [(d <= np.take_along_axis(d, nearest, 1).max(1, keepdims=True)).sum(1) - 1 for d in (dx, dy)]
    return digamma(K) - 1 / K - np.mean(sum(digamma(c) for c in counts)) + digamma(N)


as_stated = True
for correlation in (0.0, 0.8):
    x = rng.normal(size=N)
    y = correlation * x + np.sqrt(1 - correlation**2) * rng.normal(size=N)
    true = -0.5 * np.log(1 - correlation**2) + 0.0
    one, two = (float(infomeasure.mutual_information(x, y, approach="ksg", k=K, ksg_id=i)) for i in (1, 2))
    right = float(second(x, y))
    print(f"correlation {correlation}, true {true:.3f}: first {one:.3f}, second {two:.3f}, ", end="")
    print(f"second with a width per axis {right:.3f}")
    as_stated &= abs(one - true) < 0.06 and abs(right - true) < 0.06 and two < true - 0.2
sys.exit(0 if as_stated else 1)
PYTHON
