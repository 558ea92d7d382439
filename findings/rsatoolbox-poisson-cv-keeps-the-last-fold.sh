#!/usr/bin/env bash
# rsatoolbox 0.3.2: calc_rdm(method="poisson_cv") is the cross-validated KL divergence of Poisson counts. It takes each fold in turn as the
# test set, and keeps the distances of the last one; crossnobis, beside it, averages all folds. The names of the folds decide
# which it is: called by other numbers, the same folds give other distances.
#
# Seen: three folds: 1.3474, mean of the three 1.6076, of the last alone 1.3474
#       the same folds, first and last change names: 2.0865, mean of the three 1.6076
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile numpy==2.4.6 scipy==1.17.1 rsatoolbox==0.3.2 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
from rsatoolbox.data import Dataset
from rsatoolbox.rdm import calc_rdm

rng = np.random.default_rng(0)
word, fold = np.repeat([0, 1], 3), np.tile([0, 1, 2], 2)
rates = np.where(np.arange(40) % 2 == word[:, None], 3.0, 1.5)
counts = rng.poisson(rates).astype(float)


def distance(method, folds):
    data = Dataset(counts, obs_descriptors={"word": word, "fold": folds})
    return float(calc_rdm(data, method=method, descriptor="word", cv_descriptor="fold").dissimilarities[0, 0])


def right(test):
    """The distance of the two words with one fold as the test set; the prior is that of the package."""
    def mean(rows):
        return np.array([counts[rows & (word == w)].mean(0) for w in (0, 1)])

    train, held = ((mean(rows) + 0.1) / 1.1 for rows in (fold != test, fold == test))
    return float((train[0] - train[1]) @ (np.log(held[0]) - np.log(held[1]))) / counts.shape[1]


folds = [right(test) for test in (0, 1, 2)]
found, renamed, mean = distance("poisson_cv", fold), distance("poisson_cv", 2 - fold), float(np.mean(folds))
print(f"three folds: {found:.4f}, mean of the three {mean:.4f}, of the last alone {folds[2]:.4f}")
print(f"the same folds, first and last change names: {renamed:.4f}, mean of the three {mean:.4f}")
same = abs(distance("crossnobis", fold) - distance("crossnobis", 2 - fold)) < 1e-9
as_stated = abs(found - folds[2]) < 1e-9 and abs(renamed - folds[0]) < 1e-9 and abs(found - mean) > 0.01 and same
sys.exit(0 if as_stated else 1)
PYTHON
