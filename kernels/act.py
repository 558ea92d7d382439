"""The acts of project → act → lift: device functions that turn y = Bᵀx and ‖x‖ into (s, g), for rows and for tiles.

They read a slot's numbers and no row of the stream. `steerfast.ops.torch_backend` has the same, mode by mode.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .angles import PI, asin, sin
from .solve import euler, integrate

ADD = tl.constexpr(1)
HINGE = tl.constexpr(2)
FLOW = tl.constexpr(4)
ROTATE = tl.constexpr(8)
PUSH = tl.constexpr(16)
SLERP = tl.constexpr(32)
REFLECT = tl.constexpr(64)
AFFINE = tl.constexpr(128)
KEEP_NORM = tl.constexpr(256)  # not a mode: some slot restores the length of its rows
SOLVE = tl.constexpr(512)
COUPLED = tl.constexpr(
    636
)  # FLOW | ROTATE | PUSH | SLERP | REFLECT | SOLVE: these need all of y before they know any of g
MODE = tl.constexpr(767)
SINE = tl.constexpr(1e-4)  # below this sine two directions count as parallel


@triton.jit
def mode_of(head_ptr, MODES: tl.constexpr):
    """The mode of a slot; known at compile time where the bank holds only one, and then no branch remains."""
    if (MODE & MODES) & ((MODE & MODES) - 1) == 0:
        return MODE & MODES
    else:
        return tl.load(head_ptr)


@triton.jit
def relu(y):
    """max(y, 0); a NaN stays a NaN, as in PyTorch."""
    return tl.where(y > 0, y, tl.where(y == y, 0.0, y))


@triton.jit
def hinge_numbers(c_ptr, offs, mask):
    """c₀ … c₇ of each direction: one load each, apart from `bent` so that they are under way before y is known."""
    c0 = tl.load(c_ptr + offs * 8, mask=mask, other=0.0)
    c1 = tl.load(c_ptr + offs * 8 + 1, mask=mask, other=0.0)
    c2 = tl.load(c_ptr + offs * 8 + 2, mask=mask, other=0.0)
    c3 = tl.load(c_ptr + offs * 8 + 3, mask=mask, other=0.0)
    c4 = tl.load(c_ptr + offs * 8 + 4, mask=mask, other=0.0)
    c5 = tl.load(c_ptr + offs * 8 + 5, mask=mask, other=0.0)
    c6 = tl.load(c_ptr + offs * 8 + 6, mask=mask, other=0.0)
    c7 = tl.load(c_ptr + offs * 8 + 7, mask=mask, other=0.0)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def bent(y, c0, c1, c2, c3, c4, c5, c6, c7):
    """c₀ + c₁y + c₂·relu(y - c₃) + c₄·relu(y - c₅) + c₆·[y > c₇]."""
    bend = c2 * relu(y - c3) + c4 * relu(y - c5)
    return c0 + c1 * y + bend + tl.where(y > c7, c6, 0.0)


@triton.jit
def restore(before, after):
    """The factor that gives a row its length back, from its squared lengths; 1 if the row has vanished (1e-5 of it left)."""
    return tl.where(after > 1e-10 * before, tl.sqrt(before / after), 1.0)


@triton.jit
def _pick(y, offs_k, j):
    """Column j of a tile of coordinates: (BLOCK_N,)."""
    return tl.sum(tl.where((offs_k == j)[None, :], y, 0.0), axis=1)


@triton.jit
def _rotate(y, constants_ptr, weight, offs_k):
    """g that gives the two coordinates the angle weight·c₃ and leaves their length; c₄ = 1: only where y₁ > 0."""
    angle = weight * tl.load(constants_ptr + 3)
    radius = tl.sqrt(tl.sum(y * y, axis=1))
    axis = tl.where((offs_k == 0)[None, :], sin(angle + 0.5 * PI)[:, None], sin(angle)[:, None])
    turns = tl.where(tl.load(constants_ptr + 4) == 0, 1.0, _pick(y, offs_k, 0)) > 0
    return tl.where(turns[:, None] & (offs_k < 2)[None, :], radius[:, None] * axis - y, 0.0)


@triton.jit
def _push(y, constants_ptr, weight, offs_k, mask_k):
    """g = weight·m·v/Σv with the deficit v = relu(m - relu(y + b)), m = c₃; nothing where no feature falls short."""
    target = tl.load(constants_ptr + 3)
    bias = tl.load(constants_ptr + 8 + offs_k * 8, mask=mask_k, other=0.0)
    short = tl.where(mask_k[None, :], relu(target - relu(y + bias[None, :])), 0.0)
    total = tl.sum(short, axis=1)
    return tl.where(total > 0, weight * target / total, 0.0)[:, None] * short


@triton.jit
def _slerp(y, norm, constants_ptr, weight, offs_k):
    """(s, g): by the share t of the angle to μ_T, t = α(δ - β)/(1 - β), δ = tanh(κ(cos_H - cos_T)/2); α, β, κ = c₃, c₄, c₅."""
    beta = tl.load(constants_ptr + 4)
    inverse = tl.where(norm > 0, 1.0 / norm, 0.0)
    cos = tl.minimum(tl.maximum(_pick(y, offs_k, 0) * inverse, -1.0), 1.0)
    avoid = tl.minimum(tl.maximum(_pick(y, offs_k, 1) * inverse, -1.0), 1.0)
    doubt = 2.0 * tl.sigmoid(tl.load(constants_ptr + 5) * (avoid - cos)) - 1.0
    t = weight * tl.load(constants_ptr + 3) * (doubt - beta) / (1.0 - beta)
    t = tl.where(t > 1.0, 1.0, t)  # NaN, of a scale, stays
    small = asin(tl.abs(cos))
    omega = 0.5 * PI - tl.where(cos < 0, -small, small)
    sine = sin(omega)
    turns = (doubt > beta) & (sine > SINE) & (norm > 0)
    s = tl.where(turns, sin((1.0 - t) * omega) / sine, 1.0)
    g = tl.where(turns, norm * sin(t * omega) / sine, 0.0)
    return s, tl.where((offs_k == 0)[None, :], g[:, None], 0.0)


@triton.jit
def _reflect(y, norm, constants_ptr, weight, offs_k, mask_k):
    """(s, g): towards the mirror image by γ = weight·π·σ(w₂ᵀrelu(y₁… + b₁) + c₃), where y₀ + c₄ < 0."""
    bias = tl.load(constants_ptr + 8 + offs_k * 8, mask=mask_k, other=0.0)
    w2 = tl.load(constants_ptr + 8 + offs_k * 8 + 1, mask=mask_k & (offs_k > 0), other=0.0)
    first = _pick(y, offs_k, 0)
    score = tl.sum(relu(y + bias[None, :]) * w2[None, :], axis=1) + tl.load(constants_ptr + 3)
    gamma = weight * PI * tl.sigmoid(score)
    lean = tl.minimum(tl.abs(first) * tl.where(norm > 0, 1.0 / norm, 0.0), 1.0)
    phi = 2.0 * asin(lean)
    sine = sin(phi)
    turns = (first + tl.load(constants_ptr + 4) < 0) & (sine > SINE)
    far = tl.where(turns, sin(gamma) / sine, 0.0)
    s = tl.where(turns, sin(phi - gamma) / sine + far, 1.0)
    g = tl.where(turns, -2.0 * first * far, 0.0)  # a row that stays may have no number in y
    return s, tl.where((offs_k == 0)[None, :], g[:, None], 0.0)


@triton.jit
def couple(y, norm, weight, head_ptr, constants_ptr, offs_k, mask_k, MODES: tl.constexpr):
    """(s, g) of the modes that need all of y: (BLOCK_N,) and (BLOCK_N, BLOCK_K)."""
    mode = mode_of(head_ptr, MODES)
    alpha = tl.full(norm.shape, 1.0, tl.float32)
    g = tl.zeros_like(y)
    if FLOW & MODES:
        if mode == FLOW:
            length = weight * (tl.load(constants_ptr) + tl.load(constants_ptr + 1) * norm)
            raw, steps = tl.load(constants_ptr + 3), tl.load(head_ptr + 5)
            alpha, end = euler(y, norm, raw, constants_ptr + 8, offs_k, mask_k, length, steps)
            g = end - alpha[:, None] * y
    if SOLVE & MODES:
        if mode == SOLVE:
            length = weight * (tl.load(constants_ptr) + tl.load(constants_ptr + 1) * norm)
            rank, steps = tl.load(head_ptr + 1), tl.load(head_ptr + 5)
            alpha, end = integrate(y, norm, constants_ptr + 8, rank, offs_k, mask_k, length, steps)
            g = end - alpha[:, None] * y
    if ROTATE & MODES:
        if mode == ROTATE:
            g = _rotate(y, constants_ptr, weight, offs_k)
    if PUSH & MODES:
        if mode == PUSH:
            g = _push(y, constants_ptr, weight, offs_k, mask_k)
    if SLERP & MODES:
        if mode == SLERP:
            alpha, g = _slerp(y, norm, constants_ptr, weight, offs_k)
    if REFLECT & MODES:
        if mode == REFLECT:
            alpha, g = _reflect(y, norm, constants_ptr, weight, offs_k, mask_k)
    return alpha, g


@triton.jit
def act(y, square, weight, head_ptr, constants_ptr, offs_k, mask_k, MODES: tl.constexpr):
    """(s, unit, g) of a tile: x' = s·x + unit·(C·g), every |g| ≤ 1 so that g fits float16; AFFINE has no g."""
    mode = mode_of(head_ptr, MODES)
    g = tl.zeros_like(y)
    alpha = tl.full(weight.shape, 1.0, tl.float32)
    gain = weight
    if ADD & MODES:
        # the lift row as it is; no branch: Triton 3.9's compiler can end the process over one (in LLVM, not here)
        g += tl.where((offs_k == 0)[None, :] & (tl.zeros_like(offs_k) + mode == ADD)[None, :], 1.0, 0.0)
    if HINGE & MODES:
        if mode == HINGE:
            c0, c1, c2, c3, c4, c5, c6, c7 = hinge_numbers(constants_ptr + 8, offs_k[None, :], mask_k[None, :])
            g = bent(y, c0, c1, c2, c3, c4, c5, c6, c7)
    if COUPLED & MODES:
        if (mode != ADD) & (mode != HINGE) & (mode != AFFINE):
            alpha, g = couple(y, tl.sqrt(square), weight, head_ptr, constants_ptr, offs_k, mask_k, MODES)
            gain = tl.full(weight.shape, 1.0, tl.float32)
    largest = tl.max(tl.abs(g), axis=1)
    unit = tl.where(largest > 0, largest, 1.0)
    return alpha, gain * unit, g / unit[:, None]
