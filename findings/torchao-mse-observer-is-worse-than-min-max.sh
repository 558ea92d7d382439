#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0: AffineQuantizedMSEObserver searches for the range of values that minimizes the error of
# quantization. It tries ranges that lie around zero alone, for an asymmetric mapping as well: behind a ReLU, half of the levels
# are for numbers that do not occur, and the error is four times that of the min-max observer, which does not search. And of
# several batches it keeps the range of the last one, where the min-max observer keeps that of all.
#
# Seen: ReLU    8 bits  mean squared error of min-max 9.97e-06, of the search 4.17e-05
#       uniform 8 bits  mean squared error of min-max 1.28e-06, of the search 5.17e-06
#       uniform 4 bits  mean squared error of min-max 0.000375, of the search 0.00142
#       largest value that is not cut off, after batches of size 10 and 1: min-max 10, the search 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 torchao==0.18.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import torch
from torchao.quantization.granularity import PerTensor
from torchao.quantization.observer import AffineQuantizedMinMaxObserver, AffineQuantizedMSEObserver
from torchao.quantization.quant_primitives import MappingType

torch.manual_seed(0)


def levels(kind, mapping, dtype, bounds, *batches):
    observer = kind(mapping, dtype, PerTensor(), quant_min=bounds[0], quant_max=bounds[1], eps=1e-6)
    for batch in batches:
        observer(batch)
    scale, zero = observer.calculate_qparams()
    return scale.double(), zero.double()


def error(kind, x, bits):
    """The error of quantization, computed here from the scale and the zero point of the observer."""
    scale, zero = levels(kind, MappingType.ASYMMETRIC, torch.uint8, (0, 2**bits - 1), x)
    rounded = ((x.double() / scale).round() + zero).clamp(0, 2**bits - 1)
    return float(((rounded - zero) * scale - x.double()).pow(2).mean())


kinds = (AffineQuantizedMinMaxObserver, AffineQuantizedMSEObserver)
worse = []
for name, x, bits in (
    ("ReLU", torch.randn(64, 64).relu(), 8),
    ("uniform", torch.rand(64, 64), 8),
    ("uniform", torch.rand(64, 64), 4),
):
    simple, searched = (error(kind, x, bits) for kind in kinds)
    print(f"{name:<7} {bits} bits  mean squared error of min-max {simple:.3g}, of the search {searched:.3g}")
    worse.append(searched > 3 * simple)
batches = [size * torch.linspace(-1, 1, 4096).view(64, 64) for size in (10, 1)]
ends = [float(levels(kind, MappingType.SYMMETRIC, torch.int8, (-128, 127), *batches)[0] * 127.5) for kind in kinds]
print(
    f"largest value that is not cut off, after batches of size 10 and 1: min-max {ends[0]:.3g}, the search {ends[1]:.3g}"
)
sys.exit(0 if all(worse) and ends[0] > 9 and ends[1] < 2 else 1)
PYTHON
