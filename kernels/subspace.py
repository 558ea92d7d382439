"""Project → act → lift: x' = s·x + C·g, (s, g) = act(Bᵀx, ‖x‖), with the slots of a bank.

Three kernels share the acts of `act.py`; sizes choose between them:

    rank < 16, or mixed dtypes     subspace_rows    one program per token, any mix of slots
    one flow of rank d             flow             two matrix products around all steps
    rank ≥ 16, up to 1024 tokens   subspace_split   columns of d split across programs
    rank ≥ 16, more tokens         subspace_tiles   tiles of tokens on tensor cores

A row never depends on the rows beside it. Papers: see the table of methods in README.md.
"""

from __future__ import annotations

from torch import Tensor

from ._launch import columns, flatten, on_device
from .act import FLOW, SOLVE
from .flow import flow
from .subspace_rows import launch_rows
from .subspace_split import SPLIT_ROWS, launch_split
from .subspace_tiles import TILE_RANK, launch_tiles

MOST = 512  # directions that fit into the registers of a tile


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
    """Write the edited x into `out`, which may be x itself; see steerfast.reference for the layout of a bank.

    With `hidden` the stream is hidden + x and `out` gets x + δ. `probe` (n, P, max_rank), zero, gets y.
    """
    flat, result = flatten(x), out.view(-1, out.shape[-1])
    if flat.numel() == 0:
        return out
    half = None if hidden is None else flatten(hidden)
    rows = None if rows is None else columns(rows)
    scale = None if scale is None else columns(scale)
    bank = vectors, coefficients, slots
    with on_device(x):
        if _is_full_flow(flat, bank, modes, max_rank) and half is None and probe is None:
            result.copy_(flow(flat, *bank, rows, scale, bool(modes & SOLVE.value)))
            return out
        if max_rank < TILE_RANK or max_rank > MOST or x.dtype != vectors.dtype:
            launch_rows(flat, half, result, probe, bank, rows, scale, modes, max_rank)
            return out
        launch = launch_split if flat.shape[0] <= SPLIT_ROWS else launch_tiles
        for p in range(1 if rows is None else rows.shape[1]):  # left to right, each on what the last one wrote
            part = (None if table is None else table[:, p : p + 1] for table in (rows, scale))
            seen = None if probe is None else probe[:, p]
            launch(flat if p == 0 else result, half, result, seen, bank, *part, modes, max_rank)
    return out


def _is_full_flow(x: Tensor, bank: tuple[Tensor, Tensor, Tensor], modes: int, max_rank: int) -> bool:
    """Whether the bank holds one flow of a full-rank barrier and nothing else: then products do the work."""
    flows = FLOW.value | SOLVE.value
    return bank[0].shape[0] == max_rank == x.shape[1] and not modes & ~flows and bank[0].dtype == x.dtype
