#!/usr/bin/env bash
# POT 0.9.7.post1: ot.solve(M, reg=..., unbalanced=...) says in res.value what the plan is worth: the linear cost, the regularization and
# the penalties of both marginals. For plans of another mass, a Kullback-Leibler divergence has a term of the masses. The solver
# minimises with it, and leaves it out when it adds up the value. What is left is the derivative of the objective along the plan
# itself, which is 0 at every optimum: the value is 0 whatever the data are. The plan is right, and so is lbfgsb_unbalanced.
#
# Seen: clouds 0 apart: value +0.00000, by the formula 2.67190, by another solver 2.67210
#       clouds 1 apart: value +0.00000, by the formula 3.48990, by another solver 3.49073
#       clouds 3 apart: value +0.00000, by the formula 4.90591, by another solver 4.90828
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile POT==0.9.7.post1 scipy==1.17.1 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
import ot

REG, PENALTY = 1.0, 2.0
rng = np.random.default_rng(0)
a, b = np.full(40, 1 / 40), np.full(30, 1 / 30)


def divergence(p, q):
    return float((p * np.log(p / q) - p + q).sum())


as_stated = True
for apart in (0, 1, 3):
    cost = ot.dist(rng.normal(size=(40, 4)), rng.normal(size=(30, 4)) + apart)
    found = ot.solve(cost, a, b, reg=REG, unbalanced=PENALTY, max_iter=100_000, tol=1e-13)
    plan = found.plan
    formula = float((plan * cost).sum()) + REG * divergence(plan, np.outer(a, b))
    formula += PENALTY * (divergence(plan.sum(1), a) + divergence(plan.sum(0), b))
    _, log = ot.unbalanced.lbfgsb_unbalanced(
        a, b, cost, REG, PENALTY, reg_div="kl", regm_div="kl", numItermax=10_000, stopThr=1e-15, log=True
    )
    other = float(log["total_cost"])
    print(f"clouds {apart} apart: value {found.value:+.5f}, by the formula {formula:.5f}, by another solver {other:.5f}")
    as_stated &= abs(found.value) < 1e-8 and formula > 1 and abs(formula - other) < 1e-3 * formula
sys.exit(0 if as_stated else 1)
PYTHON
