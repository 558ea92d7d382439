"""Sparse encode and decode: exact, with ties by index, on every backend. Small integers make exactness a matter of bits."""

from __future__ import annotations

import pytest
import reference
import torch
from places import DTYPES, PLACES, assert_exact, backend, runs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import steerfast as sf

F16, F32, F64 = torch.float16, torch.float32, torch.float64

# (shape of x, F, k): F not a multiple of a tile, k above a tile's keys, k = F, one row, no row
SMALL = [((5, 72), 1000, 7), ((2, 3, 40), 300, 40), ((1, 24), 130, 130), ((0, 16), 40, 3)]
LARGE = [
    ((256, 576), 8192, 32),
    ((70, 100), 1000, 512),
    ((3, 64), 16384, 64),
    ((130, 128), 4097, 1),
    ((2, 65, 72), 16500, 8),
]


def dictionary(features: int, d: int, device: str, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return (torch.randn(features, d) / d**0.5).to(device, dtype), (0.1 * torch.randn(features)).to(device, dtype)


def assert_top_k(got: tuple[Tensor, Tensor], x: Tensor, w: Tensor, b: Tensor, k: int) -> None:
    """Exact as the ops define it: no feature left out is larger than the smallest selected one, up to rounding."""
    values, indices = (part.cpu().reshape(-1, k) for part in got)
    x = x.reshape(-1, x.shape[-1])
    assert values.dtype == F32
    assert indices.dtype == torch.int32
    true = torch.relu(reference.pre_activations(x, w, b))
    naive = torch.relu(reference.naive(reference.pre_activations, x.float(), w, b))
    tolerance = 2 * (naive - true).abs().max().item() + true.max().item() * torch.finfo(F32).eps
    active = values > 0
    chosen = true.gather(1, indices.long())
    assert ((values - chosen).abs()[active] <= tolerance).all()
    assert (indices[~active] == 0).all()
    assert (values.diff(dim=1) <= 0).all()
    rest = true.clone()
    for i in range(len(rest)):
        mine = indices[i, active[i]].long()
        assert mine.unique().numel() == mine.numel()
        rest[i, mine] = 0
    assert (rest.amax(1) <= values[:, -1] + 2 * tolerance).all()


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0].cpu().double(), wanted[0].cpu())
    assert torch.equal(got[1].cpu(), wanted[1].cpu())


@pytest.mark.parametrize("place", PLACES)
def test_encode_against_float64(place):
    # a sort of many keys takes the interpreter long
    sizes = [SMALL[0], ((2, 40), 300, 9), ((1, 24), 60, 60), SMALL[3]] if place == "interpreter" else SMALL + LARGE
    cases = [(size, dtype) for size in sizes for dtype in DTYPES if runs(place, dtype)]
    with backend(place) as device:
        for (shape, features, k), dtype in cases:
            if place == "interpreter" and dtype != F32 and shape != SMALL[0][0]:
                continue
            x = torch.randn(shape).to(device, dtype)
            w, b = dictionary(features, shape[-1], device, dtype)
            got = sf.ops.sae_encode(x, w, b, k)
            assert got[0].shape == got[1].shape == (*shape[:-1], k)
            if x.numel():
                assert_top_k(got, x, w, b, k)


def integers(kind: str, features: int, d: int) -> tuple[Tensor, Tensor]:
    """(x, w) whose products are small whole numbers: exact in every dtype, and full of ties."""
    x = torch.randint(1, 3, (5, d)).float()
    w = torch.randint(-1, 2, (features, d)).float()
    if kind == "one tile":
        w[256:320] = torch.randint(1, 3, (64, d)).float()
    elif kind == "ascending":
        w = torch.zeros(features, d)
        w[:, 0] = torch.arange(features) // 16 % 1024
    elif kind == "descending":
        w = torch.zeros(features, d)
        w[:, 0] = (features - torch.arange(features)) // 16 % 1024
    elif kind == "duplicates":
        w = w[:7].repeat(features // 7 + 1, 1)[:features]
    elif kind == "few":
        w = -w.abs()
        w[features // 2 : features // 2 + 3] = 1.0
    elif kind == "all equal":
        w = torch.ones(features, d)
    x[3] = 0
    return x, w


KINDS = ["random", "one tile", "ascending", "descending", "duplicates", "few", "all equal"]


@pytest.mark.parametrize("place", PLACES)
def test_ties_and_clusters_to_the_bit(place, monkeypatch):
    """Every way to crowd the winners, at sizes where a tile keeps too few at first and must be looked at again."""
    if place != "cpu":
        from steerfast_kernels import sae_encode

        monkeypatch.setattr(sae_encode, "HEADROOM", 1)
    sizes = [(650, 8, 9)] if place == "interpreter" else [(650, 8, 20), (1000, 24, 1), (5000, 24, 64), (16384, 16, 400)]
    with backend(place) as device:
        for kind in KINDS:
            for features, d, k in sizes:
                x, w = integers(kind, features, d)
                wanted = reference.sae_encode(x, w, None, k)
                for dtype in [F32] if place == "interpreter" else DTYPES:
                    if dtype == torch.bfloat16 and w.max() > 256:
                        continue
                    assert_same(sf.ops.sae_encode(x.to(device, dtype), w.to(device, dtype), None, k), wanted)


@pytest.mark.parametrize("place", [place for place in PLACES if place != PLACES[1]])
def test_every_k_and_odd_dictionaries_to_the_bit(place):
    """k around every power of two, dictionaries that no tile, block or group divides, winners anywhere."""
    with backend(place) as device:
        for features in (1, 31, 257, 1021, 4099, 8191):
            x, w = torch.randint(1, 4, (3, 6)).float(), torch.randint(-3, 4, (features, 6)).float()
            for k in (1, 2, 3, 4, 5, 31, 32, 33, 64, 127, 129, 256, 511, 512):
                if k <= features:
                    got = sf.ops.sae_encode(x.to(device), w.to(device), None, k)
                    assert_same(got, reference.sae_encode(x, w, None, k))


@pytest.mark.parametrize("place", [place for place in PLACES if place != "cpu"])
def test_every_block_of_rows_meets_every_tile(place, monkeypatch):
    """Groups of row blocks, the last of them smaller, cover the grid once."""
    from steerfast_kernels import sae_tiles

    monkeypatch.setattr(sae_tiles, "GROUP", 2)
    with backend(place) as device:
        x, w = torch.randint(-2, 3, (330, 8)).float(), torch.randint(-2, 3, (200, 8)).float()
        x, w = (x[:130], w[:130]) if place == "interpreter" else (x, w)
        for dtype in [F32] if place == "interpreter" else DTYPES:
            assert_same(
                sf.ops.sae_encode(x.to(device, dtype), w.to(device, dtype), None, 1),
                reference.sae_encode(x, w, None, 1),
            )


def test_a_tile_keeps_enough_or_is_repaired():
    """tiles · k' never falls below k, and what a tile can hide always has room."""
    sae_encode = pytest.importorskip("steerfast_kernels.sae_encode")
    for features in (1, 100, 1000, 4096, 16384, 65536, 1 << 20):
        for k in (1, 4, 5, 32, 64, 512):
            if k <= features:
                tiles, per_tile, hidden, slots = sae_encode.plan(features, k)
                assert tiles * per_tile >= k
                assert per_tile + hidden >= min(k, sae_encode.BLOCK_F)
                assert hidden == 0 or slots >= (k - 1) // per_tile


@pytest.mark.parametrize("place", PLACES)
def test_a_nan_stays_in_its_row(place):
    with backend(place) as device:
        x = torch.randn(4, 40, device=device)
        w, b = dictionary(200, 40, device)
        clean = sf.ops.sae_encode(x, w, b, 6)
        x[1, 3] = torch.nan
        values, indices = sf.ops.sae_encode(x, w, b, 6)
        assert values[1].isnan().all()
        assert indices[1].tolist() == list(range(6))
        others = torch.tensor([0, 2, 3], device=device)
        assert torch.equal(values[others], clean[0][others])
        assert torch.equal(indices[others], clean[1][others])
        back = sf.ops.sae_decode(values, indices, w)
        assert back[1].isnan().all()
        assert back[others].isfinite().all()


@pytest.mark.parametrize(
    "place", [place for place in PLACES if place != "cpu"]
)  # a BLAS may sum one row in another order
def test_a_row_does_not_depend_on_its_neighbours(place):
    with backend(place) as device:
        for dtype in [F32] if place == "interpreter" else DTYPES:
            n, features, k = (3, 200, 5) if place == "interpreter" else (300, 16384, 64)
            x = torch.randn(n, 72).to(device, dtype)
            w, b = dictionary(features, 72, device, dtype)
            values, indices = sf.ops.sae_encode(x, w, b, k)
            rows = sf.ops.sae_decode(values, indices, w, b[:72].clone())
            for i in range(0, n, 37 if n > 37 else 2):
                alone = sf.ops.sae_encode(x[i : i + 1], w, b, k)
                assert torch.equal(alone[0], values[i : i + 1])
                assert torch.equal(alone[1], indices[i : i + 1])
                assert torch.equal(sf.ops.sae_decode(*alone, w, b[:72].clone()), rows[i : i + 1])


@pytest.mark.parametrize("place", PLACES)
def test_layouts_and_mixed_dtypes(place):
    with backend(place) as device:
        shape = (2, 2, 24) if place == "interpreter" else (4, 3, 24)
        x, (w, b) = torch.randint(-2, 3, shape).float().to(device), dictionary(150, 24, device)
        w = (8 * w).round()
        wanted = reference.sae_encode(x, w, None, 9)
        views = {
            "transposed x": (x.transpose(0, 1).contiguous().transpose(0, 1), w),
            "strided x": (x.repeat_interleave(2, -1)[..., ::2], w),
            "an SAELens encoder, (d, F)": (x, w.T.contiguous().T),
            "float16 x": (x.half(), w),
            "float16 w": (x, w.half()),
        }
        for name, (x_view, w_view) in views.items():
            values, indices = sf.ops.sae_encode(x_view, w_view, None, 9)
            assert torch.equal(values.double(), wanted[0].to(device)), name
            assert torch.equal(indices, wanted[1].to(device)), name
        wide = sf.ops.sae_decode(values, indices, w)
        strided = sf.ops.sae_decode(values.repeat_interleave(2, -1)[..., ::2], indices.long(), w.T.contiguous().T)
        assert torch.equal(wide, strided)
        row = torch.randn(1, 24, device=device).expand(5, 24)
        values, indices = sf.ops.sae_encode(row, w, b, 4)
        assert torch.equal(values, values[:1].expand(5, 4))


def one_by_one(x: Tensor, w: Tensor) -> Tensor:
    """x Wᵀ as a float32 product sums it, feature by feature: in the order of d, one rounding an addition."""
    total = torch.zeros(x.shape[0], w.shape[0])
    for j in range(x.shape[1]):
        total = torch.addcmul(total, x[:, j : j + 1].float(), w[:, j].float())
    return total


@pytest.mark.parametrize("place", [place for place in PLACES if place != "cpu"])
@pytest.mark.parametrize(
    "pair", [("bfloat16", "float32"), ("float16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
def test_a_product_of_two_dtypes_errs_no_more_than_one_of_float32(place, pair):
    """Parts of bfloat16 on tensor cores, against float64: weights of one size, of many, tiny, huge; a few large columns of x."""
    n, d, features, k = (3, 256, 100, 4) if place == "interpreter" else (70, 2048, 512, 64)
    wide, tall = (getattr(torch, name) for name in pair)
    with backend(place) as device:
        for name in ("plain", "many sizes", "large columns", "tiny", "huge"):
            x, w = torch.randn(n, d), torch.randn(features, d) / d**0.5
            if name == "many sizes":
                w *= torch.exp(4 * torch.randn(features, d))
            elif name == "large columns":
                x[:, ::91] *= 1000
            elif name in ("tiny", "huge"):
                w *= 1e-30 if name == "tiny" else 1e30
            x, w = x.to(wide), w.to(tall)
            values, indices = (part.cpu() for part in sf.ops.sae_encode(x.to(device), w.to(device), None, k))
            true = reference.pre_activations(x, w, None)
            error = (values - true.gather(1, indices.long())).abs().max()
            allowed = (one_by_one(x, w).double() - true).abs().max()
            assert error <= allowed, f"{name}: error {error:.3e}, of float32 {allowed:.3e}"
            rounded = (x.bfloat16().double() @ w.bfloat16().double().T - true).abs().max()
            assert rounded > 10 * allowed or tall != F32, name  # one product of 16 bits would not do


@pytest.mark.parametrize("place", PLACES)
def test_decode_against_float64(place):
    sizes = [((5,), 1000, 72, 7), ((2, 3), 64, 33, 1), ((0,), 10, 8, 4)]
    if place != "interpreter":
        sizes += [((70,), 4096, 2304, 32), ((3,), 500, 576, 300)]
    with backend(place) as device:
        for shape, features, d, k in sizes:
            values = torch.rand(*shape, k)
            values[..., 1::3] = 0
            indices = torch.randint(0, features, (*shape, k), dtype=torch.int32)
            for dtype in (dtype for dtype in DTYPES if runs(place, dtype)):
                w, b = torch.randn(features, d).to(dtype), torch.randn(d).to(dtype)
                for bias in (b, None):
                    got = sf.ops.sae_decode(
                        *(t.to(device) for t in (values, indices, w)), None if bias is None else b.to(device)
                    )
                    true = reference.sae_decode(values, indices, w, bias)
                    naive = reference.naive(reference.sae_decode, values, indices, w, bias).to(dtype)
                    assert got.shape == (*shape, d)
                    if got.numel():
                        assert_exact(got, true, naive, f"{shape} {dtype}")


@pytest.mark.parametrize("place", [place for place in PLACES if place != "cpu"])
def test_an_index_outside_the_dictionary_is_seen(place):
    with backend(place) as device:
        values, indices = torch.ones(3, 2, device=device), torch.zeros(3, 2, dtype=torch.int32, device=device)
        indices[1, 1] = 5
        indices[2, 1] = -1
        values[2, 1] = 0  # nothing is read beside a zero
        out = sf.ops.sae_decode(values, indices, torch.ones(5, 20, device=device))
        assert out[0].eq(2).all()
        assert out[1].isnan().all()
        assert out[2].eq(1).all()


def test_an_index_outside_the_dictionary_is_an_error_on_pytorch():
    for dtype in DTYPES:
        with pytest.raises((IndexError, RuntimeError)):
            sf.ops.sae_decode(torch.ones(1, 1), torch.tensor([[5]]), torch.ones(5, 4, dtype=dtype))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        own = [
            t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor) and t._base is None
        ]
        self.numel = max([self.numel, *(t.numel() for t in own)])
        return out


@pytest.mark.parametrize("place", [place for place in PLACES if place != PLACES[1]])
def test_the_full_matrix_never_exists(place):
    with backend(place) as device, Largest() as largest:
        n, features = 256, 65536
        x, w = torch.randn(n, 16, device=device), torch.randn(features, 16, device=device)
        largest.numel = 0
        sf.ops.sae_encode(x, w, None, 32)
        sf.ops.sae_encode_threshold(x, w, None, torch.full((features,), 12.0, device=device), 256)
    assert largest.numel <= n * features / 8


def sorts_at_most(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sort takes the interpreter seconds: longer lists go to PyTorch's, as those of more than 1024 keys do."""
    from steerfast_kernels import sae_encode_threshold

    monkeypatch.setattr(sae_encode_threshold, "SELECT", keys)


@pytest.mark.parametrize("place", PLACES)
def test_threshold_against_float64(place, monkeypatch):
    """Every active feature and no other, sorted; what lies within rounding of its threshold may be either."""
    sizes = [((5, 72), 1000, 400), ((2, 3, 40), 300, 300), ((1, 24), 130, 130), ((0, 16), 40, 3)]
    if place != "interpreter":
        sizes += [((256, 576), 8192, 1024), ((3, 64), 16384, 2048), ((130, 128), 4097, 512)]
    else:
        sorts_at_most(64, monkeypatch)
    with backend(place) as device:
        for shape, features, capacity in sizes:
            for dtype in (dtype for dtype in DTYPES if runs(place, dtype)):
                x, (w, b) = torch.randn(shape).to(dtype), dictionary(features, shape[-1], "cpu", dtype)
                threshold = torch.rand(features) + 1.0
                values, indices, counts = sf.ops.sae_encode_threshold(
                    x.to(device), w.to(device), b.to(device), threshold.to(device), capacity
                )
                assert values.dtype == F32
                assert indices.dtype == counts.dtype == torch.int32
                assert counts.shape == shape[:-1]
                assert values.shape == indices.shape == (*shape[:-1], capacity)
                if not x.numel():
                    continue
                true = reference.pre_activations(x, w, b)
                naive = reference.naive(reference.pre_activations, x.float(), w, b)
                tolerance = 2 * (naive - true).abs().max().item() + true.abs().max().item() * torch.finfo(F32).eps
                values, indices, counts = (t.cpu() for t in (values, indices, counts))
                assert (counts <= capacity).all()
                found = torch.zeros_like(true).scatter_add_(-1, indices.long(), values.double())
                sure = (true - threshold).abs() > tolerance
                wanted = torch.where(true > threshold, true, 0)
                assert ((found - wanted).abs()[sure] <= tolerance).all()
                assert (values.diff(dim=-1) <= 0).all()
                assert torch.equal((values > 0).sum(-1), counts.long())
                assert (indices[values == 0] == 0).all()


@pytest.mark.parametrize("place", PLACES)
def test_threshold_ties_clusters_and_overflow_to_the_bit(place, monkeypatch):
    if place == "interpreter":
        sorts_at_most(32, monkeypatch)
    with backend(place) as device:
        for kind in KINDS:
            for features, d in [(330, 8)] if place == "interpreter" else [(650, 8), (5000, 24)]:
                x, w = integers(kind, features, d)
                threshold = (torch.arange(features) % 5).float()  # a product that equals its threshold is not active
                every = reference.sae_encode_threshold(x, w, None, threshold, features)[2]
                capacity = max(1, int(every.float().quantile(0.6)))
                wanted = reference.sae_encode_threshold(x, w, None, threshold, capacity)
                got = sf.ops.sae_encode_threshold(x.to(device), w.to(device), None, threshold.to(device), capacity)
                for ours, theirs in zip(got, wanted, strict=True):
                    torch.testing.assert_close(
                        ours.cpu(), theirs.to(ours.dtype), rtol=0, atol=0, equal_nan=True, msg=f"{kind} {features}"
                    )


@pytest.mark.parametrize("place", PLACES)
def test_threshold_keeps_a_nan_in_its_row_and_rows_apart(place):
    with backend(place) as device:
        n, features = (3, 200) if place == "interpreter" else (150, 4096)
        x, (w, b) = torch.randn(n, 40, device=device), dictionary(features, 40, device)
        threshold = torch.full((features,), 0.7, device=device)
        clean = sf.ops.sae_encode_threshold(x, w, b, threshold, features)
        x[1, 3] = torch.nan
        values, indices, counts = sf.ops.sae_encode_threshold(x, w, b, threshold, features)
        assert values[1].isnan().all()
        assert counts[1] == features
        others = torch.arange(n, device=device) != 1
        for got, wanted in zip((values, indices, counts), clean, strict=True):
            assert torch.equal(got[others], wanted[others])
        if place != "cpu":  # a BLAS may sum one row in another order
            alone = sf.ops.sae_encode_threshold(x[2:3], w, b, threshold, features)
            assert torch.equal(alone[0][0], values[2])


@pytest.mark.parametrize("place", PLACES)
def test_add_against_float64(place):
    sizes = [((5,), 1000, 72, 7), ((2, 3), 64, 33, 1), ((0,), 10, 8, 4)]
    if place != "interpreter":
        sizes += [((70,), 500, 1200, 32)]
    with backend(place) as device:
        for shape, features, d, k in sizes:
            values = torch.randn(*shape, k)
            indices = torch.randint(0, features, (*shape, k), dtype=torch.int32)
            n = max(1, values.numel() // k) if values.numel() else 0
            scale = torch.randn(n)
            scale[::3] = 0
            for dtype in (dtype for dtype in DTYPES if runs(place, dtype)):
                x, w = torch.randn(*shape, d).to(dtype), torch.randn(features, d).to(dtype)
                for weight in (scale, None):
                    tensors = [t.to(device) for t in (x, values, indices, w)]
                    got = sf.ops.sae_add(*tensors, None if weight is None else weight.to(device)).cpu()
                    spread = torch.ones(*shape, 1) if weight is None else weight.view(*shape, 1)
                    args = x, values, indices, w, weight
                    if got.numel():
                        naive = reference.naive(reference.sae_add, *args)
                        assert_exact(got, reference.sae_add(*args), naive, f"{shape} {dtype}")
                    untouched = (spread == 0).expand_as(x)
                    assert torch.equal(got[untouched], x[untouched])


# t(f) = clip(t₀f + t₁, t₂, t₃): set to 8, subtract 0.5, double, at most 0.5, at least 0.8
EDITS = torch.tensor(
    [
        [0.0, 8.0, -torch.inf, torch.inf],
        [1.0, -0.5, -torch.inf, torch.inf],
        [2.0, 0.0, -torch.inf, torch.inf],
        [1.0, 0.0, -torch.inf, 0.5],
        [1.0, 0.0, 0.8, torch.inf],
    ]
)


@pytest.mark.parametrize("place", PLACES)
def test_edit_against_float64(place):
    sizes = [((5,), 1000, 72, 7), ((2, 3), 64, 33, 12), ((0,), 10, 8, 4)]
    if place != "interpreter":
        sizes += [((70,), 500, 1200, 32)]
    with backend(place) as device:
        for shape, count, d, k in sizes:
            features = torch.tensor([3, 0, 1, 7, 5], dtype=torch.int32)
            indices = torch.stack([torch.randperm(count)[:k] for _ in range(max(1, torch.Size(shape).numel()))])
            indices = indices[: torch.Size(shape).numel()].view(*shape, k).int()
            values = torch.rand(*shape, k)
            values[..., k // 2 :] = 0  # what an encoder leaves where too few are active: value 0 at index 0
            indices[..., k // 2 :] = 0
            scale = torch.randn(torch.Size(shape).numel())
            scale[::3] = 0
            for dtype in (dtype for dtype in DTYPES if runs(place, dtype)):
                x, w = torch.randn(*shape, d).to(dtype), torch.randn(5, d).to(dtype)
                for weight in (scale, None):
                    tensors = [t.to(device) for t in (x, values, indices, features, EDITS, w)]
                    got = sf.ops.sae_edit(*tensors, None if weight is None else weight.to(device)).cpu()
                    args = x, values, indices, features, EDITS, w, weight
                    if got.numel():
                        naive = reference.naive(reference.sae_edit, *args)
                        assert_exact(got, reference.sae_edit(*args), naive, f"{shape} {dtype}")
                    if weight is not None:
                        untouched = (scale == 0).view(*shape, 1).expand_as(x)
                        assert torch.equal(got[untouched], x[untouched])


def edits_of(rows: int, features: int, count: int, by_row: bool, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features, their table and decoder rows, one list for all rows or one for each."""
    table = EDITS[torch.arange(count) % len(EDITS)]
    if not by_row:
        chosen = torch.randperm(features)[:count].int()
        return chosen, table, w[chosen.long()]
    chosen = torch.stack([torch.randperm(features)[:count] for _ in range(max(rows, 1))])[:rows].int()
    chosen[:, -1] = torch.where(torch.arange(rows) % 2 == 0, -1, chosen[:, -1])
    return chosen, table.expand(rows, count, 4).contiguous(), w


def counted_edit(x: Tensor, w: Tensor, b: Tensor | None, k: int, edit: tuple[Tensor, ...], device: str) -> Tensor:
    features, table, rows, *scale = (part.to(device) for part in edit)
    return sf.ops.sae_edit_topk(
        x.to(device), w.to(device), None if b is None else b.to(device), k, features, table, rows, *scale
    ).cpu()


@pytest.mark.parametrize("place", PLACES)
def test_a_counted_edit_against_float64(place):
    """Rows of which some feature lies near the k-th value may be either; most do not."""
    sizes = [((5, 72), 1000, 7, 3), ((2, 2, 33), 300, 40, 8), ((0, 16), 40, 3, 2)]
    if place != "interpreter":
        sizes += [((70, 120), 8192, 32, 8), ((1, 64), 16384, 512, 1)]
    with backend(place) as device:
        for (shape, features, k, count), by_row in [(size, by_row) for size in sizes for by_row in (False, True)]:
            n = torch.Size(shape[:-1]).numel()
            scale = torch.randn(n)
            scale[::3] = 0
            for dtype in [F32] if place == "interpreter" else DTYPES:
                x, (w, b) = torch.randn(shape).to(dtype), dictionary(features, shape[-1], "cpu", dtype)
                rows = torch.randn(features, shape[-1]).to(dtype)
                for weight in [scale] if place == "interpreter" else [scale, None]:
                    edit = (*edits_of(n, features, count, by_row, rows), *([] if weight is None else [weight]))
                    got = counted_edit(x, w, b, k, edit, device)
                    assert got.shape == shape
                    if not n:
                        continue
                    true = reference.sae_edit_topk(x, w, b, k, *edit)
                    naive = reference.naive(reference.sae_edit_topk, x, w, b, k, *edit)
                    pre = torch.relu(reference.pre_activations(x, w, b)).reshape(n, -1)
                    mine = pre.gather(1, edit[0].expand(n, count).long().clamp(min=0))
                    sure = ((mine - pre.topk(k).values[:, -1:]).abs() > 1e-4).all(1)
                    assert sure.sum() >= n // 2
                    flat = (part.reshape(n, -1)[sure] for part in (got, true, naive))
                    assert_exact(*flat, f"{shape} {dtype} {by_row}")
                    if weight is not None:
                        assert torch.equal(got.reshape(n, -1)[::3], x.reshape(n, -1)[::3])


@pytest.mark.parametrize("place", PLACES)
def test_a_counted_edit_selects_what_the_encoder_selects_to_the_bit(place):
    """Ties, clusters, few active features and features on either side of every tile: the sum is of whole numbers."""
    table = torch.tensor([[2.0, 1.0, -torch.inf, torch.inf]])  # g = f + 1: what is selected shows, and what is not
    with backend(place) as device:
        for kind in KINDS:
            for features, d, k in [(330, 8, 20)] if place == "interpreter" else [(650, 8, 20), (5000, 24, 64)]:
                x, w = integers(kind, features, d)
                pre = torch.relu(x @ w.T)
                kth = pre.topk(k).indices[:, -1]
                shared = torch.tensor([0, 1, 127, 128, 129, features - 1, features // 2, int(kth[0])])
                shared = shared.unique()[:8].int()
                own = torch.stack([kth, (kth + 1) % features, kth - 1], 1).int()
                for chosen, rows in (
                    (shared, torch.eye(len(shared), d)),
                    (own, torch.randint(-2, 3, (features, d)).float()),
                ):
                    if chosen.dim() == 1 and place == "interpreter" and kind in ("random", "ascending", "all equal"):
                        continue
                    edit = (chosen, table.expand(*chosen.shape, 4).contiguous(), rows)
                    for dtype in [F32] if place == "interpreter" else [F32, F16]:
                        got = counted_edit(x.to(dtype), w.to(dtype), None, k, (*edit[:2], rows.to(dtype)), device)
                        wanted = reference.sae_edit_topk(x, w, None, k, *edit)
                        assert torch.equal(got, wanted.to(dtype)), (kind, features, dtype, chosen.dim())


@pytest.mark.parametrize("place", PLACES)
def test_a_counted_edit_takes_the_kth_feature_and_not_the_next(place):
    """Where the two are further apart than a product rounds, whichever way the feature's own was summed."""
    n, d, features, k = (6, 40, 300, 7) if place == "interpreter" else (64, 200, 2000, 32)
    table = torch.tensor([[2.0, 1.0, -torch.inf, torch.inf]]).expand(n, 3, 4).contiguous()
    with backend(place) as device:
        for dtype in [F32] if place == "interpreter" else DTYPES:
            x, (w, b), rows = (
                torch.randn(n, d).to(dtype),
                dictionary(features, d, "cpu", dtype),
                torch.randn(features, d),
            )
            best = reference.pre_activations(x, w, b).topk(k + 1)
            chosen = best.indices[:, [0, k - 1, k]].int()
            sure = (best.values[:, k - 1] - best.values[:, k]) > 1e-4
            assert sure.sum() > n // 2
            got = counted_edit(x.float(), w, b, k, (chosen, table, rows), device)
            true = reference.sae_edit_topk(x, w, b, k, chosen, table, rows)
            torch.testing.assert_close(got[sure].double(), true[sure], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", PLACES)
def test_a_counted_edit_of_a_row_that_is_not_a_number(place):
    """Every feature of it is NaN, so the first k are selected; other rows never hear of it."""
    with backend(place) as device:
        x, (w, b) = torch.randn(4, 24), dictionary(200, 24, "cpu")
        features, table = torch.tensor([[2, -1], [2, 7], [9, 200], [9, 150]]).int(), torch.zeros(4, 2, 4)
        table[..., 1], table[..., 2], table[..., 3] = 3.0, -torch.inf, torch.inf
        clean = counted_edit(x, w, b, 5, (features, table, w), device)
        assert clean[2].isnan().all()  # there is no feature 200
        assert clean[[0, 1, 3]].isfinite().all()
        bad = x.clone()
        bad[1, 3] = torch.nan
        got = counted_edit(bad, w, b, 5, (features, table, w), device)
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 3]], clean[[0, 3]])
        encoded = sf.ops.sae_encode(x.to(device), w.to(device), b.to(device), 5)
        one = sf.ops.sae_edit(
            x[3:].to(device), *(part[3:] for part in encoded), features[3].to(device), table[3].to(device),
            w[features[3].long()].to(device),
        )  # fmt: skip
        torch.testing.assert_close(got[3:], one.cpu(), atol=1e-5, rtol=1e-5)


def test_a_counted_edit_has_the_gradients_of_the_selected_one():
    x, (w, b), rows = torch.randn(3, 5, dtype=F64), dictionary(30, 5, "cpu", F64), torch.randn(30, 5, dtype=F64)
    leaves = [leaf.requires_grad_() for leaf in (x, w, b, rows)]
    table = torch.tensor([[2.0, 1.0, -torch.inf, torch.inf]])
    for features in (torch.tensor([1, 4]).int(), torch.tensor([[1, 4], [2, -1], [7, 1]]).int()):
        spread = table.expand(*features.shape, 4).contiguous()

        def run(x: Tensor, w: Tensor, b: Tensor, rows: Tensor, features=features, spread=spread) -> Tensor:
            part = rows[features.long()] if features.dim() == 1 else rows
            return sf.ops.sae_edit_topk(x, w, b, 4, features, spread, part)

        assert torch.autograd.gradcheck(run, leaves)
        with torch.no_grad():
            torch.testing.assert_close(
                run(*leaves),
                reference.sae_edit_topk(
                    x, w, b, 4, features, spread, rows[features.long()] if features.dim() == 1 else rows
                ),
                atol=1e-12,
                rtol=0,
            )


@pytest.mark.parametrize("place", PLACES)
def test_an_overflow_reaches_the_edited_row(place):
    """The mark of a list that was too short is not lost in an edit of features that the list does not show."""
    with backend(place) as device:
        x, w = torch.randn(3, 8, device=device), torch.randn(2, 8, device=device)
        values, indices = torch.ones(3, 2, device=device), torch.zeros(3, 2, dtype=torch.int32, device=device)
        values[1] = torch.nan
        features = torch.tensor([4, 5], dtype=torch.int32, device=device)
        out = sf.ops.sae_edit(x, values, indices, features, EDITS[:2].to(device), w)
        assert out[1].isnan().all()
        assert out[::2].isfinite().all()


def test_float64_stays_float64():
    x, (w, b) = torch.randn(6, 40, dtype=F64), dictionary(500, 40, "cpu", F64)
    values, indices = sf.ops.sae_encode(x, w, b, 9)
    wanted = reference.sae_encode(x, w, b, 9)
    assert values.dtype == F64
    torch.testing.assert_close(values, wanted[0], atol=1e-14, rtol=1e-14)
    assert torch.equal(indices, wanted[1])
    decoded = reference.sae_decode(values, indices, w)
    torch.testing.assert_close(sf.ops.sae_decode(values, indices, w), decoded, atol=1e-14, rtol=1e-14)


def test_gradients():
    x, (w, b) = torch.randn(3, 5, dtype=F64), dictionary(30, 5, "cpu", F64)
    for leaf in (x, w, b):
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b: sf.ops.sae_encode(x, w, b, 4)[0], (x, w, b))
    threshold = torch.full((30,), 0.3, dtype=F64)
    assert torch.autograd.gradcheck(lambda x, w, b: sf.ops.sae_encode_threshold(x, w, b, threshold, 30)[0], (x, w, b))
    values, indices = (part.detach() for part in sf.ops.sae_encode(x, w, b, 4))
    bias = torch.randn(5, dtype=F64, requires_grad=True)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w, b: sf.ops.sae_decode(v, indices, w, b), (values, w, bias))
    scale = torch.tensor([0.5, -1.0, 2.0], dtype=F64, requires_grad=True)
    run = torch.ops.steerfast.sae_add  # the public op takes its scale in float32, too coarse for gradcheck
    assert torch.autograd.gradcheck(
        lambda *leaves: run(leaves[0], leaves[1], indices, *leaves[2:]), (x, values, w, scale)
    )
    assert torch.autograd.gradcheck(lambda x, v, w: sf.ops.sae_add(x, v, indices, w), (x, values, w))
    features, rows = indices.unique()[:5].int(), torch.randn(5, 5, dtype=F64, requires_grad=True)
    edit = torch.ops.steerfast.sae_edit
    table = EDITS.double()
    leaves = (x, values, rows, scale)
    assert torch.autograd.gradcheck(lambda x, v, r, s: edit(x, v, indices, features, table, r, s), leaves)


def test_gradients_are_the_dense_ones_and_the_same_every_time():
    """In float32, many tokens to a feature: the order of every sum is fixed, whatever runs beside it."""
    x, (w, b), w_dec = torch.randn(512, 24), dictionary(300, 24, "cpu"), torch.randn(300, 24)

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w, b, w_dec)]
        values, indices = sf.ops.sae_encode(*leaves[:3], 16)
        (sf.ops.sae_decode(values, indices, leaves[3]) - x).square().mean().backward()
        return [leaf.grad for leaf in leaves]

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for again, once in zip(run(), first, strict=True):
                assert torch.equal(again, once)
    finally:
        torch.set_num_threads(threads)
    leaves = [t.double().requires_grad_() for t in (x, w, b, w_dec)]
    pre = torch.relu(leaves[0] @ leaves[1].T + leaves[2])
    kept = pre * (pre >= pre.topk(16).values[:, -1:])
    (kept @ leaves[3] - x).square().mean().backward()
    for grad, leaf in zip(first, leaves, strict=True):
        torch.testing.assert_close(grad.double(), leaf.grad, atol=1e-6, rtol=1e-4)


def test_the_backward_never_holds_a_row_per_feature_and_token():
    n, k, d = 512, 32, 64
    x, (w, b) = torch.randn(n, d), dictionary(200, d, "cpu")
    w.requires_grad_()
    values, indices = sf.ops.sae_encode(x, w, b, k)
    with Largest() as largest:
        sf.ops.sae_decode(values, indices, w).sum().backward()
    assert largest.numel <= n * k * d / 8


@pytest.mark.parametrize("grad", [False, True])
def test_torch_library_contract(grad):
    x, (w, b) = torch.randn(2, 3, 16), dictionary(90, 16, "cpu")
    values, indices = sf.ops.sae_encode(x, w, b, 5)
    for tensor in (x, w, values):
        tensor.requires_grad_(grad)
    torch.library.opcheck(torch.ops.steerfast.sae_encode.default, (x, w, b, 5))
    torch.library.opcheck(torch.ops.steerfast.sae_encode.default, (x, w, None, 5))
    torch.library.opcheck(torch.ops.steerfast.sae_decode.default, (values, indices, w, b[:16].clone()))
    torch.library.opcheck(torch.ops.steerfast.sae_decode.default, (values, indices, w, None))
    threshold, scale = torch.full((90,), 0.5), torch.randn(6)
    torch.library.opcheck(torch.ops.steerfast.sae_encode_threshold.default, (x, w, b, threshold, 90))
    torch.library.opcheck(torch.ops.steerfast.sae_add.default, (x, values, indices, w, scale))
    torch.library.opcheck(torch.ops.steerfast.sae_add.default, (x, values, indices, w, None))
    edit = (x, values, indices, torch.arange(5, dtype=torch.int32), EDITS, torch.randn(5, 16))
    torch.library.opcheck(torch.ops.steerfast.sae_edit.default, (*edit, scale))
    torch.library.opcheck(torch.ops.steerfast.sae_edit.default, (*edit, None))
    if not grad:  # with a gradient it is made of the other ops
        counted = (x, w, b, 5, torch.arange(5, dtype=torch.int32), EDITS, torch.randn(5, 16), scale)
        torch.library.opcheck(torch.ops.steerfast.sae_edit_topk.default, counted)


@pytest.mark.parametrize("place", [place for place in PLACES if place != PLACES[1]])
def test_compiled_without_a_graph_break(place):
    with backend(place) as device:
        x, (w, b) = torch.randn(2, 3, 16, device=device), dictionary(500, 16, device)

        def round_trip(x: Tensor) -> Tensor:
            values, indices = sf.ops.sae_encode(x * 2, w, b, 5)
            return sf.ops.sae_decode(values, indices, w) + 1

        torch._dynamo.reset()
        compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), round_trip(x), atol=0, rtol=0)
        leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled(leaves[0]).sum().backward()
        round_trip(leaves[1]).sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


X, W = torch.zeros(2, 4), torch.zeros(6, 4)
V, J, T = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sf.ops.sae_encode(X, W, None, 0), ValueError, "k is 0; expected 1 to F = 6"),
        (lambda: sf.ops.sae_encode(X, W, None, 7), ValueError, "k is 7; expected 1 to F = 6"),
        (lambda: sf.ops.sae_encode(X, W, None, 2.0), TypeError, "k must be a whole number; got 2.0"),
        (lambda: sf.ops.sae_encode(X.int(), W, None, 2), TypeError, "x has dtype torch.int32"),
        (lambda: sf.ops.sae_encode(X, W.T, None, 2), ValueError, r"w_enc has shape \(4, 6\)"),
        (lambda: sf.ops.sae_encode(X, W[0], None, 2), ValueError, r"w_enc has shape \(4,\); expected \(F, d\)"),
        (lambda: sf.ops.sae_encode(X, W, torch.zeros(4), 2), ValueError, r"b_enc has shape \(4,\); expected \(6,\)"),
        (lambda: sf.ops.sae_decode(V, J.float(), W), TypeError, "indices has dtype torch.float32"),
        (lambda: sf.ops.sae_decode(V, J[:1], W), ValueError, r"indices has shape \(1, 3\) and values \(2, 3\)"),
        (lambda: sf.ops.sae_decode(V, J, W, torch.zeros(6)), ValueError, r"b_dec has shape \(6,\); expected \(4,\)"),
        (lambda: sf.ops.sae_decode(V[:, :0], J[:, :0], W), ValueError, r"values has shape \(2, 0\)"),
        (lambda: sf.ops.sae_encode_threshold(X, W, None, T, 0), ValueError, "capacity is 0; expected 1 to F = 6"),
        (lambda: sf.ops.sae_encode_threshold(X, W, None, 0.5, 3), TypeError, r"threshold is 0.5; expected a floating"),
        (lambda: sf.ops.sae_encode_threshold(X, W, None, T[:5], 3), TypeError, r"threshold is torch.float32 \(5,\)"),
        (lambda: sf.ops.sae_add(X[:1], V, J, W), ValueError, r"x has shape \(1, 4\); expected \(2, 4\)"),
        (lambda: sf.ops.sae_add(X, V, J, W, V), ValueError, r"scale has shape \(2, 3\)"),
        (lambda: sf.ops.sae_edit(X, V, J, J[0], EDITS[:3], W), TypeError, r"features is torch.int32 \(3,\); expected"),
        (lambda: sf.ops.sae_edit(X, V, J, J[0], EDITS[:2], W[:3]), TypeError, r"table is torch.float32 \(2, 4\)"),
        (
            lambda: sf.ops.sae_edit_topk(X, W, None, 7, J[0], EDITS[:3], W[:3]),
            ValueError,
            "k is 7; expected 1 to F = 6",
        ),
        (lambda: sf.ops.sae_edit_topk(X, W, None, 2, J[0], EDITS[:3], W), ValueError, r"w_dec is \(6, 4\) .* \(3, 4\)"),
        (lambda: sf.ops.sae_edit_topk(X, W, None, 2, J, EDITS[:3], W), TypeError, r"table is .* \(2, 3, 4\)"),
        (lambda: sf.ops.sae_edit_topk(X, W, None, 2, T.int().repeat(2), EDITS, W), ValueError, "features names 12 of"),
        (lambda: sf.ops.sae_edit_topk(X, W, None, 2, T, EDITS, W), TypeError, "features is torch.float32"),
        (lambda: sf.ops.sae_edit(X, V.int(), J, J[0], EDITS[:3], W[:3]), TypeError, "values must be a floating tensor"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
