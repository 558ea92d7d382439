#!/usr/bin/env bash
# optimum-quanto 0.2.7, torch 2.13.0: by default Calibration is to leave those outputs unquantized that go straight into a function
# that cannot take them, as silu. It leaves all of them: it looks for the class QTensor itself among the classes of a call, which
# are never it but its subclasses, and so does not see that a function did take one. A layer before relu or before another layer
# returns plain numbers although activations=qint8 was asked for; with streamline=False it does not. Nor is this in any file: a model
# saved and read by requantize, in the way of the README, quantizes all outputs again, and is less exact than the one saved.
#
# Seen: silu    an output of the first layer is Tensor, with streamline=False ActivationQBytesTensor
#       relu    an output of the first layer is Tensor, with streamline=False ActivationQBytesTensor
#       nothing an output of the first layer is Tensor, with streamline=False ActivationQBytesTensor
#       qint8: error 0.018 returning Tensor, saved and read 0.023 returning ActivationQBytesTensor
#       qfloat8_e4m3fn: error 0.036 returning Tensor, saved and read 0.056 returning ActivationQBytesTensor
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 optimum-quanto==0.2.7 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import copy
import sys

import torch
from optimum.quanto import Calibration, QTensor, freeze, qfloat8, qint8, quantization_map, quantize, requantize
from torch import nn

torch.manual_seed(0)
torch.set_grad_enabled(False)
as_stated = []

for name, between in (("silu", nn.SiLU()), ("relu", nn.ReLU()), ("nothing", nn.Identity())):
    kinds = []
    for streamline in (True, False):
        model = nn.Sequential(nn.Linear(8, 8), between, nn.Linear(8, 8))
        quantize(model, weights=qint8, activations=qint8)
        with Calibration(streamline=streamline):
            for _ in range(4):
                model(torch.randn(64, 8))
        kinds.append(type(model[0](torch.randn(2, 8))).__name__)
    print(f"{name:<7} an output of the first layer is {kinds[0]}, with streamline=False {kinds[1]}")
    as_stated.append(kinds == ["Tensor", "ActivationQBytesTensor"])

original = nn.Sequential(
    nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 8)
)
batches, rows = torch.randn(16, 32, 64), torch.randn(1000, 64)


def off(model):
    """Error of a model's outputs, as a part of the size of those of the original."""
    found = model(rows)
    found = found.dequantize() if isinstance(found, QTensor) else found
    return float((found - original(rows)).pow(2).mean().sqrt() / original(rows).std())


for activations in (qint8, qfloat8):
    model = copy.deepcopy(original)
    quantize(model, weights=qint8, activations=activations)
    with Calibration():
        for batch in batches:
            model(batch)
    freeze(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    read = copy.deepcopy(original)
    requantize(read, state, quantization_map(model))
    print(
        f"{activations.name}: error {off(model):.3f} returning {type(model(rows)).__name__}, "
        f"saved and read {off(read):.3f} returning {type(read(rows)).__name__}"
    )
    as_stated.append(off(read) > 1.2 * off(model) and isinstance(read(rows), QTensor))
sys.exit(0 if all(as_stated) else 1)
PYTHON
