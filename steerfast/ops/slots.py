"""Slots of a bank: the modes, the layout of the three tables, and how one slot is read from them.

Every intervention is a *slot*: k projection rows B, k lift rows C and a few numbers. A bank is three tensors
that hold all slots of one place in the model, at addresses that never change:

    vectors       (R, d)  storage dtype   the rows of every B and C, one after another; a slot with C = B stores them once
    coefficients  (M, 8)  float32         per slot one row of constants, then one row per direction
    slots         (S, 8)  int32           per slot: mode, rank, project, lift, coefficients, steps, keep_norm, extra

`project` and `lift` are the first row of B and C in `vectors`, `coefficients` is the row of the slot's constants
(T, angle, strength, c₃ … c₇). `extra` further rows of coefficients may follow those of the directions. Modes ADD and
AFFINE project nothing: the edit of ADD is the single row C, that of AFFINE is C₀ ⊙ x + C₁. A slot of rank 0 is empty and
edits nothing. A row table says who edits which token:

    rows          (n,) or (n, P) int32    slots applied to that token, left to right; -1 = none; ≥ S is undefined
    scale         like rows, float32      multiplies the edit δ (for a flow: T), on top of the slot's own strength

One table serves every layer: a plan takes the same slot numbers in the bank of every layer, and where it has no edit
the slot is empty. So a batch's owners are decided once per forward pass, not once per layer, and a strength is changed
by writing one float. All three tensors and the table keep their addresses while contents change, which is what CUDA
graphs and torch.compile need.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ADD, HINGE, FLOW, ROTATE, PUSH, SLERP, REFLECT, AFFINE = 1, 2, 4, 8, 16, 32, 64, 128
KEEP_NORM = 256  # not a mode, but announced with them: some slot restores the length of its rows
SOLVE = 512  # a flow with further rows: another solver than Euler, a level, ridge terms, a raw barrier
ALL_MODES = ADD | HINGE | FLOW | ROTATE | PUSH | SLERP | REFLECT | AFFINE | KEEP_NORM | SOLVE


class Slot(NamedTuple):
    """One row of a bank, as views of its tensors."""

    mode: int
    steps: int
    keep_norm: bool
    project: Tensor  # (k, d)
    lift: Tensor  # (k, d)
    constants: Tensor  # (8,)
    coefficients: Tensor  # (k, 8)
    extra: Tensor | None = None  # (e, 8), what a mode needs beyond eight numbers per direction


def slot_of(vectors: Tensor, coefficients: Tensor, slots: Tensor, index: int) -> Slot:
    """Slot number `index` of a bank."""
    mode, rank, project, lift, start, steps, keep_norm, extra = slots[index].tolist()
    end = start + 1 + rank
    return Slot(
        mode=mode,
        steps=steps,
        keep_norm=bool(keep_norm),
        project=vectors[project : project + rank],
        lift=vectors[lift : lift + rank],
        constants=coefficients[start],
        coefficients=coefficients[start + 1 : end],
        extra=coefficients[end : end + extra] if extra else None,
    )
