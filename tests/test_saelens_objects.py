"""SAELens's own objects to and from ours, where sae-lens is installed; our files in its hands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import steerfast as sf
from steerfast.place import Origin
from steerfast.sae.formats import save_saelens

ROOT = Path(__file__).parent / "data" / "saes"
EXPECTED = sorted(path.parent for path in ROOT.rglob("expected.safetensors"))
GIVEN = {"llamascopium-jumprelu-folded": {"scale": 1.0}}
TOP_K_TRANSCODERS = [
    path for path in EXPECTED if path.relative_to(ROOT).parts[0] in ("sparsify-transcoder", "sparsify-skip-transcoder")
]


def load(path: Path) -> sf.SAE:
    return sf.SAE.load(path, **GIVEN.get(path.relative_to(ROOT).as_posix(), {}))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [path for path in EXPECTED if path not in TOP_K_TRANSCODERS], ids=name)
def test_saelens_computes_what_we_compute_from_our_file_and_from_the_object(path, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = load(path), load_file(path / "expected.safetensors")["x"]
    for theirs in (sae_lens.SAE.load_from_disk(save_saelens(sae, tmp_path)), sae.to_saelens()):
        assert isinstance(theirs, sae_lens.SAE)
        torch.testing.assert_close(theirs.encode(x).detach(), sae.encode(x), atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(theirs(x).detach(), sae(x), atol=2e-5, rtol=2e-5)
        back = sf.SAE.from_saelens(theirs)
        assert torch.equal(back.encode(x), sae.encode(x))
        assert torch.equal(back(x), sae(x))
        assert type(back) is type(sae)
        assert back.place == sae.place
    theirs.W_dec.data.zero_()  # nothing is shared
    assert torch.equal(back(x), sae(x))


def test_sixteen_bits_become_float32_so_that_nothing_is_rounded():
    """SAELens keeps one dtype: in that of the matrices the folded biases would be rounded, and the rows with them."""
    sae_lens = pytest.importorskip("sae_lens")
    sae = sf.SAE(torch.randn(40, 12).bfloat16(), torch.randn(40, 12).bfloat16(), torch.randn(40), torch.randn(12), k=5)
    theirs, x = sae.to_saelens(), torch.randn(9, 12)
    assert isinstance(theirs, sae_lens.TopKSAE)
    assert theirs.W_enc.dtype == torch.float32
    torch.testing.assert_close(theirs.encode(x).detach(), sae.encode(x), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("path", TOP_K_TRANSCODERS, ids=name)
def test_saelens_has_no_top_k_transcoder(path, tmp_path):
    with pytest.raises(ValueError, match="save_saelens: SAELens has no Top-K transcoder"):
        save_saelens(load(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_sae_of_saelens_is_refused():
    with pytest.raises(TypeError, match=r"SAE.from_saelens: expected an SAE of SAELens; got Linear"):
        sf.SAE.from_saelens(torch.nn.Linear(2, 3))


def test_an_object_needs_saelens(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"SAE.to_saelens: sae-lens cannot be imported .*: pip install sae-lens"):
        sf.SAE(torch.ones(3, 2), torch.ones(3, 2)).to_saelens()


def test_the_kinds_that_no_selection_does_are_refused_by_name():
    sae_lens = pytest.importorskip("sae_lens")
    base = {"d_in": 8, "d_sae": 20, "dtype": "float32", "device": "cpu"}
    pursuit = sae_lens.SAE.from_dict({**base, "architecture": "matching_pursuit"})
    with pytest.raises(ValueError, match="architecture 'matching_pursuit': it finds its features one after another"):
        sf.SAE.from_saelens(pursuit)
    temporal = sae_lens.SAE.from_dict(
        {**base, "architecture": "temporal", "n_heads": 2, "bottleneck_factor": 1, "kval_topk": 3}
    )
    with pytest.raises(ValueError, match="architecture 'temporal': it attends across the tokens"):
        sf.SAE.from_saelens(temporal)


def test_the_scale_of_an_object_in_training_is_not_guessed(tmp_path, monkeypatch):
    """Its scaler lies beside a checkpoint, not in the object; whatever lies in the working directory is not its own."""
    sae_lens = pytest.importorskip("sae_lens")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    settings = {"d_in": 8, "d_sae": 20, "architecture": "standard", "normalize_activations": "expected_average_only_in"}
    with pytest.raises(ValueError, match=r"so it was trained on s·x, and there is no activation_scaler.json with s"):
        sf.SAE.from_saelens(sae_lens.SAE.from_dict({**settings, "dtype": "float32", "device": "cpu"}))


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "skip"])
def test_an_object_of_ours_survives_the_way_there_and_back(kind):
    pytest.importorskip("sae_lens")
    w, b, origin = torch.randn(40, 12), torch.randn(40), Origin(place=("mlp_out", 3))
    made = {
        "relu": lambda: sf.SAE(w, w.flip(0), b, origin=origin),
        "topk": lambda: sf.SAE(w, w.flip(0), b, k=4, origin=origin),
        "jumprelu": lambda: sf.SAE(w, w.flip(0), b, threshold=b.abs(), origin=origin),
        "skip": lambda: sf.sae.Transcoder(
            w, w[:, :7].clone(), b, threshold=b.abs(), w_skip=torch.randn(7, 12), origin=origin
        ),
    }[kind]()
    back = sf.SAE.from_saelens(made.to_saelens())
    assert back.fingerprint == made.fingerprint
    assert (back.place, type(back)) == (made.place, type(made))
