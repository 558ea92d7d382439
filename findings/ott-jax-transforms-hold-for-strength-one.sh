#!/usr/bin/env bash
# ott-jax 0.6.0, jax 0.10.2: RegTICost is a cost of rho/2 times the squared length plus lam times a regularizer. Its Legendre transform puts
# the proximal point of the regularizer where the maximum would be if rho were 1; beside another rho the value is not the maximum, and its
# gradient, which the transport maps of that cost follow, is off by the factor rho. The proximal operator of the regularizer STVS takes the
# square of its strength for the strength, so that too is right at 1 alone. Both are compared with a maximum and a minimum over a grid.
#
# Seen: rho 0.5: Legendre transform at 3 3.000, true 4.000; its gradient 2.000, true 4.000
#       rho 1.0: Legendre transform at 3 2.000, true 2.000; its gradient 2.000, true 2.000
#       rho 2.0: Legendre transform at 3 0.000, true 1.000; its gradient 2.000, true 1.000
#       STVS of strength 0.25: proximal point of 2 1.985, true 1.944
#       STVS of strength 1.0: proximal point of 2 1.755, true 1.755
#       STVS of strength 2.0: proximal point of 2 1.020, true 1.428
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile ott-jax==0.6.0 jax==0.10.2 jaxopt==0.8.5 numpy==2.4.6 scipy==1.17.1 2> /dev/null
JAX_PLATFORMS=cpu "$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)
from ott.geometry import costs, regularizers

grid = jnp.linspace(-10, 10, 200_001)
transforms, points = {}, {}
for rho in (0.5, 1.0, 2.0):
    cost = costs.RegTICost(regularizers.L1(), lam=1.0, rho=rho)
    said, slope = (float(jnp.squeeze(f(jnp.array([3.0])))) for f in (cost.h_legendre, jax.grad(cost.h_legendre)))
    gains = 3 * grid - rho / 2 * grid**2 - jnp.abs(grid)
    true, best = float(gains.max()), float(grid[gains.argmax()])
    transforms[rho] = said - true, slope / best
    print(f"rho {rho}: Legendre transform at 3 {said:.3f}, true {true:.3f}; its gradient {slope:.3f}, true {best:.3f}")
regularizer = regularizers.STVS(gamma=0.7)
values = jax.vmap(lambda x: regularizer(x[None]))(grid)
for strength in (0.25, 1.0, 2.0):
    said = float(regularizer.prox(jnp.array([2.0]), strength)[0])
    true = float(grid[(0.5 * (grid - 2) ** 2 + strength * values).argmin()])
    points[strength] = said - true
    print(f"STVS of strength {strength}: proximal point of 2 {said:.3f}, true {true:.3f}")
as_stated = abs(transforms[1.0][0]) < 1e-6 and abs(points[1.0]) < 1e-3
as_stated &= all(transforms[rho][0] < -0.4 and abs(transforms[rho][1] - rho) < 1e-3 for rho in (0.5, 2.0))
sys.exit(0 if as_stated and points[0.25] > 0.03 and points[2.0] < -0.1 else 1)
PYTHON
