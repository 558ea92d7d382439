"""SAEs by the name of their release, from a cache of the hub laid out on disk; what is missing is named."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import steerfast as sf
from steerfast.sae.formats import releases

SAES = Path(__file__).parent / "data" / "saes"
LIST = """
gemma-scope-2b-pt-res:
  conversion_func: gemma_2
  model: gemma-2-2b
  repo_id: google/gemma-scope-2b-pt-res
  saes:
  - {id: layer_20/width_16k/average_l0_71, l0: 71, path: layer_20/width_16k/average_l0_71,
     neuronpedia: gemma-2-2b/20-gemmascope-res-16k}
  - {id: layer_20/width_65k/average_l0_61, path: layer_20/width_65k/average_l0_61}
  - {id: embedding/width_4k/average_l0_6, path: embedding/width_4k/average_l0_6}
qwen-scope-3-1.7b-base-w32k-l3:
  conversion_func: qwen_scope
  model: Qwen/Qwen3-1.7B-Base
  repo_id: Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3
  saes:
  - {id: layer5, l0: 3, path: layer5.sae.pt}
gpt2-small-mlp-tm:
  conversion_func: null
  model: gpt2-small
  repo_id: someone/gpt2-small-mlp-out-saes
  config_overrides: {model_from_pretrained_kwargs: {center_writing_weights: false}, model_name: gpt2-small}
  saes:
  - {id: blocks.0.hook_mlp_out, norm_scaling_factor: 0.5, path: "0:v1"}
twins:
  repo_id: someone/twins
  saes:
  - {id: a, path: a, neuronpedia: m/1-x}
  - {id: b, path: b, neuronpedia: m/1-x}
several-att:
  repo_id: someone/several
  saes:
  - {id: layer_4, path: att/layer_4}
several-res:
  repo_id: someone/several
  saes:
  - {id: layer_4, path: res/layer_4, neuronpedia: m/4-several}
temporal-sae-gemma-2-2b:
  conversion_func: temporal
  repo_id: canrager/temporalSAEs
  saes:
  - {id: blocks.12.hook_resid_post, path: gemma-2-2B/layer_12/temporal}
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for module in ("file_download", "_snapshot_download"):
        loaded = sys.modules.get(f"huggingface_hub.{module}")
        if loaded is not None and hasattr(loaded, "HF_HUB_CACHE"):
            monkeypatch.setattr(loaded, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A sae_lens on the path that holds its list of releases, and breaks when it is imported."""
    package = tmp_path / "path" / "sae_lens"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "pretrained_saes.yaml").write_text(LIST)
    monkeypatch.delitem(sys.modules, "sae_lens", raising=False)
    monkeypatch.syspath_prepend(package.parent)
    importlib.invalidate_caches()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "6.54.12")
    releases.directory.cache_clear()
    yield
    releases.directory.cache_clear()


def cached(hub: Path, repository: str, *files: Path, at: str = "") -> Path:
    """A snapshot as huggingface_hub lays it out: names that are links to blobs."""
    root = hub / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("a" * 40)
    (root / "blobs").mkdir(exist_ok=True)
    for file in files:
        blob, link = root / "blobs" / f"{len(list((root / 'blobs').iterdir())):064x}", snapshot / at / file.name
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def test_a_release_is_read_from_the_cache(hub, listed):
    at = "layer_20/width_16k/average_l0_71"
    here = SAES / "gemma-scope-2b-pt-res" / at
    cached(hub, "google/gemma-scope-2b-pt-res", here / "params.npz", at=at)
    expected = load_file(here / "expected.safetensors")
    for name in (
        ("gemma-scope-2b-pt-res", at),
        ("google/gemma-scope-2b-pt-res", at),
        ("gemma-2-2b/20-gemmascope-res-16k",),
    ):
        sae = sf.SAE.load(*name)
        torch.testing.assert_close(sae.encode(expected["x"]), expected["features"], atol=1e-5, rtol=1e-6)
        assert (sae.place, sae.source.model) == (("resid_post", 20), "google/gemma-2-2b")


def test_the_name_of_a_repository_in_the_cache_says_k(hub, listed):
    here = SAES / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    cached(hub, "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", here / "layer5.sae.pt")
    for name in (
        ("qwen-scope-3-1.7b-base-w32k-l3", "layer5"),
        ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", "layer5.sae.pt"),
    ):
        sae = sf.SAE.load(*name, dtype=torch.bfloat16)
        assert (sae.k, sae.place, sae.source.model) == (3, ("resid_post", 5), "Qwen/Qwen3-1.7B-Base")
        assert 0 < sae.source.rounding < 2**-8


def test_what_the_list_says_beside_a_file_is_taken(hub, listed, tmp_path):
    """norm_scaling_factor and settings that the file lacks; a file that needs no scale does not get one."""
    at, files = "0:v1", [SAES / "saelens-standard" / name for name in ("cfg.json", "sae_weights.safetensors")]
    plain = sf.SAE.load(SAES / "saelens-standard")
    snapshot = cached(hub, "someone/gpt2-small-mlp-out-saes", *files, at=at)
    same = sf.SAE.load("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out")
    x = torch.randn(5, 8)
    assert torch.equal(same.encode(x), plain.encode(x))
    assert same.source.model == "gpt2-small"
    config = snapshot / at / "cfg.json"
    text = config.read_text().replace(
        '"normalize_activations": "none"', '"normalize_activations": "expected_average_only_in"'
    )
    config.unlink()
    config.write_text(text)
    scaled = sf.SAE.load("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out")
    torch.testing.assert_close(scaled.encode(x), plain.encode(0.5 * x))


def test_a_repository_that_is_not_listed_is_read_if_its_layout_is_cached(hub, listed):
    files = [SAES / "saelens-topk" / name for name in ("cfg.json", "sae_weights.safetensors")]
    cached(hub, "someone/saes", *files, at="layer_4")
    assert sf.SAE.load("someone/saes", "layer_4").fingerprint == sf.SAE.load(SAES / "saelens-topk").fingerprint


@pytest.mark.parametrize("name", [("someone/several", "res/layer_4"), ("several-res", "layer_4"), ("m/4-several",)])
def test_all_releases_of_a_repository_are_looked_through(name, hub, listed):
    """Gemma Scope 2 has eight releases in one repository, whose SAEs go by equal ids."""
    kinds = {"att": SAES / "saelens-standard", "res": SAES / "saelens-topk"}
    for at, kind in kinds.items():
        files = [kind / file for file in ("cfg.json", "sae_weights.safetensors")]
        cached(hub, "someone/several", *files, at=f"{at}/layer_4")
    assert sf.SAE.load(*name).fingerprint == sf.SAE.load(SAES / "saelens-topk").fingerprint


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (("gemma-scope-2b-pt-res", "layer_20/width_65k/average_l0_61"), FileNotFoundError,
         r"layer_20/width_65k/average_l0_61/params.npz of google/gemma-scope-2b-pt-res could not be had .*fetch it where there "
         r"is a network: hf download google/gemma-scope-2b-pt-res layer_20/width_65k/average_l0_61/params.npz$"),
        (("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out"), FileNotFoundError,
         r"0:v1/cfg.json, 0:v1/sae_weights.safetensors of someone/gpt2-small-mlp-out-saes could not be had"),
        (("gemma-scope-2b-pt-res", "layer_20"), ValueError,
         r"release gemma-scope-2b-pt-res has no SAE 'layer_20' among its 3; near it are layer_20/width_16k"),
        (("gemma-scope-2b-pt-rse", "layer_20"), ValueError,
         r"sae-lens 6.54.12 lists no release 'gemma-scope-2b-pt-rse' \(gemma-scope-2b-pt-res\)"),
        (("m/1-x",), ValueError, r"m/1-x is the id of 2 SAEs; give SAE.load\('twins', 'a'\) or SAE.load\('twins', 'b'\)"),
        (("someone/several", "layer_4"), ValueError, "among its 2; near it are res/layer_4, att/layer_4"),
        (("m/none",), FileNotFoundError, "m/none does not exist; give a directory, or the file with the weights, or a release"),
        (("temporal-sae-gemma-2-2b", "blocks.12.hook_resid_post"), ValueError, "temporal attends across the tokens"),
        (("someone/else", "layer_4"), FileNotFoundError, "hf download someone/else --include 'layer_4/\\*'"),
        (("someone/else", "a.pt"), FileNotFoundError, "a.pt of someone/else could not be had"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(name, error, message, hub, listed):
    with pytest.raises(error, match=message):
        sf.SAE.load(*name)


def test_an_sae_of_a_directory_is_named_as_one_of_a_release(hub, listed, tmp_path):
    """A release that was copied by hand lies on disk under the same names."""
    shutil.copytree(SAES / "gemma-scope-2b-pt-res", tmp_path / "gemma-scope-2b-pt-res")
    at = "layer_20/width_16k/average_l0_71"
    sae = sf.SAE.load(tmp_path / "gemma-scope-2b-pt-res", at)
    assert (sae.fingerprint, sae.place) == (
        sf.SAE.load(SAES / "gemma-scope-2b-pt-res" / at).fingerprint,
        ("resid_post", 20),
    )


def test_half_of_a_release_is_not_read(hub, listed):
    cached(hub, "someone/gpt2-small-mlp-out-saes", SAES / "saelens-standard" / "cfg.json", at="0:v1")
    with pytest.raises(FileNotFoundError, match=r"load: 0:v1/sae_weights.safetensors of someone"):
        sf.SAE.load("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out")


def test_without_sae_lens_a_release_says_so(monkeypatch, hub):
    monkeypatch.setattr(releases, "directory", dict)
    with pytest.raises(
        ValueError, match="releases are listed by sae-lens, which is not installed: pip install sae-lens"
    ):
        sf.SAE.load("gemma-scope-2b-pt-res", "layer_20")


def test_the_list_of_an_installed_sae_lens_is_read(hub):
    """Every layout that it lists is read or refused by its name."""
    releases.directory.cache_clear()
    found = releases.directory()
    if not found:
        pytest.skip("sae-lens is not installed")
    layouts = {str(release.get("conversion_func") or "sae_lens") for release in found.values()}
    assert layouts == {*releases.FILES, *releases.REFUSED} - {"sparsify"}
    at = "layer_20/width_16k/average_l0_71"
    cached(hub, "google/gemma-scope-2b-pt-res", SAES / "gemma-scope-2b-pt-res" / at / "params.npz", at=at)
    assert sf.SAE.load("gemma-scope-2b-pt-res", at).place == ("resid_post", 20)
    assert sf.SAE.load("gemma-2-2b/20-gemmascope-res-16k").place == ("resid_post", 20)
