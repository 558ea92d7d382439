"""Every op × dtype × shape × layout × backend against float64, and the laws that an edit must keep."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import DTYPES, ROADS, assert_exact, backend, runs
from torch import Tensor

import steerfast as sf
from steerfast.ops import slots, torch_backend

ANGLE, STEPS = 0.4, 4


@dataclass(frozen=True)
class Case:
    """An op, its in-place twin, and its formula."""

    op: Callable[[Tensor, Tensor], Tensor]
    twin: Callable[[Tensor, Tensor], Tensor]
    formula: Callable[[Tensor, Tensor], Tensor]


def flow_numbers(q: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and bias of a barrier, the same in every dtype: exact in 16 bits."""
    k = torch.arange(q.shape[0], device=q.device)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return ((k % 3) - 1).to(dtype) / 4, (0.5 + (k % 2)).to(dtype)


CASES = {
    "add": Case(
        lambda x, s: sf.ops.add(x, s[0]), lambda x, s: sf.ops.add_(x, s[0]), lambda x, s: reference.add(x, s[0])
    ),
    "ablate": Case(sf.ops.ablate, sf.ops.ablate_, reference.ablate),
    "amplify": Case(
        lambda x, s: sf.ops.amplify(x, s, 0.75),
        lambda x, s: sf.ops.amplify_(x, s, 0.75),
        lambda x, s: reference.amplify(x, s, 0.75),
    ),
    "calibrate": Case(
        lambda x, s: sf.ops.calibrate(x, s, 1.5),
        lambda x, s: sf.ops.calibrate_(x, s, 1.5),
        lambda x, s: reference.calibrate(x, s, 1.5),
    ),
    "flow": Case(
        lambda x, s: sf.ops.flow(x, s, *flow_numbers(s), angle=ANGLE, steps=STEPS),
        lambda x, s: sf.ops.flow_(x, s, *flow_numbers(s), angle=ANGLE, steps=STEPS),
        lambda x, s: reference.flow(x, s, *flow_numbers(s), angle=ANGLE, steps=STEPS),
    ),
}


def orthonormal(rank: int, d: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, rank, dtype=torch.float64))[0].T.contiguous()


def sizes(place: str) -> list[tuple[tuple[int, ...], int]]:
    """(shape of x, rank): odd widths and counts, 1-D to 3-D, ranks for either kernel."""
    small = [((3, 40), 1), ((2, 3, 72), 5), ((17, 72), 16), ((40,), 2)]
    return (
        small
        if place == "interpreter"
        else [*small, ((5, 7, 576), 8), ((130, 576), 33), ((1, 4608), 64), ((65, 100), 100)]
    )


def cases(place: str):
    return [
        (name, dtype, shape, rank)
        for name in CASES
        for dtype in DTYPES
        for shape, rank in sizes(place)
        if runs(place, dtype)
    ]


@pytest.mark.parametrize("place", ROADS)
def test_every_op_is_as_exact_as_its_formula(place):
    with backend(place) as device:
        for name, dtype, shape, rank in cases(place):
            case = CASES[name]
            s = orthonormal(rank, shape[-1]).to(dtype).to(device)
            x = (3 * torch.randn(shape)).to(dtype).to(device)
            before = x.clone()
            got = case.op(x, s)
            assert torch.equal(x, before), name  # out of place
            naive = reference.naive(case.formula, x, s, within=dtype)
            assert_exact(got, case.formula(x, s), naive, f"{name} {dtype} {shape} rank {rank}")
            assert torch.equal(case.twin(before, s), got), (name, dtype, shape)
            assert before.data_ptr() != got.data_ptr()


@pytest.mark.parametrize("place", ROADS)
@pytest.mark.parametrize("name", CASES)
def test_layouts(name, place):
    """Strided, transposed and expanded views give what a contiguous copy gives, in place where that can be."""
    case = CASES[name]
    with backend(place) as device:
        s = orthonormal(3, 24).float().to(device)
        wide = torch.randn(2, 3, 48, device=device)
        views = {
            "every other row": wide[::2, :, :24],
            "every other column": wide[..., ::2],
            "transposed": wide[..., :24].transpose(0, 1),
            "expanded": wide[:1, :1, :24].expand(2, 2, 24),
            "slice": wide[1, :, 5:29],
        }
        for label, x in views.items():
            expected = case.op(x.contiguous(), s)
            torch.testing.assert_close(case.op(x, s), expected, msg=label)
            if label != "expanded":
                base = wide.clone()
                twin = torch.as_strided(base, x.shape, x.stride(), x.storage_offset())
                case.twin(twin, s)
                torch.testing.assert_close(twin, expected, msg=label)
                outside = torch.ones_like(base, dtype=torch.bool)
                torch.as_strided(outside, x.shape, x.stride(), x.storage_offset()).fill_(False)
                assert torch.equal(base[outside], wide[outside]), label  # not a byte beside the view


@pytest.mark.parametrize("place", ROADS)
def test_nothing_in_nothing_out(place):
    with backend(place) as device:
        s = orthonormal(2, 8).float().to(device)
        for name, case in CASES.items():
            for shape in ((0, 8), (2, 0, 8)):
                assert case.op(torch.zeros(shape, device=device), s).shape == shape, name
                assert case.twin(torch.zeros(shape, device=device), s).shape == shape, name


def mixed_bank(d: int, device: str, dtype: torch.dtype = torch.float32) -> sf.Bank:
    """Slots of every mode and of ranks for either kernel; slot 8 is left empty."""
    bank = sf.Bank(d, slots=9, directions=64, dtype=dtype, device=device)
    rows = torch.randn(24, d)
    barrier = sf.Barrier(orthonormal(3, d).float(), torch.tensor([0.5, 0.0, -0.5]), torch.ones(3))
    for edit in (
        sf.Add(rows[0], 2.0),
        sf.Ablate(rows[1:4]),
        sf.Amplify(rows[4:9] / 8, 0.5, keep_norm=True),
        sf.Calibrate(rows[9:11] / 8, 1.5),
        sf.Flow(barrier, angle=0.3, steps=4),
        sf.Add(rows[11], -1.0, keep_norm=True),
        sf.Rotate(orthonormal(2, d).float(), 70.0, adaptive=True),
        sf.DeficitPush(rows[12:15] / 8, 2.0),
    ):
        bank.register(edit)
    return bank


@pytest.mark.parametrize("place", ROADS)
@pytest.mark.parametrize("columns", [None, 1, 3])
def test_a_bank_of_all_methods_against_float64(place, columns):
    with backend(place) as device:
        for dtype in (d for d in DTYPES if runs(place, d)):
            n, d = (9, 40) if place == "interpreter" else (33, 576)
            bank = mixed_bank(d, device, dtype)
            x = (2 * torch.randn(n, d)).to(dtype).to(device)
            shape = (n,) if columns is None else (n, columns)
            rows = torch.randint(-1, 9, shape, dtype=torch.int32, device=device)
            scale = torch.rand(shape, device=device) + 0.5
            got = sf.ops.subspace(x, *bank.tensors, rows, scale)
            args = x, *bank.tensors, rows, scale
            assert_exact(got, reference.subspace(*args), reference.naive(reference.subspace, *args))
            idle = ((rows < 0) | (rows == 8)).reshape(n, -1).all(1)
            assert torch.equal(got[idle], x[idle])
            twin = x.clone()
            assert sf.ops.subspace_(twin, *bank.tensors, rows, scale) is twin
            assert torch.equal(twin, got)


@pytest.mark.parametrize("place", ROADS)
def test_an_unowned_row_keeps_its_bits(place):
    """Bits, not values: -0.0, subnormals, NaN payloads and infinities pass through a row whose entries are all -1."""
    with backend(place) as device:
        bank = mixed_bank(40, device)
        odd = torch.tensor([-0.0, 1e-42, float("inf"), float("-inf"), float("nan")], device=device).repeat(8)
        x = torch.stack([odd, torch.ones(40, device=device), odd])
        rows = torch.tensor([[-1, -1], [0, 4], [8, -1]], dtype=torch.int32, device=device)
        for out in (
            sf.ops.subspace(x, *bank.tensors, rows),
            sf.ops.add(x, bank.vectors[:7], rows.clamp(max=0) - (rows == 8).int()),
        ):
            assert torch.equal(out.view(torch.int32)[[0, 2]], x.view(torch.int32)[[0, 2]])
            assert out[1].isfinite().all()


@pytest.mark.parametrize("place", ROADS)
def test_a_row_does_not_depend_on_its_neighbours(place):
    """Batch invariance, bit for bit, and a NaN row stays alone."""
    with backend(place) as device:
        n = 6 if place == "interpreter" else 70  # one kernel each for ranks 3 and 20, below 1024 rows
        for d, rank in ((40, 3), (72, 20)):
            s = (orthonormal(rank, d) / 2).float().to(device)
            x = torch.randn(n, d, device=device)
            for name, case in CASES.items():
                whole = case.op(x, s)
                # a BLAS, which flows take on either road, may sum one row in another order than many; the kernels may not
                if place not in ("cpu", "compiled"):
                    for i in (0, n - 1):
                        assert torch.equal(case.op(x[i : i + 1], s)[0], whole[i]), (name, rank)
                poisoned = x.clone()
                poisoned[1] = float("nan")
                assert torch.equal(case.op(poisoned, s)[2:], whole[2:]), (name, rank)


@pytest.mark.parametrize("place", ROADS)
def test_rows_in_whose_memory_directions_stand(place):
    """In place, what is read of them is what was there before."""
    with backend(place) as device:
        numbers = torch.tensor([slots.constants(), *[slots.hinge(slope=-1.0)] * 8], device=device)
        header = torch.tensor([[slots.HINGE, 8, 0, 0, 0, 0, 0, 0]], dtype=torch.int32, device=device)
        rows = torch.randperm(24, device=device).int()
        edits = {
            "ablate": (lambda x: sf.ops.ablate(x, x[0]), lambda x: sf.ops.ablate_(x, x[0])),
            "amplify": (lambda x: sf.ops.amplify(x, x[8:16]), lambda x: sf.ops.amplify_(x, x[8:16])),
            "add": (lambda x: sf.ops.add(x, x, rows), lambda x: sf.ops.add_(x, x, rows)),
            "subspace": (
                lambda x: sf.ops.subspace(x, x, numbers, header),
                lambda x: sf.ops.subspace_(x, x, numbers, header),
            ),
            "subspace_split": (
                lambda x: sf.ops.subspace(x, x, numbers, header),
                lambda x: sf.ops.subspace_split_(torch.zeros_like(x), x, x, numbers, header),
            ),
        }
        for dtype in (d for d in DTYPES if runs(place, d)):
            x = (torch.randn(24, 40, device=device) / 6).to(dtype)
            for name, (op, twin) in edits.items():
                wanted, memory = op(x), x.clone()
                assert twin(memory) is memory, name
                unit = torch.finfo(dtype).eps * wanted.abs().max()
                assert (memory.float() - wanted.float()).abs().max() <= 4 * unit, (name, dtype)


@pytest.mark.parametrize("place", ROADS)
def test_left_to_right(place):
    """Slot j sees the result of slot j - 1: adding and then ablating differs from ablating and then adding."""
    with backend(place) as device:
        bank = sf.Bank(8, slots=2, device=device)
        v = torch.eye(8)[0]
        add, ablate = bank.register(sf.Add(v, 5.0)), bank.register(sf.Ablate(v))
        x = torch.ones(2, 8, device=device)
        rows = torch.tensor([[add, ablate], [ablate, add]], dtype=torch.int32, device=device)
        assert sf.ops.subspace(x, *bank.tensors, rows)[:, 0].tolist() == [0.0, 5.0]


@pytest.mark.parametrize("place", ROADS)
def test_mixed_dtypes_of_stream_and_bank(place):
    """A float32 bank under a 16-bit stream: nothing of the bank is rounded."""
    with backend(place) as device:
        x = torch.randn(5, 40, device=device).half()
        bank = mixed_bank(40, device)
        rows = torch.arange(5, dtype=torch.int32, device=device)
        got = sf.ops.subspace(x, *bank.tensors, rows)
        true = reference.subspace(x, *bank.tensors, rows)
        assert got.dtype == torch.float16
        assert_exact(got, true, true.half())


@pytest.mark.parametrize("place", ROADS)
def test_laws(place):
    with backend(place) as device:
        s, x = orthonormal(4, 40).float().to(device), torch.randn(6, 40, device=device)
        once = sf.ops.ablate(x, s)
        torch.testing.assert_close(sf.ops.ablate(once, s), once, atol=1e-6, rtol=0)
        assert (once @ s.T).abs().max() < 1e-5
        erased = sf.ops.amplify(x, s, -1.0)  # orthogonal features: the active part is gone, the rest untouched
        torch.testing.assert_close(erased @ s.T, (x @ s.T).clamp(max=0), atol=1e-5, rtol=0)
        torch.testing.assert_close(sf.ops.calibrate(x, s, 0.0), erased, atol=1e-6, rtol=0)
        numbers = flow_numbers(s)
        assert torch.equal(sf.ops.flow(x, s, *numbers, T=0.0), x)
        T, steps = 1.5, 6
        moved = sf.ops.flow(x, s, *numbers, T=T, steps=steps)
        grown = (moved.norm(dim=1) ** 2 - x.norm(dim=1) ** 2) / (T * T / steps)
        torch.testing.assert_close(grown, torch.ones_like(grown), atol=1e-3, rtol=0)  # Euler adds ε² a step to ‖a‖²


@pytest.mark.parametrize("place", ROADS)
def test_flow_where_nothing_can_move_or_everything_is_at_the_pole(place):
    with backend(place) as device:
        q = torch.eye(3)[:1].to(device)
        flat, one = torch.zeros(1, device=device), torch.ones(1, device=device)
        x = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [1e-20, 1e-20, 0.0]], device=device)
        out = sf.ops.flow(x, q, flat, one, angle=0.5)
        assert torch.equal(out[:3], x[:3])  # a zero row and both poles are stationary
        assert out.isfinite().all()
        assert torch.equal(sf.ops.flow(x, q, flat, flat, angle=0.5)[:3], x[:3])  # h is constant
        near = torch.tensor([[5.0, 1e-6, 0.0]], device=device)
        past = sf.ops.flow(near, q, flat, one, T=3.0, steps=10)  # overshoot: it turns around the pole, finite
        assert past.isfinite().all()
        assert past[0, 0] > 4.9


@pytest.mark.parametrize("place", ROADS)
def test_one_euler_step_of_a_linear_barrier_is_addition_of_its_tangent(place):
    with backend(place) as device:
        q = torch.eye(4)[:1].to(device)
        x = torch.randn(5, 4, device=device)
        got = sf.ops.flow(x, q, torch.zeros(1, device=device), torch.ones(1, device=device), T=0.7, steps=1)
        unit = x / x.norm(dim=1, keepdim=True)
        tangent = q - (unit @ q.T) * unit
        torch.testing.assert_close(got, x + 0.7 * tangent / tangent.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("place", ROADS)
def test_h_grows_along_the_flow(place):
    with backend(place) as device:
        q = orthonormal(3, 40).float().to(device)
        barrier = sf.Barrier(q, torch.tensor([0.5, 0.0, -0.5]), torch.tensor([1.0, -0.5, 0.25]))
        x = torch.randn(8, 40, device=device)
        path = [x]
        for _ in range(10):
            path.append(
                sf.ops.flow(path[-1], q, barrier.eigenvalues.to(device), barrier.bias.to(device), angle=0.02, steps=1)
            )
        h = torch.stack([barrier(a) for a in path])
        assert (h[1:] > h[:-1]).all()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), d=st.integers(1, 33), k=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_float64_stays_float64(n, d, k, seed):
    k = min(k, d)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    s = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))[0].T
    for name, case in CASES.items():
        if name == "flow" and d <= k:
            continue  # d = k: a row may lie in the span, where a pole is common
        torch.testing.assert_close(case.op(x, s), case.formula(x, s), atol=1e-11, rtol=1e-11, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    case = CASES[name]
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    s = orthonormal(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(case.op, (x, s))


@pytest.mark.parametrize("place", ROADS)
def test_both_backends_have_one_gradient(place):
    with backend(place) as device:
        bank = mixed_bank(40, device)
        rows = torch.tensor([0, 1, 2, 3, 4, 5, -1], dtype=torch.int32, device=device)
        grads = {}
        for kind in ("op", "torch"):
            tensors = [
                torch.linspace(-1, 1, 280, device=device).reshape(7, 40).requires_grad_(),
                bank.vectors.clone().requires_grad_(),
            ]
            tensors += [bank.coefficients.clone().requires_grad_(), torch.ones(7, device=device, requires_grad=True)]
            x, vectors, coefficients, scale = tensors
            function = sf.ops.subspace if kind == "op" else torch_backend.subspace
            (function(x, vectors, coefficients, bank.slots, rows, scale) ** 2).sum().backward()
            grads[kind] = [t.grad for t in tensors]
        for got, expected in zip(grads["op"], grads["torch"], strict=True):
            torch.testing.assert_close(got, expected)


def test_torch_library_contract():
    bank = mixed_bank(40, "cpu")
    x = torch.randn(5, 40)
    rows, scale = torch.tensor([0, 1, 4, -1, 5], dtype=torch.int32), torch.rand(5)
    grad = [t.clone().requires_grad_() for t in (x, bank.vectors, bank.coefficients, scale)]
    torch.library.opcheck(
        torch.ops.steerfast.subspace.default, (grad[0], grad[1], grad[2], bank.slots, rows, grad[3], 7, 5)
    )
    torch.library.opcheck(torch.ops.steerfast.subspace_.default, (x.clone(), *bank.tensors, rows, scale, 7, 5))
    torch.library.opcheck(torch.ops.steerfast.add.default, (grad[0], bank.vectors, rows, scale))
    torch.library.opcheck(torch.ops.steerfast.add_.default, (x.clone(), bank.vectors, rows, scale))


@pytest.mark.parametrize("name", CASES)
def test_in_place_twins_refuse_what_would_break_a_gradient(name):
    x = torch.randn(3, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{name}_: x needs a gradient"):
        CASES[name].twin(x, torch.eye(6)[:2])
    with torch.no_grad():
        CASES[name].twin(x, torch.eye(6)[:2])


@pytest.mark.parametrize("place", ROADS)
def test_who_kept_a_tensor_sees_that_it_was_edited_in_place(place):
    """A gradient that needs the old numbers says so, and an encode of them is not taken for one of the new."""
    with backend(place) as device:
        s = torch.eye(6, device=device)[:2]
        rows, scale = torch.tensor([0, -1, 1], dtype=torch.int32, device=device), torch.rand(3, device=device)
        bank = sf.Bank(6, slots=2, directions=4, device=device)
        for strength in (1.0, 2.0):
            bank.register(sf.Amplify(s, strength))
        hidden = torch.zeros(3, 6, device=device)
        twins = {name: case.twin for name, case in CASES.items()} | {
            "add with rows": lambda x, s: sf.ops.add_(x, s, rows, scale),
            "subspace": lambda x, s: sf.ops.subspace_(x, *bank.tensors),
            "subspace with rows": lambda x, s: sf.ops.subspace_(x, *bank.tensors, rows, scale),
            "subspace_split": lambda x, s: sf.ops.subspace_split_(hidden, x, *bank.tensors, rows, scale),
            "affine": lambda x, s: sf.ops.affine_(x, x[0] + 1, x[1].clone()),
        }
        for twin in twins.values():
            x = torch.randn(3, 6, device=device)
            weight = torch.randn(3, 6, device=device, requires_grad=True)
            loss = (weight * x).sum()
            twin(x, s)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            with torch.inference_mode():
                twin(torch.randn(3, 6, device=device), s)


MODES = ("ADD", "HINGE", "FLOW", "ROTATE", "PUSH", "SLERP", "REFLECT", "AFFINE", "SOLVE")


def test_modes_are_one_bit_each():
    bits = [getattr(slots, name) for name in (*MODES, "KEEP_NORM")]
    assert all(bit.bit_count() == 1 for bit in bits)
    assert sum(bits) == slots.ALL_MODES == 2 ** len(bits) - 1
    assert all(getattr(reference, name) == getattr(slots, name) for name in MODES)


def test_the_kernels_have_the_same_modes():
    """They know nothing of `steerfast`, so they have the numbers once more; and two masks made of them."""
    act = pytest.importorskip("steerfast_kernels.act")
    for name in (*MODES, "KEEP_NORM"):
        assert getattr(act, name).value == getattr(slots, name), name
    assert act.MODE.value == slots.ALL_MODES & ~slots.KEEP_NORM
    assert act.COUPLED.value == act.MODE.value & ~(slots.ADD | slots.HINGE | slots.AFFINE)
    own = {
        name for name, value in vars(act).items() if name.isupper() and isinstance(getattr(value, "value", None), int)
    }
    assert own == {*MODES, "KEEP_NORM", "MODE", "COUPLED"}  # no mode of the kernels' own


def test_every_op_has_its_formula():
    """Under its own name, with its arguments in the same order."""
    for name in {name.rstrip("_") for name in sf.ops.__all__}:
        formula = getattr(reference, name)
        if name != "subspace_split":
            theirs, ours = (list(inspect.signature(f).parameters) for f in (formula, getattr(sf.ops, name)))
            assert theirs == [argument for argument in ours if argument != "modes"][: len(theirs)], name


BAD = [
    (lambda x: sf.ops.add(x.long(), x[0]), TypeError, "add: x has dtype torch.int64"),
    (lambda x: sf.ops.add([1.0], x[0]), TypeError, "add: x must be a tensor"),
    (
        lambda x: sf.ops.add(x, x[0, :3]),
        ValueError,
        r"vectors has shape \(3,\); expected \(d,\) or \(m, d\) with d = 4",
    ),
    (lambda x: sf.ops.add(x, x[0].long()), TypeError, "vectors has dtype torch.int64"),
    (lambda x: sf.ops.add(x, x, rows=torch.zeros(3)), TypeError, "rows has dtype torch.float32; expected torch.int32"),
    (lambda x: sf.ops.add(x, x, rows=[0, 1, 0]), TypeError, "add: rows must be a tensor of torch.int32; got list"),
    (
        lambda x: sf.ops.add(x, x, rows=torch.zeros(2, dtype=torch.int32)),
        ValueError,
        r"rows has shape \(2,\); expected \(3,\)",
    ),
    (
        lambda x: sf.ops.add(x, x, rows=torch.zeros(3, 5, dtype=torch.int32)),
        ValueError,
        "P = 5 columns; expected 1 to 4",
    ),
    (lambda x: sf.ops.add(x, x, scale=torch.ones(3, dtype=torch.float64)), TypeError, "scale has dtype torch.float64"),
    (
        lambda x: sf.ops.add(x, x, torch.zeros(3, 2, dtype=torch.int32), torch.ones(3)),
        ValueError,
        "expected the same shape",
    ),
    (lambda x: sf.ops.add(x, x[0].to("meta")), ValueError, "vectors is on meta and x on cpu"),
    (lambda x: sf.ops.amplify(x, x, float("nan")), ValueError, "alpha must be finite"),
    (lambda x: sf.ops.calibrate(x, x, "much"), TypeError, "beta must be a number"),
    (lambda x: sf.ops.flow(x, x[:1], torch.ones(2), torch.ones(1), T=1.0), ValueError, r"eigenvalues has shape \(2,\)"),
    (lambda x: sf.ops.flow(x, x[:1], torch.ones(1), torch.ones(1)), ValueError, "give exactly one of them"),
    (lambda x: sf.ops.flow(x, x[:1], torch.ones(1), torch.ones(1), T=-1.0), ValueError, "T is -1.0; expected >= 0"),
    (lambda x: sf.ops.flow(x, x[:1], torch.ones(1), torch.ones(1), T=1.0, steps=0), ValueError, "steps is 0"),
    (
        lambda x: sf.ops.subspace(x, x, torch.zeros(2, 7), torch.zeros(1, 8, dtype=torch.int32)),
        ValueError,
        "coefficients has shape",
    ),
    (lambda x: sf.ops.subspace(x, x, torch.zeros(2, 8), torch.zeros(1, 8)), TypeError, "slots has dtype torch.float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(3, 4))


def test_backend_choice():
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="expected one of 'auto', 'triton', 'torch'"):
        sf.use_backend("cuda")
    sf.use_backend("triton")
    try:
        with pytest.raises(TypeError, match="takes no float64"):
            sf.ops.add(x.double(), x[0].double())
    finally:
        sf.use_backend("auto")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter makes the choice valid")
def test_an_explicit_backend_that_cannot_run_is_an_error():
    sf.use_backend("triton")
    try:
        with pytest.raises(RuntimeError, match="the tensor is on cpu"):
            sf.ops.add(torch.zeros(1, 4), torch.ones(4))
    finally:
        sf.use_backend("auto")
