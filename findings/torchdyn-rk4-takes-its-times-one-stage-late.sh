#!/usr/bin/env bash
# torchdyn 1.0.6, torch 2.13.0: solver="rk4" is the classical Runge-Kutta method of fourth order. The table of its times begins with
# the 0 of the first stage, and the step reads it from the second stage on: the stages are asked at t, t, t + h/2 and t + h/2 instead
# of t, t + h/2, t + h/2 and t + h. Where the field does not look at the time nothing is seen of it. Where it does, as that of a flow
# does, the order is one: twice the steps halve the error, and "midpoint" with half as many calls is better.
#
# Seen: without time, y' = -y           rk4 20 steps 2.5e-07, 40 steps 1.5e-08, 80 steps 9.0e-10: order 4.0
#       with time, y' = -cos(t) y       rk4 20 steps 1.4e-02, 40 steps 7.0e-03, 80 steps 3.5e-03: order 1.0
#       with time, y' = -cos(t) y  midpoint 20 steps 7.5e-04, 40 steps 1.8e-04, 80 steps 4.5e-05: order 2.0
#       with time, the same step by hand    20 steps 1.6e-07, 40 steps 1.0e-08, 80 steps 6.4e-10: order 4.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 torchcde==0.2.5 torchsde==0.2.6 \
  matplotlib==3.11.2 attrs==26.1.0 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps torchdyn==1.0.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import math
import sys

import torch
from torchdyn.numerics import odeint

START = torch.ones(1, 1, dtype=torch.float64)


def by_hand(field, y, times):
    for t, following in zip(times[:-1], times[1:]):
        h = following - t
        a = field(t, y)
        b = field(t + h / 2, y + h / 2 * a)
        c = field(t + h / 2, y + h / 2 * b)
        y = y + h / 6 * (a + 2 * b + 2 * c + field(t + h, y + h * c))
    return y


def order(name, field, true, solve):
    """The errors at t = 2 with 20, 40 and 80 steps, and the order that they show."""
    errors = [abs(float(solve(field, START, torch.linspace(0, 2, n + 1, dtype=torch.float64))) - true) for n in (20, 40, 80)]
    found = math.log2(errors[1] / errors[2])
    print(f"{name} 20 steps {errors[0]:.1e}, 40 steps {errors[1]:.1e}, 80 steps {errors[2]:.1e}: order {found:.1f}")
    return found


def library(solver):
    return lambda field, y, times: odeint(field, y, times, solver=solver)[1][-1]


still, moving = (lambda t, y, args=None: -y), (lambda t, y, args=None: -y * torch.cos(t))
orders = [
    order("without time, y' = -y           rk4", still, math.exp(-2), library("rk4")),
    order("with time, y' = -cos(t) y       rk4", moving, math.exp(-math.sin(2)), library("rk4")),
    order("with time, y' = -cos(t) y  midpoint", moving, math.exp(-math.sin(2)), library("midpoint")),
    order("with time, the same step by hand   ", moving, math.exp(-math.sin(2)), by_hand),
]
sys.exit(0 if all(abs(a - b) < 0.2 for a, b in zip(orders, (4, 1, 2, 4))) else 1)
PYTHON
