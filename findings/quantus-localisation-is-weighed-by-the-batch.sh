#!/usr/bin/env bash
# quantus 0.6.0, torch 2.13.0: AttributionLocalisation(weighted=True) multiplies the share of attribution inside a mask by the
# share of the image that the mask takes up. Instead of the size of an image it takes the size of all but the first two images
# of the batch. The same explanations get a quarter of the score with a batch of six instead of three, and infinity in batches
# of one or two. (max_size is compared with the same number.)
#
# Seen: scores of the same three images, mask of a quarter of each
#       inside share 0.149, 0.259, 0.254; times a quarter 0.037, 0.065, 0.064
#       batch of 1: inf, inf, inf
#       batch of 2: inf, inf, inf
#       batch of 3: 0.037, 0.065, 0.064
#       batch of 6: 0.009, 0.016, 0.016
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
x, a = random.normal(size=(6, 1, 6, 6)).astype(np.float32), np.abs(random.normal(size=(6, 1, 6, 6)))
mask = np.zeros_like(x)
mask[:, :, :3, :3] = 1


def scores(batch_size, weighted=True):
    metric = quantus.AttributionLocalisation(weighted=weighted, disable_warnings=True)
    found = metric(model=model, x_batch=x, y_batch=np.zeros(6, int), a_batch=a, s_batch=mask, batch_size=batch_size)
    return np.array(found)[:3]


def text(values):
    return ", ".join(f"{value:.3f}" for value in values)


inside = (a * mask).sum(axis=(1, 2, 3))[:3] / a.sum(axis=(1, 2, 3))[:3]
print("scores of the same three images, mask of a quarter of each")
print(f"inside share {text(inside)}; times a quarter {text(inside / 4)}")
found = {size: scores(size) for size in (1, 2, 3, 6)}
for size, values in found.items():
    print(f"batch of {size}: {text(values)}")
same = all(np.allclose(scores(size, weighted=False), inside) for size in found)
infinite = np.isinf(found[1]).all() and np.isinf(found[2]).all()
sys.exit(0 if same and infinite and np.allclose(found[3], inside / 4) and np.allclose(found[6], inside / 16) else 1)
PYTHON
