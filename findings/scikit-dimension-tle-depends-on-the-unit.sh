#!/usr/bin/env bash
# scikit-dimension 0.5.0: an intrinsic dimension does not depend on the unit of the data. TLE drops all measurements and distances
# below epsilon = 1e-4, an absolute number ("epsilon: float", no more). It corrects the count, and what is left are the larger ones: the
# same plane in a smaller unit has fifteen dimensions, in silence. KNN's default draws samples of three to six points, each once,
# and fits a growth rate to these: the plane of 1000 points has 1 to 10 dimensions, with the seed.
#
# Seen: TLE, unit 1: 2.1; unit 0.01: 2.2; unit 0.001: 14.9
#       MLE, unit 1: 1.9; unit 0.01: 1.9; unit 0.001: 1.9
#       KNN() with seeds 0 to 9: [1, 10, 3, 10, 1, 2, 10, 2, 1, 1]
#       KNN(ps=100, 200 … 900) with seeds 0 to 9: [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 numba==0.68.1 \
    scikit-dimension==0.5.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
from skdim.id import KNN, MLE, TLE

rng = np.random.default_rng(0)
plane = np.zeros((1000, 10))
plane[:, :2] = rng.random((1000, 2))
plane = plane @ np.linalg.qr(rng.normal(size=(10, 10)))[0]
found = {}
for method in (TLE, MLE):
    found[method] = [float(method().fit(unit * plane).dimension_) for unit in (1, 0.01, 0.001)]
    print(f"{method.__name__}, unit 1: {found[method][0]:.1f}; unit 0.01: {found[method][1]:.1f}; unit 0.001: {found[method][2]:.1f}")
default = [int(KNN(random_state=seed).fit(plane).dimension_) for seed in range(10)]
print("KNN() with seeds 0 to 9:", default)
large = [int(KNN(ps=np.arange(100, 1000, 100), random_state=seed).fit(plane).dimension_) for seed in range(10)]
print("KNN(ps=100, 200 … 900) with seeds 0 to 9:", large)
as_stated = found[TLE][0] < 2.5 and found[TLE][2] > 5 and np.ptp(found[MLE]) < 1e-3
sys.exit(0 if as_stated and min(default) == 1 and max(default) == 10 and set(large) == {2} else 1)
PYTHON
