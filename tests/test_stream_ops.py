"""Ops around the subspace op: the split stream, the probe, the three kernels of one bank, affine maps, similarity, norm."""

from __future__ import annotations

import pytest
import reference
import roads
import torch
from places import DTYPES, PLACES, assert_exact, backend, runs

import steerfast as sf
from steerfast.ops import torch_backend


def orthonormal(k: int, d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, k))[0].T.contiguous()


def bank_of(d: int, device: str, dtype: torch.dtype, rank: int = 3) -> sf.Bank:
    """One slot of every mode, ranks up to `rank`, some of them restoring lengths; the last slot is empty."""
    bank = sf.Bank(d, slots=12, directions=8 * rank + 20, dtype=dtype, device=device)
    rows = torch.randn(4 * rank, d) / d**0.5
    barrier = sf.Barrier(orthonormal(rank, d), torch.linspace(0.5, -0.5, rank), torch.ones(rank))
    for edit in (
        sf.Add(rows[0] * d**0.5, 2.0),
        sf.Ablate(rows[:rank]),
        sf.Amplify(rows[rank : 2 * rank], 0.5, keep_norm=True),
        sf.LoReFT(orthonormal(rank, d), rows[2 * rank : 3 * rank], torch.ones(rank)),
        sf.Flow(barrier, angle=0.3, steps=3),
        sf.Affine(1 + rows[0], rows[1], keep_norm=True),
        sf.Rotate(orthonormal(2, d), 70.0),
        sf.DeficitPush(rows[: rank + 1], 2.0),
        sf.Spherical(rows[0], rows[1], alpha=0.8, beta=-0.5, kappa=5.0),
        sf.Householder(rows[2], rows[:2], torch.ones(2), torch.tensor([0.5, -1.0])),
        sf.Affine(1 - rows[2]),
    ):
        bank.register(edit)
    return bank


def table(n: int, columns: int | None, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (n,) if columns is None else (n, columns)
    rows = torch.randint(-1, 12, shape, dtype=torch.int32)
    rows.view(n, -1)[:12, 0] = torch.arange(12)[: rows.view(n, -1)[:12, 0].numel()]  # every slot has a row
    return rows.to(device), (torch.rand(shape) + 0.5).to(device)


SIZES = {"cpu": [(33, 72)], "interpreter": [(14, 40)], "cuda": [(33, 576), (70, 4096), (1, 4096)]}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("columns", [None, 2])
def test_the_split_stream_is_the_whole_stream(place, columns):
    with backend(place) as device:
        for dtype in (t for t in DTYPES if runs(place, t)):
            for n, d in SIZES[place]:
                bank, (rows, scale) = bank_of(d, device, dtype), table(n, columns, device)
                hidden, residual = (torch.randn(n, d).to(dtype).to(device) for _ in range(2))
                before = residual.clone()
                got = sf.ops.subspace_split_(hidden, residual, *bank.tensors, rows, scale)
                assert got is residual
                true = reference.subspace_split(hidden, before, *bank.tensors, rows, scale)
                x = (hidden + before).cpu()  # what an engine without this op would edit
                naive = before.cpu() + (reference.naive(reference.subspace, x, *bank.tensors, rows, scale) - x)
                assert_exact(got, true, naive, f"{dtype} {n}×{d}")
                idle = ((rows < 0) | (rows == 11)).reshape(n, -1).all(1)
                assert torch.equal(got[idle], before[idle])


@pytest.mark.parametrize("place", PLACES)
def test_the_probe_is_the_projection_that_each_slot_saw(place):
    with backend(place) as device:
        n, d = SIZES[place][0]
        bank, (rows, scale) = bank_of(d, device, torch.float32), table(n, 2, device)
        x = torch.randn(n, d).to(device)
        out, y = sf.ops.subspace_probe(x, *bank.tensors, bank.max_rank, rows, scale)
        assert y.shape == (n, 2, bank.max_rank)
        torch.testing.assert_close(out, sf.ops.subspace(x, *bank.tensors, rows, scale), atol=1e-5, rtol=1e-5)
        expected = reference.subspace_probe(x, *bank.tensors, bank.max_rank, rows, scale)[1]
        torch.testing.assert_close(y.cpu(), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", [5, 21])  # one program per token, and tiles
def test_a_probe_too_narrow_for_a_slot_gets_its_first_numbers(place, rank):
    """A kernel must not write on into the next row's numbers."""
    with backend(place) as device:
        n, d = SIZES[place][0]
        bank = sf.Bank(d, slots=1, directions=rank, device=device)
        bank.register(sf.Ablate(orthonormal(rank, d)))
        x, rows = torch.randn(n, d).to(device), torch.arange(n, dtype=torch.int32).to(device) % 2 - 1
        y = sf.ops.subspace_probe(x, *bank.tensors, rank - 2, rows)[1]
        expected = reference.subspace_probe(x, *bank.tensors, rank - 2, rows)[1]
        torch.testing.assert_close(y.cpu(), expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", [p for p in PLACES if p != "cpu"])
@pytest.mark.parametrize("path", roads.ROADS)
def test_every_kernel_does_every_mode(place, path, monkeypatch):
    """One bank down every road, whole and split stream, with a probe, in and out of place."""
    roads.take(monkeypatch, path)
    with backend(place) as device:
        n, d, rank = (13, 72, 17) if place == "interpreter" else (70, 576, 33)
        columns = 1 if path == "split" else 2
        for dtype in (t for t in DTYPES if runs(place, t)):
            bank, (rows, scale) = bank_of(d, device, dtype, rank), table(n, columns, device)
            x, hidden = (torch.randn(n, d).to(dtype).to(device) for _ in range(2))
            true, seen = reference.subspace_probe(x, *bank.tensors, bank.max_rank, rows, scale)
            naive = x  # rounded after each slot, as the kernels do
            for column in range(columns):
                tables = rows[:, column], scale[:, column]
                naive = reference.naive(reference.subspace, naive, *bank.tensors, *tables)
            got, y = sf.ops.subspace_probe(x, *bank.tensors, bank.max_rank, rows, scale)
            assert_exact(got, true, naive, f"{path} {dtype}")
            first = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            torch.testing.assert_close(y[:, 0].cpu(), seen[:, 0].float(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(y[:, 1:].cpu(), seen[:, 1:].float(), atol=4 * first, rtol=4 * first)
            twin = x.clone()
            sf.ops.subspace_(twin, *bank.tensors, rows, scale, max_rank=bank.max_rank)
            assert torch.equal(twin, got)
            residual = x.clone()
            sf.ops.subspace_split_(hidden, residual, *bank.tensors, rows[:, :1], scale[:, :1])
            args, summed = (*bank.tensors, rows[:, 0], scale[:, 0]), (hidden + x).cpu()
            naive = x.cpu() + (reference.naive(reference.subspace, summed, *args) - summed)
            assert_exact(residual, reference.subspace_split(hidden, x, *args), naive, f"{path} {dtype} split")


@pytest.mark.parametrize("place", PLACES)
def test_five_hundred_directions(place):
    with backend(place) as device:
        for dtype in (t for t in DTYPES if runs(place, t)):
            for rank in (130, 512):
                x, s = (torch.randn(m, 40).to(dtype).to(device) for m in (5, rank))
                s /= rank**0.5
                naive = reference.naive(reference.amplify, x, s, 0.5, within=dtype)
                assert_exact(sf.ops.amplify(x, s, 0.5), reference.amplify(x, s, 0.5), naive)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_add_rms_norm(place, unit_offset):
    with backend(place) as device:
        for dtype in (t for t in DTYPES if runs(place, t)):
            for shape in [(5, 40), (2, 3, 72)] + ([(130, 4096)] if place == "cuda" else []):
                d, n = shape[-1], torch.Size(shape[:-1]).numel()
                hidden, residual = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
                weight, vectors = torch.rand(d).to(dtype).to(device), torch.randn(3, d).to(dtype).to(device)
                rows = torch.randint(-1, 3, (n, 2), dtype=torch.int32, device=device)
                scale = torch.rand(n, 2, device=device)
                for owners, gain in ((rows, scale), (rows, None), (None, None)):
                    args = hidden, residual, weight, vectors, owners, gain
                    normed, stream = sf.ops.add_rms_norm(*args, eps=1e-5, unit_offset=unit_offset)
                    sums = reference.add_rms_norm(*args, 1e-5, unit_offset)[1]
                    naive = reference.naive(reference.add, hidden + residual, vectors, owners, gain)
                    assert_exact(stream, sums, naive, f"stream {dtype} {shape}")
                    true = reference.rms_norm(stream, weight, 1e-5, unit_offset)  # of the stream as it is stored
                    naive = torch.nn.functional.rms_norm(stream, (d,), weight + float(unit_offset), 1e-5)
                    assert_exact(normed, true, naive, f"normed {dtype} {shape}")


@pytest.mark.parametrize("place", PLACES)
def test_affine(place):
    with backend(place) as device:
        for dtype in (t for t in DTYPES if runs(place, t)):
            x = torch.randn(3, 5, 40).to(dtype).to(device)
            w, b = (1 + torch.randn(40) / 8).to(dtype).to(device), torch.randn(40).to(dtype).to(device)
            got = sf.ops.affine(x, w, b)
            assert_exact(got, reference.affine(x, w, b), x * w + b)
            assert torch.equal(sf.ops.affine_(x, w, b), got)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["projection", "tanh"])
def test_similarity(place, kind):
    with backend(place) as device:
        for dtype in (t for t in DTYPES if runs(place, t)):
            for m in (1, 3):
                w = orthonormal(m, 40).to(dtype).to(device)
                x = torch.randn(7, 40).to(dtype).to(device)
                x[2], x[3, 0] = 0, float("nan")
                got = sf.ops.similarity(x, w, kind)
                true = reference.similarity(x, w, kind)
                assert got[2] == 0
                assert got[3].isnan()
                keep = torch.tensor([0, 1, 4, 5, 6])
                tolerance = 1e-5 if dtype == torch.float32 else 4e-3  # 16-bit rows are not quite orthonormal
                torch.testing.assert_close(got.cpu().double()[keep], true[keep], atol=tolerance, rtol=tolerance)


def test_gradients_of_loreft_and_add_rms_norm():
    make = {"dtype": torch.float64, "requires_grad": True}
    x, R, W, b = torch.randn(3, 7, **make), torch.randn(2, 7, **make), torch.randn(2, 7, **make), torch.randn(2, **make)
    assert torch.autograd.gradcheck(sf.ops.loreft, (x, R, W, b))
    torch.testing.assert_close(sf.ops.loreft(x, R, W, b).detach(), reference.loreft(x, R, W, b))
    h, r, g, v = (torch.randn(s, **make) for s in ((3, 7), (3, 7), (7,), (2, 7)))
    rows, scale = torch.tensor([0, -1, 1], dtype=torch.int32), torch.rand(3)
    assert torch.autograd.gradcheck(lambda *a: sf.ops.add_rms_norm(*a, rows, scale), (h, r, g, v))


@pytest.mark.parametrize("place", PLACES)
def test_gradients_through_the_registered_ops(place):
    """What torch.library differentiates is the gradient of the PyTorch backend."""
    with backend(place) as device:
        h, r, g, v = (torch.randn(s, device=device, requires_grad=True) for s in ((3, 8), (3, 8), (8,), (2, 8)))
        rows = torch.tensor([0, -1, 1], dtype=torch.int32, device=device)
        scale = torch.rand(3, device=device)

        def loss(op):
            normed, stream = op(h, r, g, v, rows, scale, 1e-6, False)
            return (normed.sin() + stream.cos()).sum()

        ours = torch.autograd.grad(loss(torch.ops.steerfast.add_rms_norm), (h, r, g, v))
        theirs = torch.autograd.grad(loss(torch_backend.add_rms_norm), (h, r, g, v))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


BAD = [
    (lambda x, bank: sf.ops.subspace_split_(x[:1], x, *bank.tensors), ValueError, "two halves of one stream"),
    (lambda x, bank: sf.ops.subspace_split_(x.half(), x, *bank.tensors), ValueError, "two halves of one stream"),
    (lambda x, bank: sf.ops.subspace_split_(x, x[:, :3], *bank.tensors), ValueError, "two halves of one stream"),
    (lambda x, bank: sf.ops.add_rms_norm(x, x, torch.ones(3), x[0]), ValueError, "weight has shape"),
    (lambda x, bank: sf.ops.add_rms_norm(x, x, x, x[0]), ValueError, "weight has shape"),
    (lambda x, bank: sf.ops.affine(x, x, x[0]), ValueError, "weight has shape"),
    (lambda x, bank: sf.ops.loreft(x, x, x, x[0]), ValueError, r"expected \(r, d\)"),
    (lambda x, bank: sf.ops.similarity(x, x[0], "dot"), ValueError, "kind is 'dot'"),
    (
        lambda x, bank: sf.ops.subspace_split_(x, x.clone().requires_grad_(), *bank.tensors),
        RuntimeError,
        "needs a gradient",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(4, 8), bank_of(8, "cpu", torch.float32, 2))


def test_they_survive_torch_compile():
    bank, (rows, scale) = bank_of(40, "cpu", torch.float32), table(14, 2, "cpu")
    hidden, residual, weight = torch.randn(14, 40), torch.randn(14, 40), torch.rand(40)
    rank = bank.max_rank

    def step(hidden, residual):
        residual = residual.clone()
        sf.ops.subspace_split_(hidden, residual, *bank.tensors, rows, scale)
        out, y = sf.ops.subspace_probe(residual, *bank.tensors, rank, rows, scale)
        normed, stream = sf.ops.add_rms_norm(hidden, out, weight, residual[:2], rows.clamp(max=1), scale)
        return sf.ops.affine(normed, weight, weight), stream, y, sf.ops.similarity(out, weight)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(hidden, residual), step(hidden, residual), strict=True):
        torch.testing.assert_close(one, other)
