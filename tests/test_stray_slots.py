"""A number in a row table that is neither a slot's nor -1: its row becomes NaN, the others stay, nothing waits for the host."""

from __future__ import annotations

import pytest
import reference
import roads
import torch
from places import PLACES, ROADS, backend, runs
from torch import Tensor

import steerfast as sf

D, LARGE = 40, 2**31 - 1
TABLE = [[0, -1], [3, -1], [-1, -1], [-1, LARGE], [-2, 0], [1, 2], [-LARGE - 1, 1], [2, 3], [-1, 1]]
DTYPES = [torch.float32, torch.float16]


def bank_of(device: str, dtype: torch.dtype, rank: int) -> sf.Bank:
    """Three slots, one of which restores the length of its rows."""
    bank = sf.Bank(D, slots=3, directions=2 * rank + 1, dtype=dtype, device=device)
    features = torch.randn(2 * rank, D) / rank
    edits = [sf.Add(features[0]), sf.Amplify(features[:rank], 0.5, keep_norm=True), sf.Calibrate(features[rank:])]
    for edit in edits:
        bank.register(edit)
    return bank


def tables(device: str, columns: int = 2) -> tuple[Tensor, Tensor]:
    rows = torch.tensor(TABLE, dtype=torch.int32, device=device)[:, :columns]
    return rows, torch.rand(len(TABLE), columns, device=device) + 0.5


def strays(columns: int = 2) -> Tensor:
    return torch.tensor([any(slot not in (-1, 0, 1, 2) for slot in row[:columns]) for row in TABLE])


def assert_only_strays(got: Tensor, expected: Tensor, what: str, columns: int = 2) -> None:
    """NaN throughout the rows of strays and nowhere else; the others as the formula has them."""
    stray = strays(columns)
    got, tolerance = got.cpu(), 1e-5 if got.dtype == torch.float32 else 4e-3
    assert torch.equal(got.isnan(), stray[:, None].expand(got.shape)), what
    assert torch.equal(expected.isnan(), got.isnan()), what
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("place", ROADS)
@pytest.mark.parametrize("path", roads.ROADS)
def test_a_stray_slot(place, path, monkeypatch):
    """In and out of place, whole and split stream, with a probe, whichever kernel serves the bank."""
    if place not in ("cpu", "compiled"):
        roads.take(monkeypatch, path)
    columns = 1 if path == "split" else 2
    with backend(place) as device:
        for dtype in (t for t in DTYPES if runs(place, t)):
            bank, (rows, scale) = bank_of(device, dtype, 17), tables(device, columns)
            x, hidden = (torch.randn(len(TABLE), D).to(dtype).to(device) for _ in range(2))
            expected, seen = reference.subspace_probe(x, *bank.tensors, bank.max_rank, rows, scale)
            got, y = sf.ops.subspace_probe(x, *bank.tensors, bank.max_rank, rows, scale)
            assert_only_strays(got, expected, f"{path} {dtype}", columns)
            assert torch.equal(got[2].view(torch.uint8), x[2].view(torch.uint8))
            torch.testing.assert_close(y.double().cpu(), seen, atol=0.02, rtol=0.02, equal_nan=True)
            twin = x.clone()
            sf.ops.subspace_(twin, *bank.tensors, rows, scale, max_rank=bank.max_rank)
            assert torch.equal(twin.nan_to_num(7.0), got.nan_to_num(7.0))
            residual = x.clone()
            args = *bank.tensors, rows, scale
            sf.ops.subspace_split_(hidden, residual, *args, (bank.modes, bank.max_rank))
            assert_only_strays(residual, reference.subspace_split(hidden, x, *args), f"{path} {dtype} split", columns)


@pytest.mark.parametrize("place", ROADS)
@pytest.mark.parametrize("path", roads.ROADS)
def test_what_is_no_number_is_no_number_on_every_road(place, path, monkeypatch):
    """An infinite entry of a row stays infinite where a vector is added; a strength of NaN makes NaN of any row that moves."""
    if place not in ("cpu", "compiled"):
        roads.take(monkeypatch, path)
    with backend(place) as device:
        x = torch.randn(3, D, device=device)
        bank = sf.Bank(D, slots=2, directions=8, device=device)
        bank.register(sf.Add(torch.ones(D)))
        bank.register(sf.Spherical(torch.ones(D), beta=-0.9, kappa=1.0))
        odd = x.clone()
        odd[1, 7], odd[2, 3] = float("inf"), -float("inf")
        args = *bank.tensors, torch.zeros(3, dtype=torch.int32, device=device), None, bank.modes, bank.max_rank
        torch.testing.assert_close(sf.ops.subspace(odd, *args), odd + 1)
        rows, scale = (
            torch.tensor([1, -1, 1], dtype=torch.int32, device=device),
            torch.full((3,), float("nan"), device=device),
        )
        got = sf.ops.subspace(x, *bank.tensors, rows, scale, bank.modes, bank.max_rank)
        assert got.isnan().all(1).tolist() == [True, False, True]
        assert torch.equal(got[1], x[1])


@pytest.mark.parametrize("place", ROADS)
def test_a_stray_slot_beside_a_flow_of_full_rank(place):
    with backend(place) as device:
        basis = torch.linalg.qr(torch.randn(D, D))[0]
        bank = sf.Bank(D, slots=3, directions=D, device=device)
        bank.register(sf.Flow(sf.Barrier(basis, torch.randn(D), torch.randn(D)), angle=0.4, steps=3))
        rows, scale = tables(device)
        x = torch.randn(len(TABLE), D, device=device)
        got = sf.ops.subspace(x, *bank.tensors, rows, scale, bank.modes, bank.max_rank)
        assert_only_strays(got, reference.subspace(x, *bank.tensors, rows, scale), "full rank")


@pytest.mark.parametrize("place", ROADS)
@pytest.mark.parametrize("scaled", [True, False])
def test_a_stray_vector(place, scaled):
    with backend(place) as device:
        for dtype in DTYPES:
            x, hidden, vectors = (torch.randn(m, D).to(dtype).to(device) for m in (len(TABLE), len(TABLE), 3))
            rows, scale = tables(device)
            args = vectors, rows, scale if scaled else None
            got = sf.ops.add(x, *args)
            assert_only_strays(got, reference.add(x, *args), f"add {dtype}")
            assert torch.equal(sf.ops.add_(x.clone(), *args).nan_to_num(7.0), got.nan_to_num(7.0))
            weight = torch.rand(D).to(dtype).to(device)
            normed, stream = sf.ops.add_rms_norm(hidden, x, weight, *args)
            true = reference.add_rms_norm(hidden, x, weight, *args)
            assert_only_strays(stream, true[1], f"stream {dtype}")
            assert_only_strays(normed, true[0], f"normed {dtype}")


@pytest.mark.parametrize("place", ROADS)
def test_a_bank_without_rows_has_only_strays(place):
    with backend(place) as device:
        x, none = torch.randn(3, D, device=device), torch.zeros(0, D, device=device)
        tables = none, torch.zeros(0, 8, device=device), torch.zeros(0, 8, dtype=torch.int32, device=device)
        rows = torch.tensor([-1, 0, -1], dtype=torch.int32, device=device)
        for op, bank in ((sf.ops.add, (none,)), (sf.ops.subspace, tables)):
            got = op(x, *bank, rows)
            assert torch.equal(got[::2], x[::2])
            assert got[1].isnan().all()
            assert op(x, *bank).isnan().all()


def test_gradients_of_the_rows_beside_a_stray_are_what_they_were():
    """And those of the bank and of the strengths, into which the NaN of a stray must not leak: no slot follows it here."""
    bank, (rows, scale) = bank_of("cpu", torch.float32, 3), tables("cpu")
    rows = rows.sort(dim=1).values.masked_fill((rows < -1).any(1, keepdim=True), -2)
    good, stray = ~strays(), strays()

    def gradients(op, keep):
        leaves = [torch.arange(len(TABLE) * D).view(-1, D) / 100.0, bank.vectors[:3], scale]
        x, vectors, gain = (leaf.clone().requires_grad_() for leaf in leaves)
        op(x[keep], vectors, rows[keep], gain[keep])[good[keep]].square().sum().backward()
        return x.grad, vectors.grad, gain.grad

    def subspace(x, vectors, rows, gain):
        return sf.ops.subspace(x, torch.cat([vectors, bank.vectors[3:]]), *bank.tensors[1:], rows, gain)

    for op in (sf.ops.add, subspace):
        for found, expected in zip(gradients(op, good | stray), gradients(op, good), strict=True):
            assert found.isfinite().all()
            torch.testing.assert_close(found, expected)


def test_a_compiled_graph_keeps_strays():
    bank, (rows, scale) = bank_of("cpu", torch.float32, 3), tables("cpu")
    x = torch.randn(len(TABLE), D)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def steered(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return sf.ops.subspace(x, *bank.tensors, rows, scale), sf.ops.add(x, bank.vectors[:3], rows, scale)

    moved, added = steered(x, rows)
    assert_only_strays(moved, reference.subspace(x, *bank.tensors, rows, scale), "subspace")
    assert_only_strays(added, reference.add(x, bank.vectors[:3], rows, scale), "add")


@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("path", roads.ROADS)
def test_rows_without_numbers_are_edited_as_pytorch_does(place, path, monkeypatch):
    """Rows with a NaN or an infinity: what stays a number there stays one, and an infinite entry of a row that stays is kept."""
    roads.take(monkeypatch, path)
    x = torch.randn(5, D)
    x[0, 3], x[1, 3], x[2, 3], x[3] = (float(odd) for odd in ("nan", "inf", "-inf", "nan"))
    x[4, 2], x[4, 5] = float("inf"), -float("inf")
    net = torch.randn(4, D) / D**0.5, torch.randn(4), torch.randn(4), 0.1
    edits = [sf.DeficitPush(torch.randn(5, D) / D**0.5, 1.0)]
    edits += [sf.Householder(torch.randn(D), *net, offset) for offset in (100.0, -100.0)]
    edits.append(sf.Spherical(torch.randn(D), beta=-0.9, kappa=1.0))
    for edit in edits:
        expected = edit.apply(x)
        with backend(place) as device:
            bank = sf.Bank(D, slots=1, directions=16, device=device)
            bank.register(edit)
            got = sf.ops.subspace(x.to(device), *bank.tensors, None, None, bank.modes, bank.max_rank)
        torch.testing.assert_close(got.cpu(), expected, atol=1e-4, rtol=1e-4, equal_nan=True)
