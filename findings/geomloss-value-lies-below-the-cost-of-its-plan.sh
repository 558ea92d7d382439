#!/usr/bin/env bash
# geomloss 0.3.1, torch 2.13.0: ot.solve minimises a cost plus reg times a Kullback-Leibler divergence that its documentation writes out,
# with the terms of the masses, and calls .value the full cost with its regularization. Balanced, the value is what the potentials give
# without these terms, right for probabilities alone: for marginals of another mass it is off by reg·(mass² - mass) and may lie
# below the bare cost of its own plan, as in the example of the documentation (0.997 where no plan costs less than 1). Unbalanced, the
# terms are there, so an ever stronger penalty does not lead to the balanced value. (The default max_iter=None, "until convergence", is refused.)
#
# Seen: mass 0.5  value 2.6734, by the formula 2.5487, with a penalty of 1e5 2.5483, bare cost of the plan 2.2582
#       mass 1    value 5.0002, by the formula 5.0009, with a penalty of 1e5 5.0000, bare cost of the plan 4.5163
#       mass 4    value 17.2282, by the formula 23.2308, with a penalty of 1e5 23.2273, bare cost of the plan 18.0654
#       the example of the documentation: value 0.997, by the formula 1.009
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 geomloss==0.3.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
from geomloss import ot


def by_the_formula(plan, cost, a, b, reg):
    reference = np.outer(a, b)
    terms = np.where(plan > 0, plan * np.log(np.maximum(plan, 1e-300) / reference), 0) - plan + reference
    return float((cost * plan).sum() + reg * terms.sum())


rng = np.random.default_rng(0)
x, y = rng.normal(size=(20, 2)), rng.normal(size=(15, 2)) + 1
cost = ((x[:, None] - y[None]) ** 2).sum(-1)
shares, others = rng.dirichlet(np.ones(20)), rng.dirichlet(np.ones(15))
REG, as_stated = 0.5, True
for mass in (0.5, 1, 4):
    a, b = mass * shares, mass * others
    found = ot.solve(cost, reg=REG, a=a, b=b, max_iter=20_000)
    formula = by_the_formula(found.plan, cost, a, b, REG)
    penalised = float(ot.solve(cost, reg=REG, a=a, b=b, unbalanced=1e5, max_iter=20_000).value)
    value, bare = float(found.value), float((cost * found.plan).sum())
    print(f"mass {mass:<4} value {value:.4f}, by the formula {formula:.4f}, with a penalty of 1e5 {penalised:.4f}, ", end="")
    print(f"bare cost of the plan {bare:.4f}")
    as_stated &= abs(formula - value - REG * (mass**2 - mass)) < 0.01 and abs(formula - penalised) < 0.01
    as_stated &= mass < 4 or value < bare
cost, a, b = np.array([[0.0, 1.0, 4.0], [2.0, 1.0, 0.0]]), np.array([2.0, 2.0]), np.array([1.0, 1.0, 2.0])
found = ot.solve(cost, a=a, b=b, reg=0.001, max_iter=100)
formula = by_the_formula(found.plan, cost, a, b, 0.001)
print(f"the example of the documentation: value {float(found.value):.3f}, by the formula {formula:.3f}")
sys.exit(0 if as_stated and float(found.value) < 1 < formula else 1)
PYTHON
