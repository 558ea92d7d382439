"""Project → act → lift by tiles of tokens in one launch: a program edits its tokens, column after column of the tables.

A program reads x of its tile for y, acts, and reads x again for x' (once more between, where a length is restored), each time the
other way round, since what was read last is there still. The tiles that are under way at a time stay in L2 for the greater part.
Bytes a token: reads |x|·d, again from L2, writes |x|·d; B and C once per tile and owner (from L2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import kernel
from .act import COUPLED, KEEP_NORM, act, mode_of, restore
from .owners import leave_rows, next_owner, owners_of
from .subspace_act import store_probe
from .subspace_lift import walk
from .subspace_project import project


@triton.jit
def _named(rows_ptr, stride_rows_n, stride_rows_p, offs_n, mask_n, P):
    """Whether a row of a tile names anything."""
    named = tl.full(offs_n.shape, 0, tl.int1)
    for p in range(P):
        named = named | (tl.load(rows_ptr + offs_n * stride_rows_n + p * stride_rows_p, mask=mask_n, other=-1) != -1)
    return tl.max(named.to(tl.int32), axis=0) > 0


@kernel
def whole_kernel(
    x_ptr, stride_x_n,
    hidden_ptr, stride_hidden_n,
    out_ptr, stride_out_n,
    probe_ptr, stride_probe_n, stride_probe_p, K,
    vectors_ptr, stride_v,
    coefficients_ptr,
    slots_ptr, S,
    rows_ptr, stride_rows_n, stride_rows_p,
    scale_ptr, stride_scale_n, stride_scale_p,
    N, D, P, MODES: tl.constexpr, IN_PLACE: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, LIFT_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x' of a tile of whole tokens."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if IN_PLACE:
        if rows_ptr is not None:
            # nothing to do: not even x is read
            if not _named(rows_ptr, stride_rows_n, stride_rows_p, offs_n, mask_n, P):
                return
    offs_k = tl.arange(0, BLOCK_K)
    from_ptr, stride_from = x_ptr, stride_x_n
    limit = -1 if IN_PLACE else 0
    for p in range(P):
        here_ptr, weight_ptr, seen_ptr = rows_ptr, scale_ptr, probe_ptr
        if rows_ptr is not None:
            here_ptr += p * stride_rows_p
        if scale_ptr is not None:
            weight_ptr += p * stride_scale_p
        if probe_ptr is not None:
            seen_ptr += p * stride_probe_p
        owner, weight = owners_of(slots_ptr, S, here_ptr, stride_rows_n, weight_ptr, stride_scale_n, offs_n, mask_n)
        leave_rows(from_ptr, stride_from, out_ptr, stride_out_n, owner, offs_n, mask_n, 0, D, limit, LIFT_D)
        slot = tl.max(owner, axis=0)
        while slot >= 0:  # once per distinct owner of the tile
            head_ptr = slots_ptr + slot * 8
            mine = owner == slot
            mode = mode_of(head_ptr, MODES)
            rank = tl.load(head_ptr + 1)
            mask_k = offs_k < rank
            b_ptr = vectors_ptr + tl.load(head_ptr + 2).to(tl.int64) * stride_v
            c_ptr = vectors_ptr + tl.load(head_ptr + 3).to(tl.int64) * stride_v
            constants_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
            y, square = project(
                from_ptr, stride_from, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mine, offs_k, mask_k,
                0, D, (COUPLED | KEEP_NORM) & MODES, SUMS, BLOCK_D,
            )  # fmt: skip
            if probe_ptr is not None:
                store_probe(seen_ptr, stride_probe_n, K, y, head_ptr, offs_n, mine, offs_k, mask_k)
            strength = weight * tl.load(constants_ptr + 2)
            alpha, unit, g = act(y, square, strength, head_ptr, constants_ptr, offs_k, mask_k, MODES)
            high = g.to(vectors_ptr.dtype.element_ty)
            low = (g - high.to(tl.float32)).to(high.dtype)
            gain = tl.full(alpha.shape, 1.0, tl.float32)
            backwards = True
            if KEEP_NORM & MODES:
                keep = tl.load(head_ptr + 6)
                backwards = keep == 0
                if keep != 0:
                    after = walk(
                        from_ptr, stride_from, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, c_ptr, stride_v,
                        high, low, None, 0, alpha, unit, gain, offs_n, mine, offs_k, rank, 0, D, mode,
                        True, MODES, True, LIFT_D, STAGES, 0,
                    )  # fmt: skip
                    gain = restore(square, after)
            walk(
                from_ptr, stride_from, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, c_ptr, stride_v,
                high, low, None, 0, alpha, unit, gain, offs_n, mine, offs_k, rank, 0, D, mode,
                backwards, MODES, False, LIFT_D, STAGES, 0,
            )  # fmt: skip
            owner, slot = next_owner(owner, slot, 1)
        from_ptr, stride_from, limit = out_ptr, stride_out_n, -1
        if P > 1:  # what other threads have written is what the next column reads
            tl.debug_barrier()
