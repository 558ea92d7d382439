"""`plan show | convert`: every number that is shown, every format there and back, and what is refused."""

from __future__ import annotations

import argparse
import doctest
from typing import Any

import pytest
import torch

import steerfast as sf
from steerfast.cli.plan import add_arguments, run
from steerfast.directions.direction import Direction
from steerfast.place import Origin
from steerfast.plan import ModelCard
from steerfast.tools import convert as plan_tools
from steerfast.tools.convert import FORMATS, convert, show

VECTORS = [to for to in FORMATS if to != "lora"]  # tests/test_lora.py has that one
V = torch.tensor([3.0, 4.0, 0.0])
U = torch.tensor([0.0, 1.0, 2.0])


@pytest.fixture
def plan(tmp_path: Any) -> Any:
    return sf.Plan({1: sf.Add(V, 2.0), 2: sf.Add(U, -0.5)}, model=ModelCard("LlamaForCausalLM:", 3, 4)).save(
        tmp_path / "plan"
    )


def test_show_names_model_positions_and_norms(tmp_path: Any) -> None:
    edits = {1: [sf.Add(V, 2.0, keep_norm=True), sf.Amplify(torch.stack([V, U]), 0.5)], ("attn_out", 3): sf.Ablate(V)}
    flow = sf.Flow(sf.Barrier(torch.eye(3)[:1], torch.zeros(1), torch.ones(1)), angle=0.3)
    saved = sf.Plan({**edits, 0: flow}, positions=[0, -1], model=ModelCard("LlamaForCausalLM:", 3, 4)).save(
        tmp_path / "p"
    )
    lines = show(saved).splitlines()
    assert lines[0].split() == ["model", "LlamaForCausalLM:", "(width", "3,", "4", "layers)"]
    assert lines[1] == "positions  (0, -1)"
    rows = [line.split() for line in lines[4:]]
    assert rows[0] == [
        "resid_post",
        "1",
        "Add",
        "1",
        "×",
        "3",
        "5",
        "strength=2,",
        "keep_norm=True,",
        "‖c·v‖",
        "=",
        "10",
    ]
    assert rows[1] == ["resid_post", "1", "Amplify", "features", "2", "×", "3", "2.236", "to", "5", "alpha=0.5"]
    assert rows[2] == ["attn_out", "3", "Ablate", "direction", "1", "×", "3", "1"]
    assert rows[3][:3] == ["resid_post", "0", "Flow"]
    assert "angle=0.3" in lines[7]


@pytest.mark.parametrize("to", VECTORS)
def test_every_format_and_back_keeps_the_vectors(plan: Any, tmp_path: Any, to: str) -> None:
    there = convert(plan, tmp_path / "there", to)
    back = sf.Plan.load(convert(there, tmp_path / "back", "plan"))
    added = {place: edit.tensors()["vector"] * edit.strength for place, (edit,) in back.edits.items()}
    assert set(added) == {("resid_post", 1), ("resid_post", 2)}
    assert torch.equal(added["resid_post", 1], 2 * V)
    assert torch.equal(added["resid_post", 2], -0.5 * U)
    assert "resid_post" in show(there)


def test_a_bound_or_a_number_of_zero_is_shown(tmp_path: Any) -> None:
    v = torch.tensor([3.0, 4.0])
    chain = [sf.Clamp(v, low=0.0), sf.Clamp(v, high=0.0), sf.AffineAblate(v), sf.Rotate(torch.eye(2), degrees=0.0)]
    lines = show(sf.Plan({1: chain}).save(tmp_path / "plan")).splitlines()[-4:]
    said = [line.rpartition("  ")[2] for line in lines]
    assert said == ["low=0", "high=0", "baseline=0, offset=0", "degrees=0"]


def test_strength_multiplies(plan: Any, tmp_path: Any) -> None:
    scaled = sf.Plan.load(convert(plan, tmp_path / "p", "plan", strength=3.0))
    assert [edit.strength for (edit,) in scaled.edits.values()] == [6.0, -1.5]
    vectors = sf.load_directions(convert(plan, tmp_path / "d", "directions", strength=3.0))
    assert sorted(float(d.norm) for d in vectors.values()) == pytest.approx([1.5 * 5**0.5, 30.0])


def test_strength_keeps_where_a_vector_comes_from(tmp_path: Any) -> None:
    origin = Origin("LlamaForCausalLM", ("resid_post", 1), "last", 12.0)
    saved = sf.Plan({1: sf.Add(Direction(V, "pca", 5.0, origin), 2.0)}).save(tmp_path / "saved")
    (edit,) = sf.Plan.load(convert(saved, tmp_path / "p", "plan", strength=3.0)).edits["resid_post", 1]
    (direction,) = sf.load_directions(convert(saved, tmp_path / "d", "directions", strength=3.0)).values()
    assert edit.origin == direction.origin == origin


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: sf.Plan({1: sf.Ablate(V)}), r"Ablate\(.*\) at resid_post 1 is no vector that is added"),
        (lambda: sf.Plan({1: sf.Add(V, keep_norm=True)}), r"at resid_post 1 is no vector that is added"),
        (lambda: sf.Plan({1: sf.Add(V)}, positions="last"), r"has positions='last', which vectors cannot say"),
        (lambda: sf.Plan({-1: sf.Add(V)}), r"resid_post -1 counts from the end"),
        (lambda: sf.Plan({1: sf.Add(V, 0.0)}), r"every addition of the plan has strength 0, so there is no vector"),
    ],
)
def test_what_a_vector_cannot_say_is_refused(made: Any, message: str, tmp_path: Any) -> None:
    saved = made().save(tmp_path / "plan")
    for to in VECTORS[1:]:
        with pytest.raises(ValueError, match=message):
            convert(saved, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()
    assert repr(sf.Plan.load(convert(saved, tmp_path / "again", "plan"))) == repr(made())


def test_converted_vectors_belong_with_those_that_were_extracted(plan: Any, tmp_path: Any) -> None:
    converted = sf.load_directions(convert(plan, tmp_path / "d", "directions"))
    assert converted.model == ModelCard("LlamaForCausalLM:", 3, 4)
    v = converted["resid_post.1"]
    assert (v.method, v.norm) == ("plan", 10.0)
    assert v.origin == Origin("LlamaForCausalLM", ("resid_post", 1))
    with pytest.raises(ValueError, match="does not know the norm of the activations"):
        v.dose()
    extracted = sf.Direction(U, "mean_difference", 2.0, Origin("LlamaForCausalLM", 1, "last", 50.0))
    both = v - extracted
    assert torch.equal(both.vector, 2 * V - U)
    assert (both.origin.model, both.origin.typical_norm) == ("LlamaForCausalLM", 50.0)


@pytest.mark.parametrize("to", VECTORS[1:])
def test_additions_of_one_place_become_their_sum(tmp_path: Any, to: str) -> None:
    made = sf.Plan({2: [sf.Add(V, 2.0), sf.Add(U, -0.5), sf.Add(V, 0.0)], 1: [sf.Add(U)]})
    there = convert(made.save(tmp_path / "plan"), tmp_path / "there", to, strength=2.0)
    vectors = {d.origin.place.layer: d.vector for d in sf.load_directions(there).values()}
    assert vectors.keys() == {1, 2}
    assert torch.equal(vectors[2], 4 * V - U)
    assert torch.equal(vectors[1], 2 * U)
    cancelled = sf.Plan({2: [sf.Add(V, 2.0), sf.Add(2 * V, -1.0)]}).save(tmp_path / "cancelled")
    with pytest.raises(ValueError, match="cancels to zero"):
        convert(cancelled, tmp_path / "nothing", to)
    assert not (tmp_path / "nothing").exists()


def test_a_set_of_directions_stays_what_it_is(tmp_path: Any) -> None:
    one, two = (sf.Direction(t, "pca", 7.0, Origin("M", 1, "last", 50.0)) for t in (V, U))
    bare = sf.Direction(V, "given", 5.0)
    sf.save_directions(tmp_path / "set", {"one": one, "two": two, "bare": bare}, ModelCard("M:m", 3, 4))
    same = sf.load_directions(convert(tmp_path / "set", tmp_path / "same", "directions"))
    assert (list(same), same.model) == (["one", "two", "bare"], ModelCard("M:m", 3, 4))
    origins = [(d.method, d.norm, d.origin.typical_norm) for d in same.values()]
    assert origins == [("pca", 7.0, 50.0), ("pca", 7.0, 50.0), ("given", 5.0, None)]
    tripled = sf.load_directions(convert(tmp_path / "set", tmp_path / "tripled", "directions", strength=3.0))
    assert torch.equal(tripled["two"].vector, 3 * U)
    assert tripled["two"].origin.typical_norm == 50.0
    with pytest.raises(ValueError, match="convert: 'bare' does not know its layer"):
        convert(tmp_path / "set", tmp_path / "no.gguf", "gguf")
    sf.save_directions(tmp_path / "two", {"one": one, "two": two})
    (summed,) = sf.load_directions(convert(tmp_path / "two", tmp_path / "sum.gguf", "gguf")).values()
    assert torch.equal(summed.vector, V + U)


def test_a_plan_of_a_top_k_sae_is_shown_where_the_sae_is_known(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("STEERFAST_SAES", raising=False)
    sae = sf.SAE(torch.randn(9, 3), torch.eye(3).repeat(3, 1) * 2, k=2)
    saved, folder = (
        sf.Plan({1: sf.EditFeatures(sae, {4: 1.0, 2: 0.0})}).save(tmp_path / "plan"),
        sae.save(tmp_path / "sae"),
    )
    with pytest.raises(FileNotFoundError, match="set STEERFAST_SAES"):
        show(saved)
    row = show(saved, sae).splitlines()[-1]
    assert row.split()[:7] == ["resid_post", "1", "EditFeatures", "decoder", "2", "×", "3"]
    assert f"SAE(F=9, d=3, k=2, place=None, torch.float32) {sae.fingerprint[:12]}…" in row
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [
        "convert",
        str(saved),
        str(tmp_path / "copy"),
        "--to",
        "plan",
        "--saes",
        str(tmp_path),
        "--saes",
        str(folder),
    ]
    assert run(parser.parse_args(arguments)) == 0
    assert sae.fingerprint[:12] in capsys.readouterr().out
    assert (tmp_path / "copy" / "plan.json").read_bytes() == (saved / "plan.json").read_bytes()
    with pytest.raises(ValueError, match=r"EditFeatures\(.*\) at resid_post 1 is no vector that is added"):
        convert(saved, tmp_path / "d", "directions", saes=sae)


def test_bad_input(plan: Any, tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        show(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="plan exists"):
        convert(plan, plan, "gguf")
    with pytest.raises(ValueError, match="to is 'zip'; expected one of plan, directions"):
        convert(plan, tmp_path / "x", "zip")
    ablate = sf.Plan({1: sf.Ablate(V)}).save(tmp_path / "ablate")
    with pytest.raises(ValueError, match="Ablate at resid_post 1 has no strength to multiply"):
        convert(ablate, tmp_path / "x", "plan", strength=2.0)
    (plan / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        show(plan)


def test_the_command(plan: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["show", str(plan)])) == 0
    assert "‖c·v‖ = 10" in capsys.readouterr().out
    assert run(parser.parse_args(["convert", str(plan), str(tmp_path / "v.gguf"), "--to", "gguf"])) == 0
    assert f"Written     {tmp_path / 'v.gguf'}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parser.parse_args([])


def test_the_docstrings_examples_run() -> None:
    assert doctest.testmod(plan_tools).failed == 0
