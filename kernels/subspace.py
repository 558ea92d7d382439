"""Project → act → lift: x' = s·x + C·g, (s, g) = act(Bᵀx, ‖x‖), with the slots of a bank.

Bytes a token: reads 2·|x|·d, B and C once per token (rows kernel) or once per tile (tiles kernel, from L2), writes |x|·d.
Two kernels: one program per token with the whole row in registers (any mix of slots, small k), and one program per
tile of tokens with tensor-core products (k ≥ 16); the latter walks the distinct owners of its tile, so one owner costs
one pass. A row never depends on the rows beside it. Papers: see the table of methods in README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import choose, columns, flatten, on_device, power_of_two, stride

ADD = tl.constexpr(1)
HINGE = tl.constexpr(2)
FLOW = tl.constexpr(4)
ROTATE = tl.constexpr(8)
PUSH = tl.constexpr(16)
COUPLED = tl.constexpr(28)  # FLOW | ROTATE | PUSH: these need all of y before they know any of g

WARPS = [(1024, 4), (2048, 8), (16384, 16)]  # (largest d, warps): 8 at d = 4096 spill 8 bytes on sm_90 with Triton 3.6
CHUNK = [(1024, 8), (4096, 4), (16384, 1)]  # (largest d, directions read together): one reduction serves them all
TILE_RANK = 16  # from this rank on a product on tensor cores beats sums of vectors
TILE_ROWS = [(1024, 16), (1 << 62, 64)]  # (largest n, rows per tile): few rows want many programs
TILE_ROWS_BY_RANK = [(64, 64), (128, 32), (512, 16)]  # (largest k, rows per tile): y stays in registers
# (largest k, (columns of d per step, warps)): at k = 64 a step of 64 columns spills 280 bytes on sm_80 with 4 warps and
# 28 on gfx942 with 8
TILE_STEP = [(32, (64, 4)), (512, (32, 8))]
TILE_STAGES = 3


@triton.jit
def _mode(head_ptr, MODES: tl.constexpr):
    """The mode of a slot; known at compile time where the bank holds only one, and then no branch remains."""
    if MODES & (MODES - 1) == 0:
        return MODES
    else:
        return tl.load(head_ptr)


@triton.jit
def _hinge(y, c_ptr, offs, mask):
    c0 = tl.load(c_ptr + offs * 8, mask=mask, other=0.0)
    c1 = tl.load(c_ptr + offs * 8 + 1, mask=mask, other=0.0)
    c2 = tl.load(c_ptr + offs * 8 + 2, mask=mask, other=0.0)
    c3 = tl.load(c_ptr + offs * 8 + 3, mask=mask, other=0.0)
    c4 = tl.load(c_ptr + offs * 8 + 4, mask=mask, other=0.0)
    c5 = tl.load(c_ptr + offs * 8 + 5, mask=mask, other=0.0)
    c6 = tl.load(c_ptr + offs * 8 + 6, mask=mask, other=0.0)
    c7 = tl.load(c_ptr + offs * 8 + 7, mask=mask, other=0.0)
    bend = c2 * _relu(y - c3) + c4 * _relu(y - c5)
    return c0 + c1 * y + bend + tl.where(y > c7, c6, 0.0)


@triton.jit
def _restore(before, after):
    """The factor that gives a row its length back, from its squared lengths; 1 if the row has vanished (1e-5 of it left)."""
    return tl.where(after > 1e-10 * before, tl.sqrt(before / after), 1.0)


@triton.jit
def _relu(y):
    return tl.where(y > 0, y, tl.where(y == y, 0.0, y))  # a NaN stays a NaN, as in PyTorch


@triton.jit
def _flow_step(y, alpha, rest, lam, bias, step):
    """One Euler step of the flow on rows of coordinates: y (BLOCK_N, BLOCK_K), alpha, rest and step (BLOCK_N,)."""
    outside = alpha * alpha * rest
    square = tl.sum(y * y, axis=1) + outside
    inverse = tl.where(square > 0, tl.rsqrt(square), 0.0)
    point = y * inverse[:, None]
    u = 2 * lam[None, :] * point + bias[None, :]
    s = tl.sum(point * u, axis=1)
    tangent = u - s[:, None] * point
    speed = tl.sum(tangent * tangent, axis=1) + s * s * outside * inverse * inverse
    q = tl.where((speed > 0) & (square > 0), step * tl.rsqrt(speed), 0.0)
    shrink = 1 - q * s * inverse
    return shrink[:, None] * y + q[:, None] * u, shrink * alpha


@triton.jit
def _flow(y, norm, c_ptr, offs_k, mask_k, length, steps):
    """All steps: returns α (BLOCK_N,) and the lift's numbers g = y_N - α·y₀ (BLOCK_N, BLOCK_K)."""
    lam = tl.load(c_ptr + offs_k * 8, mask=mask_k, other=0.0)
    bias = tl.load(c_ptr + offs_k * 8 + 1, mask=mask_k, other=0.0)
    start = y
    alpha = tl.full(norm.shape, 1.0, tl.float32)
    rest = tl.maximum(norm * norm - tl.sum(y * y, axis=1), 0.0)
    step = length / steps
    for _ in range(steps):
        y, alpha = _flow_step(y, alpha, rest, lam, bias, step)
    return alpha, y - alpha[:, None] * start


@triton.jit
def _rotate(y, constants_ptr, weight, offs_k):
    """g that gives the two coordinates the angle weight·c₃ and leaves their length; c₄ = 1: only where y₁ > 0."""
    angle = weight * tl.load(constants_ptr + 3)
    radius = tl.sqrt(tl.sum(y * y, axis=1))
    axis = tl.where((offs_k == 0)[None, :], tl.cos(angle)[:, None], tl.sin(angle)[:, None])
    first = tl.sum(tl.where((offs_k == 0)[None, :], y, 0.0), axis=1)
    turns = tl.where(tl.load(constants_ptr + 4) == 0, 1.0, first) > 0
    return tl.where(turns[:, None] & (offs_k < 2)[None, :], radius[:, None] * axis - y, 0.0)


@triton.jit
def _push(y, constants_ptr, weight, offs_k, mask_k):
    """g = weight·m·v/Σv with the deficit v = relu(m - relu(y + b)), m = c₃; nothing where no feature falls short."""
    target = tl.load(constants_ptr + 3)
    bias = tl.load(constants_ptr + 8 + offs_k * 8, mask=mask_k, other=0.0)
    short = tl.where(mask_k[None, :], _relu(target - _relu(y + bias[None, :])), 0.0)
    total = tl.sum(short, axis=1)
    return tl.where(total > 0, weight * target / total, 0.0)[:, None] * short


@triton.jit
def _couple(y, norm, weight, head_ptr, constants_ptr, offs_k, mask_k, MODES: tl.constexpr):
    """(s, g) of the modes that need all of y: (BLOCK_N,) and (BLOCK_N, BLOCK_K)."""
    mode = _mode(head_ptr, MODES)
    alpha = tl.full(norm.shape, 1.0, tl.float32)
    g = tl.zeros_like(y)
    if FLOW & MODES:
        if mode == FLOW:
            length = weight * (tl.load(constants_ptr) + tl.load(constants_ptr + 1) * norm)
            alpha, g = _flow(y, norm, constants_ptr + 8, offs_k, mask_k, length, tl.load(head_ptr + 5))
    if ROTATE & MODES:
        if mode == ROTATE:
            g = _rotate(y, constants_ptr, weight, offs_k)
    if PUSH & MODES:
        if mode == PUSH:
            g = _push(y, constants_ptr, weight, offs_k, mask_k)
    return alpha, g


@triton.jit
def _project(x, b_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """y = Bx of one row, all of it, as (BLOCK_K,)."""
    offs_c = tl.arange(0, CHUNK)
    offs_k = tl.arange(0, BLOCK_K)
    y = tl.zeros((BLOCK_K,), tl.float32)
    for j in range(0, rank, CHUNK):
        offs_j = j + offs_c
        mask = (offs_j < rank)[:, None] & mask_d[None, :]
        b = tl.load(b_ptr + offs_j[:, None].to(tl.int64) * stride_v + offs_d[None, :], mask=mask, other=0.0)
        part = tl.sum(b.to(tl.float32) * x[None, :], axis=1)  # (CHUNK,)
        y += tl.sum(tl.where(offs_k[:, None] == offs_j[None, :], part[None, :], 0.0), axis=1)
    return y


@triton.jit
def _lift(g, c_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """C·g of one row, with all of g at hand as (BLOCK_K,)."""
    offs_c = tl.arange(0, CHUNK)
    offs_k = tl.arange(0, BLOCK_K)
    delta = tl.zeros(offs_d.shape, tl.float32)
    for j in range(0, rank, CHUNK):
        offs_j = j + offs_c
        mask = (offs_j < rank)[:, None] & mask_d[None, :]
        c = tl.load(c_ptr + offs_j[:, None].to(tl.int64) * stride_v + offs_d[None, :], mask=mask, other=0.0)
        part = tl.sum(tl.where(offs_k[:, None] == offs_j[None, :], g[:, None], 0.0), axis=0)  # (CHUNK,)
        delta += tl.sum(c.to(tl.float32) * part[:, None], axis=0)
    return delta


@triton.jit
def _hinge_delta(x, b_ptr, c_ptr, coef_ptr, rank, stride_v, offs_d, mask_d, CHUNK: tl.constexpr):
    """C·hinge(Bx) of one row: every direction is projected, bent and lifted while its rows are in registers."""
    offs_c = tl.arange(0, CHUNK)
    delta = tl.zeros(offs_d.shape, tl.float32)
    for j in range(0, rank, CHUNK):
        offs_j = j + offs_c
        mask_j = offs_j < rank
        mask = mask_j[:, None] & mask_d[None, :]
        span = offs_j[:, None].to(tl.int64) * stride_v + offs_d[None, :]
        b = tl.load(b_ptr + span, mask=mask, other=0.0)
        g = _hinge(tl.sum(b.to(tl.float32) * x[None, :], axis=1), coef_ptr, offs_j, mask_j)  # (CHUNK,)
        c = tl.load(c_ptr + span, mask=mask, other=0.0)
        delta += tl.sum(c.to(tl.float32) * g[:, None], axis=0)
    return delta


@triton.jit
def _rows_kernel(
    x_ptr, stride_x_n,
    out_ptr, stride_out_n,
    vectors_ptr, stride_v,
    coefficients_ptr,
    slots_ptr,
    rows_ptr, stride_rows_n, stride_rows_p,
    scale_ptr, stride_scale_n, stride_scale_p,
    D, P: tl.constexpr,
    MODES: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    original = tl.load(x_ptr + i_n * stride_x_n + offs_d, mask=mask_d, other=0.0)
    x = original.to(tl.float32)
    edited = False
    for p in tl.static_range(P):
        slot = tl.full((), 0, tl.int32)
        if rows_ptr is not None:
            slot = tl.load(rows_ptr + i_n * stride_rows_n + p * stride_rows_p)
        head_ptr = slots_ptr + slot * 8
        rank = tl.load(head_ptr + 1, mask=slot >= 0, other=0)
        if rank > 0:
            mode = _mode(head_ptr, MODES)
            b_ptr = vectors_ptr + tl.load(head_ptr + 2).to(tl.int64) * stride_v
            c_ptr = vectors_ptr + tl.load(head_ptr + 3).to(tl.int64) * stride_v
            constants_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
            keep_norm = tl.load(head_ptr + 6)
            weight = tl.load(constants_ptr + 2)
            if scale_ptr is not None:
                weight *= tl.load(scale_ptr + i_n * stride_scale_n + p * stride_scale_p)
            delta = tl.zeros((BLOCK_D,), tl.float32)
            if ADD & MODES:
                if mode == ADD:
                    delta = weight * tl.load(c_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            if HINGE & MODES:
                if mode == HINGE:
                    delta = weight * _hinge_delta(
                        x, b_ptr, c_ptr, constants_ptr + 8, rank, stride_v, offs_d, mask_d, CHUNK
                    )
            if COUPLED & MODES:
                if mode >= FLOW:
                    offs_k = tl.arange(0, BLOCK_K)
                    y = _project(x, b_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K, CHUNK)
                    norm = tl.sqrt(tl.sum(x * x, axis=0)) + tl.zeros((1,), tl.float32)
                    gain = weight + tl.zeros((1,), tl.float32)
                    alpha, g = _couple(y[None, :], norm, gain, head_ptr, constants_ptr, offs_k, offs_k < rank, MODES)
                    lift = _lift(tl.sum(g, axis=0), c_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K, CHUNK)
                    delta = (tl.sum(alpha, axis=0) - 1.0) * x + lift
            moved = x + delta
            if keep_norm != 0:
                moved *= _restore(tl.sum(x * x, axis=0), tl.sum(moved * moved, axis=0))
            x = moved
            edited = True
    if IN_PLACE:
        tl.store(out_ptr + i_n * stride_out_n + offs_d, x.to(original.dtype), mask=mask_d & edited)
    else:
        out = tl.where(edited, x.to(original.dtype), original)
        tl.store(out_ptr + i_n * stride_out_n + offs_d, out, mask=mask_d)


@triton.jit
def _copy_rows(x_ptr, stride_x_n, out_ptr, stride_out_n, offs_n, mask_n, D, BLOCK_D: tl.constexpr):
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask)
        tl.store(out_ptr + offs_n[:, None] * stride_out_n + offs_d[None, :], x, mask=mask)


@triton.jit
def _tile_project(x_ptr, stride_x_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k, D, BLOCK_D: tl.constexpr):
    """(y, ‖x‖²) of a tile of rows: (BLOCK_N, BLOCK_K) and (BLOCK_N,)."""
    y = tl.zeros((offs_n.shape[0], offs_k.shape[0]), tl.float32)
    square = tl.zeros(offs_n.shape, tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        mask = mask_n[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask, other=0.0)
        mask_b = mask_k[None, :] & mask_d[:, None]
        b = tl.load(b_ptr + offs_k[None, :] * stride_v + offs_d[:, None], mask=mask_b, other=0.0)
        y = tl.dot(x, b, y, input_precision="ieee")
        square += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
    return y, square


@triton.jit
def _split_dot(g, c):
    """g·C with float32 g and 16-bit C: two products carry the leading 16 bits of g and what they leave out."""
    if c.dtype == tl.float32:
        return tl.dot(g, c, input_precision="ieee")
    high = g.to(c.dtype)
    low = (g - high.to(tl.float32)).to(c.dtype)
    return tl.dot(low, c, tl.dot(high, c))


@triton.jit
def _tile_moved(
    x_ptr, stride_x_n, c_ptr, stride_v, g, alpha, gain, offs_n, mask_n, offs_k, mask_k, offs_d, D
):  # fmt: skip
    """x' of one tile: α·x + gain·(g·C), in float32."""
    mask_d = offs_d < D
    x = tl.load(
        x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0
    )
    mask_c = mask_k[:, None] & mask_d[None, :]
    c = tl.load(c_ptr + offs_k[:, None] * stride_v + offs_d[None, :], mask=mask_c, other=0.0)
    wide = x.to(tl.float32)
    return wide + ((alpha - 1.0)[:, None] * wide + gain[:, None] * _split_dot(g, c))


@triton.jit
def _tile_slot(
    x_ptr, stride_x_n, out_ptr, stride_out_n, vectors_ptr, stride_v, coefficients_ptr, head_ptr,
    offs_n, mask_n, weight, D,
    MODES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One slot on the rows of a tile that it owns: project (pass 1), act in registers, lift (pass 2, x from L2)."""
    mode = _mode(head_ptr, MODES)
    rank = tl.load(head_ptr + 1)
    b_ptr = vectors_ptr + tl.load(head_ptr + 2).to(tl.int64) * stride_v
    c_ptr = vectors_ptr + tl.load(head_ptr + 3).to(tl.int64) * stride_v
    constants_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
    weight *= tl.load(constants_ptr + 2)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < rank
    y, square = _tile_project(x_ptr, stride_x_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k, D, BLOCK_D)
    g = tl.zeros_like(y)
    alpha = tl.full(weight.shape, 1.0, tl.float32)
    gain = weight
    if ADD & MODES:
        if mode == ADD:  # the lift row as it is
            g = tl.where((offs_k == 0)[None, :], 1.0, g)
    if HINGE & MODES:
        if mode == HINGE:
            g = _hinge(y, constants_ptr + 8, offs_k[None, :], mask_k[None, :])
    if COUPLED & MODES:
        if mode >= FLOW:
            alpha, g = _couple(y, tl.sqrt(square), weight, head_ptr, constants_ptr, offs_k, mask_k, MODES)
            gain = tl.full(weight.shape, 1.0, tl.float32)
    largest = tl.max(tl.abs(g), axis=1)  # the 16-bit parts of g are taken in units of it: no overflow in float16
    unit = tl.where(largest > 0, largest, 1.0)
    g = g / unit[:, None]
    gain = gain * unit
    restore = tl.full(weight.shape, 1.0, tl.float32)
    if tl.load(head_ptr + 6) != 0:
        after = tl.zeros(weight.shape, tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            moved = _tile_moved(
                x_ptr, stride_x_n, c_ptr, stride_v, g, alpha, gain, offs_n, mask_n, offs_k, mask_k, offs_d, D
            )
            after += tl.sum(moved * moved, axis=1)
        restore = _restore(square, after)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        moved = _tile_moved(
            x_ptr, stride_x_n, c_ptr, stride_v, g, alpha, gain, offs_n, mask_n, offs_k, mask_k, offs_d, D
        )
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        out = (restore[:, None] * moved).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_n[:, None] * stride_out_n + offs_d[None, :], out, mask=mask)


@triton.jit
def _tiles_kernel(
    x_ptr, stride_x_n,
    out_ptr, stride_out_n,
    vectors_ptr, stride_v,
    coefficients_ptr,
    slots_ptr,
    rows_ptr, stride_rows_n,
    scale_ptr, stride_scale_n,
    N, D,
    MODES: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if rows_ptr is None:
        owner = tl.where(mask_n, 0, -1)
    else:
        owner = tl.load(rows_ptr + offs_n * stride_rows_n, mask=mask_n, other=-1)
    rank = tl.load(slots_ptr + owner * 8 + 1, mask=owner >= 0, other=0)
    owner = tl.where(rank > 0, owner, -1)
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if scale_ptr is not None:
        weight = tl.load(scale_ptr + offs_n * stride_scale_n, mask=mask_n, other=1.0)
    if not IN_PLACE and tl.min(tl.where(mask_n, owner, 0), axis=0) < 0:
        _copy_rows(x_ptr, stride_x_n, out_ptr, stride_out_n, offs_n, mask_n & (owner < 0), D, BLOCK_D)
    slot = tl.max(owner, axis=0)
    while slot >= 0:  # once per distinct owner of the tile
        _tile_slot(
            x_ptr, stride_x_n, out_ptr, stride_out_n, vectors_ptr, stride_v, coefficients_ptr, slots_ptr + slot * 8,
            offs_n, owner == slot, weight, D, MODES, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        owner = tl.where(owner == slot, -1, owner)
        slot = tl.max(owner, axis=0)


def subspace(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    modes: int,
    max_rank: int,
    out: Tensor,
) -> Tensor:
    """Write the edited x into `out`, which may be x itself; see steerfast.reference for the layout of a bank."""
    flat, result = flatten(x), out.view(-1, out.shape[-1])
    rows = None if rows is None else columns(rows)
    scale = None if scale is None else columns(scale)
    if flat.numel() == 0:
        return out
    bank = vectors, coefficients, slots
    one_owner = rows is None or rows.shape[1] == 1
    with on_device(x):
        if one_owner and max_rank >= TILE_RANK and x.dtype == vectors.dtype:
            _launch_tiles(flat, result, bank, rows, scale, modes, max_rank)
        else:
            _launch_rows(flat, result, bank, rows, scale, modes, max_rank)
    return out


def _launch_rows(
    x: Tensor,
    out: Tensor,
    bank: tuple[Tensor, Tensor, Tensor],
    rows: Tensor | None,
    scale: Tensor | None,
    modes: int,
    max_rank: int,
) -> None:
    vectors, coefficients, slots = bank
    n, d = x.shape
    _rows_kernel[(n,)](
        x_ptr=x, stride_x_n=x.stride(0),
        out_ptr=out, stride_out_n=out.stride(0),
        vectors_ptr=vectors, stride_v=vectors.stride(0),
        coefficients_ptr=coefficients, slots_ptr=slots,
        rows_ptr=rows, stride_rows_n=stride(rows, 0), stride_rows_p=stride(rows, 1),
        scale_ptr=scale, stride_scale_n=stride(scale, 0), stride_scale_p=stride(scale, 1),
        D=d, P=1 if rows is None else rows.shape[1],
        MODES=modes, IN_PLACE=x.data_ptr() == out.data_ptr(),
        BLOCK_D=power_of_two(d), BLOCK_K=power_of_two(max_rank),
        CHUNK=min(choose(CHUNK, d), power_of_two(max_rank)),
        num_warps=choose(WARPS, d),
    )  # fmt: skip


def _launch_tiles(
    x: Tensor,
    out: Tensor,
    bank: tuple[Tensor, Tensor, Tensor],
    rows: Tensor | None,
    scale: Tensor | None,
    modes: int,
    max_rank: int,
) -> None:
    vectors, coefficients, slots = bank
    n, d = x.shape
    block_n = min(choose(TILE_ROWS, n), choose(TILE_ROWS_BY_RANK, max_rank))
    block_d, warps = choose(TILE_STEP, max_rank)
    _tiles_kernel[(triton.cdiv(n, block_n),)](
        x_ptr=x, stride_x_n=x.stride(0),
        out_ptr=out, stride_out_n=out.stride(0),
        vectors_ptr=vectors, stride_v=vectors.stride(0),
        coefficients_ptr=coefficients, slots_ptr=slots,
        rows_ptr=rows, stride_rows_n=stride(rows, 0),
        scale_ptr=scale, stride_scale_n=stride(scale, 0),
        N=n, D=d,
        MODES=modes, IN_PLACE=x.data_ptr() == out.data_ptr(),
        BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_K=power_of_two(max_rank, TILE_RANK),
        num_warps=warps, num_stages=TILE_STAGES,
    )  # fmt: skip
