#!/usr/bin/env bash
# optimum-quanto 0.2.7, torch 2.13.0: quantized activations run through quantized versions of some operations, which the README has
# inserted by themselves, and these give something else than the operation on the dequantized numbers, without a word. relu looks
# at the sign of the integers, also where a negative factor sits in the scale: what should be zero stays, and what should stay is
# zero. where puts its result back on the scale of the input, so a mask of -inf becomes the smallest calibrated value, and masked
# words keep part of the softmax; masked_fill does not. softmax rounds to steps of 1/127: over a thousand classes every
# probability is 0. chunk and split hand out parts that say they have the shape of the whole.
#
# Seen: relu(-1 * x)                    off by 2.115, relu(-x) off by 0.000
#       where(keep, x, -inf).softmax    masked 0.071 of 1, masked_fill(-inf).softmax 0.000
#       softmax over 1000               sums to 0.000
#       chunk(2, -1) of (4, 8)          says (4, 8), holds (4, 4)
#       classifier of 4000, calibrated  largest probability of 64 rows 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 optimum-quanto==0.2.7 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import torch
from optimum.quanto import Calibration, QTensor, absmax_scale, qint8, quantize, quantize_activation


def quantized(x):
    return quantize_activation(x, qint8, absmax_scale(x, qint8))


def plain(x):
    return x.dequantize() if isinstance(x, QTensor) else x


torch.manual_seed(0)
q = quantized(torch.randn(4, 8))
x = q.dequantize()

scaled = float((plain(torch.relu(-1.0 * q)) - torch.relu(-x)).abs().max())
negated = float((plain(torch.relu(-q)) - torch.relu(-x)).abs().max())
print(f"relu(-1 * x)                    off by {scaled:.3f}, relu(-x) off by {negated:.3f}")

keep = torch.arange(8) < 5
where = float(plain(torch.where(keep, q, float("-inf")).softmax(-1))[:, 5:].sum(-1).max())
fill = float(plain(q.masked_fill(~keep, float("-inf")).softmax(-1))[:, 5:].sum(-1).max())
print(f"where(keep, x, -inf).softmax    masked {where:.3f} of 1, masked_fill(-inf).softmax {fill:.3f}")

total = float(plain(quantized(torch.randn(1000) / 10).softmax(-1)).sum())
print(f"softmax over 1000               sums to {total:.3f}")

part = q.chunk(2, -1)[0]
print(f"chunk(2, -1) of {tuple(q.shape)}          says {tuple(part.shape)}, holds {tuple(part.dequantize().shape)}")


class Classifier(torch.nn.Module):
    """A linear layer over 4000 classes, and their probabilities."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(16, 4000)

    def forward(self, x):
        return self.head(x).softmax(-1)


model, rows = Classifier(), torch.randn(64, 16) / 4
quantize(model, weights=qint8, activations=qint8)
with torch.no_grad(), Calibration(streamline=False):
    model(rows)
largest = float(plain(model(rows)).max())
print(f"classifier of 4000, calibrated  largest probability of 64 rows {largest:.3f}")
as_stated = scaled > 1 and negated < 1e-6 and where > 0.05 and fill < 1e-6 and total < 1e-6 and largest < 1e-6
sys.exit(0 if as_stated and part.shape != part.dequantize().shape else 1)
PYTHON
