"""The quick look at arguments passes exactly what the checks with words pass, and the words stay what they were."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import steerfast as sf
from steerfast._checks import check_stream, check_table, check_width, fits

STREAMS = [
    torch.zeros(3, 8), torch.zeros(1, 3, 8).half(), torch.zeros(8).bfloat16(), torch.zeros(0, 8), torch.zeros(3, 0),
    torch.zeros(()), torch.zeros(3, 8, dtype=torch.int32), torch.zeros(3, 8, device="meta"), [[0.0] * 8],
]  # fmt: skip
DIRECTIONS = [
    torch.zeros(8), torch.zeros(2, 8), torch.zeros(0, 8), torch.zeros(1, 2, 8), torch.zeros(7), torch.zeros(8).double(),
    torch.zeros(8, dtype=torch.int64), torch.zeros(8, device="meta"), torch.zeros(()), None,
]  # fmt: skip
SHAPES = [(3,), (3, 1), (3, 4), (3, 5), (3, 0), (1,), (1, 2), (0,), (3, 1, 1), (), (2,)]
ROWS = [
    None,
    *(torch.zeros(shape, dtype=torch.int32) for shape in SHAPES),
    torch.zeros(3),
    torch.zeros(3, device="meta").int(),
]
SCALES = [None, *(torch.zeros(shape) for shape in SHAPES), torch.zeros(3).half(), torch.zeros(3, device="meta")]


def words(x: object, directions: object, rows: torch.Tensor | None, scale: torch.Tensor | None) -> str:
    """What the checks say; nothing where they pass."""
    try:
        check_stream("op", x)
        check_width("op", "vectors", directions, x)
        check_table("op", rows, scale, x)
    except (TypeError, ValueError) as refusal:
        return str(refusal)
    return ""


def test_the_look_and_the_words_agree():
    every = list(itertools.product(STREAMS, DIRECTIONS, ROWS, SCALES))
    likely = itertools.product(STREAMS[:4], DIRECTIONS[:3], ROWS, SCALES)
    passed = 0
    for mix in [*likely, *random.Random(0).sample(every, 4000)]:
        said = words(*mix)
        assert fits(*mix) == (not said), (mix, said)
        passed += not said
    assert passed > 40


def bank() -> list[torch.Tensor]:
    made = sf.Bank(8, 2)
    made.register(sf.Ablate(torch.ones(8)))
    return list(made.tensors)


@pytest.mark.parametrize(
    ("place", "wrong", "words"),
    [
        (0, torch.zeros(8), r"vectors has shape \(8,\); expected \(R, d\)"),
        (1, torch.zeros(3, 7), r"coefficients has shape \(3, 7\); expected a contiguous table with 8 columns"),
        (1, torch.zeros(8, 8).T[:, ::1][::2], "coefficients has shape"),
        (2, torch.zeros(2, 8), "slots has dtype torch.float32; expected torch.int32"),
        (2, torch.zeros(2, 4, 8), r"slots has shape \(2, 4, 8\)"),
        (1, torch.zeros(3, 8, device="meta"), "coefficients is on meta and x on cpu"),
        (2, torch.zeros(3, 8, device="meta"), "slots is on meta and x on cpu"),
    ],
)
@pytest.mark.parametrize("op", ["subspace", "subspace_"])
def test_a_bank_that_does_not_fit_is_named(op, place, wrong, words):
    tables = bank()
    tables[place] = wrong
    with pytest.raises((TypeError, ValueError), match=f"{op}: {words}"):
        getattr(sf.ops, op)(torch.zeros(3, 8), *tables)


def test_an_in_place_edit_names_who_needs_a_gradient():
    x, v = torch.zeros(3, 8), torch.ones(8)
    for wanted, name in ((x, "x needs a gradient"), (v, "an argument needs a gradient")):
        wanted.requires_grad_()
        with pytest.raises(RuntimeError, match=name):
            sf.ops.add_(x, v)
        with torch.no_grad():
            sf.ops.add_(x, v)
        wanted.requires_grad_(False)
    with pytest.raises(ValueError, match="expanded view"):
        sf.ops.add_(torch.zeros(1, 8).expand(3, 8), v)
    sf.ops.add_(torch.zeros(1, 8).expand(1, 8), v)


def test_a_bank_counts_what_occurs_through_every_change():
    made = sf.Bank(8, 4)
    assert (made.modes, made.max_rank) == (0, 0)

    def is_counted() -> None:
        views = [made.view(slot) for slot in held]
        modes = 0
        for view in views:
            modes |= view.modes
        assert (made.modes, made.max_rank) == (modes, max((view.rank for view in views), default=0))

    held = [made.register(sf.Add(torch.ones(8))), made.register(sf.Ablate(torch.randn(3, 8)))]
    is_counted()
    held.append(made.register(sf.Affine(torch.ones(8), torch.ones(8), keep_norm=True)))
    is_counted()
    made.replace(held[1], sf.Rotate(torch.linalg.qr(torch.randn(8, 2))[0].T, 30.0))
    is_counted()
    for slot in list(held):
        held.remove(slot)
        made.release(slot)
        is_counted()
