"""The SAE object: one form for all families, dense and sparse roads that agree, its own file."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import steerfast as sf
from steerfast.edits.features import Features
from steerfast.edits.selected import SelectedFeatures
from steerfast.files import replace as _files
from steerfast.place import Origin
from steerfast.sae.model import Source

F64 = torch.float64
NORMALISATIONS = ["none", "constant_norm_rescale", "layer_norm"]


def make(k: int | None = 7, normalisation: str = "none", dtype: torch.dtype = F64, features: int = 90) -> sf.SAE:
    """An SAE with every part in use; without k, a threshold per feature."""
    w_enc, w_dec = (torch.randn(features, 24, dtype=dtype) for _ in range(2))
    b_enc, b_dec = torch.randn(features, dtype=dtype), torch.randn(24, dtype=dtype)
    threshold = None if k is not None else torch.rand(features, dtype=dtype)
    return sf.SAE(
        w_enc,
        w_dec,
        b_enc,
        b_dec,
        k,
        threshold,
        normalisation,
        Origin("m", ("resid_pre", 3)),
        Source("steerfast", "here", "m"),
    )


def naive(sae: sf.SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(features, reconstruction) from the definition, dense, one row after another."""
    features, rebuilt = [], []
    for row in x.reshape(-1, sae.d):
        mean, length = 0.0, 1.0
        inner = row
        if sae.normalisation == "constant_norm_rescale":
            length = row.square().sum().sqrt() / sae.d**0.5
            inner = row / length
        elif sae.normalisation == "layer_norm":
            mean = row.mean()
            length = ((row - mean).square().sum() / (sae.d - 1)).sqrt()
            inner = (row - mean) / (length + 1e-5)
        h = sae.w_enc @ inner + sae.b_enc
        if sae.k is None:
            f = torch.where(h > sae.threshold, h, 0)
        else:
            f = torch.zeros_like(h)
            best = torch.relu(h).topk(sae.k).indices
            f[best] = torch.relu(h)[best]
        features.append(f)
        rebuilt.append((f @ sae.w_dec + sae.b_dec) * length + mean)
    return torch.stack(features).view(*x.shape[:-1], -1), torch.stack(rebuilt).view(x.shape)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("k", [7, 90, None])
def test_both_roads_follow_the_definition(k, normalisation):
    sae, x = make(k, normalisation), torch.randn(3, 4, 24, dtype=F64)
    features, rebuilt = naive(sae, x)
    torch.testing.assert_close(sae.encode(x), features, atol=1e-12, rtol=1e-12)
    values, indices = sae.topk(x)
    assert values.shape[-1] == ((features > 0).sum(-1).max() if k is None else k)
    dense = torch.zeros_like(features).scatter_add_(-1, indices.long(), values)
    torch.testing.assert_close(dense, features, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sae.decode_topk(values, indices, x), rebuilt, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sae.decode(features, x), rebuilt, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sae(x), rebuilt, atol=1e-12, rtol=1e-12)


def test_an_unused_place_does_not_erase_feature_zero():
    """Fewer than k active features leave value 0 at index 0, and feature 0 may be active."""
    sae = sf.SAE(torch.eye(5), torch.eye(5), k=3)
    assert sae.encode(torch.tensor([2.0, -1, -1, -1, -1])).tolist() == [2, 0, 0, 0, 0]


def test_a_threshold_is_strict_and_more_active_features_than_expected_are_all_found():
    sae = sf.SAE(torch.eye(300), torch.eye(300), threshold=torch.full((300,), 0.5))
    x = torch.linspace(0, 1, 301)[1:]
    x[0] = 0.5
    values, indices = sae.topk(x)
    assert values.shape == ((x > 0.5).sum(),)
    assert indices[0] == 299
    assert torch.equal(sae.encode(x), torch.where(x > 0.5, x, 0))
    assert sae.topk(torch.zeros(2, 300))[0].tolist() == [[0.0], [0.0]]
    assert sae.topk(torch.zeros(0, 300))[0].shape == (0, 1)


def test_a_normalised_row_is_not_decoded_without_itself():
    sae, x = make(7, "layer_norm"), torch.randn(2, 24, dtype=F64)
    with pytest.raises(
        ValueError, match=r"SAE.decode_topk: this SAE normalises each row \(layer_norm\); pass the rows as x="
    ):
        sae.decode_topk(*sae.topk(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_rows_of_16_bits_are_rebuilt_in_the_numbers_of_the_sae(normalisation, dtype):
    sae, x = make(7, normalisation, torch.float32), (torch.randn(50, 24) + 3).to(dtype)
    _, rebuilt = naive(sae.to(dtype=F64), x.double())
    for out in (sae(x), sae.decode(sae.encode(x), x)):
        torch.testing.assert_close(out.double(), rebuilt, atol=1e-4, rtol=1e-5)
    narrow = sae.to(dtype=dtype)
    assert narrow(x).dtype == dtype


def test_the_approximate_form_differs_only_in_its_selection():
    sae, x = make(7), torch.randn(50, 24, dtype=F64)
    theta = sae.topk(x)[0][:, -1].mean().item()
    cheap = sae.approximate(theta)
    h = x @ sae.w_enc.T + sae.b_enc
    torch.testing.assert_close(cheap.encode(x), torch.where(h > theta, h, 0), atol=1e-12, rtol=1e-12)
    assert isinstance(sae.rows([1]), SelectedFeatures)
    assert isinstance(cheap.rows([1]), Features)
    assert cheap.place == sae.place
    with pytest.raises(ValueError, match="has a threshold already"):
        cheap.approximate(0.0)


def test_matrices_take_the_dtype_and_biases_stay_wide():
    sae = make(7, dtype=torch.float32).to(dtype=torch.bfloat16)
    assert sae.w_enc.dtype == sae.w_dec.dtype == torch.bfloat16
    assert sae.b_enc.dtype == sae.b_dec.dtype == torch.float32
    x = torch.randn(3, 24)
    wide = sae.to(dtype=torch.float32)
    torch.testing.assert_close(sae.encode(x.bfloat16()), wide.encode(x.bfloat16().float()), atol=1e-4, rtol=1e-4)
    assert sae.encode(x.bfloat16()).dtype == torch.float32
    assert sae(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("k", [7, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_own_file_round_trip(tmp_path, k, normalisation, dtype):
    sae = make(k, normalisation, torch.float32 if dtype == torch.bfloat16 else dtype).to(dtype=dtype)
    back = sf.SAE.load(sae.save(tmp_path / "sae"))
    assert {n: t.dtype for n, t in back.tensors().items()} == {n: t.dtype for n, t in sae.tensors().items()}
    for name, tensor in sae.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
    assert (back.k, back.normalisation, back.origin) == (sae.k, sae.normalisation, sae.origin)
    assert repr(back) == repr(sae)
    assert torch.equal(sf.SAE.load(tmp_path / "sae" / "sae.safetensors").w_enc, sae.w_enc)


def test_a_tied_sae_is_written_once(tmp_path):
    w = torch.randn(50, 8)
    path = sf.SAE(w, w, k=3).save(tmp_path)
    assert "w_dec" not in load_file(path / "sae.safetensors")
    back = sf.SAE.load(path)
    assert back.w_dec.data_ptr() == back.w_enc.data_ptr()


SQUARE, WIDE = torch.randn(8, 8), torch.randn(50, 16)
VIEWS = [(SQUARE, SQUARE.T), (WIDE[:, :8], WIDE.view(100, 8)[:50])]


@pytest.mark.parametrize(("encoder", "decoder"), VIEWS)
def test_two_matrices_in_one_memory_are_not_tied(encoder, decoder, tmp_path):
    """Two views that begin at one address are two matrices; a file that lost one of them is refused."""
    made = sf.SAE(encoder, decoder, k=3)
    back = sf.SAE.load(made.save(tmp_path))
    assert torch.equal(back.w_dec, made.w_dec)
    assert back.fingerprint == made.fingerprint
    sf.SAE(encoder, encoder, k=3).save(tmp_path)
    text = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(text | {"fingerprint": made.fingerprint}))
    with pytest.raises(ValueError, match=r"SAE.load: .*sae.safetensors lacks w_dec, which was not w_enc in the SAE"):
        sf.SAE.load(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    first, second = make(7), make(5)
    first.save(tmp_path)

    def full(self: object, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_files.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        second.save(tmp_path)
    monkeypatch.undo()
    assert torch.equal(sf.SAE.load(tmp_path).w_enc, first.w_enc)
    assert sorted(os.listdir(tmp_path)) == ["sae.json", "sae.safetensors"]


def change(path, **settings):
    file = path / "sae.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: change(path, schema=9),
            "schema 9, newer than this version of steerfast, which reads 1 to 3: upgrade it",
        ),
        (lambda path: change(path, kind="other"), 'is not an SAE \\("kind" is not "steerfast.sae"\\)'),
        (lambda path: change(path, extra=1), "has keys"),
        (lambda path: change(path, k=91), "k is 91; expected 1 to F = 90"),
        (lambda path: change(path, features=89), r"'w_enc' has shape \(90, 24\); sae.json says \(89, 24\)"),
        (lambda path: change(path, origin={"place": ["nowhere", 1]}), "site is 'nowhere'"),
        (lambda path: (path / "sae.json").write_text("{"), "is not JSON"),
        (lambda path: save_file({"w_enc": torch.ones(90, 24)}, path / "sae.safetensors"), "copy both again"),
        (
            lambda path: save_file(make().tensors(), path / "sae.safetensors"),
            "not the file that sae.json beside it was written with",
        ),
        (
            lambda path: (path / "sae.safetensors").write_bytes((path / "sae.safetensors").read_bytes()[:-9]),
            "copy both again",
        ),
    ],
)
def test_a_damaged_own_file_is_refused(tmp_path, damage, message):
    make(7).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(tmp_path)


W, B = torch.randn(6, 4), torch.randn(6)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: sf.SAE(W, W.T, k=2),
            ValueError,
            r"w_dec has shape \(4, 6\) and w_enc \(6, 4\); expected \(F, d\) for both",
        ),
        (lambda: sf.SAE(W, W, k=7), ValueError, "k is 7; expected 1 to F = 6"),
        (lambda: sf.SAE(W, W, k=0), ValueError, "k is 0; expected 1 to F = 6"),
        (lambda: sf.SAE(W, W, k=2.0), TypeError, "k must be a whole number; got 2.0"),
        (lambda: sf.SAE(W, W, k=2, threshold=B.abs()), ValueError, "k and threshold are both given"),
        (lambda: sf.SAE(W, W, threshold=-B.abs()), ValueError, "threshold is negative"),
        (
            lambda: sf.SAE(W, W, threshold=torch.zeros(6, dtype=torch.int64)),
            TypeError,
            "threshold has dtype torch.int64",
        ),
        (lambda: sf.SAE(W, W, threshold=0.5), TypeError, r"threshold is float; expected a floating tensor \(F,\)"),
        (lambda: sf.SAE(W, W, [0.0] * 6), TypeError, "b_enc must be a tensor; got list"),
        (lambda: sf.SAE(W, W, threshold=B[:5].abs()), ValueError, r"threshold has shape \(5,\); expected \(6,\)"),
        (lambda: sf.SAE(W, W, B[:5]), ValueError, r"b_enc has shape \(5,\); expected \(6,\)"),
        (lambda: sf.SAE(W, W * torch.nan), ValueError, "w_dec holds NaN or Inf"),
        (lambda: sf.SAE(W, W, normalisation="batch"), ValueError, "normalisation is 'batch'; expected one of 'none'"),
        (lambda: sf.SAE(W.int(), W), TypeError, "w_enc has dtype torch.int32"),
        (lambda: sf.SAE(W, W, origin=Origin(place=("middle", 3))), ValueError, "site is 'middle'; expected one of"),
        (lambda: sf.SAE(W, W, origin=Origin(place=("resid_pre", -1))), ValueError, "layer is -1"),
        (
            lambda: sf.SAE(W, W).encode(torch.ones(3)),
            ValueError,
            r"SAE.encode: x has shape \(3,\); expected \(..., d\)",
        ),
        (lambda: sf.SAE(W, W).decode(torch.ones(3)), ValueError, r"features has shape \(3,\).*with F = 6"),
        (lambda: sf.SAE(W, W).decode(torch.ones(2, 6, dtype=torch.int64)), TypeError, "features has dtype torch.int64"),
        (lambda: sf.SAE(W, W).decode([1.0] * 6), TypeError, "features is list; expected a floating tensor"),
        (lambda: sf.SAE(W, W).decode_topk(B[:1], [3]), TypeError, "indices is list; expected a tensor of torch.int32"),
        (lambda: sf.SAE(W, W).rows([6]), ValueError, "feature 6 is out of range; there are 6, from 0"),
        (lambda: sf.SAE(W, W, k=2).approximate(-1.0), ValueError, "threshold is negative"),
        (lambda: sf.SAE.load("/nowhere/at/all"), FileNotFoundError, "does not exist"),
    ],
)
def test_bad_input_is_named(build, error, message):
    with pytest.raises(error, match=message):
        build()
