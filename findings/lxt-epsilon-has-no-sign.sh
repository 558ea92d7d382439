#!/usr/bin/env bash
# lxt 2.1, torch 2.13.0: linear_epsilon is the epsilon rule of layer-wise relevance propagation: the relevance of an output z is
# shared out in parts divided by z + epsilon * sign(z), so that relevance is damped and never blows up. It divides by z + epsilon:
# right for positive outputs, while negative ones of about -epsilon get relevances without bound, and those between -epsilon and 0
# relevances of the wrong sign. A layer whose weights are turned round, and its output with them, has other relevances. add2,
# matmul, mean, layer_norm and EpsilonRule divide in the same way.
#
# Seen: epsilon 0.1, relevances of the two inputs of 0.20 and 0.09, weights 1 and -1 and turned round
#       output  0.11: lxt 0.95 -0.43, epsilon rule 0.95 -0.43
#       output -0.11: lxt 20.00 -9.00, epsilon rule 0.95 -0.43
#       1000 outputs with their relevance 1, epsilon 0.25: largest sum of relevances lxt 266.5, epsilon rule 0.9
#       of the 474 negative outputs, those whose relevance has the wrong sign: lxt 160, epsilon rule 0
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


def relevance(x, weight, epsilon):
    x = x.clone().requires_grad_()
    output = lf.linear_epsilon(x, weight, None, epsilon)
    (found,) = torch.autograd.grad(output, x, torch.ones_like(output))
    return output.detach(), found


def rule(x, weight, epsilon):
    output = x @ weight.T
    return weight * x / (output + epsilon * output.sign())


print("epsilon 0.1, relevances of the two inputs of 0.20 and 0.09, weights 1 and -1 and turned round")
x, weight = torch.tensor([[0.2, 0.09]]), torch.tensor([[1.0, -1.0]])
found = []
for w in (weight, -weight):
    output, mine = relevance(x, w, 0.1)
    reference = rule(x, w, 0.1)
    one, two = (" ".join(f"{value:.2f}" for value in values.flatten()) for values in (mine, reference))
    print(f"output {float(output):5.2f}: lxt {one}, epsilon rule {two}")
    found.append((mine, reference))
x, weight = torch.randn(1000, 8), torch.randn(1, 8) / 8**0.5
output, mine = relevance(x, weight, 0.25)
reference = rule(x, weight, 0.25)
sums = [values.sum(1) for values in (mine, reference)]
print(
    "1000 outputs with their relevance 1, epsilon 0.25: largest sum of relevances "
    f"lxt {sums[0].abs().max():.1f}, epsilon rule {sums[1].abs().max():.1f}"
)
wrong = [int((values[output[:, 0] < 0] < 0).sum()) for values in sums]
print(
    f"of the {int((output < 0).sum())} negative outputs, those whose relevance has the wrong sign: "
    f"lxt {wrong[0]}, epsilon rule {wrong[1]}"
)
same = torch.allclose(*found[0]) and torch.allclose(found[0][1], found[1][1])
sys.exit(0 if same and found[1][0].abs().max() > 10 and sums[0].abs().max() > 10 and wrong[0] > 50 and wrong[1] == 0 else 1)
PYTHON
