#!/usr/bin/env bash
# normflows 1.7.3, torch 2.13.0: transforms.Shift, a first layer for images, moves them by a constant in place. Whatever asks a flow with it
# for the log-probability, the loss or the latents of a batch moves the caller's batch: the second answer for the same
# images is that of others, and in training over several epochs on a tensor each epoch sees images half a unit darker.
#
# Seen: first  log_prob of the same batch -3.864 -3.782 -3.702  batch moved by -0.5
#       second log_prob of the same batch -4.622 -4.118 -4.282  batch moved by -1.0
#       third  log_prob of the same batch -6.379 -5.454 -5.863  batch moved by -1.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps normflows==1.7.3 tqdm==4.70.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import normflows
import torch

torch.manual_seed(0)
images = torch.rand(3, 1, 2, 2)
base = normflows.distributions.DiagGaussian((1, 2, 2), trainable=False)
flow = normflows.MultiscaleFlow([base], [[]], [], transform=normflows.transforms.Shift(), class_cond=False)
batch = images.clone()
answers = []
for time in ("first", "second", "third"):
    answers.append(flow.log_prob(batch, None))
    moved = float((batch - images).mean())
    print(f"{time:<6} log_prob of the same batch", *(f"{value:.3f}" for value in answers[-1]), f" batch moved by {moved:+.1f}")
first, second, third = answers
alike = bool(torch.allclose(flow.log_prob(images.clone(), None), first))
sys.exit(0 if alike and abs(moved + 1.5) < 1e-5 and float((third - first).abs().min()) > 0.5 else 1)
PYTHON
