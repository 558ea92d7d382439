#!/usr/bin/env bash
# flow_matching 1.0.10, torch 2.13.0: MixtureDiscreteEulerSolver.sample simulates the chain from the first to the last time of time_grid.
# Its last step, whatever the time is, does not step: it returns the draw from the model's posterior of the end (t = 1). A run that
# is to stop at 0.5 gives finished tokens, one in two halves gives others than in one go, and the first half alone ends the whole of it.
#
# Seen: a path from token 0 to token 1, 20000 tokens, steps of 0.01, share at token 1
#       stop at 0.25: 1.000 (asked for on the way to 1: 0.253, by the path 0.25)
#       stop at 0.50: 1.000 (asked for on the way to 1: 0.503, by the path 0.50)
#       stop at 0.75: 1.000 (asked for on the way to 1: 0.745, by the path 0.75)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchdiffeq==0.2.5 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps flow_matching==1.0.10 tqdm==4.70.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from flow_matching.path import MixtureDiscreteProbPath
from flow_matching.path.scheduler import PolynomialConvexScheduler
from flow_matching.solver import MixtureDiscreteEulerSolver


def model(x, t):
    """The posterior of the end: token 1, whatever the present one is."""
    return torch.tensor([0.0, 1.0]).expand(*x.shape, 2)


solver = MixtureDiscreteEulerSolver(model, MixtureDiscreteProbPath(PolynomialConvexScheduler(1.0)), vocabulary_size=2)
start = torch.zeros(20000, 1, dtype=torch.long)
torch.manual_seed(0)
stops = (0.25, 0.5, 0.75)
grid = torch.tensor([0.0, *stops, 1.0])
on_the_way = solver.sample(start, step_size=0.01, time_grid=grid, return_intermediates=True)[1:-1].float().mean((1, 2))
print(f"a path from token 0 to token 1, {len(start)} tokens, steps of 0.01, share at token 1")
as_stated = True
for stop, passing in zip(stops, on_the_way.tolist()):
    stopped = float(solver.sample(start, step_size=0.01, time_grid=torch.tensor([0.0, stop])).float().mean())
    print(f"stop at {stop:.2f}: {stopped:.3f} (asked for on the way to 1: {passing:.3f}, by the path {stop:.2f})")
    as_stated &= stopped == 1.0 and abs(passing - stop) < 0.02
sys.exit(0 if as_stated else 1)
PYTHON
