#!/usr/bin/env bash
# optimum-quanto 0.2.7, torch 2.13.0: Calibration(momentum=...) is "the momentum to use when updating scales" of inputs and
# outputs. It reaches those of the outputs alone; those of the inputs are always updated with 0.9. Whoever asks for 0, the range
# of the last batch, or 0.5, to be done after a few batches, gets inputs that are clipped far below what was seen, and the range
# of the outputs is then taken from what the layer makes of clipped inputs.
#
# Seen: momentum 0.0, ranges 1 and 11: input 2.00, output 2.02, by the formula 11.00
#       momentum 0.5, ranges 1 and 11: input 2.00, output 1.51, by the formula 6.00
#       momentum 0.9, ranges 1 and 11: input 2.00, output 1.10, by the formula 2.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 optimum-quanto==0.2.7 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import torch
from optimum.quanto import Calibration, qint8, quantize

first, last = torch.tensor([[1.0, -0.5]]), torch.tensor([[11.0, -5.5]])
seen = []
for momentum in (0.0, 0.5, 0.9):
    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.eye_(layer.weight)  # outputs are the inputs, and so are their ranges
    model = torch.nn.Sequential(layer)
    quantize(model, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration(momentum=momentum):
        model(first)
        model(last)
    ranges = [127 * float(scale) for scale in (model[0].input_scale, model[0].output_scale)]
    expected = momentum * 1 + (1 - momentum) * 11
    print(
        f"momentum {momentum}, ranges 1 and 11: input {ranges[0]:.2f}, output {ranges[1]:.2f}, by the formula {expected:.2f}"
    )
    seen.append(ranges[0])
sys.exit(0 if all(abs(value - 2) < 0.05 for value in seen) else 1)
PYTHON
