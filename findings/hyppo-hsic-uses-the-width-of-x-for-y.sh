#!/usr/bin/env bash
# hyppo 0.5.2: Hsic takes, by default, a Gaussian kernel of the median distance for each of its two sides. compute_kern works the width out
# from x, puts it into the arguments, and uses these for y as well. The statistic is then not symmetric, and depends on the unit of y:
# where its numbers are a hundred times as large, every row of y is like itself alone, and a clear dependence fades. With a kernel
# that works out a width for each side nothing of this is seen.
#
# Seen: y times 1      Hsic(x, y) 0.356 (p 2e-17)    Hsic(y, x) 0.382 (p 1.4e-18)  a width each 0.341
#       y times 100    Hsic(x, y) 0.030 (p 0.0081)   Hsic(y, x) -0.000 (p 0.33)    a width each 0.341
#       y times 1000   Hsic(x, y) 0.005 (p 0.15)     Hsic(y, x) -0.000 (p 0.33)    a width each 0.341
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile hyppo==0.5.2 numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
from hyppo.independence import Hsic
from scipy.spatial.distance import pdist, squareform


def own_width(rows, **_):
    """A Gaussian kernel of the median distance of these rows."""
    distances = squareform(pdist(rows))
    return np.exp(-(distances**2) / (2 * np.median(pdist(rows)) ** 2))


rng = np.random.default_rng(0)
x = rng.normal(size=(200, 1))
y = x**2 + 0.3 * rng.normal(size=(200, 1))
found = []
for factor in (1, 100, 1000):
    (forth, p), (back, q) = Hsic().test(x, factor * y), Hsic().test(factor * y, x)
    each = float(Hsic(compute_kernel=own_width).statistic(x, factor * y))
    print(f"y times {factor:<5}  Hsic(x, y) {f'{forth:.3f} (p {p:.2g})':<17}  Hsic(y, x) {f'{back:.3f} (p {q:.2g})':<17}  ", end="")
    print(f"a width each {each:.3f}")
    found.append((forth, back, each))
(first, _, each), (second, _, _), (third, other, same) = found
sys.exit(0 if first > 10 * second > 10 * third and third > 2 * other and abs(each - same) < 1e-6 and each > 0.3 else 1)
PYTHON
