"""Plans that edit features of a Top-K SAE: the file names the SAE, and loading finds it."""

from __future__ import annotations

import dataclasses
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import steerfast as sf
from steerfast.files.shelf import Shelf
from steerfast.place import Origin
from steerfast.probes.encoder import shared_copy
from steerfast.sae.formats import save_saelens
from steerfast.sae.model import Source

D, F, K = 12, 40, 3
PLACE = ("resid_post", 1)


@pytest.fixture(autouse=True)
def _no_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEERFAST_SAES", raising=False)


def make(seed: int = 0, k: int | None = K, normalisation: str = "none", dtype: torch.dtype = torch.float32) -> sf.SAE:
    draw = torch.Generator().manual_seed(seed)
    w_enc, w_dec = (torch.randn(F, D, generator=draw).to(dtype) for _ in range(2))
    b_enc, b_dec = torch.randn(F, generator=draw), torch.randn(D, generator=draw)
    threshold = None if k is not None else torch.rand(F, generator=draw)
    return sf.SAE(w_enc, w_dec, b_enc, b_dec, k, threshold, normalisation, Origin("LlamaForCausalLM", PLACE))


def plan(sae: sf.SAE) -> sf.Plan:
    """Three edits of one SAE, one of them behind a condition, at two places."""
    first, second = sf.EditFeatures(sae, {7: 2.5, 0: 0.5}), sf.EditFeatures(sae, {39: -1.0}, "add", keep_norm=True)
    gated = sf.When(sf.Condition(torch.ones(D), 0.0), sf.EditFeatures(sae, {3: 2.0}, "min"))
    return sf.Plan({1: [first, second], ("resid_pre", 2): gated})


def edits(made: sf.Plan) -> list[sf.EditFeatures]:
    chains = [edit for chain in made.edits.values() for edit in chain]
    found = [edit.then if isinstance(edit, sf.When) else edit for edit in chains]
    assert all(isinstance(edit, sf.EditFeatures) for edit in found)
    return found  # type: ignore[return-value]


def effect(edit: sf.Intervention) -> torch.Tensor:
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(5))
    run = edit.program(torch.device("cpu"))
    assert run is not None
    return run(x, 1.0)


def assert_same(mine: sf.Plan, other: sf.Plan) -> None:
    for a, b in zip(edits(mine), edits(other), strict=True):
        assert a.numbers() == b.numbers()
        assert torch.equal(a.decoder, b.decoder)
        assert torch.equal(effect(a), effect(b))
    assert repr(mine) == repr(other)


# --- the fingerprint ---------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_what_an_sae_computes(tmp_path: Path) -> None:
    sae = make()
    assert len(sae.fingerprint) == 64
    assert sf.SAE.load(sae.save(tmp_path)).fingerprint == sae.fingerprint == make().fingerprint
    assert json.loads((tmp_path / "sae.json").read_text())["fingerprint"] == sae.fingerprint
    moved = dataclasses.replace(sae, origin=Origin("m", ("mlp_out", 0)), source=Source("SAELens", "elsewhere", "m"))
    strided = dataclasses.replace(sae, w_enc=torch.stack([sae.w_enc, sae.w_dec], 2)[..., 0])
    assert moved.fingerprint == strided.fingerprint == sae.fingerprint
    changed = sae.w_dec.clone()
    changed[39, 11] = torch.nextafter(changed[39, 11], torch.tensor(9.0))
    others = [
        make(1), make(k=4), make(normalisation="layer_norm"), make(k=None), sae.to(dtype=torch.bfloat16),
        sae.to(dtype=torch.float64), dataclasses.replace(sae, w_dec=changed), dataclasses.replace(sae, b_dec=sae.b_dec + 1),
        dataclasses.replace(sae, w_enc=sae.w_dec, w_dec=sae.w_enc),
    ]  # fmt: skip
    assert len({sae.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


def test_a_tied_sae_in_16_bits_keeps_its_fingerprint(tmp_path: Path) -> None:
    w = make(dtype=torch.bfloat16).w_enc
    tied = sf.SAE(w, w, k=2)
    assert tied.fingerprint == sf.SAE(w, w.clone(), k=2).fingerprint
    assert sf.SAE.load(tied.save(tmp_path)).fingerprint == tied.fingerprint
    assert set(load_file(tmp_path / "sae.safetensors")) == {"w_enc", "b_enc", "b_dec"}


def test_an_sae_of_schema_1_has_its_fingerprint_too(tmp_path: Path) -> None:
    made = make()
    made.save(tmp_path)
    file = tmp_path / "sae.json"
    text = {**json.loads(file.read_text()), "schema": 1}
    del text["fingerprint"]
    file.write_text(json.dumps(text))
    assert sf.SAE.load(tmp_path).fingerprint == made.fingerprint
    assert_same(sf.Plan.load(plan(made).save(tmp_path / "plan"), tmp_path), plan(made))


# --- where an SAE is found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_a_file_holds_no_weights_and_finds_them(tmp_path: Path, normalisation: str, monkeypatch) -> None:
    sae = make(normalisation=normalisation)
    made = plan(sae)
    saved, folder = made.save(tmp_path / "plan"), sae.save(tmp_path / "saes" / "one")
    make(1).save(tmp_path / "saes" / "another")
    assert [name.partition(".")[2] for name in load_file(saved / "plan.safetensors")] == ["probe.direction"]
    for saes in (
        sae,
        folder,
        str(folder),
        tmp_path / "saes",
        [make(2), tmp_path / "saes"],
        (sae,),
        folder / "sae.safetensors",
    ):
        assert_same(sf.Plan.load(saved, saes), made)
    monkeypatch.setenv("STEERFAST_SAES", str(tmp_path / "saes"))
    back = sf.Plan.load(saved)
    assert_same(back, made)
    again = back.save(tmp_path / "again")
    assert [(again / name).read_bytes() for name in os.listdir(again)] == [
        (saved / name).read_bytes() for name in os.listdir(again)
    ]


def test_an_sae_of_another_library_is_found_by_what_it_computes(tmp_path: Path) -> None:
    save_saelens(make(), tmp_path / "saes" / "theirs")
    theirs = sf.SAE.load(tmp_path / "saes" / "theirs")
    saved = plan(theirs).save(tmp_path / "plan")
    assert_same(sf.Plan.load(saved, tmp_path / "saes"), plan(theirs))
    assert_same(sf.Plan.load(saved, theirs.save(tmp_path / "ours")), plan(theirs))


def test_place_and_model_are_the_plans_own(tmp_path: Path) -> None:
    here = dataclasses.replace(make(), origin=Origin("GPT2LMHeadModel", ("resid_post", 3)))
    saved = sf.Plan([sf.EditFeatures(here, {1: 1.0})]).save(tmp_path / "plan")
    (edit,) = edits(sf.Plan.load(saved, make()))
    assert (edit.origin.place, edit.origin.model) == (("resid_post", 3), "GPT2LMHeadModel")


def test_one_sae_is_loaded_once_and_held_once(tmp_path: Path, monkeypatch) -> None:
    sae = make()
    saved, folder = plan(sae).save(tmp_path / "plan"), sae.save(tmp_path / "saes" / "b")
    make(1).save(tmp_path / "saes" / "a")
    loads, load = [], sf.SAE.load

    def counted(path: Path) -> sf.SAE:
        loads.append(path)
        return load(path)

    monkeypatch.setattr(sf.SAE, "load", counted)
    shelf = Shelf("Plan.load", tmp_path / "saes")
    plans = [sf.Plan.load(saved, shelf) for _ in range(2)]
    assert loads == [folder]  # the other one says in its JSON that it is another
    held = {edit.sae.encoder.data_ptr() for made in plans for edit in edits(made)}  # type: ignore[attr-defined]
    assert len(held) == 1


def test_edits_of_one_sae_share_its_encoder_on_a_device() -> None:
    first, second, third = edits(plan(make()))
    meta = torch.device("meta")
    copies = [shared_copy(edit.sae.sae, "encoder", edit.sae.encoder, meta) for edit in (first, second, third)]  # type: ignore[attr-defined]
    assert copies[0] is copies[1] is copies[2]
    gone = weakref.ref(copies[0])
    del copies
    assert gone() is None


def test_a_threshold_needs_no_sae(tmp_path: Path) -> None:
    for sae in (make(k=None), make(k=None, normalisation="layer_norm"), make().approximate(0.5)):
        made = sf.Plan([sf.EditFeatures(sae, {7: 2.5, 0: 0.5})])
        saved = made.save(tmp_path / "plan")
        assert max(tensor.numel() for tensor in load_file(saved / "plan.safetensors").values()) == 2 * D
        (a,), (b,) = edits(made), edits(sf.Plan.load(saved))
        assert a.numbers() == b.numbers()
        assert all(torch.equal(tensor, b.tensors()[name]) for name, tensor in a.tensors().items())


def test_the_file_is_small(tmp_path: Path) -> None:
    wide = sf.SAE(torch.randn(8192, 576), torch.randn(8192, 576), k=32)
    saved = sf.Plan({1: sf.EditFeatures(wide, {5: 1.0})}).save(tmp_path)
    assert sum(path.stat().st_size for path in saved.iterdir()) < 2000
    embedded = {"encoder": wide.w_enc, "bias": wide.b_enc}
    assert sum(tensor.nbytes for tensor in embedded.values()) > 18.9e6  # what a file of release 0.1 carried


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_an_sae_that_is_not_given_is_named(tmp_path: Path, monkeypatch) -> None:
    sae = make()
    saved = plan(sae).save(tmp_path / "plan")
    with pytest.raises(FileNotFoundError) as error:
        sf.Plan.load(saved)
    words = str(error.value)
    for part in (
        f"Plan.load: {saved / 'plan.json'} names SAE(F=40, d=12, k=3", sae.fingerprint,
        "was not given, and STEERFAST_SAES is not set", "Pass it as saes=", "sae.save writes one",
    ):  # fmt: skip
        assert part in words
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("STEERFAST_SAES", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=rf"is not among STEERFAST_SAES={tmp_path / 'empty'}: there is no SAE"):
        sf.Plan.load(saved)
    monkeypatch.setenv("STEERFAST_SAES", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=rf"is not among STEERFAST_SAES={tmp_path / 'gone'}: there is no SAE"):
        sf.Plan.load(saved)
    assert sf.Plan.load(sf.Plan({1: sf.Add(torch.ones(3))}).save(tmp_path / "plain")).edits  # which needs none


def test_another_sae_is_refused_by_its_fingerprint(tmp_path: Path) -> None:
    sae, other = make(), make(1)
    saved = plan(sae).save(tmp_path / "plan")
    for wrong in (other, sae.to(dtype=torch.bfloat16)):
        with pytest.raises(
            FileNotFoundError, match=rf"{sae.fingerprint}.* is {wrong.fingerprint[:12]}….*another dtype"
        ):
            sf.Plan.load(saved, wrong)
    for i in range(6):
        make(i + 1).save(tmp_path / "saes" / f"sae {i}")
    with pytest.raises(FileNotFoundError, match=rf"saes: sae 0 is {other.fingerprint[:12]}….*; and 2 more"):
        sf.Plan.load(saved, tmp_path / "saes")


def test_a_fingerprint_that_lies_or_a_damaged_sae_is_not_taken(tmp_path: Path) -> None:
    sae = make()
    saved, folder = plan(sae).save(tmp_path / "plan"), make(1).save(tmp_path / "saes" / "liar")
    text = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps({**text, "fingerprint": sae.fingerprint}))
    broken = sae.save(tmp_path / "saes" / "broken")
    (broken / "sae.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError) as error:
        sf.Plan.load(saved, tmp_path / "saes")
    assert f"liar is {make(1).fingerprint[:12]}…" in str(error.value)
    assert "broken: SAE.load: " in str(error.value)
    assert "is not the file that sae.json beside it was written with" in str(error.value)


@pytest.mark.parametrize("saes", [3, [3], {"a": 1}.values(), torch.ones(3)])
def test_what_is_no_sae_is_refused(saes: object, tmp_path: Path) -> None:
    saved = plan(make()).save(tmp_path / "plan")
    with pytest.raises(
        TypeError, match=r"Plan\.load: saes must be an SAE, the path of one or of a folder of them, or a list"
    ):
        sf.Plan.load(saved, saes)


def test_a_path_that_is_not_there_is_refused_even_if_no_sae_is_needed(tmp_path: Path) -> None:
    saved = sf.Plan({1: sf.Add(torch.ones(3))}).save(tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match=r"Plan.load: saes: .*nowhere does not exist"):
        sf.Plan.load(saved, tmp_path / "nowhere")


def test_restore_wants_the_sae_and_not_its_name() -> None:
    (edit, *_) = edits(plan(make()))
    with pytest.raises(TypeError, match=r"expected the SAE itself, which Plan\.load finds by its name"):
        type(edit).restore(edit.tensors(), edit.numbers())
    back = type(edit).restore({}, {**edit.numbers(), "sae": make()})
    assert torch.equal(effect(back), effect(edit))


def test_a_file_that_names_a_feature_too_many_is_refused(tmp_path: Path) -> None:
    saved = sf.Plan([sf.EditFeatures(make(), {1: 1.0})]).save(tmp_path)
    text = (saved / "plan.json").read_text()
    (saved / "plan.json").write_text(
        text.replace('"features": [\n              1\n', '"features": [\n              40\n')
    )
    with pytest.raises(ValueError, match=r"does not describe a plan: SAE: feature 40 is out of range"):
        sf.Plan.load(saved, make())


# --- features that were picked before ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "normalisation"), [(K, "none"), (30, "layer_norm"), (None, "layer_norm"), (None, "none")]
)
def test_picked_features_are_numbered_by_their_place(k: int | None, normalisation: str, tmp_path: Path) -> None:
    """Whatever selects: `sae.rows([5, 7])` has the features 0 and 1, in any order, alone or together, and in a file."""
    sae, x = make(k=k, normalisation=normalisation), torch.randn(9, D)
    picked = sae.rows([5, 7])
    for own, values in (
        ({0: 1.0, 1: 2.0}, {5: 1.0, 7: 2.0}),
        ({1: 2.0, 0: 1.0}, {5: 1.0, 7: 2.0}),
        ({1: 2.0}, {7: 2.0}),
    ):
        edit, right = sf.EditFeatures(picked, own), sf.EditFeatures(sae, values).apply(x)
        assert torch.allclose(edit.apply(x), right, atol=1e-6)
        back = sf.Plan.load(sf.Plan({1: edit}).save(tmp_path / f"{len(own)}{next(iter(own))}"), saes=sae)
        assert torch.equal(back.edits["resid_post", 1][0].apply(x), edit.apply(x))
    with pytest.raises(ValueError, match="EditFeatures: feature 5 is out of range; there are 2, from 0"):
        sf.EditFeatures(picked, {5: 1.0})
