#!/usr/bin/env bash
# quantus 0.6.0, torch 2.13.0: PointingGame is to give NaN to an image whose mask is empty, as the other localisation metrics do.
# Its scores are an array of truth values, in which NaN is stored as True: an image without the object counts as a hit, always.
# Mean accuracies over a data set in which some masks are empty are too high. (weighted=True meets the same array.)
#
# Seen: 100 images of noise, every second mask empty, the others a quarter of the image
#       PointingGame             hits of full masks 9 of 50, of empty masks 50 of 50, mean 0.590
#       RelevanceRankAccuracy    NaN of full masks 0 of 50, of empty masks 50 of 50
#       AttributionLocalisation  NaN of full masks 0 of 50, of empty masks 50 of 50
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 quantus==0.6.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
import quantus
import torch

torch.manual_seed(0)
random = np.random.default_rng(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 2)).eval()
x, a = random.normal(size=(100, 1, 6, 6)).astype(np.float32), np.abs(random.normal(size=(100, 1, 6, 6)))
mask = np.zeros_like(x)
mask[::2, :, :3, :3] = 1


def scores(metric):
    found = metric(disable_warnings=True)(model=model, x_batch=x, y_batch=np.zeros(100, int), a_batch=a, s_batch=mask)
    return np.array([float(value) for value in found])


print("100 images of noise, every second mask empty, the others a quarter of the image")
hits = scores(quantus.PointingGame)
print(
    f"PointingGame             hits of full masks {hits[::2].sum():.0f} of 50, "
    f"of empty masks {hits[1::2].sum():.0f} of 50, mean {hits.mean():.3f}"
)
others = []
for metric in (quantus.RelevanceRankAccuracy, quantus.AttributionLocalisation):
    missing = np.isnan(scores(metric))
    print(f"{metric.__name__:<24} NaN of full masks {missing[::2].sum()} of 50, of empty masks {missing[1::2].sum()} of 50")
    others.append(missing[1::2].all() and not missing[::2].any())
sys.exit(0 if hits[1::2].all() and hits[::2].sum() < 30 and all(others) else 1)
PYTHON
