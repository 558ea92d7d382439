#!/usr/bin/env bash
# concept-erasure 0.2.4, torch 2.13.0: QuadraticEraser brings every class onto one mean and one covariance, with the least change.
# That mean is documented as the global centroid of the data set. It is the mean of the class means, each class counted once, while
# the covariance is weighted by the sizes of the classes: with 950 rows of one class and 50 of another, all rows go half the
# way to the small class. LeaceEraser keeps the mean, and erases the linear part as well.
#
# Seen: mean of the data 0.484, after LeaceEraser 0.484, after QuadraticEraser 5.06; a row moves by 5.09 (LeaceEraser 1.32)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 concept-erasure==0.2.4 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from concept_erasure import LeaceEraser, QuadraticEraser

torch.manual_seed(0)
z = (torch.arange(1000) >= 950).long()
x = torch.randn(1000, 4)
x[:, 0] += 10.0 * z
linear = LeaceEraser.fit(x, z)(x)
eraser = QuadraticEraser.fit(x, z)
quadratic = eraser(x, z)
before, after, kept = (float(rows[:, 0].mean()) for rows in (x, quadratic, linear))
moved, least = (float((rows - x).norm(dim=1).mean()) for rows in (quadratic, linear))
print(f"mean of the data {before:.3g}, after LeaceEraser {kept:.3g}, after QuadraticEraser {after:.3g}; ", end="")
print(f"a row moves by {moved:.3g} (LeaceEraser {least:.3g})")
centre = torch.stack([x[z == label].mean(0) for label in (0, 1)]).mean(0)
as_stated = abs(kept - before) < 1e-3 and after - before > 3 and torch.allclose(eraser.global_mean, centre, atol=1e-4)
sys.exit(0 if as_stated else 1)
PYTHON
