"""Velocity fields: every solver on every backend against all d dimensions, plans and files, the fit, and bad input."""

from __future__ import annotations

import copy
import json
import math

import pytest
import reference
import torch
from families import build
from flowing import barrier, by_hand, velocity
from places import DTYPES, PLACES, assert_exact, backend, runs
from test_sweeping import Letters

import steerfast as sf
from steerfast.directions.fits import natural
from steerfast.models import demo

KINDS = ("identity", "tanh")


def stream(n: int, d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_is_as_exact_as_the_field_in_all_dimensions(place, kind):
    methods = ("euler", "adaptive") if place == "interpreter" else ("euler", "one-step", "midpoint", "rk4", "adaptive")
    with backend(place) as device:
        for dtype in (t for t in DTYPES if runs(place, t) and (place != "interpreter" or t == DTYPES[0])):
            for rows, rank in ((1, 3), (7, 3), (2, 17)):
                x = stream(rows, 40, dtype).to(device)
                for method in methods:
                    flow = sf.Flow(velocity(kind, 40, rank), T=0.3, steps=4, method=method, tolerance=1e-2)
                    out = flow.alone(torch.device(device))(x, 1.0)
                    what = f"{kind} {method} {dtype} rank {rank}"
                    assert_exact(out, by_hand(x, flow), reference.naive(by_hand, x, flow), what)


@pytest.mark.parametrize("place", PLACES)
def test_a_bank_mixes_fields_and_barriers_and_a_strength_is_a_time(place):
    with backend(place) as device:
        flows = [
            sf.Flow(velocity("identity", 40), T=0.2),
            sf.Flow(barrier("mlp", 40), angle=0.3),
            sf.Flow(velocity("tanh", 40, 5), T=0.5, method="rk4", keep_norm=True),
        ]
        x = stream(4, 40).to(device)
        bank = sf.Bank(40, slots=4, directions=16, device=device)
        rows = torch.tensor([*map(bank.register, flows), -1], dtype=torch.int32, device=device)
        for sign in (1.0, -0.5):
            scale = sign * torch.tensor([1.0, 0.5, 2.0, 1.0], device=device)
            got = sf.ops.subspace(x, *bank.tensors, rows, scale, bank.modes, bank.max_rank)
            for i, flow in enumerate(flows):
                alone = by_hand(x[i], flow, scale[i].item())
                torch.testing.assert_close(got[i].double().cpu(), alone, atol=2e-5, rtol=2e-5)
            assert torch.equal(got[3], x[3])


def test_affine_ablation_is_one_euler_step_of_a_field_of_rank_one():
    direction = torch.nn.functional.normalize(torch.randn(12, generator=torch.Generator().manual_seed(3)), dim=0)
    one = torch.ones(1, 1)
    field = sf.VelocityField(direction[None], torch.tensor([2.0]), -one, torch.zeros(1), one)
    x = stream(5, 12)
    expected = sf.AffineAblate(direction, baseline=2.0 * direction).apply(x)
    torch.testing.assert_close(sf.flow(x, field, T=1.0, method="one-step"), expected)
    many = sf.flow(x, field, T=1.0, steps=10)
    share = 1 - 0.9**10  # the same way, not as far
    torch.testing.assert_close(many, x + share * (expected - x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_and_its_flow_come_back_from_files(kind, tmp_path):
    field = velocity(kind, 12)
    field.save(tmp_path / "field")
    back = sf.VelocityField.load(tmp_path / "field")
    x = stream(5, 12)
    assert torch.equal(back(x), field(x))
    flow = sf.Flow(field, T=0.4, steps=6, method="rk4", keep_norm=True)
    sf.Plan({3: flow}, positions="last").save(tmp_path / "plan")
    again = sf.Plan.load(tmp_path / "plan").edits["resid_post", 3][0]
    assert repr(again) == repr(flow)
    assert torch.equal(again.apply(x), flow.apply(x))
    text = json.loads((tmp_path / "field" / "velocity.json").read_text())
    text["velocity"]["activation"] = "sine"
    (tmp_path / "field" / "velocity.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="activation is 'sine'"):
        sf.VelocityField.load(tmp_path / "field")


@pytest.mark.parametrize("place", PLACES)
def test_a_zero_row_moves_with_a_velocity(place):
    with backend(place) as device:
        x = torch.zeros(2, 12, device=device)
        for kind in KINDS:
            for method in ("euler", "midpoint"):
                flow = sf.Flow(velocity(kind, 12), T=0.5, steps=3, method=method)
                out = flow.alone(torch.device(device))(x, 1.0).double().cpu()
                torch.testing.assert_close(out, by_hand(x.cpu(), flow), atol=1e-5, rtol=1e-5)
                assert out.norm() > 0.01


def test_the_negated_field_goes_back():
    field, x = velocity("tanh", 12), stream(4, 12)
    there = sf.flow(x, field, T=0.3, steps=200, method="rk4")
    torch.testing.assert_close(sf.flow(there, -field, T=0.3, steps=200, method="rk4"), x, atol=1e-4, rtol=1e-4)


def test_what_only_a_barrier_can_is_refused():
    field = velocity("identity", 12)
    for given, message in (
        ({"angle": 0.1}, "angle is given, but a velocity field runs for a time; give T alone"),
        ({"T": 1.0, "level": 0.0}, "level is given, but a velocity field has no h"),
        ({"T": 1.0, "method": "geodesic"}, "follows great circles, but a velocity field does not"),
    ):
        with pytest.raises(ValueError, match=message):
            sf.Flow(field, **given)
    with pytest.raises(ValueError, match="barrier is hand-made; the published one"):
        sf.Flow.odesteer(field, T=1.0)
    with pytest.raises(TypeError, match="has no h to draw"):
        sf.tools.plot_flow(sf.Flow(field, T=1.0), stream(2, 12), "never.png")
    with pytest.raises(TypeError):
        sf.probes.BarrierProbe(field)
    with pytest.raises(ValueError, match="has width 12 and x 8"):
        sf.flow(torch.ones(1, 8), field, T=1.0)
    one, row = torch.ones(1, 1), torch.eye(12)[:1]
    with pytest.raises(ValueError, match="do not fit; expected basis"):
        sf.VelocityField(row, torch.zeros(2), one, torch.zeros(1), one)
    with pytest.raises(ValueError, match="not orthonormal"):
        sf.VelocityField(2 * row, torch.zeros(1), one, torch.zeros(1), one)
    with pytest.raises(ValueError, match="outputs holds NaN"):
        sf.VelocityField(row, torch.zeros(1), one, torch.zeros(1), one * torch.nan)
    with pytest.raises(ValueError, match="got activations of shape"):
        field(torch.ones(2, 8))


PAIRS = [(f"The {thing} was", f" {good}.", f" {bad}.") for thing, good, bad in (
    ("film", "wonderful", "terrible"), ("meal", "delicious", "disgusting"), ("trip", "lovely", "awful"),
    ("talk", "brilliant", "boring"), ("house", "beautiful", "ugly"), ("week", "great", "horrible"),
    ("song", "charming", "annoying"), ("game", "exciting", "dull"), ("friend", "kind", "cruel"), ("news", "good", "bad"),
)]  # fmt: skip


@pytest.fixture(scope="module")
def fitted():
    model, tokenizer = demo.load()
    texts = [
        "The library opens at nine and closes at five on weekdays, as it has for years.",
        "Water boils at a lower temperature on a mountain than it does at the coast.",
        "He put the keys on the table and went to look for the letter in the hall.",
        "The bridge was built in three years and carries two lanes in each direction.",
    ]
    state = torch.get_rng_state()
    field = sf.fit_velocity(model, tokenizer, PAIRS, 14, neutral=texts, rank=2, draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    return model, tokenizer, texts, field


def test_a_fit_raises_the_odds_of_pairs_that_it_has_not_seen(fitted):
    model, tokenizer, _, field = fitted
    assert (field.rank, field.origin.place) == (4, ("resid_post", 14))
    assert field.info.nats > 1
    assert 0.099 <= field.info.damage < 0.1
    null = field.info.null
    assert (null.effect, len(null.shuffled), len(null.random)) == (field.info.nats, 3, 3)
    assert null.beaten  # three draws of each kind, and none does as well
    assert max(map(abs, null.random)) < 1 < max(map(abs, null.shuffled))  # half of the labels are still true ones
    assert sf.VelocityField.restore(field.tensors(), field.numbers()).info == field.info
    assert not any(block._forward_hooks for block in model.model.layers)
    plan = sf.Plan({14: sf.Flow(field, T=1.0)}, positions="last")
    prompt = tokenizer("The party was", return_tensors="pt")
    good, bad = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" fantastic", " dreadful"))
    with torch.no_grad():
        before = model(**prompt).logits[0, -1]
        with sf.steer(model, plan, prompt_length=prompt["input_ids"].shape[1]):
            after = model(**prompt).logits[0, -1]
    assert after[good] - after[bad] > before[good] - before[bad] + 0.5


def test_the_fit_is_the_natural_gradient_by_hand(fitted):
    """The field's matrix against F⁻¹GΣ⁻¹ from gradients that this test takes itself, with the same draws."""
    from steerfast.directions.fits import velocity as module
    from steerfast.directions.fits.natural import Gradients

    model, tokenizer, texts, _ = fitted
    gradients = Gradients.of("test", model, tokenizer, PAIRS[:2], 14, texts[:3], seed=5)
    lessons = gradients.lessons
    with gradients.pupil.taught(), gradients.pupil.taught():  # once, however often it is said
        pull, metric = gradients.pull([1.0, 1.0]), gradients.metric
        parts = [gradients.pull(signs) for signs in ([1.0, 0.0], [0.0, 1.0], [1.0, -1.0])]
        torch.testing.assert_close(parts[2], (parts[0] - parts[1]) / 2)
    seen = {}

    def keep(block, args, out):
        seen["x"] = out if isinstance(out, torch.Tensor) else out[0]
        seen["x"].retain_grad()

    handle = model.model.layers[14].register_forward_hook(keep)
    total = torch.zeros(576, 577, dtype=torch.float64)
    mean = metric.mean
    for one in lessons:
        for way, sign in ((one.wanted, 1), (one.unwanted, -1)):
            row = torch.tensor([[*one.prompt, *way]])
            logits = model(input_ids=row).logits[0].log_softmax(-1)
            sum(logits[len(one.prompt) - 1 + i, token] for i, token in enumerate(way)).backward()
            at = slice(len(one.prompt) - 1, -1)
            a, g = seen["x"].detach()[0, at].double(), seen["x"].grad[0, at].double()
            total += sign * g.T @ torch.cat([a - mean, torch.ones(len(a), 1, dtype=torch.float64)], 1) / len(lessons)
    handle.remove()
    model.zero_grad()
    torch.testing.assert_close(pull, total, atol=1e-6, rtol=1e-4)
    eye = torch.eye(576, dtype=torch.float64)
    fisher = metric.fisher + 2.0 * metric.fisher.diagonal().mean() * eye
    rows = metric.covariance + 0.5 * metric.covariance.diagonal().mean() * eye
    wide = torch.block_diag(rows, torch.ones(1, 1, dtype=torch.float64))
    whole = torch.linalg.solve(fisher, total) @ torch.linalg.inv(wide)
    field, _ = module._natural(metric, pull, 40, (2.0, 0.5))  # more than there are: nothing is cut
    a = torch.randn(3, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + mean
    expected = torch.cat([a - mean, torch.ones(3, 1, dtype=torch.float64)], 1) @ whole.T
    torch.testing.assert_close(field(a), expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_time_of_one_costs_its_nats_on_texts_that_the_model_does_not_expect(rank):
    """Their likelihood rises and falls anyhow, and far out ten Euler steps diverge: the first time that costs so much counts."""
    model, tokenizer = build("gpt2"), Letters()
    things = ["film", "meal", "trip", "talk", "house", "week", "song", "game", "day", "book", "walk", "idea"]
    pairs = [(f"the {thing} was", " good", " poor") for thing in things]
    texts = ["the library opens at nine", "water boils in the hills", "he put the keys away", "two lanes lead to town"]
    field = sf.fit_velocity(model, tokenizer, pairs, 1, neutral=texts, rank=rank)
    assert 0.09 < field.info.damage <= 0.1
    assert field.info.nats > 0
    ids = torch.tensor([tokenizer(texts[0])["input_ids"]])  # the first of six is held out
    plan = sf.Plan({1: sf.Flow(field, T=1.0)}, positions="last")

    def cost(strength):
        with torch.no_grad():
            p = model(ids).logits[0, 4:-1].double().log_softmax(-1)
            with sf.steer(model, plan, strength, prompt_length=5):
                q = model(ids).logits[0, 4:-1].double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert cost(1.0) == pytest.approx(field.info.damage, rel=1e-3)
    costs = [cost(0.1 * i) for i in range(1, 11)]
    assert costs == sorted(costs)  # no time before it costs as much


class Opened(Letters):
    bos_token_id = 1


def test_neutral_texts_are_the_models_own_whatever_mode_it_is_in() -> None:
    """Dropout would be in the texts of a model that is left in train mode."""
    from steerfast.directions.fits import natural as module

    model = build("gpt2")
    assert model.config.attn_pdrop > 0
    try:
        texts = []
        for training in (False, True):
            model.train(training)
            state = torch.get_rng_state()
            texts.append(module._written("t", model, Opened(), 3))
            assert torch.equal(torch.get_rng_state(), state)
            assert all(module_.training == training for module_ in model.modules())
    finally:
        model.eval()
    assert texts[0] == texts[1]
    assert (len(texts[0]), {len(ids) for ids in texts[0]}, {ids[0] for ids in texts[0]}) == (48, {49}, {1})
    with pytest.raises(ValueError, match="no first token to write texts from; give neutral="):
        sf.fit_velocity(model, Letters(), [("a", "b", "c")], 1)


def test_the_way_to_it_is_named_where_methods_are_fitted_on_activations() -> None:
    with pytest.raises(ValueError, match=r"use sf\.fit_velocity"):
        sf.fit("velocity", torch.ones(4, 3), -torch.ones(4, 3))


SHORT = ["the library opens at nine", "water boils in the hills", "he put the keys away", "two lanes lead to town"]
CASES = [(f"the {thing} was", " good", " poor") for thing in ("film", "meal", "trip", "talk")]


def test_a_model_that_is_not_finite_is_named_and_nothing_is_searched_for() -> None:
    """The cost of a path was NaN on a held-out text, and the search for a shorter one never ended."""
    for place in (0, 1):
        model = copy.deepcopy(build("gpt2"))
        texts = [f"{text} Q" if i == place else text for i, text in enumerate(SHORT)]
        with torch.no_grad():
            model.transformer.wte.weight[Letters()("Q")["input_ids"][-1]] = torch.nan
        with pytest.raises(
            ValueError, match="numbers on a neutral text are not finite; check the text, and the model's weights"
        ):
            sf.fit_velocity(model, Letters(), CASES, 1, neutral=texts, draws=0)


@pytest.mark.parametrize("examples", [
    [("the film was", " good", " good")],
    [("the film was", " good", " poor"), ("the film was", " poor", " good")],
], ids=["the same", "contradictory"])  # fmt: skip
def test_examples_that_cancel_out_pull_nowhere(examples) -> None:
    """What is left of them is rounding, in some direction."""
    with pytest.raises(ValueError, match="the examples pull nowhere, since what they pull cancels out"):
        sf.fit_velocity(build("gpt2"), Letters(), examples, 1, neutral=SHORT, draws=0)


def test_neutral_texts_of_one_row_are_too_few() -> None:
    with pytest.raises(
        ValueError, match="1 neutral texts with 1 rows in all say nothing of the stream; give more or longer"
    ):
        sf.fit_velocity(build("gpt2"), Letters(), CASES, 1, neutral=["abcde", "fghij"], draws=0)


def test_a_fit_in_inference_mode_is_the_same() -> None:
    fitted = [sf.fit_velocity(build("gpt2"), Letters(), CASES, 1, neutral=SHORT, draws=0)]
    with torch.inference_mode():
        fitted.append(sf.fit_velocity(build("gpt2"), Letters(), CASES, 1, neutral=SHORT, draws=0))
        vector = sf.fit_vector(build("gpt2"), Letters(), [one[:2] for one in CASES], 1, steps=2)
    assert torch.equal(fitted[0].outputs, fitted[1].outputs)
    assert not vector.vector.is_inference()


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_the_unsteered_model_is_asked_once_where_there_is_room(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    def turned(x: torch.Tensor) -> torch.Tensor:
        return x.roll(1, -1)

    monkeypatch.setattr(natural, "ROOM", room)
    model, asked = build("gpt2"), []
    gradients = natural.Gradients.of("test", model, Letters(), CASES, 1, SHORT)
    with gradients.pupil.taught():
        plain = [gradients.damage(edit) for edit in (torch.clone, turned)]
        with model.register_forward_hook(lambda *_: asked.append(1)):
            again = gradients.damage(turned)
    assert len(asked) == len(gradients.held) * (1 if room else 2)
    assert torch.equal(plain[1], again)
    assert plain[0].abs().max() < 1e-6 < plain[1].min()
    assert len(again) == sum(len(ids) - natural.OPENING for ids in gradients.held)


def test_a_field_back_in_time_claims_nothing_of_its_fit() -> None:
    field = sf.fit_velocity(build("gpt2"), Letters(), CASES * 3, 1, neutral=SHORT, draws=1)
    assert field.info.null is not None
    back = (-field).info
    assert math.isnan(back.nats)
    assert math.isnan(back.damage)
    assert back.null is None
    assert back.settings == field.info.settings


BAD = [
    ({"neutral": ["Some text of several words.", 5]}, TypeError, "neutral holds 5; expected texts"),
    ({"examples": []}, ValueError, "expected a list of"),
    ({"examples": [("a", "b")]}, TypeError, "expected .* three strings"),
    ({"rank": 0}, ValueError, "rank"),
    ({"rank": 5000}, ValueError, "rank is 5000 and the stream has width 576"),
    ({"damping": 1.0}, TypeError, "expected two numbers"),
    ({"damping": (0.0, 1.0)}, ValueError, "expected two numbers > 0"),
    ({"neutral": "text"}, TypeError, "expected a list of texts"),
    ({"neutral": ["Short."]}, ValueError, "expected two or more, each of more than 5"),
    ({"layer": 99}, ValueError, "99"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD)
def test_bad_input_is_named_and_leaves_nothing(fitted, given, error, message):
    model, tokenizer, texts, _ = fitted
    rest = {"examples": PAIRS, "layer": 14, "neutral": texts} | given
    with pytest.raises(error, match=message):
        sf.fit_velocity(model, tokenizer, rest.pop("examples"), rest.pop("layer"), **rest)
    assert not any(block._forward_hooks for block in model.model.layers)
    assert all(weight.requires_grad for weight in model.parameters())
