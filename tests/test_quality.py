"""The study of effect against damage: its data, its scores against plain forward passes, its curves against closed forms."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import build, randomise

import steerfast as sf
from steerfast.models.layers import find_layers

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import quality
import quality_concepts as concepts
import quality_report as report
import quality_scores as scores
import quality_tradeoff as tradeoff
import quality_truthful as truthful
from quality_methods import METHODS, Method, Sample, everywhere
from quality_tradeoff import Interval, Run


class Letters:
    """A tokenizer: one token per letter, one special token in front."""

    all_special_ids = (1,)
    pad_token_id = eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [3 + ord(letter) % 90 for letter in text]}

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(map(str, row)) for row in ids.tolist()]


def sample(groups: int = 6, each: int = 5, width: int = 16, seed: int = 0) -> Sample:
    """Two clouds that differ along the first axis; head 1 of layer 0 tells them apart, the others do not."""
    random = torch.Generator().manual_seed(seed)
    n = groups * each
    pos, neg = (torch.randn(n, width, generator=random) + s * torch.eye(width)[0] for s in (2.0, -2.0))
    heads = [{i: torch.randn(n, 3, 4, generator=random) for i in range(2)} for _ in range(2)]
    for side, sign in zip(heads, (1.0, -1.0), strict=True):
        side[0][:, 1, 2] += 3 * sign
    pairs = [concepts.Pair(f"g{i // each}", "", "", "") for i in range(n)]
    return Sample(1, pos, neg, heads[0], heads[1], pairs, seed, None, None)


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", concepts.NAMES)
def test_no_held_out_group_or_text_was_seen(name: str) -> None:
    concept = concepts.own(name)
    assert len(concept.train) >= 60
    assert len(concept.test) >= 24
    assert not {p.group for p in concept.train} & {p.group for p in concept.test}
    pairs = [*concept.train, *concept.test]
    texts = [p.prompt + side for p in pairs for side in (p.wanted, p.unwanted)]
    assert len(set(texts)) == len(texts)
    wanted, unwanted = concept.classifier or ((), ())
    assert len(wanted) == len(unwanted) >= 24
    own_texts = {text.strip() for text in (*wanted, *unwanted)}
    assert len(own_texts) == 2 * len(wanted)
    assert not own_texts & {t.strip() for p in pairs for t in (p.prompt + p.wanted, p.prompt + p.unwanted)}


@pytest.mark.parametrize("name", concepts.NAMES)
def test_a_continuation_begins_with_its_space_and_a_prompt_ends_without_one(name: str) -> None:
    concept = concepts.own(name)
    for pair in (*concept.train, *concept.test):
        assert pair.wanted != pair.unwanted
        for text in (pair.wanted, pair.unwanted):
            assert text[0] == " " != text[1]
        assert pair.prompt == pair.prompt.strip()
    assert all(text == text.strip() for text in (*concept.openings, *concepts.reference()))


def test_a_training_set_is_whole_groups_and_depends_on_its_seed() -> None:
    concept = concepts.own("sentiment")
    drawn = [concept.sampled(seed) for seed in range(6)]
    assert concept.sampled(0) == drawn[0]
    assert len({tuple(one) for one in drawn}) > 1
    for index in drawn:
        names = {concept.train[i].group for i in index}
        assert index == [i for i, pair in enumerate(concept.train) if pair.group in names]
        assert len(names) == 9


def test_public_sets_are_read_with_their_groups_apart(tmp_path: Path) -> None:
    folder = tmp_path / "caa" / "honesty"
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        pairs = [
            {"question": f"{part} {i}? (A) a (B) b", "answer_matching_behavior": "(B)", "answer_not_matching_behavior": "(A)"}
            for i in range(9)
        ]  # fmt: skip
        (folder / f"{part}.json").write_text(json.dumps(pairs))
    with (tmp_path / "TruthfulQA.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Category", "Question", "Best Answer", "Incorrect Answers"])
        table.writerows([f"c{i % 6}", f"q{i}?", "yes, really", "no; never"] for i in range(30))
    with (tmp_path / "xstest_prompts.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "type", "label"])
        table.writerows([f"p{i}", f"t{i % 3}", "safe" if i % 2 else "unsafe"] for i in range(12))
    behaviour, truth, safe = concepts.public(tmp_path, 8)
    assert behaviour.train[0] == concepts.Pair("train 0", "train 0? (A) a (B) b\n\nAnswer:", " (B", " (A")
    assert (len(behaviour.train), len(behaviour.test)) == (8, 4)
    assert (truth.train[0].wanted, truth.train[0].unwanted) == (" yes, really", " no")
    for one in (truth, safe):
        assert one.test
        assert not {p.group for p in one.train} & {p.group for p in one.test}
    assert all(int(p.prompt.split()[1][1:]) % 2 for p in (*safe.train, *safe.test))
    with pytest.raises(FileNotFoundError, match="holds none of"):
        concepts.public(tmp_path / "caa", 8)


def test_the_classifier_tells_its_own_sides_apart_and_is_judged_on_held_out_texts() -> None:
    concept = concepts.own("formality")
    found = scores.WordClassifier(*concept.classifier)
    wanted, unwanted = (np.array(found(side)) for side in concept.classifier)
    assert (wanted > 0).mean() > 0.95
    assert (unwanted < 0).mean() > 0.95
    swapped = replace(concept, test=tuple(replace(p, wanted=p.unwanted, unwanted=p.wanted) for p in concept.test))
    assert found.accuracy(concept) == pytest.approx(1 - found.accuracy(swapped), abs=0.05)
    assert found.accuracy(concept) > 0.75


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [-1, 0, 1, 2])  # the plan begins at 1, and for 0 has another site
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("strength", [None, 1.0, -0.5])
def test_scores_are_those_of_plain_passes_text_by_text(strength: float | None, family: str, known: int) -> None:
    model, tokenizer = build(family), Letters()
    vector = torch.randn(48)
    places = {1: sf.Add(vector, 3.0), ("resid_post" if known > 0 else "attn_out", 2): sf.Add(vector)}
    plan = None if strength is None else sf.Plan(places, "last")
    pairs = [concepts.Pair("g", p, a, b) for p, a, b in (("some prompt", " good", " a bad one"), ("no", " x", " yz"))]
    texts = [*scores.pair_texts(tokenizer, concepts.Concept("c", (), tuple(pairs), ())),
             *scores.reference_texts(tokenizer, ["a neutral text", "another of them"])]  # fmt: skip
    found = scores.log_likelihoods(scores.batches(model, texts, known, rows=4), plan, strength or 0.0)
    again = scores.log_likelihoods(parts := scores.batches(model, texts, known, rows=4), plan, strength or 0.0)
    ran = []
    with find_layers(model).blocks[0].mlp.register_forward_hook(lambda *_: ran.append(1)):
        assert again == scores.log_likelihoods(parts, plan, strength or 0.0) == found
    assert bool(ran) is (known == -1 or (plan is not None and known != 1))
    assert not any("forward" in vars(block) for block in find_layers(model).blocks)
    for text, score in zip(texts, found, strict=True):
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            if plan is None:
                logits = model(ids, use_cache=False).logits
            else:
                with sf.steer(model, plan, strength, prompt_length=text.start):
                    logits = model(ids, use_cache=False).logits
        odds = logits[0].double().log_softmax(-1)
        own = sum(float(odds[i - 1, text.ids[i]]) for i in range(text.start, len(text.ids)))
        assert score == pytest.approx(own, abs=2e-4)


def shared_keys() -> torch.nn.Module:
    """A model whose upper blocks take the keys and values of lower ones."""
    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("this transformers has no Gemma 4")
    sizes = dict.fromkeys(("head_dim", "global_head_dim"), 16) | dict.fromkeys(
        ("vocab_size", "vocab_size_per_layer_input"), 128
    )
    config = transformers.Gemma4TextConfig(
        **sizes, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=64, max_position_embeddings=128, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 3, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model)
    return model.float().eval()


@pytest.mark.parametrize("shared", [False, True])
def test_what_cannot_be_left_out_is_computed(shared: bool) -> None:
    model, place = (shared_keys(), 3) if shared else (build("llama"), 2)
    edit = sf.Add(torch.randn(48), 3.0)
    if not shared:
        edit = sf.WhenToken(sf.Condition(torch.randn(48), 0.0), edit, layer=0)
    plan = sf.Plan({place: edit}, "last")
    texts = [scores.Text(tuple(range(5, 5 + n)), start) for n, start in ((9, 4), (6, 3), (16, 12))]
    plain, kept = (scores.log_likelihoods(scores.batches(model, texts, layer), plan) for layer in (-1, place))
    assert kept == pytest.approx(plain, abs=1e-5)
    assert scores.log_likelihoods(scores.batches(model, texts), None) != pytest.approx(plain, abs=1e-2)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What `quality.main` would measure, and the file that it would report."""
    found: list[Any] = []
    monkeypatch.setattr(quality, "load", lambda path: (build("llama"), Letters(), "tiny"))
    monkeypatch.setattr(quality, "measure", lambda *given, **_: found.append(list(given[5])))
    monkeypatch.setattr(quality.quality_report, "report", lambda path: found.append(path.name))
    monkeypatch.setattr(quality, "HERE", tmp_path)
    return found


@pytest.mark.parametrize(("argv", "methods", "name"), [
    (["--fields"], ["caa", "affine", "natural", "natural-one"], "quality-velocity-tiny.json"),
    (["--methods", "natural"], ["natural"], "quality-velocity-tiny.json"),
    (["--methods", "caa", "--everywhere"], ["caa"], "quality-tiny-everywhere.json"),
    ([], [key for key in METHODS if not key.startswith("natural")], "quality-tiny.json"),
])  # fmt: skip
def test_what_is_measured_has_the_name_of_its_file(
    asked: list[Any], argv: list[str], methods: list[str], name: str
) -> None:
    quality.main(argv)
    assert asked == [methods, name]


@pytest.mark.parametrize(("argv", "message"), [
    (["--pairs", "0"], "--pairs is 0; expected training pairs of the public sets in --data"),
    (["--pairs", "-3", "--data", "."], "--pairs is -3"),
    (["--fields", "--everywhere"], "--fields names its methods itself"),
    (["--fields", "--methods", "caa"], "--fields names its methods itself"),
    (["--methods", "natural", "--everywhere"], "none of natural is left"),
    (["--methods", "sae"], "none of sae is left"),
])  # fmt: skip
def test_options_that_name_nothing_are_refused(
    asked: list[Any], capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        quality.main(argv)
    assert message in capsys.readouterr().err
    assert asked == []


def test_texts_written_at_several_strengths_in_one_batch_are_those_written_alone() -> None:
    model, tokenizer = build("llama"), Letters()
    plan = sf.Plan({1: sf.Add(torch.randn(48), 2.0)}, "last")
    openings = ["one", "another one"]
    both = scores.generate(model, tokenizer, openings, plan, (1.0, 4.0))
    for strength, texts in zip((1.0, 4.0), both, strict=True):
        assert scores.generate(model, tokenizer, openings, plan, (strength,)) == [texts]
    assert both[0] != both[1]
    assert scores.generate(model, tokenizer, openings, None, (0.0,))[0] != both[1]


@pytest.mark.parametrize(
    ("text", "share"), [("a b c", 0.0), ("a b a b a b", 0.6), ("on on on on", 2 / 3), ("one", 0.0)]
)
def test_repetition_counts_word_pairs_seen_before(text: str, share: float) -> None:
    assert scores.repetition(text) == pytest.approx(share)


# --- methods ----------------------------------------------------------------------------------------------------------


# ITI edits heads, not the stream; what asks the model has none here.
@pytest.mark.parametrize("key", [key for key in METHODS if key != "iti" and not key.startswith("natural")])
def test_every_method_moves_the_unwanted_side_toward_the_wanted_one(key: str) -> None:
    made = sample()
    x = made.neg.mean(0, keepdim=True) + 0.1
    edit = METHODS[key].build(made)["resid_post", 1]
    moved = edit.apply(x, 0.5)
    assert float((moved - x)[0] @ made.mean_difference) > 0.05


@pytest.mark.parametrize(("key", "method"), [("natural", "euler"), ("natural-one", "one-step")])
def test_the_natural_gradient_is_followed_for_a_time_of_one(key: str, method: str) -> None:
    made, one = sample(), torch.ones(1, 1)
    field = sf.VelocityField(torch.eye(made.pos.shape[1])[:1], torch.ones(1), one, torch.zeros(1), one)
    vars(made)["velocity"] = field
    edit = METHODS[key].build(made)["resid_post", 1]
    assert (edit.barrier, edit.T, edit.steps, edit.method) == (field, 1.0, 10, method)


def test_iti_steers_the_head_that_tells_the_sides_apart_along_its_axis() -> None:
    made = sample()
    edits = METHODS["iti"].build(made)
    assert list(edits) == [("head_out", 0)]
    vector = edits["head_out", 0].vector.view(3, 4)
    assert float(vector[[0, 2]].abs().max()) == 0.0
    both = torch.cat([made.heads_pos[0][:, 1], made.heads_neg[0][:, 1]])
    direction = torch.nn.functional.normalize(made.heads_pos[0][:, 1].mean(0) - made.heads_neg[0][:, 1].mean(0), dim=0)
    torch.testing.assert_close(vector[1], direction * (both @ direction).std())


# --- curves -----------------------------------------------------------------------------------------------------------


def line(slope: float, items: int = 8, texts: int = 5, noise: float = 0.0, seed: int = 0) -> Run:
    """Effect = slope · damage, at damages 0.1, 0.2 and 0.4."""
    random = np.random.default_rng(seed)
    damage = np.array([0.1, 0.2, 0.4])[:, None]
    effects = (slope + noise * random.normal(size=(1, items))) * damage
    return Run(effects, np.tile(damage, texts), np.full(texts, 1 / texts))


def test_effect_is_read_where_the_damage_is_reached_first() -> None:
    assert tradeoff.reach(np.array([0.0, 0.1, 0.3]), 0.2) == (1, pytest.approx(0.5))
    assert tradeoff.reach(np.array([0.0, -0.1, 0.5, 0.1]), 0.2) == (1, pytest.approx(0.5))
    assert tradeoff.reach(np.array([0.0, 0.1, 0.15]), 0.2) == (2, 0.0)
    ones = np.ones(8), np.ones(5)
    assert tradeoff.at_damage([line(10)], *ones, 0.3) == pytest.approx(3.0)
    assert tradeoff.at_damage([line(10), line(20)], *ones, 0.3) == pytest.approx(4.5)
    assert tradeoff.area([line(10)], *ones, 0.3) == pytest.approx(10 * 0.3 * 0.55)  # of the grid 0.03, 0.06 … 0.3
    assert tradeoff.at_damage([line(10)], *ones, 9.0) == pytest.approx(4.0)  # never reached: the last strength


def test_a_paired_difference_is_sharper_than_the_effects_and_finds_the_better_method() -> None:
    groups = [f"g{i // 2}" for i in range(8)]
    noisy = {"caa": [line(10, noise=8, seed=s) for s in range(3)], "same": [line(10, noise=8, seed=s) for s in range(3)],
             "better": [replace(r, effects=r.effects + 1.0) for r in (line(10, noise=8, seed=s) for s in range(3))]}  # fmt: skip
    found = tradeoff.compare(noisy, groups, 0.3, "caa", rounds=200)
    assert found["caa"].effect.low < found["caa"].effect.value < found["caa"].effect.high
    assert found["same"].difference == (0.0, 0.0, 0.0)
    assert found["better"].difference == pytest.approx((1.0, 1.0, 1.0))
    assert found["caa"].reached == pytest.approx(0.3)


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    inside = 0
    for trial in range(60):
        random = np.random.default_rng(trial)
        run = Run(np.full((1, 30), 2.0) + random.normal(size=(1, 30)), np.full((1, 4), 0.1), np.full(4, 0.25))
        found = tradeoff.compare({"caa": [run]}, [str(i) for i in range(30)], 0.2, "caa", rounds=200, seed=trial)
        inside += found["caa"].effect.low <= 2.0 <= found["caa"].effect.high
    assert inside >= 48  # 95 % of 60 is 57; P(< 48) is below 1e-4 even at a true coverage of 90 %


def test_a_curve_goes_down_until_its_least_strength_damages_little() -> None:
    def asked(damage: dict[float, float], known: dict[float, float], most: float = np.inf) -> list[float]:
        found = []
        for s in quality.lacking((0.1, 0.2, 0.4), known, most):
            found.append(s)
            known[s] = damage.get(s, 4 * s)
        return found

    assert asked({}, {}) == [0.1, 0.2, 0.4, 0.05, 0.025, 0.0125]
    assert asked({}, {0.1: 0.4, 0.2: 0.8, 0.4: 1.6}) == [0.05, 0.025, 0.0125]  # of a run before
    assert asked({}, {0.1: 0.04, 0.2: 0.8, 0.4: 1.6}) == []
    assert asked({0.1: 0.01}, {}, 0.3) == [0.1, 0.2]
    assert asked(dict.fromkeys((0.1, *(0.1 / 2**i for i in range(20))), 1.0), {}, 0.3)[1:] == pytest.approx(
        [0.1 / 2**i for i in range(1, 9)]
    )  # a damage that does not go away


def test_a_difference_that_no_table_shows_is_none() -> None:
    assert [report.side(Interval(*found)) for found in (
        (0.2, 0.1, 0.3), (-0.2, -0.3, -0.1), (0.2, -0.1, 0.3), (0.004, 0.003, 0.006), (-0.006, -0.01, -0.003),
    )] == [1, -1, 0, 0, -1]  # fmt: skip


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_is_continued_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = build("llama"), Letters()
    concept = replace(concepts.own("truth"), openings=("the sun", "a day"))
    concept = replace(concept, test=concept.test[:8])
    methods = {key: replace(METHODS[key], strengths=METHODS[key].strengths[:2]) for key in ("caa", "spherical", "iti")}
    out, texts = tmp_path / "quality.json", [text[:40] for text in concepts.reference()[:3]]

    def run(seeds: int, chosen: dict[str, Method], draws: int = 0) -> Any:
        store = quality.Store(out, "tiny", 1)
        quality.measure(store, [1], model, tokenizer, [concept], chosen, texts, seeds, draws, writes=True)
        return json.loads(out.read_text())

    first = run(1, {"caa": methods["caa"]})
    assert [(r["method"], r["seed"], r["strength"]) for r in first["rows"]] == [("caa", 0, 0.1), ("caa", 0, 0.18)]
    second = run(2, methods)
    assert second["rows"][:2] == first["rows"]
    assert len(second["rows"]) == 3 * 2 * 2
    assert run(2, methods)["rows"] == second["rows"]
    plan = sf.Plan({1: sf.Add(torch.ones(48))}, "last")
    odds = quality.Scorer(scores.batches(model, scores.pair_texts(tokenizer, concept)),
                          scores.batches(model, scores.reference_texts(tokenizer, texts)))  # fmt: skip
    assert odds(None)["odds"] == second["concepts"]["truth"]["unsteered"]["odds"]
    assert odds(plan)["odds"] != odds(None)["odds"]
    assert run(2, methods, 1)["nulls"] == run(2, methods, 2)["nulls"][:4]
    nulls = run(2, methods, 2)["nulls"]
    assert [(n["method"], n["draw"]) for n in nulls] == [(m, d) for d in (0, 1) for m in ("random", *methods)]
    report.report(out)
    shown = capsys.readouterr().out
    assert "ODE linear (spherical)" in shown
    assert re.search(r"nulls as good at 0.3: shuffled, random \|.*\n.*\n\| CAA .* \| [012] of 2, [012] of 2", shown)
    assert out.with_suffix(".png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- tables quality.json caa -->\nold\n<!-- end -->\nb\n<!-- counts quality.json iti -->\n<!-- end -->\nc\n"
    )
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.into(page)
    made = page.read_text()
    assert "old" not in made
    assert re.search(
        r"a\n<!-- tables quality.json caa -->\n\n\*\*truth\*\*.*<!-- end -->\nb\n<!-- counts .*against ITI.*<!-- end -->\nc\n",
        made,
        re.S,
    )
    report.into(page)
    assert page.read_text() == made
    with pytest.raises(ValueError, match="holds another run"):
        quality.Store(out, "tiny", 2)
    with pytest.raises(ValueError, match="other texts"):
        quality.measure(
            quality.Store(out, "tiny", 1), [1], model, tokenizer, [concept], methods, texts[:2], 1, 0, writes=True
        )


def test_every_layer_is_edited_by_its_own_fit(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), Letters()
    concept = concepts.own("truth")
    found = quality.activations(model, tokenizer, concept, range(2), heads=False).take(concept.sampled(0), 0)
    alone = quality.activations(model, tokenizer, concept, [1], heads=False).take(concept.sampled(0), 0)
    for chosen in (found, found.shuffled(3)):
        edits = METHODS["caa"].edits(chosen)
        assert list(edits) == [("resid_post", 0), ("resid_post", 1)]
        assert not torch.equal(edits["resid_post", 0].vector, edits["resid_post", 1].vector)
    (only,) = METHODS["caa"].edits(alone).values()
    assert torch.equal(METHODS["caa"].edits(found)["resid_post", 1].vector, only.vector)
    (only,) = METHODS["affine"].edits(alone.shuffled(3)).values()
    both = METHODS["affine"].edits(found.shuffled(3))
    assert torch.equal(both["resid_post", 1].direction, only.direction)  # the same groups at every layer
    weak = everywhere(METHODS)
    assert not {"iti", "natural", "natural-one"} & set(weak)
    assert all(max(weak[key].strengths) < max(METHODS[key].strengths) for key in weak)


def test_a_shuffled_sample_exchanges_both_sides_of_half_of_the_groups_everywhere() -> None:
    pairs = [concepts.Pair(f"g{i // 2}", f"p{i}", f" w{i}", f" u{i}") for i in range(8)]
    pos, neg = torch.arange(8.0)[:, None] + 1, -torch.arange(8.0)[:, None] - 1
    sample = Sample(0, pos, neg, {3: pos[..., None]}, {3: neg[..., None]}, pairs, 0, None, None)
    for draw in range(4):
        turned = sample.shuffled(draw)
        swapped = turned.pos[:, 0] < 0
        assert int(swapped.sum()) == 4
        assert torch.equal(swapped[::2], swapped[1::2])
        assert torch.equal(turned.neg, -turned.pos)
        assert torch.equal(turned.heads_pos[3], turned.pos[..., None])
        assert torch.equal(turned.heads_neg[3], turned.neg[..., None])
        assert [p.wanted.startswith(" u") for p in turned.pairs] == swapped.tolist()
        assert [p.unwanted.startswith(" w") for p in turned.pairs] == swapped.tolist()
    assert len({tuple(sample.shuffled(draw).pos[:, 0].tolist()) for draw in range(20)}) > 3


def test_as_many_groups_are_exchanged_as_are_kept() -> None:
    """Of five groups one is left out: with three kept, what is left of the difference would point as the true one does."""
    pairs = [concepts.Pair(f"g{i // 2}", f"p{i}", f" w{i}", f" u{i}") for i in range(10)]
    pos = torch.ones(10, 1)
    sample = Sample(0, pos, -pos, {}, {}, pairs, 0, None, None)
    left_out = set()
    for draw in range(20):
        turned = sample.shuffled(draw)
        assert float(turned.pos.sum()) == 0.0
        assert len(turned.pairs) == 8
        left_out |= set(sample.groups) - set(turned.groups)
    assert len(left_out) > 2


def test_the_velocity_of_a_shuffled_sample_is_the_fit_of_its_own_texts() -> None:
    """From the gradients of the true labels, taken once for all draws."""

    class Opened(Letters):
        bos_token_id = 1

    model, tokenizer = build("gpt2"), Opened()
    words = ["good", "poor", "fair", "calm", "loud", "warm", "cold", "kind", "dark", "soft", "new", "old", "big", "wee"]
    pairs = [concepts.Pair(f"g{i // 2}", f"it was {i}", f" {w}", f" {w[::-1]}") for i, w in enumerate(words)]
    sides = [torch.ones(len(pairs), 1), -torch.ones(len(pairs), 1)]
    known = Sample(1, *sides, {}, {}, pairs, 0, model, tokenizer)
    turned = known.shuffled(1)
    assert {*turned.signs} == {-1.0, 0.0, 1.0}
    fitted = sf.fit_velocity(model, tokenizer, turned.contrasts, 1, draws=0)
    x = torch.randn(3, fitted.width, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(turned.velocity(x), fitted(x), rtol=1e-4, atol=1e-4 * float(fitted(x).abs().max()))
    assert (turned.velocity(x) - known.velocity(x)).norm() > 0.1 * fitted(x).norm()


def test_a_null_is_read_at_the_damage_that_is_asked() -> None:
    unsteered = {"odds": [0.0, 1.0], "reference": [-4.0]}
    rows = [{"concept": "c", "method": "caa", "seed": 0, "strength": s, "odds": [3 * s, 1 + 3 * s], "reference": [-4 - s]}
            for s in (1.0, 2.0)]  # fmt: skip
    curve = [{"strength": s, "damage": s / 4, "odds": [s, 1 + s]} for s in (1.0, 2.0)]
    nulls = [{"concept": "c", "method": m, "draw": 0, "curve": curve} for m in ("caa", "random")]
    found = {
        "concepts": {"c": {"unsteered": unsteered, "tokens": [4], "groups": ["a", "b"]}},
        "rows": rows,
        "nulls": nulls,
    }
    assert report.null_effects(found, "c", "random", 0.375) == [pytest.approx(1.5)]
    assert report.null_effects(found, "c", "random", 0.9) == [pytest.approx(2.0)]
    assert report.did_as_well(found, "c", "caa", 0.3) == "0 of 1, 0 of 1"
    rows[0]["odds"] = rows[1]["odds"] = [0.5, 1.5]
    assert report.did_as_well(found, "c", "caa", 0.3) == "1 of 1, 1 of 1 (no better)"


def test_a_method_that_has_not_seen_every_training_set_does_not_bring_its_own() -> None:
    unsteered = {"odds": [0.0, 1.0], "reference": [-4.0]}
    rows = [{"concept": "c", "method": m, "seed": s, "strength": 1.0, "odds": [s + 1.0, s + 3.0], "reference": [-5.0]}
            for m, s in (("caa", 0), ("caa", 1), ("iti", 0))]  # fmt: skip
    found = {"concepts": {"c": {"unsteered": unsteered, "tokens": [4], "groups": ["a", "b"]}}, "rows": rows}
    runs = report.runs_of(found, "c")
    assert {key: len(part) for key, part in runs.items()} == {"caa": 1, "iti": 1}
    np.testing.assert_allclose(runs["caa"][0].effects, [[1.0, 2.0]])
    np.testing.assert_allclose(runs["caa"][0].losses, [[0.25]])
    with pytest.raises(ValueError, match="run on"):
        report.runs_of({**found, "rows": rows[2:]}, "c")


# --- TruthfulQA by halves ---------------------------------------------------------------------------------------------


def write_questions(path: Path) -> Path:
    """Two questions of each of four categories."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"])
        table.writeheader()
        for i in range(8):
            table.writerow({"Category": f"c{i // 2}", "Question": f"is {i} odd", "Best Answer": "yes it is",
                            "Correct Answers": "yes it is; it may be", "Incorrect Answers": "no; never"})  # fmt: skip
    return path


def test_halves_share_no_category_and_exchange_their_roles(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "TruthfulQA.csv")
    (fit_a, judge_a), (fit_b, judge_b) = truthful.halves(path, None)
    assert len(fit_a) == len(fit_b) == len(judge_a) == len(judge_b) == 4
    assert not {p.prompt for p in fit_a} & {c.prompt for c in judge_a}
    assert {p.prompt for p in fit_a} == {c.prompt for c in judge_b}
    assert {p.prompt for p in fit_b} == {c.prompt for c in judge_a}
    assert not {p.group for p in fit_a} & {p.group for p in fit_b}
    assert [p.wanted for p in fit_a] == [" yes it is."] * 4
    assert [len(judged) for _, judged in truthful.halves(path, 3)] == [3, 3]


def test_truthful_questions_are_judged_and_go_on_where_they_were_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_questions(tmp_path / "TruthfulQA.csv"), tmp_path / "out.json"
    monkeypatch.setattr(truthful, "load", lambda path: (build("llama"), Letters(), "tiny"))
    command = [str(path), "--methods", "caa", "--out", str(out), "--layer", "1"]
    truthful.main(command)
    rows = json.loads(out.read_text())["rows"]
    strengths = METHODS["caa"].strengths
    assert [(r["half"], r["strength"]) for r in rows] == [(h, s) for h in (0, 1) for s in (0.0, *strengths)]
    assert all(r["count"] == 4 and 0 <= r["mass"] <= 1 for r in rows)
    assert rows[0]["damage"] == 0.0
    assert len({r["mass"] for r in rows[:5]}) == 5
    _, judged = next(truthful.halves(path, None))
    plain = sf.tools.evaluate_choices(build("llama"), Letters(), judged)
    assert [rows[0][key] for key in ("first", "mass", "log_odds")] == pytest.approx(
        [plain.first, plain.mass, plain.log_odds], abs=1e-4
    )
    capsys.readouterr()
    out.write_text(json.dumps({**json.loads(out.read_text()), "rows": rows[:4]}))
    truthful.main(command)
    assert json.loads(out.read_text())["rows"] == rows
    shown = capsys.readouterr().out
    assert shown.count("half ") == len(rows) - 4
    mean = sum(r["first"] for r in rows if r["strength"] == 0.0) / 2
    assert f"| unsteered | 0 | 0.000 | {mean:.3f} |" in shown
    with pytest.raises(ValueError, match="holds another run"):
        truthful.main([*command, "--questions", "2"])
