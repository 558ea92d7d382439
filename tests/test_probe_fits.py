"""Fits of probes and of conditions: planted answers, scikit-learn's, all thresholds, and a real model."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import steerfast as sf
from steerfast.edits.fit_condition import best_threshold, contrast_component
from steerfast.place import Place
from steerfast.probes import Probe, SimilarityProbe

D = 37


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- fit_probe -----------------------------------------------------------------------------------------------------------


def planted(n: int, m: int, shift: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sides around an offset, apart along entry 3, in large units."""
    x = drawn(n + m, D, seed=seed) + 5 * drawn(D, seed=99)
    x[:n, 3] += shift
    return 40 * x[:n], 40 * x[n:]


def test_a_planted_direction_is_found() -> None:
    pos, neg = planted(300, 500)
    made = sf.fit_probe(pos, neg, C="auto")
    assert int(made.weight.abs().argmax()) == 3
    w = made.weight.double()
    assert float(w[3] / w.norm()) > 0.9
    fresh_pos, fresh_neg = planted(4000, 4000, seed=1)
    p = torch.cat([made(fresh_pos), made(fresh_neg)])
    y = torch.arange(8000) < 4000
    assert made.info.accuracy == pytest.approx(float(((p > 0.5) == y).float().mean()), abs=0.04)
    from sklearn.metrics import roc_auc_score

    assert made.info.auroc == pytest.approx(roc_auc_score(y, p), abs=0.03)
    assert (made.info.positives, made.info.negatives, made.info.groups) == (300, 500, 800)
    assert made.info.best_layer is None
    assert not made.info.separable
    # a probability: of the rows that get p, a share of p is positive, at the shares of the fitted rows
    p, y = torch.cat([p[:2400], p[4000:]]), torch.cat([y[:2400], y[4000:]])
    for low in (0.1, 0.3, 0.5, 0.7):
        inside = (p > low) & (p <= low + 0.2)
        assert float(y[inside].float().mean()) == pytest.approx(float(p[inside].mean()), abs=0.12)


def test_the_fit_is_that_of_scikit_learn_on_scaled_rows() -> None:
    from sklearn.linear_model import LogisticRegression

    pos, neg = planted(80, 60)
    x = torch.cat([pos, neg]).double()
    scale = (x - x.mean(0)).square().mean().sqrt()
    y = [1] * 80 + [0] * 60
    wanted = LogisticRegression(C=0.3, tol=1e-10, max_iter=5000).fit(((x - x.mean(0)) / scale).numpy(), y)
    odds = torch.from_numpy(wanted.decision_function(((x - x.mean(0)) / scale).numpy()))
    made = sf.fit_probe(pos, neg, C=0.3)
    torch.testing.assert_close(torch.logit(made(x.float()).double()), odds, rtol=1e-3, atol=1e-3)
    times = sf.fit_probe(1000 * pos, 1000 * neg, C=0.3)  # C means the same whatever the unit
    torch.testing.assert_close(times(1000 * x.float()), made(x.float()), rtol=1e-4, atol=1e-4)


def test_rows_of_one_group_are_held_out_together() -> None:
    """Each group is a cluster of its own on a random side: what is learnt of it says nothing of another."""
    centres = 6 * drawn(24, D, seed=3)
    x = (centres[:, None] + 0.1 * drawn(24, 10, D, seed=4)).reshape(-1, D)
    groups = [i // 10 for i in range(240)]
    alone, together = sf.fit_probe(x[:120], x[120:]), sf.fit_probe(x[:120], x[120:], groups=groups)
    assert alone.info.auroc > 0.99
    assert together.info.auroc < 0.8
    assert together.info.groups == 24
    assert torch.equal(alone.weight, together.weight)


def test_one_probe_a_layer_and_which_is_best() -> None:
    sides = [{0: a, 4: b} for a, b in zip(planted(60, 60, 0.2), planted(60, 60, 3.0), strict=True)]
    made = sf.fit_probe(*sides)
    assert list(made) == [0, 4]
    assert {probe.info.best_layer for probe in made.values()} == {4}
    assert [probe.place for probe in made.values()] == [Place("resid_post", 0), Place("resid_post", 4)]
    (one,) = (sf.fit_probe({4: sides[0][4]}, {4: sides[1][4]}),)
    assert one.info.best_layer is None
    assert torch.equal(one.weight, made[4].weight)


def test_too_few_rows_to_hold_out_warn(tmp_path: Path) -> None:
    pos, neg = planted(6, 6)
    with pytest.warns(UserWarning, match="fit_probe: the 12 rows are too few, or in too few groups, to hold some out"):
        made = sf.fit_probe(pos, neg, groups=[0] * 6 + [1] * 6)
    assert math.isnan(made.info.auroc)
    again = Probe.load(made.save(tmp_path))
    assert again.info.numbers() == made.info.numbers()  # type: ignore[attr-defined]
    assert math.isnan(again.info.auroc)  # type: ignore[attr-defined]


POS, NEG = planted(6, 6)
SPOILED = POS.clone()
SPOILED[2, 5] = torch.nan
BAD_SIDES = [
    ((POS[:1], NEG), "pos has 1 row.*expected at least 2"),
    ((POS, NEG[:0]), r"neg has shape \(0, 37\)"),
    ((POS, POS), "the two sides are identical"),
    ((SPOILED, NEG), "row 2 of pos is zero or holds NaN"),
    ((POS, NEG[:, 1:]), "pos has width 37 and neg 36"),
]


@pytest.mark.parametrize(("sides", "match"), BAD_SIDES)
@pytest.mark.parametrize("fit", [sf.fit_probe, sf.fit_condition])
def test_bad_sides_are_named(fit: Any, sides: tuple[Tensor, Tensor], match: str) -> None:
    if fit is sf.fit_probe:
        with pytest.raises(ValueError, match=f"fit_probe: {match}"):
            fit(*sides)
    with pytest.raises(ValueError, match=f"{fit.__name__}: layer 7: {match}"):
        fit({7: sides[0]}, {7: sides[1]})
    with pytest.raises(ValueError, match=r"pos has layers \[7\] and neg \[8\]"):
        fit({7: POS}, {8: NEG})
    with pytest.raises(ValueError, match="groups has 3 labels; expected 12"):
        fit({7: POS}, {7: NEG}, groups=[1, 2, 3])
    with pytest.raises(TypeError, match=fit.__name__):
        fit({7: POS}, NEG)


@pytest.mark.parametrize(
    ("C", "error"), [(0, ValueError), (-1.0, ValueError), (torch.inf, ValueError), ("best", ValueError)]
)
def test_a_bad_penalty_is_refused(C: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="fit_probe: C "):
        sf.fit_probe(POS, NEG, C=C)


# --- fit_condition -------------------------------------------------------------------------------------------------------


def f1(met: Tensor, y: Tensor) -> float:
    hits = int((met & y).sum())
    return 2 * hits / (int(met.sum()) + int(y.sum()))


def test_rows_along_one_line_have_a_threshold_within_the_bounds_of_a_cosine() -> None:
    found = 0
    for seed in range(40):  # rounding puts some of these similarities an ulp above 1
        generator = torch.Generator().manual_seed(seed)
        line, aside = torch.randn(24, generator=generator), 1e-5 * torch.randn(24, generator=generator)
        pos, neg = (
            s * torch.rand(9, 1, generator=generator) * line + torch.randn(9, 1, generator=generator) * aside
            for s in (1, -1)
        )
        made = sf.fit_condition({3: pos}, {3: neg})
        assert 0 <= made.threshold <= 1
        met = made(torch.cat([pos, neg]))
        assert made.info.f1 == pytest.approx(2 * int(met[:9].sum()) / max(int(met.sum()) + 9, 1))
        found += bool((made.probe(torch.cat([pos, neg])) > 1).any())
    assert found
    with pytest.raises(ValueError, match="all rows have one projection similarity"):
        sf.fit_condition({3: torch.tensor([[1.0, 0.0], [2.0, 0.0]])}, {3: torch.tensor([[-1.0, 0.0], [-3.0, 0.0]])})


def test_the_best_threshold_is_the_best_of_all() -> None:
    for seed in range(30):
        scores = drawn(40, seed=seed).round(decimals=1)
        labels = drawn(40, seed=100 + seed) + 0.7 * scores * (-1) ** seed > 0
        found = best_threshold(scores, labels)
        assert found is not None
        theta, above, _ = found
        known = sorted(set(scores.tolist()))
        middles = [(a + b) / 2 for a, b in itertools.pairwise(known)]
        best = max(max(f1(scores > t, labels), f1(scores < t, labels)) for t in middles)
        assert f1(scores > theta if above else scores < theta, labels) == pytest.approx(best)
    low, high = torch.tensor(0.5), torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    for labels in (torch.tensor([False, True]), torch.tensor([True, False])):
        theta, above, _ = best_threshold(torch.stack([low, high]), labels) or (0.0, False, 0.0)
        scores = torch.stack([low, high])
        assert torch.equal(scores > theta if above else scores < theta, labels)
    assert best_threshold(torch.ones(4), torch.tensor([True, True, False, False])) is None


def test_the_direction_is_the_first_component_of_the_centred_contrast() -> None:
    for n, m in ((10, 14), (200, 100)):
        pos, neg = planted(n, m, 6.0)
        middle = (pos.double().mean(0) + neg.double().mean(0)) / 2
        a, b = (pos - middle) / math.sqrt(n), (neg - middle) / math.sqrt(m)
        true = torch.linalg.svd(torch.cat([a, b])).Vh[0]
        got = contrast_component(pos, neg)
        assert float((got.double() @ true).abs()) == pytest.approx(1.0, abs=1e-6)
        assert float(got.norm()) == pytest.approx(1.0, abs=1e-6)


def contrast(n: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positive rows that lean towards entry 3 by `size`, negative ones away from it by a third."""
    x = drawn(2 * n, D, seed=seed)
    x[:n, 3] += size
    x[n:, 3] -= size / 3
    return x[:n], x[n:]


@pytest.mark.parametrize("similarity", ["projection", "tanh"])
def test_a_condition_is_fitted_on_the_best_layer(similarity: str, tmp_path: Path) -> None:
    layers = {2: contrast(60, 0.3, 1), 5: contrast(60, 12.0, 2), 9: contrast(60, 1.0, 3)}
    made = sf.fit_condition(
        {k: v[0] for k, v in layers.items()}, {k: v[1] for k, v in layers.items()}, similarity=similarity
    )
    assert made.probe.place == Place("resid_post", 5)
    assert isinstance(made.probe, SimilarityProbe)
    assert made.probe.kind == similarity
    assert int(made.probe.direction.abs().argmax()) == 3  # type: ignore[union-attr]
    info = made.info
    assert info is not None
    assert [row.layer for row in info.layers] == [2, 5, 9]
    y = torch.arange(120) < 60
    assert info.f1 == pytest.approx(f1(made(torch.cat(layers[5])), y))
    assert info.f1 == max(row.f1 for row in info.layers) > 0.85  # a tanh forgets how far a row lies out
    fresh = contrast(2000, 12.0, 7)  # F1 of 120 rows has a standard error of 0.04
    assert info.held_out_f1 == pytest.approx(f1(made(torch.cat(fresh)), torch.arange(4000) < 2000), abs=0.1)
    weak = next(row for row in info.layers if row.layer == 2)
    assert weak.held_out_f1 < info.held_out_f1
    plan = sf.Plan({7: sf.When(made, sf.Add(drawn(D)))})
    (edit,) = sf.Plan.load(plan.save(tmp_path)).edits[Place("resid_post", 7)]
    assert isinstance(edit, sf.When)
    assert edit.condition.info == info
    assert edit.reads == Place("resid_post", 5)


def test_a_condition_wants_layers() -> None:
    with pytest.raises(TypeError, match="fit_condition: positive is a Tensor; expected a dict of layer -> activations"):
        sf.fit_condition(POS, NEG)
    with pytest.raises(ValueError, match="similarity is 'dot'"):
        sf.fit_condition({1: POS}, {1: NEG}, similarity="dot")
    with pytest.warns(UserWarning, match="fit_condition: the 12 rows are too few"):
        made = sf.fit_condition({1: POS}, {1: NEG}, groups=[0] * 6 + [1] * 6)
    assert made.info is not None
    assert math.isnan(made.info.held_out_f1)


# --- a real model --------------------------------------------------------------------------------------------------------

WORDS = ["film", "meal", "book", "trip", "song", "hotel", "game", "show", "phone", "course", "concert", "car"]
GOOD = [
    "This {} was wonderful, I loved it.",
    "What a delightful {}!",
    "The {} made me happy.",
    "An excellent {}, truly.",
]
POOR = ["This {} was terrible, I hated it.", "What a dreadful {}!", "The {} made me angry.", "An awful {}, truly."]


@pytest.mark.model
def test_sentiment_is_read_and_gated_in_a_real_model(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    sides = [[text.format(word) for word in WORDS for text in texts] for texts in (GOOD, POOR)]
    layers = [1, 8, 16]
    pos, neg = (sf.collect(model, tokenizer, texts, layers=layers, position="mean", progress=False) for texts in sides)
    groups = [word for _ in sides for word in WORDS for _ in GOOD]
    probes = sf.fit_probe(pos, neg, groups=groups)
    best = probes[probes[1].info.best_layer]
    assert best.info.groups == len(WORDS)
    assert best.info.auroc > 0.98
    assert best.origin.model == "LlamaForCausalLM"
    assert best.place.site == "resid_post"
    assert best.place.layer in layers
    assert bool((best(pos[best.place.layer]).mean() > 0.8) & (best(neg[best.place.layer]).mean() < 0.2))
    assert torch.equal(Probe.load(best.save(tmp_path))(pos[8]), best(pos[8]))

    asked = [
        "How do I make a cake?",
        "What is the capital of France?",
        "Where can I buy shoes?",
        "Why is the sky blue?",
    ]
    told = ["The cake is in the oven.", "Paris is a large city.", "My shoes are brown.", "The sky was grey today."]
    more = [
        "Who wrote this book?",
        "When does it open?",
        "Which one is yours?",
        "Can you swim?",
        "Is it far from here?",
    ]
    less = ["She wrote the book.", "It opens at nine.", "That one is mine.", "I can swim.", "It is far from here."]
    ask, tell = (
        sf.collect(model, tokenizer, texts, layers=layers, progress=False) for texts in (asked + more, told + less)
    )
    condition = sf.fit_condition(ask, tell)
    assert condition.info is not None
    assert condition.info.f1 > 0.85
    layer = condition.probe.place.layer
    edit = sf.When(condition, sf.Add(100 * drawn(576)))
    with sf.steer(model, {layer + 2: edit}) as handle:
        for texts, acts in ((asked, ask), (told, tell)):
            for text, row in zip(texts, acts[layer], strict=False):
                model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=1, do_sample=False)
                assert handle.decisions()[0][0].tolist() == [bool(condition(row))]
