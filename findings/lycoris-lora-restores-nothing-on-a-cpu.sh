#!/usr/bin/env bash
# lycoris-lora 4.1.3, torch 2.13.0: onfly_merge() puts an adapter into the weights of a model for a while, and onfly_restore() is
# to put the old weights back. What is kept of them is weight.data.cpu(), which on a CPU is the same memory and no copy: the merge
# overwrites it, and restoring writes the merged weights over themselves. The adapter stays in the model, and a second one is put
# on top of it.
#
# Seen: lora   merged moves outputs by 48.1, restored by 48.1, merged and restored once more by 96.2
#       lokr   merged moves outputs by 12.1, restored by 12.1, merged and restored once more by 24.3
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


def look(algo):
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(5, 16)
    moved = []
    with torch.no_grad():
        before = model(x)
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4.0, algo=algo)
        network.apply_to()
        network.restore()
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        for step in (network.onfly_merge, network.onfly_restore, network.onfly_merge, network.onfly_restore):
            step()
            moved.append(float((model(x) - before).abs().max()))
    merged, restored, _, again = moved
    print(f"{algo:<6} merged moves outputs by {merged:.1f}, restored by {restored:.1f}, ", end="")
    print(f"merged and restored once more by {again:.1f}")
    return merged, restored, again


lora, lokr = look("lora"), look("lokr")
as_stated = all(found[0] > 1 and abs(found[1] / found[0] - 1) < 1e-3 for found in (lora, lokr))
sys.exit(0 if as_stated and all(abs(found[2] / found[0] - 2) < 1e-2 for found in (lora, lokr)) else 1)
PYTHON
