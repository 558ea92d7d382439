#!/usr/bin/env bash
# torch-cka 0.21, torch 2.13.0: compare() fills the rows and columns of its CKA matrix in the order in which the layers finish within
# a pass. export() and the plot name them in the order in which the model lists them. A block is listed before its parts and finishes
# behind them, and so does the model itself: wherever blocks are among the layers (all of them are by default), rows bear names
# of other layers. The order of model1_layers= does not matter. Each value is right, at the wrong place.
#
# Seen: CKA with layer 'first'
#       'block':      exported 0.977, of its own output 0.592 (0.977 is that of 'block.up')
#       'block.up':   exported 0.592, of its own output 0.977 (0.592 is that of 'block.down')
#       'block.down': exported 0.592, of its own output 0.592 (0.592 is that of 'block')
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 tqdm==4.67.1 matplotlib==3.10.7 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps torch-cka==0.21 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import sys

import torch
from torch import nn
from torch_cka import CKA


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, x):
        return self.down(self.up(x).relu().square())


torch.manual_seed(0)
model = nn.Sequential()
model.add_module("first", nn.Linear(8, 8))
model.add_module("block", Block())
x = torch.randn(64, 8)
layers = ["first", "block", "block.up", "block.down"]
outputs = {}
for name in layers:
    model.get_submodule(name).register_forward_hook(lambda *call, name=name: outputs.__setitem__(name, call[-1].double()))


def right(name):
    """The CKA of one batch with layer 'first', by its unbiased estimator."""
    grams = [outputs[key] @ outputs[key].T for key in ("first", name)]
    for gram in grams:
        gram.fill_diagonal_(0)

    def hsic(k, m):
        n = len(k)
        return (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)

    k, m = grams
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


with torch.no_grad():
    cka = CKA(model, model, model1_layers=layers, model2_layers=layers)
    cka.compare(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=64))
found = cka.export()
own = {name: right(name) for name in layers}
ran = list(outputs)
print("CKA with layer 'first'")
rows = dict(zip(found["model1_layers"], found["CKA"][:, 0].tolist()))
for name, other in zip(layers[1:], ran[1:]):
    print(f"{name!r}:".ljust(13), f"exported {rows[name]:.3f}, of its own output {own[name]:.3f} ({own[other]:.3f} is that of {other!r})")
by_order = all(abs(rows[name] - own[other]) < 1e-3 for name, other in zip(layers, ran))
sys.exit(0 if by_order and abs(rows["block"] - own["block"]) > 0.1 else 1)
PYTHON
