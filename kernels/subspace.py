"""Project → act → lift: x' = s·x + C·g, (s, g) = act(Bᵀx, ‖x‖), with the slots of a bank.

Sizes choose the road; all share the acts of `act.py`:

    rank < 16 and few tokens, ≤ 3 of one mode, or mixed dtypes;
    a decode step whose tables have several columns, rank ≤ 64      subspace_rows    one program per token, any mix of slots
    one flow of rank d                                             flow             two matrix products around all steps
    rank > 64; rank 9 to 64 of up to 4224 tokens, all of one slot  subspace_wide    tall tiles, three launches
    else                                                           subspace_tiles   tiles of tokens on tensor cores, one launch;
                                                                                    two of up to 512 tokens and one column

A row never depends on the rows beside it. Papers: see the table of methods in README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import Edit, choose, columns, flatten, on_device, width
from .act import FLOW, SOLVE
from .flow import flow
from .subspace_rows import is_light, launch_rows
from .subspace_tiles import TILE_RANK, launch_tiles
from .subspace_wide import launch_wide

MOST = 512  # directions that fit into the registers of a tile
# (directions, (from tokens, to tokens)) of one slot for all whose product, act and lift are launches of their own: fewer tokens
# than that in tiles of whole ones leave SMs idle, and more directions find no room there. Where each token has its own slot or
# none, one launch is kept: what costs nobody anything while nobody is steered
WIDE = [(8, (1, 0)), (32, (513, 4224)), (64, (257, 4224)), (MOST, (1, 1 << 62))]
WIDE_RANK = 64  # beyond, of tables of any width
# (most tokens, directions for each column of the tables): up to so many, programs of one token, all columns in one launch, fill
# an H200 sooner than tiles of whole tokens, and cost no more than the two or three launches of tiles whose columns are split
ONE_LAUNCH = [(128, 16), (256, 8), (1 << 62, 0)]
FEW_TOKENS = 256  # up to this many tokens, programs of one token each fill the device twice at most and finish first


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
    hidden: Tensor | None = None,
    probe: Tensor | None = None,
) -> Tensor:
    """Write the edited x into `out`, which may be x itself; see steerfast.ops.slots for the layout of a bank.

    With `hidden` the stream is hidden + x and `out` gets x + δ. `probe` (n, P, max_rank), zero, gets y.
    """
    if x.numel() == 0:
        return out
    half = None if hidden is None else flatten(hidden)
    rows, scale = (None if table is None else columns(table) for table in (rows, scale))
    bank = vectors, coefficients, slots
    edit = Edit(flatten(x), half, out.view(-1, out.shape[-1]), probe, bank, rows, scale, modes, max_rank)
    with on_device(x):
        if _is_full_flow(edit):
            edit.out.copy_(flow(edit.x, *bank, rows, scale, bool(modes & SOLVE.value)))
        elif _by_rows(edit):
            launch_rows(edit)
        elif _is_wide(edit):
            launch_wide(edit)
        else:
            launch_tiles(edit)
    return out


def _by_rows(edit: Edit) -> bool:
    """Whether programs of one token each are the faster road, or the only one."""
    (n, _), vectors, rank = edit.x.shape, edit.bank[0], edit.max_rank
    if rank > MOST or edit.x.dtype != vectors.dtype:
        return True
    if rank >= TILE_RANK:
        return rank <= choose(ONE_LAUNCH, n) * width(edit.rows)
    return n <= FEW_TOKENS or is_light(edit) or edit.x.dtype == torch.float32


def _is_wide(edit: Edit) -> bool:
    """Whether three launches are the faster road, or the only one."""
    if edit.max_rank > WIDE_RANK:
        return True
    least, most = choose(WIDE, edit.max_rank)
    return edit.rows is None and least <= edit.x.shape[0] <= most and edit.x.dtype != torch.float32


def _is_full_flow(edit: Edit) -> bool:
    """Whether the bank holds one flow of a full-rank barrier and nothing else: then products do the work."""
    vectors, others = edit.bank[0], edit.modes & ~(FLOW.value | SOLVE.value)
    square = vectors.shape[0] == edit.max_rank == edit.x.shape[1] and vectors.dtype == edit.x.dtype
    return square and not others and edit.hidden is None and edit.probe is None
