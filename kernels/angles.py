"""Angles in float32: device functions of the acts and the solvers."""

from __future__ import annotations

import triton
import triton.language as tl

PI = tl.constexpr(3.141592653589793)


@triton.jit
def sin(x):
    """Sine to 1.3e-7 for angles up to 1e6, at most 1 for any: the library's keeps a table in local memory for huge ones."""
    k = tl.floor(x * (1.0 / PI) + 0.5)
    r = ((x - k * 3.140625) - k * 9.67502593994140625e-4) - k * 1.509957990978376e-7  # x - kπ, π in three parts
    r = tl.where(
        r > 2.0, 2.0, tl.where(r < -2.0, -2.0, r)
    )  # absurd angles: k is rounded, and r far beyond π/2; NaN stays
    z = r * r
    poly = (((-2.3889859e-8 * z + 2.7525562e-6) * z - 1.9840874e-4) * z + 8.333331e-3) * z - 0.16666667
    sine = r + r * z * poly
    return tl.where(k - 2.0 * tl.floor(0.5 * k) == 0, sine, -sine)


@triton.jit
def cos(x):
    """Cosine, as `sin` is."""
    return sin(x + 0.5 * PI)


@triton.jit
def asin(x):
    """Arc sine on [0, 1] to 2e-7: a minimax polynomial on [0, 1/2], the half-angle formula above it."""
    far = x > 0.5
    z = tl.where(far, 0.5 * (1.0 - x), x * x)
    root = tl.where(far, tl.sqrt(tl.maximum(z, 0.0)), x)
    poly = (((0.042163199 * z + 0.024181311) * z + 0.045470026) * z + 0.074953003) * z + 0.16666752
    near = root + root * z * poly
    return tl.where(far, 0.5 * PI - 2.0 * near, near)
