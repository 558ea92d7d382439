#!/usr/bin/env bash
# torchcde 0.2.5, torchdiffeq 0.2.5, torch 2.13.0: LinearInterpolation.derivative at a time that is a knot is the slope of the piece before
# it. Solvers of fixed steps, which its README sends to linear interpolation with a step from knot to knot, ask at the start of
# each step, which is a knot, and get the slope of the step before. "euler" then walks along the data one row late: it takes the
# first piece twice and the last never, so the last observation has no influence and no gradient. "rk4" does so with an eighth of each step,
# where the exact answer (z follows the path itself) needs no accuracy. With torchdiffeq's perturb=True both are right.
#
# Seen: euler     off by 3.8424, and 0.0000 with perturb; gradient of the last row 0, 1
#       midpoint  off by 0.0000, and 0.0000 with perturb; gradient of the last row 1, 1
#       rk4       off by 0.4803, and 0.0000 with perturb; gradient of the last row 0.875, 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchdiffeq==0.2.5 torchsde==0.2.6 \
  torchcde==0.2.5 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
import torchcde


class Follow(torch.nn.Module):
    """The system whose state is the path: dz = dX."""

    def forward(self, t, z):
        return torch.eye(2, dtype=z.dtype).expand(1, 2, 2)


def solve(method, **options):
    rows = torch.randn(1, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    path = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(rows))
    step = (path.grid_points[1:] - path.grid_points[:-1]).min()
    options = {"step_size": step, **options}
    end = torchcde.cdeint(path, Follow(), rows[:, 0], path.interval, adjoint=False, method=method, options=options)[0, -1]
    (gradient,) = torch.autograd.grad(end[0], rows)
    return float((end - rows[0, -1]).abs().max()), float(gradient[0, -1, 0])


found = {}
for method in ("euler", "midpoint", "rk4"):
    (wrong, gradient), (right, whole) = solve(method), solve(method, perturb=True)
    found[method] = wrong, gradient
    print(f"{method:<9} off by {wrong:.4f}, and {right:.4f} with perturb; gradient of the last row {gradient:g}, {whole:g}")
    found[method + " perturbed"] = right, whole
(euler, none), (rk4, less) = found["euler"], found["rk4"]
others = [value for name, value in found.items() if name not in ("euler", "rk4")]
as_stated = euler > 1 and none == 0 and rk4 > 0.1 and abs(less - 0.875) < 1e-9
sys.exit(0 if as_stated and all(off < 1e-9 and abs(gradient - 1) < 1e-9 for off, gradient in others) else 1)
PYTHON
