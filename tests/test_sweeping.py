"""The sweep against one text at a time, its file under interruption, and what it refuses."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import build

import steerfast as sf
from steerfast.cli.sweep import _next, add_arguments, run
from steerfast.directions import extract
from steerfast.directions.fit import ESTIMATORS
from steerfast.directions.fits import natural
from steerfast.directions.trained import examples_of, train
from steerfast.place import Place
from steerfast.tools.sweep import Grid, Sweep, sweep
from steerfast.tools.sweep_edits import Swept, Trial
from steerfast.tools.sweep_scores import NEUTRAL, Question
from steerfast.tools.sweep_store import Cell

module = sys.modules["steerfast.tools.sweep"]
SIDES = (["abc d", "bcd", "cc"], ["xyz", "zz y", "wxy"])
QUESTION = Question(("hello", "some more"), (" abc", " d"), (" xyz", " w", " zzz"), ("plain text", "the rest"))
GRID = Grid(layers=(0, -1), strengths=(-0.5, 0.0, 1.0), draws=0)


class Letters:
    """A tokenizer: one token per letter, one special token in front."""

    all_special_ids = (1,)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [3 + ord(letter) % 90 for letter in text]}


def swept(**changes: Any) -> Sweep:
    settings: dict[str, Any] = {"sides": SIDES, "question": QUESTION, "grid": GRID, "progress": False}
    return sweep(build("llama"), Letters(), **settings | changes)


def one_by_one(plan: Any, strength: float = 1.0) -> tuple[float, float]:
    """Effect and perplexity of one plan, each text alone and unpadded."""
    model, tokenizer = build("llama"), Letters()

    def score(head: list[int], tail: list[int]) -> float:
        ids = torch.tensor([head + tail])
        with torch.no_grad():
            if plan is None:
                logits = model(ids).logits
            else:
                with sf.steer(model, plan, strength):
                    logits = model(ids).logits
        likelihoods = logits[0].double().log_softmax(-1)
        return sum(float(likelihoods[len(head) - 1 + i, token]) for i, token in enumerate(tail))

    def side(prompt: str, continuations: tuple[str, ...]) -> float:
        head = tokenizer(prompt)["input_ids"]
        return math.log(sum(math.exp(score(head, tokenizer(c, False)["input_ids"])) for c in continuations))

    odds = [side(p, QUESTION.wanted) - side(p, QUESTION.unwanted) for p in QUESTION.prompts]
    texts = [tokenizer(text)["input_ids"] for text in QUESTION.neutral]
    loss = -sum(score(ids[:1], ids[1:]) for ids in texts) / sum(len(ids) - 1 for ids in texts)
    return sum(odds) / len(odds), math.exp(loss)


def test_cells_equal_one_text_at_a_time() -> None:
    found = swept(batch_size=7)
    model = build("llama")
    pos, neg = (sf.collect(model, Letters(), side, [0, 2], progress=False) for side in SIDES)
    assert [(c.method, c.layer, c.strength) for c in found] == [
        ("mean_difference", layer, s) for layer in (0, 2) for s in (-0.5, 0.0, 1.0)
    ]
    assert found.baseline.effect == pytest.approx(one_by_one(None)[0], abs=1e-5)
    for cell in found:
        v = extract.mean_difference(pos[cell.layer], neg[cell.layer], normalize=True)
        dose = cell.strength * v.origin.typical_norm
        plan = None if cell.strength == 0 else {cell.layer: sf.Add(v, dose)}
        effect, perplexity = one_by_one(plan)
        assert cell.effect == pytest.approx(effect, abs=1e-4)
        assert cell.perplexity == pytest.approx(perplexity, rel=1e-4)
        assert cell.norm == pytest.approx(abs(dose), rel=1e-5)
    assert len({round(cell.effect, 4) for cell in found}) == 5  # the two zeros are one


def test_the_batch_does_not_matter_and_the_vector_may_be_the_unit() -> None:
    one, many = swept(batch_size=1), swept(batch_size=64)
    for a, b in zip(one, many, strict=True):
        assert a.effect == pytest.approx(b.effect, abs=1e-4)
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-4)
    vector = swept(grid=Grid(layers=(1,), strengths=(2.0,), unit="vector", methods=("difference", "pca")))
    model = build("llama")
    pos, neg = (sf.collect(model, Letters(), side, [1], progress=False) for side in SIDES)
    for cell, method in zip(vector, ("difference", "pca"), strict=True):
        v = getattr(extract, method)(pos, neg)
        assert cell.norm == pytest.approx(2 * float(v.vector.norm()), rel=1e-5)
        assert cell.effect == pytest.approx(one_by_one({1: sf.Add(v, 2.0)})[0], abs=1e-4)


def test_a_flow_is_swept_by_its_angle_or_its_length() -> None:
    """Negative strengths go down the same barrier."""
    model = build("llama")
    pos, neg = (sf.collect(model, Letters(), side, [1], progress=False) for side in SIDES)
    h = sf.fit_barrier(pos[1], neg[1], kind="quadratic")
    for unit, name in (("stream", "angle"), ("vector", "T")):
        found = swept(grid=Grid(layers=(1,), strengths=(-0.4, 0.6), unit=unit, methods=("flow",)))
        for cell, edit in zip(found, (sf.Flow(-h, **{name: 0.4}), sf.Flow(h, **{name: 0.6})), strict=True):
            effect, perplexity = one_by_one({1: edit})
            assert cell.effect == pytest.approx(effect, abs=1e-4)
            assert cell.perplexity == pytest.approx(perplexity, rel=1e-4)
            length = abs(cell.strength) * (h.origin.typical_norm if unit == "stream" else 1.0)
            assert cell.norm == pytest.approx(length, rel=1e-5)
        assert len({round(cell.effect, 4) for cell in found} | {round(found.baseline.effect, 4)}) == 3


@pytest.mark.parametrize(
    ("cell", "unit", "command"),
    [
        (Cell("pca", 3, -1.0, 5.0, 1.0, 1.0), "stream", "extract m --positive ... --negative ... --layers 3 --site s "
         "--method pca --normalize --strength -5"),
        (Cell("affine", 3, 0.5, 5.0, 1.0, 1.0, 0.7), "stream", "fit affine m --positive ... --negative ... --layer 3 --site s "
         "--steer all"),
        (Cell("amplify", 3, 0.5, 5.0, 1.0, 1.0, 0.7), "stream", "fit amplify m --positive ... --negative ... --layer 3 --site s "
         "--sae path --steer all"),
        (Cell("flow", 3, 0.5, 5.0, 1.0, 1.0), "stream", "fit flow m --positive ... --negative ... --layer 3 --site s "
         "--set angle=0.5 --steer all"),
        (Cell("flow", 3, -2.0, 2.0, 1.0, 1.0), "vector", "fit flow m --positive (the negative ones) --negative (the "
         "positive ones) --layer 3 --site s --set T=2 --steer all"),
    ],
)  # fmt: skip
def test_the_next_command_makes_the_best_cell(cell: Cell, unit: str, command: str) -> None:
    assert _next(argparse.Namespace(model="m", site="s", unit=unit, sae="path"), cell) == command


def test_an_interrupted_sweep_continues(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, limit = module.measure, [], [4]  # the baseline and three cells

    def measure(model: Any, sequences: Any, question: Any, plans: Any, batch_size: int) -> Any:
        if len(calls) == limit[0]:
            raise KeyboardInterrupt
        calls.append(plans)
        return real(model, sequences, question, plans, batch_size)

    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        swept(out=tmp_path, batch_size=4)
    text = json.loads((tmp_path / "sweep.json").read_text())
    assert len(text["cells"]) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]
    assert not build("llama")._forward_hooks
    calls.clear()
    limit[0] = 99
    found = swept(out=tmp_path, batch_size=4)
    assert len(calls) == 3
    assert list(found) == list(swept(batch_size=4))
    calls.clear()
    assert list(swept(out=tmp_path)) == list(found)  # all on disk: nothing is measured
    assert not calls
    larger = Grid(layers=(0, -1), strengths=(-0.5, 0.0, 1.0, 2.0), draws=0)
    assert [c for c in swept(out=tmp_path, grid=larger, batch_size=64) if c.strength < 2] == list(found)
    assert len(calls) == 1  # the two new cells share one batch


def test_parts_are_merged(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of parts are those of the whole, which measures only what no part has measured."""
    grid = dataclasses.replace(GRID, draws=0)
    whole = swept(batch_size=4, grid=grid)
    parts = {i: swept(batch_size=4, out=tmp_path, grid=dataclasses.replace(grid, part=(i, 4))) for i in (1, 4, 3)}
    assert [len(parts[i]) for i in (1, 3, 4)] == [1, 1, 2]
    assert [cell for i in (1, 3, 4) for cell in parts[i]] == [cell for n, cell in enumerate(whole) if n not in (1, 2)]
    real, calls = module.measure, []
    monkeypatch.setattr(module, "measure", lambda *a: calls.append(a[3]) or real(*a))
    merged = swept(batch_size=64, out=tmp_path, grid=grid)
    assert len(calls) == 1
    assert len(calls[0]) == 2
    for found, wanted in zip(merged, whole, strict=True):
        assert found.effect == pytest.approx(wanted.effect, abs=1e-5)
    calls.clear()
    assert list(swept(out=tmp_path, grid=grid)) == list(merged)
    assert not calls
    with pytest.raises(ValueError, match=r"sweep\.1of4\.json was measured with other sides"):
        swept(out=tmp_path, sides=(["abc"], SIDES[1]))
    with pytest.raises(ValueError, match="part is 3 of 2"):
        Grid((0,), part=(3, 2))


def test_another_sweep_or_a_damaged_file_is_refused(tmp_path: Any) -> None:
    swept(out=tmp_path)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match=r"sweep.json was measured with other sides; choose another directory"):
        swept(out=tmp_path, sides=(["abc"], SIDES[1]))
    with pytest.raises(ValueError, match=r"with other questions \(prompts, wanted, unwanted, neutral\), unit"):
        swept(out=tmp_path, question=Question(("other",), (" a",), (" b",)), grid=Grid((0,), (1.0,), unit="vector"))
    assert (tmp_path / "sweep.json").read_bytes() == before
    for content, message in ((b"{", "is not JSON"), (b'{"kind": "other"}', "is no sweep of schema 1 to 3")):
        (tmp_path / "sweep.json").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            swept(out=tmp_path)
    text = json.loads(before)
    text["cells"][0].pop("effect")
    (tmp_path / "sweep.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="is damaged"):
        swept(out=tmp_path)


def test_another_sae_of_the_same_shape_is_another_sweep(tmp_path: Any) -> None:
    grid = Grid((1,), (0.5,), ("amplify",), sae=sae(), draws=0)
    swept(out=tmp_path, grid=grid, sides=MORE)
    eye = torch.eye(48)
    other = sf.SAE(torch.cat([-eye, eye]), torch.cat([-eye, eye]), k=96)
    assert repr(other) == repr(grid.sae)
    with pytest.raises(ValueError, match="measured with other sae"):
        swept(out=tmp_path, grid=dataclasses.replace(grid, sae=other), sides=MORE)


def test_another_models_cells_are_not_taken(tmp_path: Any) -> None:
    """Models of one class, size and name differ in their weights, or in their dtype."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    swept(out=whole)
    swept(out=part, grid=dataclasses.replace(GRID, part=(1, 2)))
    other = copy.deepcopy(build("llama"))
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    for folder in (whole, part):
        with pytest.raises(ValueError, match="was measured with other weights; choose another directory"):
            sweep(other, Letters(), SIDES, QUESTION, GRID, folder, progress=False)
    exact = copy.deepcopy(build("llama")).bfloat16().float()  # the same numbers in either dtype
    sweep(exact, Letters(), SIDES, QUESTION, GRID, tmp_path / "dtype", progress=False)
    with pytest.raises(ValueError, match="was measured with other dtype; choose another directory"):
        sweep(exact.bfloat16(), Letters(), SIDES, QUESTION, GRID, tmp_path / "dtype", progress=False)


def test_what_a_method_refuses_is_said_before_anything_is_measured(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("the model was measured"))
    with pytest.raises(ValueError, match="expected at least 2 on each side"):
        swept(
            out=tmp_path, sides=(["ab"], ["xy"]), grid=dataclasses.replace(GRID, methods=("mean_difference", "clamp"))
        )
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"sweep: out: .*taken is a file; give a folder"):
        swept(out=tmp_path / "taken")


def test_a_part_without_cells(tmp_path: Any) -> None:
    grid = dataclasses.replace(GRID, draws=0, part=(1, 40))
    assert list(swept(out=tmp_path, grid=grid)) == []


FITTED = [
    method for method in ESTIMATORS if method not in ("flow", "edit_features", "amplify", "calibrate", "deficit_push")
]


@pytest.mark.parametrize("unit", ["stream", "vector"])
def test_every_method_of_fit_is_swept(unit: str) -> None:
    grid = Grid((1,), (-0.3, 0.6), (*FITTED, "amplify"), unit, sae=sae(), draws=0)
    found = swept(grid=grid, sides=MORE)
    model = build("llama")
    pos, neg = (sf.collect(model, Letters(), side, [0, 1, 2], progress=False) for side in MORE)
    for cell in found:
        given = {"sae": sae()} if cell.method == "amplify" else {}
        sides = [side if cell.method == "rotate" else side.only(1) for side in (pos, neg)]
        edit = sf.fit(cell.method, *sides, layer=1, draws=0, **given)
        one = middle(edit.apply(neg[1]) - neg[1])
        factor = cell.strength * edit.origin.typical_norm / one if unit == "stream" and one else cell.strength
        assert cell.factor == pytest.approx(factor, rel=1e-4), cell.method
        assert cell.norm == pytest.approx(middle(edit.apply(neg[1], factor) - neg[1]), rel=1e-3, abs=1e-6)
        effect, perplexity = one_by_one({1: edit}, factor)
        assert cell.effect == pytest.approx(effect, abs=1e-3), cell.method
        assert cell.perplexity == pytest.approx(perplexity, rel=1e-3)


def middle(change: torch.Tensor) -> float:
    """Median length of the rows that change."""
    lengths = change.norm(dim=1)
    return float(lengths[lengths > 0].quantile(0.5)) if bool(lengths.any()) else 0.0


def test_an_edit_of_few_rows_is_as_long_where_it_acts() -> None:
    """A clamp that two of five rows are outside of: a strength of 0.5 moves those two by half of the stream's norm."""
    rows = torch.zeros(5, 48)
    rows[:, 0] = torch.tensor([9.0, 9.0, 9.0, 2.0, 4.0])
    edit = sf.Clamp(torch.eye(48)[0], low=6.0)
    one = Swept(edit, Place("resid_post", 1), 8.0, rows, "stream")
    factor = one.factor(0.5)
    assert factor == pytest.approx(4 / 3)  # rows that move go 4 and 2 far at a factor of 1, in the middle 3
    assert one.length(factor) == pytest.approx(4.0)
    assert (edit.apply(rows, factor) - rows).norm(dim=1).tolist() == pytest.approx([0, 0, 0, 16 / 3, 8 / 3])


def test_no_random_direction_stands_beside_an_edit_that_moves_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "_edit", lambda *_: sf.Clamp(torch.eye(48)[0], low=-1e6))
    grid = Grid((1,), (0.5,), ("clamp",), damage=99.0, draws=3)
    found = swept(grid=grid, sides=MORE)
    assert (found[0].norm, found[0].factor) == (0.0, 0.5)
    assert found.null is not None
    assert len(found.null[1].shuffled) == 3
    assert found.null[1].random == ()


def sae() -> sf.SAE:
    eye = torch.eye(48)
    return sf.SAE(torch.cat([eye, -eye]), torch.cat([eye, -eye]), k=96)


MORE = (["abc d", "bcd", "cc", "ccb", "ab"], ["xyz", "zz y", "wxy", "yy", "xw"])


PULL_OF = natural.pull_of
PAIRS = ([f"some {a} zq" for a in "abcd"], [f"some {a} kk" for a in "abcd"])


def test_trained_methods_are_swept() -> None:
    with pytest.warns(UserWarning, match="of 3 pairs of texts 1 have no continuation on a side"):
        found = examples_of(("I love you", "good dog", "x"), ("I hate you", "bad cat", "y"))
    assert found == [("I", " love you", " hate you"), ("good", " dog", " cat")]
    with pytest.raises(ValueError, match="no pair of texts has a continuation on either side, as 'x' and 'y'"):
        examples_of(("x",), ("y",))
    with pytest.raises(ValueError, match="2 positive and 1 negative texts; they are read in pairs"):
        examples_of(("I love", "I like"), ("I hate",))
    with pytest.raises(ValueError, match="'reps' is trained at resid_post, and site is 'mlp_out'"):
        Grid((1,), (1.0,), ("reps",), site="mlp_out")
    grid = Grid((1,), (1.0,), ("loreft", "vector", "reft_r1", "reps", "lineas"), "vector", draws=0)
    found = {cell.method: cell for cell in swept(grid=grid, sides=PAIRS)}
    lessons = [(f"some {a}", " zq") for a in "abcd"]
    made = sf.fit_vector(build("llama"), Letters(), lessons, 1)
    assert found["vector"].effect == pytest.approx(one_by_one({1: made})[0], abs=1e-3)
    assert found["vector"].norm == pytest.approx(float(made.vector.norm()), rel=1e-4)
    affine = sf.fit_lineas(build("llama"), Letters(), *PAIRS, [1])
    assert found["lineas"].effect == pytest.approx(one_by_one(affine)[0], abs=1e-3)
    assert len({round(cell.effect, 4) for cell in found.values()}) == 5


class Opened(Letters):
    bos_token_id = 1


def test_a_velocity_is_swept_and_its_null_takes_the_gradients_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the field that `fit_velocity` makes of all pairs; an exchanged pair has its gradients with the other sign."""
    taken = []
    monkeypatch.setattr(natural, "pull_of", lambda *args: taken.append(args[1]) or PULL_OF(*args))
    monkeypatch.setattr(natural, "SAMPLES", 16)
    grid = Grid((1,), (1.0,), ("velocity",), "vector", damage=99.0, draws=3)
    found = sweep(build("llama"), Opened(), PAIRS, QUESTION, grid, progress=False)
    assert len(taken) == len(PAIRS[0])
    field = sf.fit_velocity(build("llama"), Opened(), examples_of(*PAIRS), 1, draws=0)
    (cell,) = found
    assert cell.effect == pytest.approx(one_by_one({1: sf.Flow(field, T=1.0)})[0], abs=1e-3)
    assert found.null is not None
    null = found.null[1]
    assert len({round(effect, 4) for effect in (null.effect, *null.shuffled)}) > 1
    many = [[f"some {a}{i} {side}" for i, a in enumerate("abcdefghijkl")] for side in ("zq", "kk")]
    (cell,) = sweep(build("llama"), Opened(), many, QUESTION, replace(grid, draws=0), progress=False)
    flow = train(
        "velocity", build("llama"), Opened(), *many, 1, draws=0
    )  # what `steerfast fit` makes: every fifth held out
    assert cell.effect == pytest.approx(one_by_one({1: flow})[0], abs=1e-3)
    assert len(null.shuffled) == len(null.random) == 3


def test_an_sae_is_asked_for_before_anything_runs() -> None:
    with pytest.raises(TypeError, match="Grid: 'amplify' edits features of an SAE; give it as sae="):
        Grid((1,), (1.0,), ("amplify",))


def test_the_best_cell_stands_beside_its_null(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid((1,), (0.5, 1.0), ("mean_difference", "affine_ablate"), damage=99.0, draws=4)
    found = swept(grid=grid, sides=MORE, out=tmp_path)
    best = found.best(99.0)
    assert found.null is not None
    cell, null = found.null
    assert cell == best
    assert null.effect == best.effect - found.baseline.effect
    assert len(null.shuffled) == len(null.random) == 4
    assert repr(found).splitlines()[-1].startswith(f"null of {best.method}, layer 1, strength {best.strength:g} (")
    # a control is a random direction of the cell's length, at the cell's place
    generator = torch.Generator().manual_seed(0)
    model = build("llama")
    pos, neg = (sf.collect(model, Letters(), side, [1], progress=False)[1] for side in MORE)
    if best.method == "mean_difference":
        pool = torch.cat([pos, neg])
        first = pool[torch.randperm(10, generator=generator)]
        v = first[:5].double().mean(0) - first[5:].double().mean(0)
        dose = best.strength * float(pool.norm(dim=1).quantile(0.5))
        effect, _ = one_by_one({1: sf.Add(v.float() / v.norm(), dose)})
        assert null.shuffled[0] == pytest.approx(effect - found.baseline.effect, abs=1e-3)
    monkeypatch.setattr(module, "measure", None)  # all on disk: nothing is measured
    assert swept(grid=grid, sides=MORE, out=tmp_path).null == found.null


def test_a_file_without_nulls_is_continued(tmp_path: Any) -> None:
    found = swept(out=tmp_path)
    file = tmp_path / "sweep.json"
    text = json.loads(file.read_text())
    text["schema"] = 1
    asked = {name: value for name, value in text["question"].items() if name not in ("weights", "dtype")}
    text["question"] = asked
    text["key"] = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    del text["null"]
    for entry in [text["baseline"], *text["cells"]]:
        del entry["factor"]
    file.write_text(json.dumps(text))
    with pytest.warns(UserWarning, match="does not say its model's weights and dtype; they count as these"):
        again = swept(out=tmp_path)
    assert [(c.method, c.layer, c.strength, c.effect) for c in again] == [
        (c.method, c.layer, c.strength, c.effect) for c in found
    ]
    assert math.isnan(again[0].factor)


def cells() -> Sweep:
    grid = [
        ("pca", 3, -1.0, 0.5, 21.0),
        ("pca", 3, 1.0, 2.5, 21.5),
        ("pca", 7, 1.0, 4.0, 80.0),
        ("logistic", 3, 1.0, 1.0, 20.5),
    ]
    return Sweep(
        [Cell(m, layer, s, 5.0, e, p) for m, layer, s, e, p in grid], Cell("none", -1, 0, 0, 0.5, 20.0), "stream"
    )


def test_the_best_cell_is_the_strongest_that_is_bearable() -> None:
    found = cells()
    best = found.best()
    assert best is not None
    assert (best.layer, best.strength) == (3, 1.0)
    assert found.best(5.0) == found[2]
    assert found.best(1.0) is None
    broken = Cell("pca", 5, 1.0, 5.0, math.nan, 20.0)  # logits beyond its dtype on the prompts alone
    assert Sweep([broken, *found], found.baseline, "stream").best() == best


def test_the_table_keeps_its_columns_apart() -> None:
    some = [Cell("pca", 12, s, 5.0, 12.44, 36400.0) for s in (-1.0, 1.0)]
    shown = repr(Sweep(some, Cell("none", -1, 0, 0, 0.0, 20.0), "stream")).splitlines()
    assert shown[4].split() == ["12", *["+12.44", "|", "3.64e+04"] * 2]


def test_the_table_shows_every_cell() -> None:
    shown = repr(cells()).splitlines()
    assert shown[0] == "unsteered: effect +0.50 nats, perplexity 20.0"
    assert shown[3].split() == ["layer", "-1", "1"]
    assert shown[4].split() == ["3", "+0.00", "|", "21", "+2.00", "|", "21.5"]
    assert shown[5].split() == ["7", "+3.50", "|", "80"]
    assert shown[7].startswith("logistic")


def test_the_heat_map_is_a_png_and_leaves_matplotlib_alone(tmp_path: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    backend = matplotlib.get_backend(auto_select=False)
    path = cells().heat_map(tmp_path / "map.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20))
    assert width > height > 300
    assert list(tmp_path.iterdir()) == [path]
    assert matplotlib.get_backend(auto_select=False) == backend


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": Grid(layers=(7,))}, ValueError, r"sweep: layer 7 is out of range"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        ({"sides": (["a"],)}, ValueError, r"got 1 items"),
        ({"sides": ("abc", ["x"])}, TypeError, "sides must be several values, got 'abc'"),
        ({"question": Question(("a",), (" b",), (" c",), ("d",)), "tokens": 0}, ValueError, "has one token"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    if "tokens" in change:
        change = {"question": change["question"]}

        class Bare(Letters):
            def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
                return super().__call__(text, False)

        with pytest.raises(error, match=message):
            sweep(build("llama"), Bare(), SIDES, change["question"], GRID, progress=False)
        return
    with pytest.raises(error, match=message):
        swept(**change)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Grid(layers=()), ValueError, "Grid: layers is empty"),
        (lambda: Grid((1, 1)), ValueError, "name each once"),
        (lambda: Grid((1,), (math.nan,)), ValueError, "strengths must be finite"),
        (lambda: Grid((1,), methods=("magic",)), ValueError, "methods is 'magic'; expected one of 'mean_difference'"),
        (lambda: Grid((1,), unit="miles"), ValueError, "unit is 'miles'"),
        (lambda: Question((), (" a",), (" b",)), ValueError, "Question: prompts is empty"),
        (lambda: Question("text", (" a",), (" b",)), TypeError, "prompts must be several values"),
        (lambda: Question(("text",), ("",), (" b",)), TypeError, "wanted holds ''"),
    ],
)
def test_bad_questions(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.model
def test_the_command_on_a_real_model(tmp_path: Any, capsys: pytest.CaptureFixture[str], smollm: Any) -> None:
    """Love − hate makes kind words likelier at some layer and strength, and the command says where."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(usual=parser.get_default)
    texts = ["--positive", "I love you", "--negative", "I hate you", "--prompts", "I think people are", "My boss is"]
    words = ["--wanted", " kind", " wonderful", "--unwanted", " cruel", " awful", "--neutral", *NEUTRAL[:2]]
    grid = [
        "--layers",
        "8,14",
        "--strengths",
        "0.2",
        "0.5",
        "--damage",
        "3",
        "--out",
        str(tmp_path),
        "--batch-size",
        "32",
    ]
    assert run(parser.parse_args(["demo", *texts, *words, *grid])) == 0
    shown = capsys.readouterr().out
    assert "unsteered: effect" in shown
    assert "Best" in shown
    assert "--normalize --strength" in shown
    text = json.loads((tmp_path / "sweep.json").read_text())
    assert len(text["cells"]) == 4
    gain = max(cell["effect"] for cell in text["cells"]) - text["baseline"]["effect"]
    assert gain > 0.3
    assert 5 < text["baseline"]["perplexity"] < 200
