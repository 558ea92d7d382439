#!/usr/bin/env bash
# lycoris-lora 4.1.3, torch 2.13.0: the multiplier of an adapter says how much of it is applied; at 0 the model is the base model.
# With dora_wd=True the multiplier acts on the rescaling of rows alone, and the change of the weights is added in full: at 0 the
# model is that of the adapter without weight decomposition. At 0.5 it is no half of anything, and merging at 0 changes the model,
# too.
#
# Seen: lora   at multiplier 0 outputs move by 0.0, merged at 0 by 0.0
#       dora   at multiplier 0 outputs move by 24.7, merged at 0 by 24.7, off from the whole LoRA by 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 lycoris-lora==4.1.3 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import logging
import sys

import torch
from lycoris import create_lycoris

logging.disable(logging.CRITICAL)


def look(name, **options):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(5, 16)
    with torch.no_grad():
        before = model(x)
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4.0, algo="lora", **options)
        network.apply_to()
        network.eval()
        torch.manual_seed(1)
        for key, parameter in network.named_parameters():
            if "dora" not in key:
                parameter.copy_(torch.randn(parameter.shape))
        whole = model(x)
        network.set_multiplier(0.0)
        none = model(x)
        network.restore()
        network.merge_to(0.0)
        merged = model(x)
    moved, by_merging = float((none - before).abs().max()), float((merged - before).abs().max())
    print(f"{name:<6} at multiplier 0 outputs move by {moved:.1f}, merged at 0 by {by_merging:.1f}", end="")
    return moved, by_merging, whole, none


lora = look("lora")
print()
dora = look("dora", dora_wd=True)
off = float((dora[3] - lora[2]).abs().max())
print(f", off from the whole LoRA by {off:.1f}")
sys.exit(0 if max(lora[:2]) < 1e-4 and min(dora[:2]) > 1 and off < 1e-3 else 1)
PYTHON
