#!/usr/bin/env bash
# quantus 0.6.0, torch 2.13.0: the metric Monotonicity begins with an image of the baseline and is to put features back from the
# least to the most attributed, and to say whether the output rises all the way. What it writes at each step is the baseline
# again, never a value of the image, so that all outputs are that of the baseline, and the answer is True by default, of every
# explanation of every model: also of a linear model with weights of both signs, where the output falls whenever a feature with a
# negative share comes back.
#
# Seen: weights of one sign   put back by hand: rises for 6 of 6; Monotonicity True for 6 of 6
#       weights of both signs put back by hand: rises for 0 of 6; Monotonicity True for 6 of 6
#       the same, noise       put back by hand: rises for 0 of 6; Monotonicity True for 6 of 6
#       different images that a model was shown for six images and an explanation: 6
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


class Linear(torch.nn.Module):
    """The first class is a weighted sum of the pixels; keeps what it is shown."""

    def __init__(self, weight):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(weight), []

    def forward(self, x):
        self.seen += [row.numpy().tobytes() for row in x.detach()]
        logit = x.flatten(1) @ self.weight
        return torch.stack([logit, -logit], 1)


x, y = random.normal(size=(6, 1, 6, 6)).astype(np.float32), np.zeros(6, int)
noise = random.normal(size=x.shape)


def look(name, weight, attribution=None):
    model, weight = Linear(weight).eval(), weight.numpy()
    if attribution is None:  # the exact share of each pixel in the difference from the baseline
        attribution = (x - x.min(axis=(1, 2, 3), keepdims=True)) * weight.reshape(1, 1, 6, 6)
    scores = quantus.Monotonicity(abs=False, disable_warnings=True)(model=model, x_batch=x, y_batch=y, a_batch=attribution)
    rises = 0
    for image, order in zip(x.reshape(6, -1), np.argsort(attribution.reshape(6, -1), 1), strict=True):
        shown, outputs = np.full(36, image.min()), []
        for index in order:
            shown[index] = image[index]
            outputs.append(shown @ weight)
        rises += bool((np.diff(outputs) >= 0).all())
    print(f"{name:<21} put back by hand: rises for {rises} of 6; Monotonicity True for {sum(map(bool, scores))} of 6")
    return rises, sum(map(bool, scores)), len(set(model.seen))


found = [
    look("weights of one sign", torch.rand(36)),
    look("weights of both signs", torch.randn(36)),
    look("the same, noise", torch.randn(36), noise),
]
print(f"different images that a model was shown for six images and an explanation: {found[0][2]}")
sys.exit(0 if found == [(6, 6, 6), (0, 6, 6), (0, 6, 6)] else 1)
PYTHON
