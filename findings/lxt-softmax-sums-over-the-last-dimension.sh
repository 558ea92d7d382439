#!/usr/bin/env bash
# lxt 2.1, torch 2.13.0: softmax(input, dim) takes the dimension, and computes the probabilities over it. The relevance is computed
# with sums over the last dimension, whatever `dim` is. Over any other dimension the relevances are others than those of the same
# numbers transposed, and the inputs that can have no part in an output get some of its relevance.
#
# Seen: softmax over dim -1: probabilities off by 0.00, relevances off by 0.00
#       softmax over dim 1: probabilities off by 0.00, relevances off by 4.24
#       softmax over dim 0: probabilities off by 0.00, relevances off by 6.60
#       relevance of one output given to inputs of other columns: 0.14, with the numbers transposed 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps lxt==2.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import lxt.explicit.functional as lf
import torch

torch.manual_seed(0)
x, given = torch.randn(2, 3, 4), torch.randn(2, 3, 4)


def run(x, given, dim):
    x = x.clone().requires_grad_()
    output = lf.softmax(x, dim)
    (relevance,) = torch.autograd.grad(output, x, given)
    return output.detach(), relevance


def transposed(x, given, dim):
    output, relevance = run(x.transpose(dim, -1).contiguous(), given.transpose(dim, -1).contiguous(), -1)
    return output.transpose(dim, -1), relevance.transpose(dim, -1)


off = {}
for dim in (-1, 1, 0):
    (one, mine), (two, reference) = run(x, given, dim), transposed(x, given, dim)
    off[dim] = float((one - two).abs().max()), float((mine - reference).abs().max())
    print(f"softmax over dim {dim}: probabilities off by {off[dim][0]:.2f}, relevances off by {off[dim][1]:.2f}")
single = torch.zeros(2, 3, 4)
single[0, 0, 0] = 1
others = [float(relevance[0, :, 1:].abs().max()) for _, relevance in (run(x, single, 1), transposed(x, single, 1))]
print(f"relevance of one output given to inputs of other columns: {others[0]:.2f}, with the numbers transposed {others[1]:.2f}")
right = off[-1] == (0, 0) and max(off[1][0], off[0][0]) < 1e-6
sys.exit(0 if right and min(off[1][1], off[0][1]) > 0.5 and others[0] > 0.01 and others[1] == 0 else 1)
PYTHON
