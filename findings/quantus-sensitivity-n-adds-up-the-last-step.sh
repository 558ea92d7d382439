#!/usr/bin/env bash
# quantus 0.6.0, torch 2.13.0: Sensitivity-n compares what the output loses when n pixels are taken out with the sum of their
# attributions. SensitivityN takes pixels out one after the other and leaves them out, but adds up the attributions of the last
# step alone: the loss of n pixels is correlated with the attribution of the n-th. Exact attributions of a linear model, for which
# the two are equal, get a correlation that falls to a half.
#
# Seen: exact attributions, SensitivityN: 1, 2, 8, 32 pixels 1.00, 0.79, 0.69, 0.51; mean 0.67
#       exact attributions, sum of attributions: 1, 2, 8, 32 pixels 1.00, 1.00, 1.00, 1.00; mean 1.00
#       noise, SensitivityN: 1, 2, 8, 32 pixels -0.06, -0.28, 0.04, 0.17; mean 0.00
#       noise, sum of attributions: 1, 2, 8, 32 pixels -0.06, -0.29, -0.03, 0.06; mean -0.09
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
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval()
x, y = random.normal(size=(60, 1, 8, 8)).astype(np.float32), np.zeros(60, int)
exact = x * model[1].weight.detach().numpy()[0].reshape(8, 8)  # what the output loses when a pixel becomes 0
noise = random.normal(size=x.shape)


def by_hand(attribution, n):
    flat, values = attribution.reshape(60, -1), exact.reshape(60, -1)
    order = np.argsort(-flat, axis=1)[:, :n]
    losses, sums = np.take_along_axis(values, order, 1).sum(1), np.take_along_axis(flat, order, 1).sum(1)
    return np.corrcoef(losses, sums)[0, 1]


found = {}
for name, a in {"exact attributions": exact, "noise": noise}.items():
    metric = quantus.SensitivityN(
        n_max_percentage=0.5, perturb_baseline=0.0, normalise=False, return_aggregate=False, disable_warnings=True
    )
    scores = metric(model=model, x_batch=x, y_batch=y, a_batch=a, softmax=False)
    hand = [by_hand(a, n) for n in range(1, 33)]
    found[name] = scores, hand
    for label, values in {"SensitivityN": scores, "sum of attributions": hand}.items():
        first = ", ".join(f"{values[n - 1]:.2f}" for n in (1, 2, 8, 32))
        print(f"{name}, {label}: 1, 2, 8, 32 pixels {first}; mean {np.mean(values):.2f}")
exact_scores, exact_hand = found["exact attributions"]
sys.exit(0 if min(exact_hand) > 0.999 and exact_scores[0] > 0.999 and np.mean(exact_scores) < 0.7 else 1)
PYTHON
