#!/usr/bin/env bash
# ott-jax 0.6.0, jax 0.10.2: north_west_solver, which the sliced and one-dimensional solvers use where dual variables are asked for, sorts the
# points, and returns the pairs between which mass goes as places in the sorted order, where its documentation says points of the clouds. The
# plan that transport_matrices makes of them has the weights of other points as marginals. Cost and dual variables are right,
# and so is the plan of quantile_solver. Points that come sorted show nothing of it.
#
# Seen: as they come corner    cost 1.2581, of its plan 1.9885, marginals off by 0.4127
#       as they come quantiles cost 1.2581, of its plan 1.2581, marginals off by 0.0000
#       sorted       corner    cost 1.2581, of its plan 1.2581, marginals off by 0.0000
#       sorted       quantiles cost 1.2581, of its plan 1.2581, marginals off by 0.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile ott-jax==0.6.0 jax==0.10.2 jaxopt==0.8.5 numpy==2.4.6 scipy==1.17.1 2> /dev/null
JAX_PLATFORMS=cpu "$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)
from ott.geometry import costs, pointcloud
from ott.problems.linear import linear_problem
from ott.solvers.linear import univariate

rng = np.random.default_rng(0)
a, b = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(4))
x, y = rng.normal(size=(6, 1)), rng.normal(size=(4, 1))
found = {}
for order, (i, j) in (("as they come", (slice(None), slice(None))), ("sorted", (np.argsort(x[:, 0]), np.argsort(y[:, 0])))):
    geometry = pointcloud.PointCloud(jnp.array(x[i]), jnp.array(y[j]), cost_fn=costs.Euclidean())
    problem = linear_problem.LinearProblem(geometry, jnp.array(a[i]), jnp.array(b[j]))
    corner, quantiles = univariate.north_west_solver(problem), univariate.quantile_solver(problem, return_transport=True)
    for name, output in (("corner", corner), ("quantiles", quantiles)):
        plan = np.asarray(output.transport_matrices.todense()[0])
        off = max(np.abs(plan.sum(1) - a[i]).max(), np.abs(plan.sum(0) - b[j]).max())
        moved = float((plan * np.abs(x[i] - y[j].T)).sum())
        found[order, name] = off, moved, float(output.ot_costs[0])
        print(f"{order:<12} {name:<9} cost {found[order, name][2]:.4f}, of its plan {moved:.4f}, marginals off by {abs(off):.4f}")
wrong = found.pop(("as they come", "corner"))
as_stated = wrong[0] > 0.1 and abs(wrong[1] - wrong[2]) > 0.01
sys.exit(0 if as_stated and all(off < 1e-9 and abs(moved - cost) < 1e-9 for off, moved, cost in found.values()) else 1)
PYTHON
