#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: HRA lays its reflections out in pairs of equal directions, which cancel, so that an untrained adapter
# changes nothing. With apply_GS=True it makes the directions orthogonal first: of the second of each pair nothing is left but a
# rounding error, which is divided by its own length. The untrained adapter then reflects along noise, or, where the remainder is
# exactly zero, makes every output NaN.
#
# Seen: without apply_GS 200 of 200 untrained adapters leave the layer as it is
#       with apply_GS    0 of 200 do; 26 make it NaN, the others move outputs by 0.62 of their size or more
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from peft import HRAConfig, get_peft_model


def moved(seed, apply_gs):
    """By how much an untrained adapter moves the outputs of a layer, in parts of their size."""
    torch.manual_seed(seed)
    linear, x = torch.nn.Linear(16, 16), torch.randn(5, 16)
    with torch.no_grad():
        before = linear(x)
        model = get_peft_model(torch.nn.Sequential(linear), HRAConfig(r=4, apply_GS=apply_gs, target_modules=["0"]))
        return float((model.eval()(x) - before).norm() / before.norm())


without, with_gs = ([moved(seed, gs) for seed in range(200)] for gs in (False, True))
same = [sum(value < 1e-4 for value in values) for values in (without, with_gs)]
lost = sum(value != value for value in with_gs)
least = min(value for value in with_gs if value == value)
print(f"without apply_GS {same[0]} of 200 untrained adapters leave the layer as it is")
print(
    f"with apply_GS    {same[1]} of 200 do; {lost} make it NaN, the others move outputs by {least:.2f} of their size or more"
)
sys.exit(0 if same == [200, 0] else 1)
PYTHON
