#!/usr/bin/env bash
# quantus 0.6.0, torch 2.13.0: ROAD returns, for each share of pixels taken out, the mean accuracy over all images, and
# SensitivityN correlates over all images. Images are handled in batches, 64 by default, and both metrics read the result of the
# first batch and drop the rest: with batches of 10, 20 images get the scores of the first 10.
#
# Seen: ROAD, 10, 30 and 50 percent
#         all in one batch 0.75, 0.70, 0.60; batches of 10 0.80, 0.80, 0.70; first 10 alone 0.80, 0.80, 0.70
#       SensitivityN, mean of 1 to 3 pixels
#         all in one batch -0.09; batches of 10 -0.25; first 10 alone -0.25
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
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
x = random.normal(size=(20, 1, 8, 8)).astype(np.float32)
x[10:] += 0.5
with torch.no_grad():
    y = model(torch.tensor(x)).argmax(1).numpy()
a = random.normal(size=x.shape)


def road(n, batch_size):
    metric = quantus.ROAD(percentages=[10, 30, 50], noise=0.0, disable_warnings=True)
    return list(metric(model=model, x_batch=x[:n], y_batch=y[:n], a_batch=a[:n], batch_size=batch_size).values())


def sensitivity(n, batch_size):
    metric = quantus.SensitivityN(n_max_percentage=3 / 64, disable_warnings=True)
    return metric(model=model, x_batch=x[:n], y_batch=y[:n], a_batch=a[:n], batch_size=batch_size)


same = []
for name, function in {"ROAD, 10, 30 and 50 percent": road, "SensitivityN, mean of 1 to 3 pixels": sensitivity}.items():
    found = [function(20, 20), function(20, 10), function(10, 10)]
    one, two, first = (", ".join(f"{value:.2f}" for value in values) for values in found)
    print(f"{name}\n  all in one batch {one}; batches of 10 {two}; first 10 alone {first}")
    same.append(np.allclose(found[1], found[2]) and not np.allclose(found[0], found[1], atol=0.01))
sys.exit(0 if all(same) else 1)
PYTHON
