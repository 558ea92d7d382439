"""Interventions fitted by one call: each estimator against its formula on planted rows, bad input, files, and a real model."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import steerfast as sf
from steerfast._null import Null
from steerfast.barriers.data import Data
from steerfast.cli.demo_prompts import KIND, KIND_HELD_OUT, UNKIND, UNKIND_HELD_OUT
from steerfast.directions.fit import ESTIMATORS, PAIRED, settings_of
from steerfast.directions.fits.linear import transport
from steerfast.directions.fits.rotations import angle_between
from steerfast.directions.fits.sides import shuffle
from steerfast.edits.base import Intervention
from steerfast.models.collect import Activations
from steerfast.place import Origin, Place

module = sys.modules["steerfast.directions.fit"]
D, N, M = 37, 60, 45
LAYERS = (3, 4, 5)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(v: Tensor) -> Tensor:
    return v / v.norm()


def acts(rows: dict[int, Tensor], model: str = "LlamaForCausalLM", site: str = "resid_post") -> Activations:
    count = len(next(iter(rows.values())))
    return Activations(rows, model=model, site=site, position="last", text_index=torch.arange(count))


def planted(n: int = N, m: int = M, seed: int = 0) -> tuple[Activations, Activations]:
    """Two sides around an offset, apart along entry 3, in large units; each layer also along a line of its own."""
    sides: list[dict[int, Tensor]] = [{}, {}]
    for layer in LAYERS:
        x = drawn(n + m, D, seed=100 * seed + layer) + 5 * drawn(D, seed=99)
        x[:n, 3] += 4.0
        x[:n] += 0.2 * layer * unit(drawn(D, seed=98))
        for side, rows in zip(sides, (x[:n], x[n:]), strict=True):
            side[layer] = 40 * rows
    return acts(sides[0]), acts(sides[1])


def sae(place: Any = ("resid_post", 4)) -> sf.SAE:
    """A feature for each entry, active above 20; the entries' own rows."""
    eye = torch.eye(D)
    return sf.SAE(eye, eye, threshold=torch.full((D,), 20.0), origin=Origin(place=place))


def settings(method: str) -> dict[str, Any]:
    return {"sae": sae(), "count": 2} if "sae" in settings_of(method) else {}


def fitted(method: str, /, **others: Any) -> Any:
    return sf.fit(method, *planted(N, N if method in PAIRED else M), layer=4, **{**settings(method), **others})


def rows_of(method: str = "") -> tuple[Tensor, Tensor]:
    pos, neg = planted(N, N if method in PAIRED else M)
    return pos[4].double(), neg[4].double()


@pytest.fixture(autouse=True)
def _no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- all of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ESTIMATORS)
def test_it_is_ready_to_use_and_a_file_keeps_what_is_known(method: str, tmp_path: Path) -> None:
    made = fitted(method)
    pos, neg = rows_of(method)
    assert made.origin.typical_norm == pytest.approx(float(torch.cat([pos, neg]).norm(dim=1).quantile(0.5)))
    assert made.origin == Origin("LlamaForCausalLM", Place("resid_post", 4), "last", made.origin.typical_norm)
    assert (made.info.method, made.info.positives, made.info.negatives) == (method, N, len(neg))
    assert made.info.groups == (N if method in PAIRED else N + len(neg))
    assert 0 <= made.info.dose < math.inf
    assert made.info.closed <= 1
    plan = sf.Plan([made])
    assert list(plan.edits) == [("resid_post", 4)]
    (again,) = sf.Plan.load(plan.save(tmp_path)).edits["resid_post", 4]
    assert known(again.info) == known(made.info)
    assert again.origin == made.origin
    torch.testing.assert_close(again.apply(neg.float()), made.apply(neg.float()))


@pytest.mark.parametrize("method", ESTIMATORS)
def test_the_same_rows_give_the_same_intervention(method: str) -> None:
    x = rows_of(method)[1].float()
    assert torch.equal(fitted(method).apply(x), fitted(method).apply(x))


def test_the_held_out_figures_are_those_of_fits_without_the_held_out_rows() -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    pos, neg = rows_of()
    x, y = torch.cat([pos, neg]), torch.arange(N + M) < N
    gap = left = 0.0
    doses = []
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(x, y, np.arange(N + M))
    for fit, held in folds:
        v = x[fit][y[fit]].mean(0) - x[fit][~y[fit]].mean(0)
        distance = x[held][y[held]].mean(0) - x[held][~y[held]].mean(0)
        gap, left = gap + float(distance.square().sum()), left + float((distance - v).square().sum())
        doses.append(v.norm() / x[held][~y[held]].norm(dim=1))
    info = fitted("add").info
    assert info.closed == pytest.approx(1 - left / gap, abs=1e-5)
    assert info.dose == pytest.approx(float(torch.cat(doses).mean()), abs=1e-5)
    assert info.closed > 0.5


def test_sides_that_differ_by_chance_close_nothing_that_is_held_out() -> None:
    x = drawn(120, D, seed=5)
    assert sf.fit("add", x[:60], x[60:]).info.closed < 0.1


def test_groups_are_held_out_together() -> None:
    """Each group is a cluster of its own on a random side: what is learnt of it says nothing of another."""
    x = (6 * drawn(24, D, seed=3)[:, None] + 0.1 * drawn(24, 10, D, seed=4)).reshape(-1, D)
    alone, together = (
        sf.fit("add", x[:120], x[120:]),
        sf.fit("add", x[:120], x[120:], groups=[i // 10 for i in range(240)]),
    )
    assert alone.info.closed > 0.4
    assert together.info.closed < 0.1
    assert together.info.groups == 24
    assert torch.equal(alone.vector, together.vector)


GROUPINGS = {
    "tensor": lambda labels: torch.tensor(labels),
    "array": lambda labels: np.array(labels),
    "list of tensors": lambda labels: list(torch.tensor(labels)),
    "list of arrays": lambda labels: [np.array(label) for label in labels],
    "generator": lambda labels: (label for label in labels),
}


@pytest.mark.parametrize("form", GROUPINGS)
def test_groups_are_the_same_in_whatever_form_they_are_given(form: str) -> None:
    x, labels = drawn(60, D, seed=5), [i // 5 for i in range(60)]
    pos, neg = {1: x[:30], 2: x[:30]}, {1: x[30:], 2: x[30:]}

    def told(groups: Callable[[], Any]) -> tuple[Any, ...]:
        heads = sf.fit_heads(pos, neg, 1, groups=groups(), draws=0)
        condition = sf.fit_condition(pos, neg, groups=groups()).info
        return (
            sf.fit("add", pos, neg, layer=1, groups=groups(), draws=2).info.numbers(),
            sf.fit_probe(pos, neg, groups=groups())[2].info.numbers(),
            (condition.groups, condition.held_out_f1),
            [float(row) for row in heads.accuracy.values()],
            sf.fit_barrier(x[:30], x[30:], groups=groups()).info.accuracy,
        )

    assert told(lambda: GROUPINGS[form](labels)) == told(lambda: labels)


def test_tensors_may_say_their_layer() -> None:
    pos, neg = rows_of()
    assert sf.fit("add", pos, neg).origin.place is None
    assert sf.fit("add", pos, neg, layer=4).origin.place == Place("resid_post", 4)
    assert torch.equal(sf.fit("add", pos, neg).vector, fitted("add").vector)


def known(info: Any) -> dict[str, Any]:
    """What is known of a fit, without what is not a number."""
    return {name: value for name, value in info.numbers().items() if value is not None}


def test_few_rows_warn_and_hold_nothing_out(tmp_path: Path) -> None:
    x = drawn(4, D)
    with pytest.warns(UserWarning, match="fit: add: the 4 rows are too few, or in too few groups, to hold some out"):
        made = sf.fit("add", x[:2], x[2:], layer=1)
    assert math.isnan(made.info.closed)
    (again,) = sf.Plan.load(sf.Plan([made]).save(tmp_path)).edits["resid_post", 1]
    assert again.info.numbers() == made.info.numbers()
    assert math.isnan(again.info.dose)


def test_held_out_sides_of_one_mean_are_left_out() -> None:
    a, b, c, d = (row[None] for row in torch.tensor([[1.0, 2.0], [3.0, -1.0], [-2.0, 4.0], [5.0, 7.0]]))
    made = sf.fit("add", torch.cat([a, b, c, d]), torch.cat([a, b, -c, -d]), groups=[0, 1, 2, 3] * 2, draws=4)
    assert math.isfinite(made.info.closed)
    assert (len(made.info.null.shuffled), len(made.info.null.random)) == (
        4,
        4,
    )  # none of them on a fold without a figure
    pos, neg = torch.cat([a, a, b, c]), torch.cat([a, b, b, c])
    with pytest.warns(UserWarning, match="or the sides that were held out have one mean"):
        made = sf.fit("add", pos, neg, groups=[0, 0, 1, 2, 0, 1, 1, 2])
    assert math.isnan(made.info.closed)
    torch.testing.assert_close(made.vector, pos.mean(0) - neg.mean(0))


# --- the formulas --------------------------------------------------------------------------------------------------------


def test_add_and_ablate_take_the_mean_difference() -> None:
    pos, neg = rows_of()
    v = pos.mean(0) - neg.mean(0)
    torch.testing.assert_close(fitted("add", strength=0.5).apply(neg), neg + 0.5 * v, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        fitted("ablate").apply(neg), neg - (neg @ unit(v))[:, None] * unit(v), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5])
def test_affine_ablation_ends_between_the_class_means(alpha: float) -> None:
    pos, neg = rows_of()
    v = unit(pos.mean(0) - neg.mean(0))
    found = fitted("affine_ablate", alpha=alpha).apply(torch.cat([pos, neg])) @ v
    wanted = alpha * float(pos.mean(0) @ v) + (1 - alpha) * float(neg.mean(0) @ v)
    torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=1e-4, atol=1e-2)


def test_clamp_bounds_are_quantiles_of_the_positive_side() -> None:
    pos, neg = rows_of()
    projections = (pos @ unit(pos.mean(0) - neg.mean(0))).numpy()
    made = fitted("clamp")
    assert made.low == pytest.approx(np.quantile(projections, 0.25), rel=1e-6)
    assert made.high is None
    both = fitted("clamp", low=0.1, high=0.9)
    assert (both.low, both.high) == (
        pytest.approx(np.quantile(projections, 0.1), rel=1e-6),
        pytest.approx(np.quantile(projections, 0.9), rel=1e-6),
    )


def test_affine_finds_a_planted_map_whatever_the_order() -> None:
    source = 40 * drawn(50, D, seed=1) + 100
    w, b = drawn(D, seed=2).abs() + 0.1, 10 * drawn(D, seed=3)
    made = sf.fit("affine", (source * w + b)[torch.randperm(50)], source)
    torch.testing.assert_close(made.weight, w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.bias, b, rtol=1e-4, atol=1e-2)
    assert made.info.closed > 0.8


def test_affine_of_unequal_sides_is_that_of_every_row_repeated() -> None:
    source, target = drawn(6, D).double(), 3 * drawn(9, D, seed=1).double() + 1
    w, b = transport(source, target)
    a, z = source.repeat_interleave(3, 0).sort(0).values, target.repeat_interleave(2, 0).sort(0).values
    for j in range(D):
        slope, intercept = np.polyfit(a[:, j].numpy(), z[:, j].numpy(), 1)
        assert (float(w[j]), float(b[j])) == (pytest.approx(slope), pytest.approx(intercept))
    assert bool((w >= 0).all())


def test_affine_moves_a_coordinate_that_is_constant() -> None:
    pos, neg = (x.clone() for x in rows_of())
    neg[:, 7] = 0.1
    made = sf.fit("affine", pos, neg)
    assert float(made.weight[7]) == 1.0
    assert float(made.bias[7]) == pytest.approx(float(pos[:, 7].mean()) - 0.1, rel=1e-4)


def test_rotate_spans_the_candidate_and_the_component() -> None:
    from sklearn.decomposition import PCA

    pos, neg = planted()
    candidates = []
    for layer in LAYERS:
        means = [unit(torch.nn.functional.normalize(side[layer].double(), dim=1).mean(0)) for side in (pos, neg)]
        candidates.append(means[0] - means[1])
    first = unit(candidates[1])
    component = torch.from_numpy(PCA().fit(torch.stack(candidates).numpy()).components_[0])
    second = unit(component - (component @ first) * first)
    made = fitted("rotate")
    torch.testing.assert_close(made.plane[0].double(), first, atol=1e-5, rtol=0)
    assert abs(float(made.plane[1].double() @ second)) == pytest.approx(1.0, abs=1e-5)
    assert float(made.plane[1].double() @ torch.cat([pos[4], neg[4]]).double().mean(0)) > 0
    y = made.plane.double() @ pos[4].double().mean(0)
    assert made.degrees == pytest.approx(math.degrees(math.atan2(float(y[1]), float(y[0]))), rel=1e-4)
    assert fitted("rotate", degrees=30.0).degrees == 30.0


def test_spherical_prototypes_are_antipodal() -> None:
    pos, neg = rows_of()
    made = fitted("spherical", alpha=0.5)
    torch.testing.assert_close(made.target.double(), unit(pos.mean(0) - neg.mean(0)), atol=1e-5, rtol=0)
    assert torch.equal(made.avoid, -made.target)
    assert (made.alpha, made.beta, made.kappa) == (0.5, 0.1, 20.0)


def test_householder_turns_mirror_images_into_each_other() -> None:
    """Positive rows are the mirror images of the negative ones: the probe is the mirror's normal, γ the angle to the image."""
    normal = unit(drawn(D, seed=7))
    x = drawn(80, D, seed=8)
    neg = 40 * (x - (x @ normal + 3.0)[:, None] * normal + 0.1 * drawn(80, 1, seed=9) * normal)
    pos = neg - 2 * (neg @ normal)[:, None] * normal
    made = sf.fit("householder", pos, neg)
    assert float(made.normal @ normal) > 0.99
    before, after = angle_between(neg, pos), angle_between(made.apply(neg), pos)
    assert float(after.mean()) < 0.15 * float(before.mean())
    torch.testing.assert_close(made.apply(neg).norm(dim=1), neg.norm(dim=1), rtol=1e-4, atol=0)
    assert torch.equal(made.apply(pos), pos)
    assert made.info.closed > 0.9


def test_pairs_of_every_token_are_those_of_texts_as_long() -> None:
    """Token i of one text against token i of its partner; the tokens of a pair of texts are held out together."""
    pos, neg = (x[:40].float() + 3 for x in rows_of("householder"))

    def tokens(rows: Tensor, texts: Tensor) -> Activations:
        return Activations({1: rows}, model="LlamaForCausalLM", site="resid_post", position="all", text_index=texts)

    texts = torch.arange(40) // 4
    found = sf.fit("householder", tokens(pos, texts), tokens(neg, texts), steps=5, draws=0)
    assert found.info.groups == 10
    told = sf.fit("householder", pos, neg, groups=texts.repeat(2), steps=5, draws=0)
    assert (found.info.closed, found.info.dose) == (told.info.closed, told.info.dose)
    with pytest.raises(
        ValueError, match="fit: householder: needs pairs, but the texts of pos and neg differ in length"
    ):
        sf.fit("householder", tokens(pos, texts), tokens(neg, torch.arange(40) // 5))


@pytest.mark.parametrize("C", [0.01, 1.0, 1000.0])
def test_the_normal_of_householder_is_a_logistic_regression_without_intercept(C: float) -> None:
    pos, neg = (x[:N] + 3 for x in rows_of("householder"))
    x = torch.cat([pos, neg])
    x, y = x / x.square().mean().sqrt(), torch.arange(2 * N) < N
    w = torch.zeros(D, dtype=x.dtype)
    for _ in range(50):
        p = torch.sigmoid(x @ w)
        bend = x.T @ (x * (p * (1 - p))[:, None]) + torch.eye(D, dtype=x.dtype) / C
        w = w - torch.linalg.solve(bend, x.T @ (p - y.double()) + w / C)
    made = sf.fit("householder", pos, neg, C=C, steps=1, draws=0)
    torch.testing.assert_close(made.normal.double(), unit(w), rtol=0, atol=1e-6)


def test_flow_follows_the_barrier_of_the_sides() -> None:
    pos, neg = rows_of()
    made = fitted("flow", kind="linear", norms=0.25, steps=4, method="heun")
    expected = sf.fit_barrier(pos, neg, kind="linear")
    torch.testing.assert_close(made.barrier(neg.float()), expected(neg.float()))
    assert made.barrier.info.accuracy == expected.info.accuracy
    assert pytest.approx(0.25 * expected.origin.typical_norm) == made.T
    assert (made.angle, made.steps, made.method) == (None, 4, "heun")
    usual = fitted("flow", kind="linear")
    assert usual.T == usual.barrier.info.distance == pytest.approx((pos.mean(0) - neg.mean(0)).norm().item(), rel=1e-5)
    assert fitted("flow", method="geodesic").barrier.raw is False
    with pytest.raises(ValueError, match="the means of the two sides coincide; give a length"):
        sf.fit("flow", torch.cat([pos, -pos]), torch.cat([neg, -neg]), layer=1)


def test_features_are_those_that_the_sides_differ_in() -> None:
    pos, neg = rows_of()
    active = [torch.where(x > 20, x, 0.0) for x in (pos, neg)]
    gain = torch.where((pos > 20).double().mean(0) > 0.5, active[0].mean(0) - active[1].mean(0), -1.0)
    wanted = gain.topk(2).indices.tolist()
    assert wanted[0] == 3
    for mode, values in (("set", active[0].mean(0)), ("max", active[0].mean(0)), ("add", gain)):
        made = fitted("edit_features", mode=mode)
        assert made.values == pytest.approx({index: float(values[index]) for index in wanted}, rel=1e-5)
        assert made.mode == mode
    assert fitted("edit_features", count=1).info.closed > 0.5
    assert torch.equal(fitted("amplify", alpha=0.5).features, torch.eye(D)[wanted])
    assert fitted("calibrate").beta == pytest.approx(float(torch.relu(pos[:, wanted]).sum(1).mean()), rel=1e-5)
    pushed = sf.fit(
        "deficit_push", pos, neg, sae=sf.SAE(torch.eye(D), torch.eye(D), b_dec=torch.full((D,), 5.0)), count=1
    )
    assert torch.equal(pushed.features, torch.eye(D)[[3]])
    assert pushed.target == pytest.approx(float(torch.relu(pos[:, 3] - 5).mean()), rel=1e-5)
    assert float(pushed.bias) == -5.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_not_rounded_to_the_dtype_of_an_sae(dtype: torch.dtype) -> None:
    """Beside an entry a thousand times as large, the sides differ by less than its 16 bits hold, or lie where they end."""
    middle = 70_000.0 if dtype == torch.float16 else 1000.0
    pos, neg = (middle + sign + 0.1 * drawn(40, D, seed=sign + 2) for sign in (1, -1))
    wide = sf.SAE(torch.eye(D), torch.eye(D), threshold=torch.zeros(D))
    for mode in ("set", "add"):
        a, b = (sf.fit("edit_features", pos, neg, sae=one, mode=mode, draws=0) for one in (wide, wide.to(dtype=dtype)))
        assert a.values == b.values
    assert min(a.values.values()) > 1.9


# --- bad input -----------------------------------------------------------------------------------------------------------

POS, NEG = (x.float() for x in rows_of("householder"))
SPOILED = POS.clone()
SPOILED[2, 5] = torch.nan
BAD_SIDES = [
    ((POS[:1], NEG), r"pos has 1 row\(s\); expected at least 2"),
    ((POS, NEG[:0]), r"neg has shape \(0, 37\)"),
    ((POS, POS), "the two sides are identical"),
    ((SPOILED, NEG), "row 2 of pos is zero or holds NaN"),
    ((POS, NEG[:, 1:]), "pos has width 37 and neg 36"),
]


@pytest.mark.parametrize(("sides", "match"), BAD_SIDES)
@pytest.mark.parametrize("method", ESTIMATORS)
def test_bad_sides_are_named(method: str, sides: tuple[Tensor, Tensor], match: str) -> None:
    for pos, neg, where in ((*sides, ""), ({4: sides[0]}, {4: sides[1]}, "layer 4: ")):
        with pytest.raises(ValueError, match=f"fit: {method}: {where}{match}"):
            sf.fit(method, pos, neg, **settings(method))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("fit", [sf.fit_probe, sf.fit_barrier, lambda pos, neg: sf.fit("add", pos, neg)])
def test_rows_that_are_no_floating_point_are_refused(fit: Callable[..., Any], dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"neg has dtype {dtype}; expected a floating dtype"):
        fit(POS, NEG.to(dtype))


LAYERED: list[Callable[..., Any]] = [
    sf.fit_probe,
    sf.fit_condition,
    lambda pos, neg: sf.fit("rotate", pos, neg, layer=1),
    lambda pos, neg: sf.fit_heads(pos, neg, 1),
]


@pytest.mark.parametrize("fit", LAYERED)
def test_layers_of_different_rows_are_refused(fit: Callable[..., Any]) -> None:
    """Rows of one number are those of one text in every layer, or what is held out is not what is looked at."""
    few, many = POS[:20], POS[:40]
    said = (
        r"numbers of rows of pos and of neg differ from layer to layer, \{1: \(20, 40\), 2: \(40, 20\)\}; collect all"
    )
    with pytest.raises(ValueError, match=said):
        fit({1: few, 2: many}, {1: NEG[:40], 2: NEG[:20]})


BAD: list[tuple[str, tuple[Any, Any], dict[str, Any], type[Exception], str]] = [
    ("nudge", (POS, NEG), {}, ValueError, "method is 'nudge'; expected one of 'add'"),
    ("loreft", (POS, NEG), {}, ValueError, "use sf.fit_loreft"),
    ("add", (POS, NEG), {"alpha": 1.0}, TypeError, "'add' has no setting 'alpha'; it has strength, keep_norm"),
    ("add", (POS, NEG), {"groups": [1, 2]}, ValueError, "groups has 2 labels; expected 120"),
    ("add", (POS, NEG), {"groups": 3}, TypeError, "groups is 3; expected a list of labels, one per row"),
    ("add", (POS, NEG), {"groups": torch.tensor(3)}, TypeError, "groups is 3; expected a list of labels"),
    ("add", (POS, NEG), {"groups": "ab" * 60}, TypeError, "groups is 'abab"),
    ("add", (POS, NEG), {"groups": torch.zeros(120, 1)}, TypeError, r"groups has the label \[0.0\]; expected a number or"),
    ("add", (POS, NEG), {"groups": torch.full((120,), math.nan)}, ValueError, "labels that are NaN"),
    ("add", (POS, {4: NEG}), {}, TypeError, "give both as activations or both as tensors"),
    ("add", planted(), {}, ValueError, r"hold layers \[3, 4, 5\]; name one with layer="),
    ("add", planted(), {"layer": 9}, ValueError, r"layer is 9; the sides hold layers \[3, 4, 5\]"),
    ("add", ({4: POS}, {5: NEG}), {}, ValueError, r"pos has layers \[4\] and neg \[5\]"),
    ("add", (acts({4: POS}), acts({4: NEG}, "Other")), {}, ValueError, "model"),
    ("add", (torch.cat([POS, -POS]), torch.cat([NEG, -NEG])), {}, ValueError, "the means of pos and neg do not differ"),
    ("clamp", (POS, NEG), {"low": 25}, ValueError, "low is 25.0; expected a quantile"),
    ("clamp", (POS, NEG), {"low": 0.9, "high": 0.1}, ValueError, "low is 0.9 and high 0.1; expected quantiles low <= high"),
    ("clamp", (POS, NEG), {"low": None}, ValueError, "give low, high or both"),
    ("rotate", (POS, NEG), {}, ValueError, "candidates of several layers, and 1 was given"),
    ("rotate", ({1: POS, 2: POS}, {1: NEG, 2: NEG}), {"layer": 1}, ValueError, "vary along one line only"),
    ("rotate", ({1: POS, 2: POS[1:]}, {1: NEG, 2: NEG}), {"layer": 1}, ValueError, "rows of pos and of neg differ"),
    ("householder", (POS, NEG[1:]), {}, ValueError, "needs pairs, and pos has 60 rows and neg 59"),
    ("householder", (POS, NEG), {"hidden": 121}, ValueError, "hidden is 121 and there are 120 rows"),
    ("householder", (POS, NEG), {"C": 0}, ValueError, "C is 0.0; expected > 0"),
    ("householder", (POS, NEG), {"groups": range(120)}, ValueError, "row 0 of pos and of neg are a pair, but in two groups"),
    ("flow", (POS, NEG), {"angle": 0.4, "norms": 1.0}, ValueError, "got angle and norms; give one length"),
    ("edit_features", (POS, NEG), {}, TypeError, "give it as sae="),
    ("edit_features", (POS, NEG), {"sae": torch.eye(D)}, TypeError, "sae must be an SAE"),
    ("edit_features", (POS[:, 1:], NEG[:, 1:]), {"sae": sae()}, ValueError, "SAE has width 37 and the rows 36"),
    ("edit_features", (POS, NEG), {"sae": sae(), "count": 38}, ValueError, "count is 38 and the SAE has 37 features"),
    ("edit_features", (POS, NEG), {"sae": sae(), "tau": 1.0}, ValueError, "expected a share of the rows"),
    ("edit_features", (POS, NEG), {"sae": sae(), "mode": "min"}, ValueError, "mode is 'min'"),
    ("edit_features", (-POS.abs(), NEG), {"sae": sae()}, ValueError, "no feature is active in more than 0.5"),
    ("amplify", planted(), {"sae": sae(("resid_post", 7)), "layer": 4}, ValueError, "place"),
    *(
        (method, (POS, NEG), {"sae": sf.sae.Transcoder(torch.eye(D), torch.eye(D))}, ValueError, "sae is a transcoder, which")
        for method in ("edit_features", "amplify", "calibrate", "deficit_push")
    ),
    *(
        ("deficit_push", (POS, NEG), {"sae": sf.SAE(torch.eye(D), torch.eye(D), normalisation=how)}, ValueError, how)
        for how in ("constant_norm_rescale", "layer_norm")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("method", "sides", "others", "error", "match"), BAD)
def test_bad_input_is_named(
    method: str, sides: Any, others: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"^fit: .*{match}|^Clamp: {match}"):
        sf.fit(method, *sides, **others)


def test_every_setting_is_documented() -> None:
    text = " ".join(str(sf.fit.__doc__).split())
    for method in ESTIMATORS:
        row = text[text.index(f'"{method}"') :]
        row = row[: row.index("| |") if "| |" in row else row.index("Each is")]
        assert ", ".join(settings_of(method)) in row, method


# --- a real model --------------------------------------------------------------------------------------------------------

WORDS = (("wonderful", "excellent", "lovely", "kind", "perfect"), ("terrible", "awful", "nasty", "rude", "boring"))
PROMPTS = ("I think this place is", "My new neighbours are", "Her cooking was", "The film was")


def odds(smollm: Any, edit: Intervention | None, texts: tuple[str, ...] = PROMPTS) -> float:
    """Mean log-odds of kind against unkind next words."""
    model, tokenizer = smollm
    good, bad = (torch.tensor([tokenizer(f" {word}")["input_ids"][0] for word in side]) for side in WORDS)
    total = 0.0
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            if edit is None:
                logits = model(**inputs).logits[0, -1]
            else:
                with sf.steer(model, sf.Plan([edit])):
                    logits = model(**inputs).logits[0, -1]
        likely = logits.double().log_softmax(-1)
        total += float(likely[good].logsumexp(0) - likely[bad].logsumexp(0))
    return total / len(texts)


@pytest.fixture(scope="module")
def read(smollm) -> tuple[Activations, Activations]:
    model, tokenizer = smollm
    return tuple(sf.collect(model, tokenizer, side, range(12, 17), progress=False) for side in (KIND, UNKIND))  # type: ignore[return-value]


@pytest.mark.model
@pytest.mark.parametrize("method", [name for name in ESTIMATORS if name != "ablate" and "sae" not in settings_of(name)])
@pytest.mark.filterwarnings("ignore:fit_barrier")
def test_kind_words_become_likelier_in_a_real_model(smollm, read, method: str) -> None:
    made = sf.fit(method, *read, layer=14)
    assert made.origin.place == Place("resid_post", 14)
    assert made.info.dose < 0.5
    assert odds(smollm, made) > odds(smollm, None) + 0.3


@pytest.mark.model
def test_ablation_takes_the_contrast_of_other_texts(smollm, read) -> None:
    sides = [tuple(f"{text} It was" for text in side) for side in (KIND_HELD_OUT, UNKIND_HELD_OUT)]
    made = sf.fit("ablate", *read, layer=14)
    apart, left = (odds(smollm, edit, sides[0]) - odds(smollm, edit, sides[1]) for edit in (None, made))
    assert apart > 2
    assert left < 0.5 * apart


@pytest.mark.model
def test_features_of_a_trained_sae_steer_a_real_model(smollm, read) -> None:
    model, tokenizer = smollm
    rows = sf.collect(model, tokenizer, [*KIND, *UNKIND], [14], position="all", progress=False)
    config = sf.sae.TrainConfig(features=256, k=8, tokens=30_000, batch=256, lr=0.003)
    trained = sf.sae.train_sae(rows[14], config, origin=rows.origin(14))
    none = odds(smollm, None)
    for method, tau in (("edit_features", 0.3), ("amplify", 0.0), ("deficit_push", 0.3)):
        assert odds(smollm, sf.fit(method, *read, layer=14, sae=trained, tau=tau, count=4)) > none + 0.1, method


BEGINNINGS = (
    "The weather today is", "My favourite food is", "The train to London", "His new car", "A letter from home", "This old town",
    "Every second window", "The smallest child", "Our last holiday", "The book on the table",
)  # fmt: skip
LESSONS = [(text, " purple and sings") for text in BEGINNINGS]


@pytest.mark.model
def test_a_loreft_is_trained_in_a_few_lines_and_teaches_other_prompts(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    flags = [part.requires_grad for part in model.parameters()]

    def likely(edit: Intervention | None) -> float:
        """Nats a token of the lesson behind a prompt that was in none."""
        head, tail = (tokenizer(text)["input_ids"] for text in ("Her old bicycle", " purple and sings"))
        ids = torch.tensor([head + tail])
        with torch.no_grad():
            if edit is None:
                logits = model(ids).logits
            else:
                with sf.steer(model, sf.Plan([edit])):
                    logits = model(ids).logits
        chosen = logits[0, len(head) - 1 : -1].log_softmax(-1).gather(1, ids[0, len(head) :, None])
        return float(chosen.mean())

    before = likely(None)
    made = sf.fit_loreft(model, tokenizer, LESSONS, 12, rank=2, steps=25)
    assert [part.requires_grad for part in model.parameters()] == flags
    assert all(part.grad is None for part in model.parameters())
    assert (made.origin.place, made.info.positives) == (Place("resid_post", 12), 8)
    assert made.info.nats > 2
    torch.testing.assert_close(made.R @ made.R.T, torch.eye(2), atol=1e-5, rtol=0)
    (again,) = sf.Plan.load(sf.Plan([made]).save(tmp_path)).edits["resid_post", 12]

    assert likely(None) == before
    assert likely(again) > before + 2.0


BAD_LESSONS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, r"examples is \[\]; expected a list of \(prompt, continuation\)"),
    (["purple"], {}, TypeError, "'purple' is no example"),
    ([("a", "b", "c")], {}, TypeError, r"\('a', 'b', 'c'\) is no example; expected"),
    ([("The weather", "")], {}, ValueError, r"\('The weather', ''\) has a text without tokens"),
    (LESSONS, {"layer": 30}, ValueError, "layer 30 is out of range"),
    (LESSONS, {"rank": 577}, ValueError, "rank is 577 and the stream has width 576"),
    (LESSONS, {"lr": -1.0}, ValueError, "lr is -1.0; expected > 0"),
    (LESSONS, {"steps": 0}, ValueError, "steps must be a positive integer"),
]


@pytest.mark.model
@pytest.mark.parametrize(("examples", "others", "error", "match"), BAD_LESSONS)
def test_bad_examples_are_named(
    smollm, examples: Any, others: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=f"fit_loreft: {match}"):
        sf.fit_loreft(*smollm, examples, **{"layer": 12, **others})


# --- the null ------------------------------------------------------------------------------------------------------------


def test_a_property_beats_its_null_and_chance_does_not(tmp_path: Path) -> None:
    real = fitted("add").info.null
    assert real.effect == fitted("add").info.closed
    assert (len(real.shuffled), len(real.random), real.shares, real.beaten) == (20, 20, (0.0, 0.0), True)
    x = drawn(120, D, seed=5)
    chance = sf.fit("add", x[:60], x[60:], layer=1)
    assert not chance.info.null.beaten
    assert str(chance.info.null).endswith("random directions did as well: it does not beat its null")
    (again,) = sf.Plan.load(sf.Plan([chance]).save(tmp_path)).edits["resid_post", 1]
    assert again.info == chance.info
    assert not Null.of(-0.2, [-0.5] * 20, [-0.4] * 20).beaten  # harm that is less than theirs is no effect
    assert fitted("add", draws=0).info.null is None
    with pytest.raises(ValueError, match="fit: draws"):
        fitted("add", draws=-1)


def test_the_draws_are_fits_on_shuffled_labels_and_random_directions_of_the_same_dose() -> None:
    """Redone by hand, on the folds that the figures come from."""
    pos, neg = rows_of()
    sides = module._sides("t", *planted(), 4, None, 0)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([pos, neg])
    info = fitted("add", draws=2).info
    for draw, (fitted_rows, held) in enumerate(sides.data.folds[:2]):
        y, z = sides.data.labels[fitted_rows], sides.data.labels[held]
        a, b = x[held][z].mean(0), x[held][~z].mean(0)
        own = x[fitted_rows][y].mean(0) - x[fitted_rows][~y].mean(0)
        order = shuffle(sides.take(fitted_rows).data, generator)
        mixed = x[fitted_rows][order]
        v = mixed[y].mean(0) - mixed[~y].mean(0)
        r = unit(drawn_by(generator, D)) * own.norm()
        closed = [1 - float((a - b - one).square().sum() / (a - b).square().sum()) for one in (own, v, r)]
        shift = info.closed - closed[0]
        assert info.null.shuffled[draw] == pytest.approx(closed[1] + shift, abs=1e-5)
        assert info.null.random[draw] == pytest.approx(closed[2] + shift, abs=1e-5)


def drawn_by(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def test_what_belongs_together_is_shuffled_together() -> None:
    def order(groups: list[int], positives: int) -> Tensor:
        x = torch.arange(2.0, 2.0 + len(groups))[:, None]
        labels = torch.arange(len(groups)) < positives
        return shuffle(Data(x, labels, torch.tensor(groups), Origin(), 0), torch.Generator().manual_seed(3))

    pairs = order([0, 1, 2, 3, 4, 5] * 2, 6)
    assert torch.equal(pairs % 6, torch.arange(12) % 6)  # a pair stays a pair, in its place
    assert 0 < int((pairs[:6] >= 6).sum()) < 6
    pure = order([7, 7, 7, 9, 9, 9, 11, 11, 11, 13, 13, 13], 6)
    assert [sorted(pure[i : i + 3].tolist()) for i in range(0, 12, 3)] != [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert all(len({int(row) // 3 for row in pure[i : i + 3]}) == 1 for i in range(0, 12, 3))
    alone = order(list(range(12)), 6)
    assert sorted(alone.tolist()) == list(range(12))
    assert alone.tolist() != list(range(12))


@pytest.mark.parametrize("kind", [sf.When, sf.WhenToken])
def test_a_condition_keeps_what_is_known_of_the_edit_inside(kind: type[sf.When], tmp_path: Path) -> None:
    made = fitted("add")
    plan = sf.Plan({4: kind(sf.Condition(drawn(D), 0.1), made)})
    (again,) = sf.Plan.load(plan.save(tmp_path)).edits["resid_post", 4]
    assert again.then.info == made.info
    assert again.then.origin == made.origin
