#!/usr/bin/env bash
# frites 0.4.6: mi_mixture_1d_gd and gcmi_mixture_1d_cd tell the information between numbers and classes, in bits, from a mixture of one
# Gaussian per class. The entropy of the mixture is the mean, over two points of each class, of the logarithm of its density there.
# frites adds the densities of both points up before it takes the logarithm, and still divides by two: half of the entropy is
# missing. Independent numbers get minus half of their own entropy, which depends on their unit, where the information is 0.
#
# Seen: unit 1     means 0 apart: mi_mixture_1d_gd -1.521, gcmi_mixture_1d_cd -1.520, point by point +0.000, true 0.000
#       unit 1     means 1 apart: mi_mixture_1d_gd -1.506, gcmi_mixture_1d_cd -1.507, point by point +0.151, true 0.161
#       unit 1     means 3 apart: mi_mixture_1d_gd -1.094, gcmi_mixture_1d_cd -1.087, point by point +0.859, true 0.760
#       unit 0.01  means 0 apart: mi_mixture_1d_gd -4.850, gcmi_mixture_1d_cd -4.841, point by point +0.000, true 0.000
#       unit 100   means 0 apart: mi_mixture_1d_gd +1.801, gcmi_mixture_1d_cd +1.800, point by point +0.000, true 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile frites==0.4.6 numpy==2.4.6 scipy==1.17.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
from frites.core import gcmi_mixture_1d_cd, mi_mixture_1d_gd
from scipy.integrate import quad
from scipy.stats import norm

rng = np.random.default_rng(0)
classes = rng.integers(0, 2, 20_000)


def point_by_point(x):
    """The same approximation: the mixture's density at one deviation on either side of each class's mean."""
    means, scales = zip(*((x[classes == k].mean(), x[classes == k].std(ddof=1)) for k in (0, 1)))
    shares = np.bincount(classes) / len(classes)
    points = np.array([[m - s, m + s] for m, s in zip(means, scales)])
    densities = sum(w * norm.pdf(points, m, s) for w, m, s in zip(shares, means, scales))
    within = sum(w * norm.entropy(scale=s) for w, s in zip(shares, scales))
    return float(-(shares * np.log(densities).mean(1)).sum() - within) / np.log(2)


as_stated = True
for unit, apart in ((1, 0), (1, 1), (1, 3), (0.01, 0), (100, 0)):
    x = rng.normal(size=len(classes)) + apart * classes

    def surprise(v):
        density = (norm.pdf(v) + norm.pdf(v - apart)) / 2
        return -density * np.log(density)

    true = (quad(surprise, -8, 8 + apart)[0] - norm.entropy()) / np.log(2)
    rows = x / unit
    found, copula, right = mi_mixture_1d_gd(rows, classes), gcmi_mixture_1d_cd(rows, classes), point_by_point(rows)
    print(f"unit {unit:<5g} means {apart} apart: mi_mixture_1d_gd {found:+.3f}, gcmi_mixture_1d_cd {copula:+.3f}, ", end="")
    print(f"point by point {right:+.3f}, true {abs(true):.3f}")
    as_stated &= abs(found - true) > 1 and abs(copula - true) > 1 and abs(right - true) < 0.11
sys.exit(0 if as_stated else 1)
PYTHON
