#!/usr/bin/env bash
# POT 0.9.7.post1: ot.solve_sample(..., method="lowrank") reports the linear cost of its plan in res.value_linear, as all its methods do. This
# one divides both factors of the squared distances by the root of their largest entries first (rescale_cost of lowrank_sinkhorn,
# which solve_sample cannot turn off), solves, and reports the cost in those units. The number is far below that of its own plan,
# and below what any plan can cost; reg= is in those units as well.
#
# Seen: clouds 0 apart: value_linear 0.1703, plan times cost 2.1278, least of any plan 1.9894
#       clouds 1 apart: value_linear 0.3703, plan times cost 5.6080, least of any plan 5.4229
#       clouds 5 apart: value_linear 2.6047, plan times cost 103.2236, least of any plan 99.1570
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile POT==0.9.7.post1 scipy==1.17.1 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
import ot

rng = np.random.default_rng(0)
x, y = rng.normal(size=(40, 4)), rng.normal(size=(30, 4))
as_stated = True
for apart in (0, 1, 5):
    found = ot.solve_sample(x, y + apart, method="lowrank", rank=30)
    cost = ot.dist(x, y + apart)
    right, least = float((np.asarray(found.plan) * cost).sum()), float(ot.solve(cost).value)
    print(f"clouds {apart} apart: value_linear {found.value_linear:.4f}, plan times cost {right:.4f}, least of any plan {least:.4f}")
    as_stated &= found.value_linear < 0.5 * least and right >= least - 1e-9
sys.exit(0 if as_stated else 1)
PYTHON
