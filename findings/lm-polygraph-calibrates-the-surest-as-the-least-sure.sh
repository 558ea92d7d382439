#!/usr/bin/env bash
# lm-polygraph 0.7.0: its normalizers turn an uncertainty into the quality that such an uncertainty had, on average, where they were
# fitted. BinnedPCCNormalizer looks for the first edge that is no smaller than the uncertainty and takes the bin before it: at or
# below the smallest uncertainty of the fit that is bin -1, the last one, and the surest answer of all is given the quality of the least
# sure. IsotonicPCCNormalizer, which is to clip beyond the ends, takes for its ends the first and the last of points that a set had
# in no order: beyond the ends it returns the quality of some points in between.
#
# Seen: uncertainty          below the range, its least, its middle, its largest, above the range
#       quality of its tenth 1.00 1.00 0.40 0.02 0.02
#       binned               0.02 0.02 0.40 0.02 0.02
#       isotonic             0.96 1.00 0.41 0.00 0.06
#       isotonic, of 100 fits to other data: 86 are off by more than 0.1 below the range, 97 above it
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile numpy==2.4.6 scipy==1.17.1 scikit-learn==1.9.1 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps lm-polygraph==0.7.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import importlib.util
import sys
import types

import numpy as np

for name in ("lm_polygraph", "lm_polygraph.utils"):  # without their __init__, which loads everything there is
    package = types.ModuleType(name)
    package.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
    sys.modules[name] = package
from lm_polygraph.normalizers.binned_pcc import BinnedPCCNormalizer
from lm_polygraph.normalizers.isotonic_pcc import IsotonicPCCNormalizer


def show(name, values):
    print(f"{name:<20}", *(f"{value:.2f}" for value in values))


def probes(uncertainty):
    return np.array([uncertainty.min() - 0.1, uncertainty.min(), 0.0, uncertainty.max(), uncertainty.max() + 0.1])


print("uncertainty          below the range, its least, its middle, its largest, above the range")
rng = np.random.default_rng(0)
uncertainty = rng.normal(size=500)
quality = (rng.random(500) < 1 / (1 + np.exp(3 * uncertainty))).astype(float)  # right or wrong, the surer the more often right
ordered = quality[np.argsort(uncertainty)].reshape(10, 50).mean(1)
tenth = np.searchsorted(np.sort(uncertainty)[49:-1:50], probes(uncertainty))
show("quality of its tenth", ordered[tenth])
binned = BinnedPCCNormalizer()
binned.fit(quality, uncertainty, 10)
by_bins = binned.transform(probes(uncertainty))
show("binned", by_bins)
isotonic = IsotonicPCCNormalizer()
isotonic.fit(quality, uncertainty)
show("isotonic", isotonic.transform(probes(uncertainty)))
below = above = 0
for seed in range(100):
    rng = np.random.default_rng(seed)
    uncertainty = rng.normal(size=200)
    isotonic.fit(np.clip(0.5 - 0.2 * uncertainty + 0.1 * rng.normal(size=200), 0, 1), uncertainty)
    lower, least, _, largest, upper = isotonic.transform(probes(uncertainty))
    below, above = below + (abs(lower - least) > 0.1), above + (abs(upper - largest) > 0.1)
print(f"isotonic, of 100 fits to other data: {below} are off by more than 0.1 below the range, {above} above it")
as_stated = by_bins[0] == by_bins[1] == by_bins[-1] == ordered[-1] and ordered[0] > 0.9
sys.exit(0 if as_stated and below > 50 and above > 50 else 1)
PYTHON
