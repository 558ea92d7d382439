#!/usr/bin/env bash
# torchsde 0.2.6, torch 2.13.0: BrownianInterval(levy_area_approximation="davie" or "foster") gives the Levy areas that method="log_ode"
# steps with. Over a time h, an area has the variance h^2 / 4: h^2 / 6 from its part with the increments, h^2 / 12 from a random
# rest. The rest is made of noise of variance 2 (a matrix less its transposed one) but scaled as if that were 1, and the second
# approximation has h^2 / 100 where that would be h^2 / 40. The variances come out a third too large, or an eighth too small.
#
# Seen: davie   h = 1    variance 0.332 h^2, without the part of the increments 0.167 h^2
#       davie   h = 0.1  variance 0.332 h^2, without the part of the increments 0.167 h^2
#       foster  h = 1    variance 0.219 h^2, without the part of the increments 0.054 h^2
#       foster  h = 0.1  variance 0.219 h^2, without the part of the increments 0.054 h^2
#       sums of products over 200 small steps: variance 0.249 h^2, without the part of the increments 0.082 h^2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 torchsde==0.2.6 scipy==1.17.1 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
import torchsde

PATHS, STEPS = 200_000, 200


def variances(w, u, area, h):
    """Of the area of the first two axes, and of what the increments and their integrals over time leave of it."""
    mean_bridge = u / h - w / 2
    known = mean_bridge[:, 0] * w[:, 1] - w[:, 0] * mean_bridge[:, 1]
    return float(area.var()) / h**2, float((area - known).var()) / h**2


as_stated = True
for name, whole, rest in (("davie", 1 / 3, 1 / 6), ("foster", 0.22, 0.053)):
    for h in (1.0, 0.1):
        path = torchsde.BrownianInterval(
            t0=0.0, t1=h, size=(PATHS, 2), dtype=torch.float64, entropy=1, levy_area_approximation=name
        )
        w, u, area = path(0.0, h, return_U=True, return_A=True)
        found = variances(w, u, area[:, 0, 1], h)
        print(f"{name:<7} h = {h:<4g} variance {found[0]:.3f} h^2, without the part of the increments {found[1]:.3f} h^2")
        as_stated &= abs(found[0] - whole) < 0.01 and abs(found[1] - rest) < 0.005

generator = torch.Generator().manual_seed(0)
w, u, area = torch.zeros(PATHS, 2, dtype=torch.float64), torch.zeros(PATHS, 2, dtype=torch.float64), torch.zeros(PATHS, dtype=torch.float64)
for _ in range(STEPS):
    step = torch.randn(PATHS, 2, generator=generator, dtype=torch.float64) / STEPS**0.5
    area += (w[:, 0] * step[:, 1] - w[:, 1] * step[:, 0]) / 2
    u += (w + step / 2) / STEPS
    w = w + step
found = variances(w, u, area, 1.0)
print(f"sums of products over {STEPS} small steps: variance {found[0]:.3f} h^2, without the part of the increments {found[1]:.3f} h^2")
sys.exit(0 if as_stated and abs(found[0] - 1 / 4) < 0.005 and abs(found[1] - 1 / 12) < 0.005 else 1)
PYTHON
