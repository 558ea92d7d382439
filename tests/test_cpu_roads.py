"""The quick roads of the CPU backend: what they compute is what the general one does, and where they do not serve they say so."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from places import backend, needs_numba, only_calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import steerfast as sf
from steerfast import ops
from steerfast.ops import compiled_cpu, torch_backend, torch_cpu, torch_encode, torch_slots

D = 40


@pytest.fixture(params=["cpu", pytest.param("compiled", marks=needs_numba)])
def road(request: pytest.FixtureRequest) -> Iterator[str]:
    """PyTorch's calls, as where numba is not installed, and what numba has compiled."""
    with backend(request.param):
        yield request.param


@pytest.fixture
def calls() -> Iterator[None]:
    """PyTorch's calls alone."""
    with only_calls():
        yield


both = pytest.mark.usefixtures("road")


def bank_of(count: int, rank: int, dtype: torch.dtype = torch.float32, mixed: bool = False) -> sf.Bank:
    bank = sf.Bank(D, slots=count, directions=4 * rank * count, dtype=dtype)
    for i in range(count):
        bank.register(sf.Amplify(torch.randn(rank, D) / 6, (i if mixed else 0) + 0.5))
    return bank


def close(got: Tensor, wanted: Tensor) -> None:
    unit = torch.finfo(got.dtype).eps * wanted.abs().max()
    assert (got.float() - wanted.float()).abs().max() <= 4 * unit


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_rows_of_many_owners_in_one_product(dtype: torch.dtype, mixed: bool, rank: int) -> None:
    """In order or not, with rows of nobody and with strengths: the general road's values, and idle rows bit for bit."""
    bank, x = bank_of(9, rank, dtype, mixed), torch.randn(11, D).to(dtype)
    for rows in (torch.arange(11) % 9, torch.tensor([3, 1, -1, 8, 0, 5, -1, 2, 7, 6, 4]), torch.arange(11) // 6):
        rows = rows.int()
        for scale in (None, torch.rand(11)):
            got = torch_cpu.subspace(x, *bank.tensors, rows, scale)
            assert got is not None
            close(got, torch_backend.subspace(x, *bank.tensors, rows, scale))
            assert torch.equal(got[rows < 0], x[rows < 0])
            twin = x.clone()
            assert torch_cpu.subspace(twin, *bank.tensors, rows, scale, in_place=True) is twin
            assert torch.equal(twin, got)


@both
def test_a_change_of_the_bank_is_seen_however_it_was_written() -> None:
    """What is remembered of a slot is found by its numbers, so that no write goes past it: not even one without a version."""
    bank, x = bank_of(2, 2), torch.randn(3, D)
    _, coefficients, slots = bank.tensors
    for rows in (None, torch.tensor([0, 1, 0], dtype=torch.int32)):
        before = ops.subspace(x, *bank.tensors, rows)
        coefficients.numpy()[int(slots[0, 4]), 2] *= 3
        after = ops.subspace(x, *bank.tensors, rows)
        assert not torch.equal(before, after)
        close(after, torch_backend.subspace(x, *bank.tensors, rows))


@pytest.mark.usefixtures("calls")
def test_what_is_kept_of_a_bank_goes_with_it() -> None:
    """Its memory is not held, and a bank in the same place is another one; nor is a table that was given other memory."""
    gc.collect()  # banks of other tests may still await it
    x, kept = torch.randn(3, D), len(torch_slots._readers)
    for _ in range(3):
        bank = bank_of(2, 2)
        close(ops.subspace(x, *bank.tensors), torch_backend.subspace(x, *bank.tensors))
    assert len(torch_slots._readers) == kept + 1
    array = 2 * bank.vectors.numpy()
    bank.vectors.data = torch.from_numpy(array)
    close(ops.subspace(x, *bank.tensors), torch_backend.subspace(x, *bank.tensors))
    memory = weakref.ref(array)
    del bank, array
    gc.collect()
    assert memory() is None
    assert len(torch_slots._readers) == kept


@both
def test_a_table_that_takes_another_form_in_its_place_is_read_anew() -> None:
    """Every second row of the memory, rows of half the width, fewer slots: the address says nothing of these."""
    bank, x = bank_of(2, 2, mixed=True), torch.randn(3, D)
    vectors, coefficients, slots = (table.clone() for table in bank.tensors)
    stray = torch.tensor([1, 1, 1], dtype=torch.int32)
    for rows in (None, stray):
        torch_cpu.subspace(x, vectors, coefficients, slots, rows, None)
    vectors.data = vectors.data[::2]
    slots[:, 2:4] = 0
    for rows in (None, stray):
        close(
            ops.subspace(x, vectors, coefficients, slots, rows),
            torch_backend.subspace(x, vectors, coefficients, slots, rows),
        )
    slots.resize_(1, 8)
    assert ops.subspace(x, vectors, coefficients, slots, stray).isnan().all()
    vectors.resize_(4, D // 2)
    half = x[:, ::2]
    close(ops.subspace(half, vectors, coefficients, slots), torch_backend.subspace(half, vectors, coefficients, slots))


@pytest.mark.usefixtures("calls")
def test_what_is_kept_beyond_a_bank_is_small() -> None:
    """Thousands of banks of many directions, or of batches of many owners, come and go: their numbers go, too."""
    slots = torch.tensor([[2, 90, 0, 0, 0, 0, 0, 0]] * 2, dtype=torch.int32)
    sizes = [kept.cache_info().currsize for kept in (torch_slots._how_kept, torch_slots._remembered)]
    tables = torch.randn(90, D), torch.randn(91, 8), slots
    ops.subspace(torch.randn(2, D), *tables)
    ops.subspace(torch.randn(1000, D), *tables, torch.arange(1000, dtype=torch.int32) % 2)
    assert sizes == [kept.cache_info().currsize for kept in (torch_slots._how_kept, torch_slots._remembered)]


@both
@pytest.mark.parametrize("mode", ["fake", "functionalize"])
def test_a_number_first_met_without_memory_serves_later_calls(mode: str) -> None:
    """What a mode or a transform makes of a number is its own."""
    x, features, beta = torch.randn(3, D), torch.randn(2, D) / 6, {"fake": 1.171875, "functionalize": 1.296875}[mode]
    if mode == "fake":
        with FakeTensorMode() as fake:
            ops.calibrate(fake.from_tensor(x), fake.from_tensor(features), beta)
    else:
        torch.func.functionalize(lambda x: ops.calibrate(x, features, beta))(x)
    close(ops.calibrate(x, features, beta), sf.Calibrate(features, beta).apply(x))


EDITS = {
    "both bounds": lambda v: sf.Clamp(v[0], low=-0.1, high=0.2),
    "one point": lambda v: sf.Clamp(v[0], low=0.3, high=0.3),
    "lower bound": lambda v: sf.Clamp(v[0], low=0.1, keep_norm=True),
    "upper bound": lambda v: sf.Clamp(v[0], high=-0.1),
    "push": lambda v: sf.DeficitPush(v, target=0.5),
    "push with a bias": lambda v: sf.DeficitPush(v, target=0.5, bias=torch.tensor([0.1, -0.2, 0.0])),
    "add": lambda v: sf.Add(v[0], -2.0, keep_norm=True),
    "ablate": lambda v: sf.Ablate(v[:2], keep_norm=True),
    "calibrate": lambda v: sf.Calibrate(v, beta=2.0),
    "rotate": lambda v: sf.Rotate(v[:2], degrees=36.0),
    "other matrices": lambda v: sf.LoReFT(v, torch.randn(3, D) / 6, torch.ones(3)),
}


@both
@pytest.mark.parametrize("n", [1, 3, 4, 40])
@pytest.mark.parametrize("name", EDITS)
def test_few_calls_say_what_the_formula_says(name: str, n: int) -> None:
    """Of few rows and many, with a row of zeros, one that vanishes and one of NaN, which stays alone."""
    v, x = torch.linalg.qr(torch.randn(D, 3))[0].T.contiguous(), torch.randn(n, D)
    bank = sf.Bank(D, slots=1)
    bank.register(EDITS[name](v))
    x[0] = {1: 1.0, 3: 0.0, 4: 1.0}.get(n, 1.0) * v[0]
    x[-1:] = torch.nan if n > 1 else x[-1:]
    got, wanted = torch_cpu.subspace(x, *bank.tensors, None, None), torch_backend.subspace(x, *bank.tensors)
    assert got is not None
    assert torch.equal(got.isnan(), wanted.isnan())
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=3e-6, equal_nan=True)
    twin = x.clone()
    torch_cpu.subspace(twin, *bank.tensors, None, None, in_place=True)
    torch.testing.assert_close(twin, got, rtol=1e-6, atol=1e-6, equal_nan=True)


SINGLE = {
    "ablate": sf.Ablate,
    "amplify": lambda v: sf.Amplify(v, 0.7),
    "calibrate": lambda v: sf.Calibrate(v, beta=2.0),
    "affine ablation": lambda v: sf.AffineAblate(v[0], 0.4),
    "clamp": lambda v: sf.Clamp(v[0], low=-0.1, high=0.2),
    "clamp, norm kept": lambda v: sf.Clamp(v[0], low=0.1, keep_norm=True),
    "push": lambda v: sf.DeficitPush(v, target=0.5, bias=torch.tensor([0.1])),
    "next to nothing": lambda v: sf.Amplify(v, 1e-4),
    "loreft": lambda v: sf.LoReFT(v, torch.randn(1, D) / 6, torch.ones(1)),
}


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SINGLE)
def test_a_single_row_along_a_single_direction(name: str, dtype: torch.dtype) -> None:
    """In every form that a row can have, with a strength and without: values, dtype and shape of the general road."""
    v = torch.linalg.qr(torch.randn(D, 3))[0].T.contiguous()
    bank = sf.Bank(D, slots=2, dtype=dtype)
    own = torch.tensor([bank.register(SINGLE[name](v[:1]))], dtype=torch.int32)
    wide = torch.randn(3, 2 * D).to(dtype)
    for x in (wide[:1, :D], wide[1, ::2], wide[None, None, 2:, D:], torch.full((1, D), torch.nan, dtype=dtype)):
        for scale in (None, torch.tensor([0.6])):
            rows = own if scale is None else None
            got, wanted = (
                torch_cpu.subspace(x, *bank.tensors, rows, scale),
                torch_backend.subspace(x, *bank.tensors, rows, scale),
            )
            assert got is not None
            assert got.dtype == dtype
            assert got.shape == x.shape
            assert got.is_contiguous()
            torch.testing.assert_close(got, wanted, rtol=2 * torch.finfo(dtype).eps, atol=3e-6, equal_nan=True)
            twin = x.clone()
            assert torch_cpu.subspace(twin, *bank.tensors, rows, scale, in_place=True) is twin
            torch.testing.assert_close(twin, got, rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)
    for x in (torch.full((1, D), 3e38), torch.full((1, D), torch.inf)):
        torch.testing.assert_close(
            ops.amplify(x, v[0], 5.0), torch_backend.hinged(x, v[0], lambda y: 5.0 * y.relu()), equal_nan=True
        )


@both
@pytest.mark.parametrize("shape", [(D,), (1, D), (1, 1, D)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_numbers_of_one_direction_serve_a_row_of_any_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Hinges of every term, and a push that keeps no length: numbers that no intervention writes, but a bank may hold."""
    x = torch.randn(shape).to(dtype)
    for edit, written in (
        (sf.Amplify(torch.eye(D)[:1]), (0.3, -0.2, 0.5, 0.1, -0.4, 0.2, 0.6, 0.05)),
        (sf.Amplify(torch.eye(D)[:1]), (0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
        (sf.DeficitPush(torch.eye(D)[:1], target=0.5), (0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)),
    ):
        bank = sf.Bank(D, slots=1, dtype=dtype)
        bank.register(edit)
        _, coefficients, slots = bank.tensors
        coefficients[int(slots[0, 4]) + 1] = torch.tensor(written)
        slots[0, 6] = 0
        for scale in (None, torch.tensor([0.5])):
            got = torch_cpu.subspace(x, *bank.tensors, None, scale)
            assert got is not None
            close(got, torch_backend.subspace(x, *bank.tensors, None, scale))


@both
def test_an_edit_in_place_under_a_transform_is_what_it_is_without() -> None:
    bank, x = sf.Bank(D, slots=1), torch.randn(5, 1, D)
    bank.register(sf.Ablate(torch.randn(D)))
    wanted = ops.subspace(x, *bank.tensors)
    close(torch.func.vmap(lambda x: ops.subspace_(x.clone(), *bank.tensors))(x), wanted)
    close(torch.func.jvp(lambda x: ops.subspace_(x.clone(), *bank.tensors), (x,), (x,))[0], wanted)
    v = torch.randn(D)
    close(torch.func.vmap(lambda x: ops.add_(x.clone(), v))(x), ops.add(x, v))
    close(torch.func.vmap(lambda x: ops.affine_(x.clone(), v, v))(x), ops.affine(x, v, v))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_view_that_negates_is_read_and_written_as_what_it_says(road: str, dtype: torch.dtype) -> None:
    """By PyTorch's calls whole numbers and tables of a bank, too; none of PyTorch's public calls makes such views of them."""
    memory, v = torch.randn(3, D).to(dtype), torch.randn(D)
    bank = sf.Bank(D, slots=2)
    slot = bank.register(sf.Add(v))
    vectors, coefficients, slots = bank.tensors
    negated = torch._neg_view
    rows = torch.full((3,), slot, dtype=torch.int32)
    views = [
        (negated(memory.clone()), (coefficients, slots), rows),
        (memory, (negated(-coefficients), slots), rows),
        (memory, (coefficients, negated(-slots)), rows),
        (memory, (coefficients, slots), negated(-rows)),
    ]
    for x, tables, own in views if road == "cpu" else views[:1]:
        plain = tuple(table.resolve_neg() for table in tables)
        wanted = torch_backend.subspace(x.resolve_neg(), vectors, *plain, rows)
        close(ops.subspace(x, vectors, *tables, own), wanted)
        twin = negated(x.neg().clone()) if x.is_neg() else x.clone()
        close(ops.subspace_(twin, vectors, *tables, own).resolve_neg(), wanted)
        close(ops.add(x, vectors[int(slots[slot, 3]) :].to(dtype), 0 * own), x + v.to(dtype))


@both
def test_memory_that_begins_before_x_and_reaches_into_it_is_not_written_over() -> None:
    """Tensors that know nothing of each other, such as those of one array; and a bank whose own numbers are edited."""
    rows, one = torch.zeros(4, dtype=torch.int32), torch.ones(D)
    for edit, edit_in_place in (
        (ops.ablate, ops.ablate_),
        (ops.add, ops.add_),
        (lambda x, v: ops.add(x, v[None], rows), lambda x, v: ops.add_(x, v[None], rows)),
        (lambda x, v: ops.affine(x, v, one), lambda x, v: ops.affine_(x, v, one)),
    ):
        memory = torch.randn(5 * D).numpy()
        v, x = torch.from_numpy(memory[:D]), torch.from_numpy(memory[D // 2 : 4 * D + D // 2]).view(4, D)
        wanted = edit(x.clone(), v.clone())
        close(edit_in_place(x, v), wanted)
    bank = sf.Bank(8, slots=3)
    rows = torch.tensor([bank.register(sf.Amplify(torch.randn(8), 2.0 + i)) for i in range(3)], dtype=torch.int32)
    vectors, coefficients, slots = (table.clone() for table in bank.tensors)
    x = coefficients[: len(rows)]
    wanted = ops.subspace(x.clone(), vectors, coefficients.clone(), slots, rows)
    close(ops.subspace_(x, vectors, coefficients, slots, rows), wanted)


@both
def test_what_cannot_be_edited_in_place_is_refused() -> None:
    memory, b = torch.randn(2 * D), torch.randn(2, D)
    for x in (memory.as_strided((3, D), (D // 2, 1)), memory.as_strided((D, 3), (1, 1))[:, :1].expand(D, D)):
        with pytest.raises(ValueError, match="share memory"):
            ops.ablate_(x, b[0])
    strided = memory.view(D, 2).T  # of every second number: rows beside each other
    wanted = ops.ablate(strided.clone(), b[0])
    close(ops.ablate_(strided, b[0]), wanted)
    with torch.inference_mode():
        x = torch.randn(3, D)
    with pytest.raises(RuntimeError, match="inference tensor"):
        ops.amplify_(x, b)


@both
def test_numbers_and_dtypes_that_do_not_fit_are_said() -> None:
    x, b = torch.randn(3, D), torch.randn(2, D)
    for call in (ops.amplify, ops.amplify_, ops.calibrate, ops.calibrate_):
        with pytest.raises(ValueError, match="float32 holds"):
            call(x, b, 1e39)
    close(ops.ablate(x, b.double()), ops.ablate(x, b))
    assert ops.calibrate(x.double(), b, 0.5).dtype is torch.float64
    torch.testing.assert_close(
        ops.calibrate(x.double(), b, 0.5), ops.calibrate(x, b, 0.5).double(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(ops.calibrate(x, b[:0]), x)


@both
def test_an_op_that_a_compiler_calls_has_the_strides_that_the_compiler_was_told() -> None:
    """Rows one after another, whatever those of x: Inductor asserts it."""
    bank, x = sf.Bank(8, slots=1), torch.randn(8, 5).T
    bank.register(sf.Amplify(torch.randn(8)))
    v, rows = torch.randn(1, 8), torch.zeros(5, dtype=torch.int32)
    for name, arguments in (
        ("subspace", (x, *bank.tensors, None, None, bank.modes, 1)),
        ("add", (x, v, None, None)),
        ("add", (x, v, rows, None)),
    ):
        op = getattr(torch.ops.steerfast, name)
        with FakeTensorMode() as fake:
            told = op(*(fake.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments))
        assert op(*arguments).stride() == told.stride(), name


@both
@pytest.mark.parametrize(
    "header", [(2, 99, 0, 0, 0), (2, 1, 0, 10**6, 0), (2, 1, 0, 0, 10**6), (2, 1, -1, 0, 0), (2, 1, 0, 0, -3)]
)
def test_a_header_that_points_outside_the_bank_is_not_followed(header: tuple[int, ...]) -> None:
    """Memory beside the tables is never read."""
    vectors, coefficients, slots = bank_of(2, 1).tensors
    slots = slots.clone()
    slots[0, :5] = torch.tensor(header, dtype=torch.int32)
    assert torch_cpu.subspace(torch.randn(2, D), vectors, coefficients, slots, None, None) is None
    assert torch_cpu.subspace(torch.randn(2, D), vectors, coefficients, slots, torch.tensor([0, 1]).int(), None) is None


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_make_no_difference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows block by block, out of place and in place, and the same rows at once."""
    x, b = torch.randn(37, D).to(dtype), (torch.randn(3, D) / 6).to(dtype)
    rows = torch.randint(0, 3, (37,)).int()
    calls = (
        lambda x: ops.amplify(x, b, 0.7),
        lambda x: ops.amplify_(x.clone(), b, 0.7),
        lambda x: ops.ablate(x, b[0]),
        lambda x: ops.add(x, b, rows, torch.linspace(0, 1, 37)),
        lambda x: ops.add_(x.clone(), b, rows),
    )
    whole = [call(x) for call in calls]
    monkeypatch.setattr(torch_cpu, "BLOCK", 5 * D)
    for call, wanted in zip(calls, whole, strict=True):
        close(call(x), wanted)


def test_elementwise_sums_round_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, w, b = torch.randn(50, D).to(dtype), torch.randn(D).to(dtype), torch.randn(D).to(dtype)
        assert torch.equal(ops.add(x, b), (x.float() + b.float()).to(dtype))
        assert torch.equal(ops.affine(x, w, b), (x.float() * w.float() + b.float()).to(dtype))


def test_a_direct_selection_leaves_ties_and_nan_to_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal entries go to the lower index and NaN comes first, whether torch.topk or the walk has found them."""
    w = torch.cat([torch.eye(8), torch.eye(8)])
    x = torch.tensor([[3.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.0, -1.0], [1.0, float("nan"), 0.0, 0.0, 2.0, 0.0, 0.0, 0.0]])
    for rows in (x[:1], x):
        direct = ops.sae_encode(rows, w, None, 5)
        with monkeypatch.context() as patch:
            patch.setattr(torch_encode, "SAE_DIRECT", 0)
            walked = ops.sae_encode(rows, w, None, 5)
        for got, wanted in zip(direct, walked, strict=True):
            torch.testing.assert_close(got, wanted, equal_nan=True)
    assert ops.sae_encode(x[:1], w, None, 5)[1].tolist() == [[0, 8, 4, 12, 1]]


@both
def test_a_quick_road_looks_at_everything_itself() -> None:
    """`ops.subspace` asks it before it checks: what does not fit is left to the checks, whose errors name it."""
    bank, x = sf.Bank(16, slots=2), torch.randn(3, 16)
    rows = torch.full((3,), bank.register(sf.Ablate(torch.ones(16))), dtype=torch.int32)
    vectors, coefficients, headers = bank.tensors
    ones = torch.ones(3)
    assert torch_cpu.subspace(x, vectors, coefficients, headers, rows, ones) is not None
    assert torch_cpu.subspace(x, vectors, coefficients, headers, rows[:, None], ones[:, None]) is not None
    assert torch_cpu.subspace(x, vectors, coefficients, headers, None, ones[:, None]) is not None
    for given in (
        (x[:, :8], *bank.tensors, rows, None),
        (x[0, 0], *bank.tensors, None, None),
        (x[:0], *bank.tensors, rows[:0], None),
        (x.tolist(), *bank.tensors, rows, None),
        (x, vectors.tolist(), coefficients, headers, rows, None),
        (x, vectors[0], coefficients, headers, rows, None),
        (x.double(), *bank.tensors, rows, None),
        (x.int(), *bank.tensors, rows, None),
        (x, vectors.int(), coefficients, headers, rows, None),
        (x, *bank.tensors, rows.long(), None),
        (x, *bank.tensors, rows, ones.double()),
        (x, vectors, None, headers, rows, None),
        (x, vectors, coefficients[0], headers, rows, None),
        (x, vectors, coefficients[:, :4], headers, rows, None),
        (x, vectors, coefficients.T.contiguous().T, headers, rows, None),
        (x, vectors, coefficients, headers.long(), rows, None),
        (x, vectors, coefficients.to("meta"), headers, rows, None),
        (x, *bank.tensors, rows[None], None),
        (x, *bank.tensors, rows[:2], None),
        (x, *bank.tensors, rows[:, None].repeat(1, 2), None),
        (x, *bank.tensors, rows.to("meta"), None),
        (x, *bank.tensors, rows, ones[:, None]),
        (x, *bank.tensors, rows, ones[:2]),
        (x, *bank.tensors, None, ones[None]),
        (x, *bank.tensors, rows, ones.to("meta")),
        (x.clone().requires_grad_(), *bank.tensors, rows, None),
        (x, vectors.clone().requires_grad_(), coefficients, headers, rows, None),
        (x, *bank.tensors, rows, ones.clone().requires_grad_()),
    ):
        assert torch_cpu.subspace(*given) is None
    with pytest.raises(ValueError, match="max_rank is -1"):
        sf.ops.subspace(x, *bank.tensors, rows, max_rank=-1)
    with pytest.raises(TypeError, match=r"max_rank is 1\.0"):
        sf.ops.subspace(x, *bank.tensors, rows, max_rank=1.0)
    with pytest.MonkeyPatch.context() as patch:
        for road in (compiled_cpu, torch_cpu):
            patch.setattr(road, "backend_of", lambda x: "triton")
        assert torch_cpu.subspace(x, *bank.tensors, rows, None) is None
