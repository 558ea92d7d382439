#!/usr/bin/env bash
# flow_matching 1.0.10, torch 2.13.0: RiemannianODESolver.sample solves from the first to the last time of time_grid. With a step size,
# it lays its times from 0 instead of from the first one (MixtureDiscreteEulerSolver, beside it, adds the first one): a flow that is
# to go from 0.5 to 1 is asked at 0, 0.1, 0.2 ..., and a last long step goes to 1. Where time_grid begins at 0, as by default, it is right.
#
# Seen: velocity 2 t, from 0.5 to 1 by midpoint steps of 0.1: 1.0000, with the same times given as a grid 0.7500, true 0.7500
#       the times it was asked at: 0 0.05 0.1 0.15 0.2 0.25 0.3 0.35 0.4 0.7
#       from 0 to 1: 1.0000, true 1.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchdiffeq==0.2.5 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps flow_matching==1.0.10 tqdm==4.70.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from flow_matching.solver import RiemannianODESolver
from flow_matching.utils.manifolds import Euclidean

asked = []


def velocity(x, t):
    asked.append(round(float(t), 6))
    return 2 * t * torch.ones_like(x)


def solve(grid, step_size):
    asked.clear()
    solver = RiemannianODESolver(Euclidean(), velocity)
    return float(solver.sample(torch.zeros(1, 1), step_size=step_size, method="midpoint", time_grid=torch.tensor(grid)))


by_step = solve([0.5, 1.0], 0.1)
times = list(asked)
by_grid = solve([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], None)
whole = solve([0.0, 1.0], 0.1)
print(f"velocity 2 t, from 0.5 to 1 by midpoint steps of 0.1: {by_step:.4f}, ", end="")
print(f"with the same times given as a grid {by_grid:.4f}, true 0.7500")
print("the times it was asked at:", *(f"{t:g}" for t in times))
print(f"from 0 to 1: {whole:.4f}, true 1.0000")
as_stated = abs(by_step - 1) < 1e-4 and abs(by_grid - 0.75) < 1e-4 and abs(whole - 1) < 1e-4
sys.exit(0 if as_stated and min(times) == 0 else 1)
PYTHON
