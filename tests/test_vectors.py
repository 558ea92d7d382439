"""Arithmetic of directions against plain tensors; sets on disk; the relative dose against hooks of the test's own."""

from __future__ import annotations

import builtins
import doctest
import io
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import steerfast as sf
from steerfast.directions import direction as module
from steerfast.directions import sets as vectors
from steerfast.directions.direction import Direction
from steerfast.directions.sets import DirectionSet, list_directions, save_directions
from steerfast.integrations.read import load_directions
from steerfast.models.layers import find_layers
from steerfast.place import Origin, Place, family
from steerfast.plan import ModelCard, card
from steerfast.tools.dose import dose

WIDTH = 48
TEXTS = ["w3 w4 w5 w6 w7", "w10 w11", "w12 w13 w14 w15"]


HERE = Origin("LlamaForCausalLM", Place("resid_post", 1), "last", 50.0)


def direction(seed: int = 0, width: int = WIDTH, **origin: Any) -> Direction:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, f"m{seed}", float(vector.norm()), replace(HERE, **origin))


def tokenizer() -> Any:
    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_arithmetic_is_that_of_float64_rounded_once() -> None:
    a, b = direction(1), direction(2)
    x, y = a.vector.double(), b.vector.double()
    for got, expected in (
        (a + b, x + y),
        (a - b, x - y),
        (-a, -x),
        (0.1 * a, 0.1 * x),
        (a * 3, 3 * x),
        (np.float32(2) * a, 2 * x),
        (a / 3, x / 3),
        (2 * a - b / 7, ((2 * x).float().double() - (y / 7).float().double())),
        (sum([a, b, a]), ((x + y).float().double() + x)),
    ):
        assert isinstance(got, Direction)
        assert got.vector.dtype == torch.float32
        assert torch.equal(got.vector, expected.float())
        assert got.norm == pytest.approx(float(expected.norm()), rel=1e-6)
        assert got.origin == HERE


def test_project_out_leaves_nothing_along_what_was_removed() -> None:
    a, b, c = direction(1), direction(2), direction(3)
    rest = a.project_out(b, torch.stack([c.vector, b.vector * 2]))  # the rows depend on each other
    basis = torch.linalg.qr(torch.stack([b.vector, c.vector]).double().T)[0]
    expected = a.vector.double() - basis @ (basis.T @ a.vector.double())
    torch.testing.assert_close(rest.vector.double(), expected, rtol=0, atol=1e-6)
    assert rest.method == "m1 without (m2, a tensor)"
    assert rest.origin.place.layer == 1
    with pytest.raises(ValueError, match="nothing is left"):
        a.project_out(2 * a)
    with pytest.raises(TypeError, match="at least one"):
        a.project_out()


def test_normalized_and_dose() -> None:
    a = direction(1)
    unit = a.normalized()
    assert float(unit.vector.double().norm()) == pytest.approx(1, rel=1e-6)
    assert unit.norm == pytest.approx(a.norm)
    assert unit.method == "unit(m1)"
    assert a.dose(-2.5) == pytest.approx(2.5 * a.norm / 50)
    assert unit.dose(100) == pytest.approx(2)
    with pytest.raises(ValueError, match="does not know the norm"):
        replace(a, origin=Origin()).dose()
    with pytest.raises(ValueError, match="strength must be finite"):
        a.dose(float("nan"))


def test_provenance_reads_as_the_expression() -> None:
    a, b, c = direction(1), direction(2), direction(3)
    assert (a - (b + c)).method == "m1 − (m2 + m3)"
    assert (2 * (a + b)).method == "2.0·(m1 + m2)"
    assert (-(a - b)).method == "−(m1 − m2)"
    assert ((a + b) / 2).method == "(m1 + m2) / 2.0"
    total = sum(direction(i) for i in range(300))
    assert len(total.method) <= 500
    assert total.method.endswith("…")


def test_what_only_one_side_knows_is_kept() -> None:
    a = direction(1, position="mean")
    b = direction(2, place=None, model=None)
    for result in (a + b, b - a):
        assert result.origin == replace(HERE, position=None)
    assert (a + direction(2, typical_norm=70.0)).origin.typical_norm == 60
    assert (a + direction(2, typical_norm=None)).origin.typical_norm == 50
    assert b.project_out(a).origin.place.layer == 1


@pytest.mark.parametrize(
    "change", [{"place": 2}, {"place": ("mlp_out", 1)}, {"model": "GPT2LMHeadModel"}, {"width": 32}]
)
def test_conflicts_are_refused(change: dict[str, Any]) -> None:
    a, b = direction(1), direction(2, **change)
    named = next(iter(change))
    for operation in (lambda: a + b, lambda: a - b, lambda: a.project_out(b)):
        with pytest.raises(ValueError, match=named):
            operation()


def test_impossible_operands() -> None:
    a = direction(1)
    for wrong in (
        lambda: a + 1,
        lambda: a * a,
        lambda: 1 / a,
        lambda: a + a.vector,
        lambda: a * a.vector,
        lambda: 1 + a,
    ):
        with pytest.raises(TypeError):
            wrong()
    for zero in (lambda: a - a, lambda: 0 * a, lambda: a / 0, lambda: a * float("inf"), lambda: a * 1e300):
        with pytest.raises(ValueError, match=r"Direction|factor"):
            zero()
    mine = torch.ones(3)
    kept = Direction(mine, "given", 1.0)
    mine[0] = 5
    assert kept.vector[0] == 1
    for vector in (torch.zeros(3), torch.tensor([1.0, float("nan")]), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="Direction: vector"):
            Direction(vector, "given", 1.0)


# --- sets ------------------------------------------------------------------------------------------------------------


def test_a_set_comes_back_bit_for_bit(tmp_path: Path) -> None:
    odd = torch.tensor([1e-45, -3.4e38, 0.1, 1 / 3])  # a denormal, nearly the largest, and full mantissas
    given = {
        "love - hate": direction(1),
        "愛": direction(2, position=-3),
        "bare": Direction(odd, "given", 1.0),
        "shared": direction(1),
    }
    made = ModelCard("LlamaForCausalLM:tiny", WIDTH, 3)
    path = save_directions(tmp_path / "set", {key: given[key] for key in ("love - hate", "愛", "shared")}, made)
    assert sorted(p.name for p in path.iterdir()) == ["directions.json", "directions.safetensors"]
    back = load_directions(path)
    assert back.model == made
    save_directions(tmp_path / "set", given)  # replaces
    back = load_directions(path)
    assert back.model is None
    assert list(back) == list(given)
    for name, expected in given.items():
        assert torch.equal(back[name].vector, expected.vector)
        for field in ("method", "norm", "origin"):
            assert getattr(back[name], field) == getattr(expected, field)
    assert torch.equal(load_directions(path)["愛"].vector, given["愛"].vector)
    assert load_directions(back.save(tmp_path / "again"))["bare"].vector[0] > 0


def test_names(tmp_path: Path) -> None:
    a = direction(1)
    assert list(DirectionSet(a)) == ["resid_post.1"]
    assert list(DirectionSet([a, direction(2, place=("mlp_out", 2))])) == ["resid_post.1", "mlp_out.2"]
    by_layer = DirectionSet({4: Direction(a.vector, "given", 1.0), 5: direction(place=5)})
    assert [d.origin.place.layer for d in by_layer.values()] == [4, 5]
    for name in ("../up", "a/b", "a\\b", "", ".hidden", "a\x00", "x" * 129, "c:", 4.5, "a\n"):
        with pytest.raises(ValueError, match="cannot be a name"):
            save_directions(tmp_path / "no", {name: a})
    for bad, message in (
        ([], "no directions"),
        ([a, a], "two directions"),
        ({3: a}, "for layer 3"),
        ([Direction(a.vector, "given", 1.0)], "neither name nor layer"),
    ):
        with pytest.raises(ValueError, match=message):
            DirectionSet(bad)
    for wrong in (3, "name", a.vector, {"a": a.vector}):
        with pytest.raises(TypeError, match="expected"):
            DirectionSet(wrong)
    assert not (tmp_path / "no").exists()


def test_an_interrupted_write_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_directions(tmp_path, {"a": direction(1)})

    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_directions(path, {"a": direction(2)})
    assert sorted(p.name for p in path.iterdir()) == ["directions.json", "directions.safetensors"]
    assert torch.equal(load_directions(path)["a"].vector, direction(1).vector)


def edit_json(path: Path, **changes: Any) -> None:
    text = json.loads((path / "directions.json").read_text())
    for key, value in changes.items():
        if key in text:
            text[key] = value
        else:
            text["directions"]["a"][key] = value
    (path / "directions.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "steerfast.plan"}, "holds a plan, not a set of directions: read it with Plan.load"),
        ({"kind": "other"}, "not a set of directions"),
        ({"schema": 2}, "schema 2"),
        ({"unknown": 1}, "exactly the keys"),
        ({"directions": {}}, "at least one"),
        ({"directions": []}, "at least one"),
        ({"layer": "1"}, "layer of direction 'a' is '1'"),
        ({"layer": True}, "layer of direction 'a' is True"),
        ({"norm": None}, "norm of direction 'a'"),
        ({"site": "nowhere"}, "expected one of"),
        ({"width": 47}, r"'a' has shape \(48,\); directions.json says \(47,\)"),
        ({"model": {"name": "M"}}, "missing"),
        ({"model": {"name": "M", "width": 3, "layers": 2}}, "has width 48"),
        ({"tensors_sha256": "0" * 64}, "copy both again"),
    ],
)
def test_damaged_json(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = save_directions(tmp_path, {"a": direction(1)})
    edit_json(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load_directions(path)
    assert str(tmp_path) in str(error.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = save_directions(tmp_path, {"a": direction(1)})
    whole = (path / "directions.safetensors").read_bytes()
    (path / "directions.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"directions\.safetensors is not the file"):
        load_directions(path)
    (path / "directions.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match=r"directions.json is not JSON"):
        load_directions(path)
    (path / "directions.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"directions.json is not JSON"):
        load_directions(path)
    (path / "directions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"directions.json does not exist"):
        load_directions(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_directions(tmp_path / "file", direction(1))


def test_listing_opens_one_file_a_set_and_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_directions(tmp_path / "v0", {"a": direction(1), "b": direction(2, place=2)})
    for i in range(1, 300):
        folder = tmp_path / f"v{i}"
        folder.mkdir()
        for file in first.iterdir():
            shutil.copyfile(file, folder / file.name)
    (tmp_path / "empty").mkdir()
    opened: list[str] = []
    for owner in (builtins, io, os):
        run = owner.open
        monkeypatch.setattr(
            owner, "open", lambda path, *args, run=run, **how: opened.append(path) or run(path, *args, **how)
        )
    listing = list_directions(tmp_path)
    monkeypatch.undo()
    assert len(listing) == 600
    assert sorted(os.fspath(path) for path in opened) == sorted(
        f"{folder}/directions.json" for folder in tmp_path.iterdir() if folder.name != "empty"
    )
    assert listing[1] == (
        str(first),
        "b",
        WIDTH,
        "m2",
        listing[1].norm,
        replace(HERE, place=Place("resid_post", 2)),
    )
    assert "… and 580 more" in repr(listing)
    assert list_directions(first) == listing[:2]


def test_listing_names_what_is_damaged(tmp_path: Path) -> None:
    for name in ("fine", "json", "lost"):
        save_directions(tmp_path / name, {"a": direction(1)})
    (tmp_path / "json" / "directions.json").write_text("{}")
    (tmp_path / "lost" / "directions.safetensors").unlink()
    with pytest.warns(RuntimeWarning, match="2 damaged"):
        listing = list_directions(tmp_path)
    assert [info.name for info in listing] == ["a"]
    assert sorted(Path(folder).name for folder in listing.damaged) == ["json", "lost"]
    assert "directions.safetensors is missing" in repr(listing)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        list_directions(tmp_path / "nowhere")


# --- plans from sets -------------------------------------------------------------------------------------------------


def test_a_plan_adds_each_direction_at_its_place() -> None:
    model = build("llama")
    chosen = DirectionSet([direction(1, place=0), direction(2, place=2), direction(3, place=("mlp_out", 1))], model)
    ids = torch.randint(3, VOCAB, (2, 7))
    by_hand = {
        0: sf.Add(chosen["resid_post.0"].vector, 0.5),
        2: sf.Add(chosen["resid_post.2"].vector, 0.5),
        ("mlp_out", 1): sf.Add(chosen["mlp_out.1"].vector, 0.5),
    }
    with torch.no_grad():
        with sf.steer(model, chosen.plan(0.5, model=model)):
            got = model(ids).logits
        with sf.steer(model, by_hand):
            expected = model(ids).logits
    assert torch.equal(got, expected)
    part = chosen.plan({"resid_post.2": 3.0}, positions="last", keep_norm=True)
    assert list(part.edits) == [("resid_post", 2)]
    assert part.model == card(model)
    assert part.positions == "last"


def test_plans_for_another_model() -> None:
    model = build("llama")
    chosen = DirectionSet([direction(1)], ModelCard("LlamaForCausalLM:other", WIDTH, 12))
    with pytest.raises(ValueError, match=r"12 layers\); this model"):
        chosen.plan(model=model)
    with pytest.raises(ValueError, match="made for"), sf.steer(model, chosen.plan()):
        pass
    with pytest.raises(ValueError, match="layer 3 is out of range"):
        DirectionSet(direction(1, place=3)).plan(model=model)
    with pytest.raises(ValueError, match="width"):
        DirectionSet(direction(1, width=32)).plan(model=model)
    with pytest.warns(UserWarning, match="activations of GPT2LMHeadModel; this model is a LlamaForCausalLM"):
        sf.steer(model, DirectionSet(direction(1, model="GPT2LMHeadModel")).plan(model=model)).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DirectionSet(direction(1, model="llama")).plan(model=model)  # the name that other libraries' files use
        with sf.steer(model, DirectionSet(direction(1, model="llama")).plan()):
            model(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="does not know its layer"):
        DirectionSet({"a": direction(1, place=None)}).plan()
    with pytest.raises(ValueError, match=r"names 'b'; the set has resid_post\.1"):
        DirectionSet(direction(1)).plan({"b": 1.0})


def test_family() -> None:
    names = [
        "LlamaForCausalLM:path",
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "gpt_neox",
        "gemma3_text",
        "Gemma3ForCausalLM",
    ]
    assert [family(name) for name in names] == ["llama", "gpt2", "gptneox", "gptneox", "gemma3", "gemma3"]


# --- dose ------------------------------------------------------------------------------------------------------------


def streams(model: Any, layer: int) -> torch.Tensor:
    """resid_post of every token, text by text, with a hook of this test's own."""
    seen: list[torch.Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    handle = find_layers(model).blocks[layer].register_forward_hook(read)
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tokenizer()(text)["input_ids"]]), use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dose_against_hooks(name: str) -> None:
    model = build(name)
    v, u = direction(1).vector, direction(2).vector
    plan = sf.Plan({-1: [sf.Add(v, 0.3), sf.Ablate(u)], 0: sf.Add(u, 0.01)}, positions="last")
    x = {layer: streams(model, layer) for layer in (0, 2)}
    with sf.steer(model, sf.Plan(plan.edits, "all")):
        steered = {layer: streams(model, layer) for layer in (0, 2)}
    table = dose(model, tokenizer(), plan, TEXTS, limit=1e6)
    assert [(row.site, row.layer, row.edits) for row in table] == [
        ("resid_post", 0, ("Add",)),
        ("resid_post", 2, ("Add", "Ablate")),
    ]
    unit = u / u.norm()
    added = x[2] + 0.3 * v
    change = {0: 0.01 * u.expand_as(x[0]), 2: added - (added @ unit)[:, None] * unit - x[2]}
    for row in table:
        before = x[row.layer]
        expected = (
            before.norm(dim=1).quantile(0.5),
            change[row.layer].norm(dim=1).quantile(0.5),
            (change[row.layer].norm(dim=1) / before.norm(dim=1)).quantile(0.5),
            ((steered[row.layer] - before).norm(dim=1) / before.norm(dim=1)).quantile(0.5),
        )
        for got, value in zip((row.stream, row.change, row.dose, row.accumulated), expected, strict=True):
            assert got == pytest.approx(float(value), rel=1e-4)
    assert table.tokens == len(x[0])
    assert table.texts == len(TEXTS)


def test_dose_of_a_direction_is_that_of_its_activations() -> None:
    model = build("llama")
    acts = sf.collect(model, tokenizer(), TEXTS, [1], "all", progress=False)
    v = direction(1, typical_norm=acts.norms[1])
    with pytest.warns(UserWarning, match=r"resid_post 1 is changed by .* multiply the strengths by"):
        table = dose(model, tokenizer(), DirectionSet(v).plan(2.0), TEXTS)
    assert table[0].change == pytest.approx(2 * v.norm, rel=1e-4)
    assert table[0].change / table[0].stream == pytest.approx(v.dose(2.0), rel=1e-4)
    assert "large" in repr(table).splitlines()[-1]
    small = dose(model, tokenizer(), {1: sf.Add(v.vector, 0.8 / table.largest.dose)}, TEXTS)
    assert small[0].dose == pytest.approx(0.4, rel=1e-4)
    assert "large" not in "".join(repr(small).splitlines()[1:])


def test_dose_of_other_sites_and_refusals() -> None:
    model = build("llama")
    before = [
        len(block._forward_hooks) for block in find_layers(model).blocks
    ]  # transformers may have put its own there
    v = direction(1).vector
    table = dose(
        model, tokenizer(), {("resid_pre", 1): sf.Add(v, 0.01), ("mlp_out", 0): sf.Add(v, 0.02)}, TEXTS, limit=9
    )
    assert [(row.site, row.layer) for row in table] == [("mlp_out", 0), ("resid_pre", 1)]
    assert table[1].accumulated != table[1].dose
    with pytest.raises(ValueError, match="texts is empty"):
        dose(model, tokenizer(), {1: sf.Add(v)}, [])
    with pytest.raises(TypeError, match="several texts"):
        dose(model, tokenizer(), {1: sf.Add(v)}, "one text")
    with pytest.raises(ValueError, match="out of range"):
        dose(model, tokenizer(), {9: sf.Add(v)}, TEXTS)
    with pytest.raises(TypeError, match="dose: expected a Plan"):
        dose(model, tokenizer(), [sf.Add(v)], TEXTS)  # type: ignore[arg-type]
    assert [len(block._forward_hooks) for block in find_layers(model).blocks] == before


def test_the_docstrings_examples_run() -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    examples = [*finder.find(vectors), *finder.find(Direction, globs=vars(module))]
    assert len([example for example in examples if example.examples]) >= 8
    for example in examples:
        assert runner.run(example).failed == 0
    assert Direction is Direction
