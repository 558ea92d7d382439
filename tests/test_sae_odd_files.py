"""Files of every family with something wrong in them: read as before, or refused by an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import steerfast as sf

SAES = Path(__file__).parent / "data" / "saes"
ODD = (float("nan"), float("inf"), 10**400, "abc", [1], {"a": 1}, True)
KINDS = (
    "saelens-topk", "saelens-gated", "saelens-batchtopk", "saelens-batchtopk-scaled", "saelens-skip_transcoder",
    "sparsify-skip-transcoder/layers.5.mlp", "llamascopium-jumprelu", "llamascopium-topk",
    "dictionary_learning-AutoEncoderTopK", "dictionary_learning-BatchTopKSAE",
    "gemma-scope-2-1b-pt/transcoder_all/layer_7_width_16k_l0_big_affine",
)  # fmt: skip


def copied(kind: str, target: Path) -> tuple[Path, Path, Path]:
    """A copy of a file: its folder, its weights, its settings."""
    target.mkdir(parents=True, exist_ok=True)
    for file in (SAES / kind).iterdir():
        if file.is_file() and file.name != "expected.safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    config = next(target / name for name in ("cfg.json", "config.json") if (target / name).is_file())
    weights = next(file for file in target.iterdir() if file.suffix in (".safetensors", ".pt"))
    return target, next((f for f in target.iterdir() if f.stem in ("sae_weights", "params", "sae")), weights), config


def each_setting(config: dict[str, Any], under: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in config.items():
        yield (*under, name)
        if isinstance(value, dict):
            yield from each_setting(value, (*under, name))


def changed(config: dict[str, Any], at: tuple[str, ...], value: Any) -> dict[str, Any]:
    inner = value if len(at) == 1 else changed(config[at[0]], at[1:], value)
    return {**config, at[0]: inner}


def outcome(folder: Path) -> str:
    """ "" if the file is read, else the error, which names the file."""
    try:
        sae = sf.SAE.load(folder)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
    else:
        said = ""
        assert sae.encode(torch.ones(3, sae.d)).isfinite().all()
    assert not said or str(folder) in said
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_setting_never_ends_in_an_error_of_pythons_own(kind, tmp_path):
    folder, _, config = copied(kind, tmp_path / "made")
    right = json.loads(config.read_text())
    for at in each_setting(right):
        for value in ODD:
            config.write_text(json.dumps(changed(right, at, value)))
            outcome(folder)
    config.write_text(json.dumps(right))
    assert outcome(folder) == ""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("dictionary")])
def test_an_odd_tensor_is_refused_by_an_error_that_names_the_file(kind, tmp_path):
    folder, weights, _ = copied(kind, tmp_path / "made")
    right = load_file(weights)
    for name, value in right.items():
        odd = [value.to(torch.int64), value[None] if value.dim() else None, value.reshape(-1)[:0]]
        odd += [
            torch.full_like(value, torch.nan),
            torch.full_like(value, torch.inf),
            value[:-1] if value.dim() else None,
        ]
        for one in odd:
            if one is None:
                continue
            save_file({**right, name: one.clone()}, weights)
            if one.numel() > 1 or value.numel() != 1:  # a number is one in any shape
                said = outcome(folder)
                assert said or name in ("w_enc", "W_enc")  # a transcoder may read another width
        save_file({other: t for other, t in right.items() if other != name}, weights)
        assert outcome(folder), name


@pytest.mark.parametrize(
    ("kind", "drop", "message"),
    [
        ("saelens-topk", "architecture", "it says k = 3, and no architecture that has one"),
        ("saelens-jumprelu", "architecture", "an SAE that does not use threshold, and the file holds it"),
        ("saelens-gated", "architecture", "has no tensor 'b_enc'"),
        ("saelens-skip_transcoder", "architecture", "has shape"),
        ("llamascopium-jumprelu", "act_fn", "does not use activation_function.log_jumprelu_threshold, and"),
    ],
)
def test_a_setting_without_which_a_tensor_would_be_left_out_is_missed(kind, drop, message, tmp_path):
    folder, _, config = copied(kind, tmp_path / "made")
    right = json.loads(config.read_text())
    config.write_text(json.dumps({name: value for name, value in right.items() if name != drop}))
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(folder)


def test_a_tensor_that_no_reader_knows_is_not_left_out(tmp_path):
    folder, weights, _ = copied("saelens-standard", tmp_path / "made")
    right, plain = load_file(weights), sf.SAE.load(folder)
    save_file({**right, "steps_since_fired": torch.ones(20)}, weights)
    assert sf.SAE.load(folder).fingerprint == plain.fingerprint
    save_file({**right, "W_skip": torch.eye(8)}, weights)
    with pytest.raises(ValueError, match="an SAE that does not use W_skip, and the file holds it"):
        sf.SAE.load(folder)


def test_a_gate_that_is_infinite_is_damage_and_not_always_open(tmp_path):
    folder, weights, _ = copied("saelens-gated", tmp_path / "made")
    right = load_file(weights)
    save_file({**right, "b_gate": right["b_gate"].index_fill(0, torch.tensor([2]), torch.inf)}, weights)
    with pytest.raises(ValueError, match="threshold holds NaN or Inf"):
        sf.SAE.load(folder)


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_a_setting_that_is_neither_true_nor_false_is_refused(value, tmp_path):
    folder, _, config = copied("saelens-standard", tmp_path / "made")
    config.write_text(json.dumps({**json.loads(config.read_text()), "apply_b_dec_to_input": value}))
    with pytest.raises(ValueError, match=r"apply_b_dec_to_input is .*; expected true or false"):
        sf.SAE.load(folder)


@pytest.mark.parametrize(
    "above",
    ["layer_3", "gemma-scope-9b-it-mlp/layer_3", "gemma-scope-2b-pt-transcoders/layer_3/width_16k", "embedding"],
)
def test_folders_above_a_release_of_gemma_scope_say_nothing(above, tmp_path):
    """The place is told by the folders that were released, and not by those that they were put into."""
    inside = Path("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71/params.npz")
    file = tmp_path / above / inside
    file.parent.mkdir(parents=True)
    file.write_bytes((SAES / inside).read_bytes())
    sae = sf.SAE.load(file)
    assert (type(sae), sae.place, sae.source.model) == (sf.SAE, ("resid_post", 20), "google/gemma-2-2b")
