#!/usr/bin/env bash
# diffrax 0.7.2, jax 0.10.2: in backward_hermite_coefficients(ts, ys), replace_nans_at_start is the value for NaNs at the start.
# The value takes the place of the first row of ys even where that row was observed, so a series that begins at 5 begins at 0, and
# a batch of series loses all its first values as soon as one of them begins with a NaN. linear_interpolation and
# rectilinear_interpolation with the same argument leave observed rows alone. In addition, fill_forward_nans_at_end is to fill in
# the last value before the spline is fitted, and does not: the knots at the end have other values.
#
# Seen: first observed value 5, replace_nans_at_start=0
#         linear_interpolation 5.00, rectilinear_interpolation 5.00, spline of backward_hermite_coefficients 0.00
#         half-way to the second row: without the argument 5.50, with it 3.00
#       rows 4, NaN, NaN at the end, fill_forward_nans_at_end=True
#         spline at the last three knots: 4.00, 3.81, 4.00; of rows filled in before: 4.00, 4.00, 4.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile diffrax==0.7.2 jax==0.10.2 jaxlib==0.10.2 \
    equinox==0.13.8 numpy==2.4.6 2> /dev/null
JAX_PLATFORMS=cpu "$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import diffrax
import jax.numpy as jnp

nan = float("nan")
ts = jnp.array([0.0, 1.0, 2.0, 3.5, 4.0])
whole = jnp.array([5.0, 6.0, 4.0, 7.0, 3.0])[:, None]
start = {"replace_nans_at_start": jnp.array([0.0])}


def spline(ys, **options):
    path = diffrax.CubicInterpolation(ts, diffrax.backward_hermite_coefficients(ts, ys, **options))
    return lambda t: float(path.evaluate(t)[0])


linear = float(diffrax.linear_interpolation(ts, whole, **start)[0, 0])
rectilinear = float(diffrax.rectilinear_interpolation(ts, whole, **start)[1][0, 0])
plain, replaced = spline(whole), spline(whole, **start)
print(f"first observed value {plain(0.0):.0f}, replace_nans_at_start=0")
print(
    f"  linear_interpolation {linear:.2f}, rectilinear_interpolation {rectilinear:.2f}, "
    f"spline of backward_hermite_coefficients {replaced(0.0):.2f}"
)
print(f"  half-way to the second row: without the argument {plain(0.5):.2f}, with it {replaced(0.5):.2f}")
kept = linear == rectilinear == plain(0.0) == 5

missing = whole.at[3:].set(nan)
filled = spline(diffrax.linear_interpolation(ts, missing, fill_forward_nans_at_end=True))
late = spline(missing, fill_forward_nans_at_end=True)
print("rows 4, NaN, NaN at the end, fill_forward_nans_at_end=True")
print(
    f"  spline at the last three knots: {', '.join(f'{late(t):.2f}' for t in (2.0, 3.5, 4.0))}; "
    f"of rows filled in before: {', '.join(f'{filled(t):.2f}' for t in (2.0, 3.5, 4.0))}"
)
sys.exit(0 if kept and replaced(0.0) == 0 and abs(late(3.5) - 4) > 0.1 and abs(filled(3.5) - 4) < 1e-5 else 1)
PYTHON
