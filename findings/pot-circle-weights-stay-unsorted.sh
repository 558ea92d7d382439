#!/usr/bin/env bash
# POT 0.9.7.post1: semidiscrete_wasserstein2_unif_circle gives, in closed form, the squared distance of weighted points on a circle to the
# uniform measure. The formula adds up the weights of the points before each one, so it sorts the points. It does not sort their
# weights with them: they stay where the caller had them, and belong to other points. The number depends on the order of the rows.
# Without weights nothing of this is seen, and linear_circular_embedding, beside it, sorts both.
#
# Seen: as they come  0.01426  by wasserstein_circle 0.03475
#       in order      0.03475  by wasserstein_circle 0.03475
#       backwards     0.03396  by wasserstein_circle 0.03475
#       least and largest of all orders 0.00951 and 0.04981
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile POT==0.9.7.post1 scipy==1.17.1 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys
from itertools import permutations

import numpy as np
from ot.lp import semidiscrete_wasserstein2_unif_circle, wasserstein_circle

rng = np.random.default_rng(0)
points, weights = rng.random(6), rng.dirichlet(np.ones(6))
uniform = (np.arange(20_000) + 0.5) / 20_000
sort = np.argsort(points)


def closed_form(order):
    return float(semidiscrete_wasserstein2_unif_circle(points[order, None], weights[order])[0])


found = {}
for name, order in (("as they come", np.arange(6)), ("in order", sort), ("backwards", sort[::-1])):
    true = float(wasserstein_circle(points[order], uniform, weights[order], p=2)[0])
    found[name] = closed_form(order)
    print(f"{name:<13} {found[name]:.5f}  by wasserstein_circle {true:.5f}")
every = [closed_form(np.array(order)) for order in permutations(range(6))]
print(f"least and largest of all orders {min(every):.5f} and {max(every):.5f}")
sys.exit(0 if abs(found["in order"] - true) < 1e-5 and abs(found["as they come"] - true) > 0.01 and max(every) > 5 * min(every) else 1)
PYTHON
