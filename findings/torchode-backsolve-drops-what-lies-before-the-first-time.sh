#!/usr/bin/env bash
# torchode 1.0.1, torch 2.13.0: an InitialValueProblem has a start, an end, and times at which its solution is wanted. BacksolveAdjoint and
# JointBacksolveAdjoint go back from one such time to the one before and stop at the first, not at the start. Where the first is
# not the start, the gradient of y0 is that of the state at the first time, and the parameters get nothing for the stretch before
# it: with one time, the end, their gradient is 0. The solution is right, and so is AutoDiffAdjoint.
#
# Seen: no times        solution 0.6456  d/dy0 0.4966, by backsolving 0.4966  d/drate 0.6456, by backsolving 0.6456
#       times 0, 0.5, 1 solution 0.6456  d/dy0 0.4966, by backsolving 0.4966  d/drate 0.6456, by backsolving 0.6456
#       times 0.5, 1    solution 0.6456  d/dy0 0.4966, by backsolving 0.7047  d/drate 0.6456, by backsolving 0.3228
#       times 1         solution 0.6456  d/dy0 0.4966, by backsolving 1.0000  d/drate 0.6456, by backsolving 0.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchtyping==0.1.5 typeguard==2.13.3 \
  torchode==1.0.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import math
import sys

import torch
import torchode

RATE, START = -0.7, 1.3


class Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(RATE, dtype=torch.float64))

    def forward(self, t, y):
        return self.rate * y


def solve(kind, times):
    """The solution at 1 and its gradients by y0 and by the rate."""
    field = Decay()
    term = torchode.ODETerm(field, with_stats=False)
    parts = torchode.Dopri5(term=term), torchode.IntegralController(1e-10, 1e-10, term=term)
    adjoint = torchode.AutoDiffAdjoint(*parts) if kind == "auto" else torchode.BacksolveAdjoint(term, *parts)
    y0 = torch.tensor([[START]], dtype=torch.float64, requires_grad=True)
    start, end = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    wanted = torch.tensor([times], dtype=torch.float64) if times else None
    (solution,) = adjoint.solve(torchode.InitialValueProblem(y0, start, end, wanted)).ys[:, -1].flatten()
    solution.backward()
    return float(solution), float(y0.grad), float(field.rate.grad)


true = START * math.exp(RATE), math.exp(RATE), START * math.exp(RATE)
as_stated = True
for times, stretch in (((), 1), ((0, 0.5, 1), 1), ((0.5, 1), 0.5), ((1,), 0)):
    auto, back = solve("auto", times), solve("back", times)
    name = f"times {', '.join(map(str, times))}" if times else "no times"
    print(f"{name:<15} solution {back[0]:.4f}  d/dy0 {auto[1]:.4f}, by backsolving {back[1]:.4f}  ", end="")
    print(f"d/drate {auto[2]:.4f}, by backsolving {back[2]:.4f}")
    expected = true[0], math.exp(RATE * stretch), true[2] * stretch
    as_stated &= all(abs(a - b) < 1e-6 for a, b in zip((*auto, *back), (*true, *expected)))
sys.exit(0 if as_stated else 1)
PYTHON
