"""Places and origins: what names them, what two of them make, and what a plan does with those of its interventions."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build

import steerfast as sf
from steerfast.barriers.barrier import BarrierInfo
from steerfast.place import (
    HOOKS,
    NOWHERE,
    SITES,
    Origin,
    Place,
    common_origin,
    family,
    median_of,
    place_of,
    typical_norm_of,
)

D = 48
V = torch.linspace(-1, 1, D)
HERE = Origin("LlamaForCausalLM", Place("resid_post", 1), "last", 7.0)


def direction(place: Any = ("resid_post", 1), model: str | None = "LlamaForCausalLM") -> sf.Direction:
    return sf.Direction(V, "given", 1.0, Origin(model, place))


@pytest.mark.parametrize(
    ("key", "place"),
    [
        (8, ("resid_post", 8)),
        (-1, ("resid_post", -1)),
        (np.int64(3), ("resid_post", 3)),
        (torch.tensor(3), ("resid_post", 3)),
        (("attn_out", 0), ("attn_out", 0)),
        (Place("mlp_out", 2), ("mlp_out", 2)),
        ("blocks.8.hook_resid_pre", ("resid_pre", 8)),
        ("blocks.11.attn.hook_z", ("head_out", 11)),
    ],
)
def test_what_names_a_place(key: Any, place: tuple[str, int]) -> None:
    assert place_of("here", key) == place
    assert sf.Plan({key: sf.Add(V)}).edits.keys() == {place}


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        ("8", ValueError, r"here: key '8' is no place; expected a layer number, .* blocks\.8\.hook_resid_pre"),
        ("blocks.8.hook_resid_mid", ValueError, "hook_resid_mid' is no place"),
        (1.5, TypeError, r"here: key 1\.5; expected a layer number or \(site, layer\)"),
        (("middle", 3), ValueError, "here: site is 'middle'; expected one of"),
        (("resid_post", 1, 2), TypeError, "expected a layer number"),
        (None, TypeError, "expected a layer number"),
    ],
)
def test_what_names_no_place(key: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        place_of("here", key)


def test_hook_names_are_those_of_every_site() -> None:
    assert set(HOOKS.values()) == set(SITES)
    for site in SITES:
        assert place_of("here", Place(site, 4).hook_name) == (site, 4)


def test_the_output_of_a_block_is_the_input_of_the_next() -> None:
    assert Place("resid_post", 3).same_stream(Place("resid_pre", 4))
    assert Place("resid_pre", 0).same_stream(Place("resid_pre", 0))
    for other in (Place("resid_pre", 3), Place("resid_post", 4), Place("attn_out", 3), Place("mlp_out", 4)):
        assert not Place("resid_post", 3).same_stream(other)


def test_two_origins_make_one_or_are_refused() -> None:
    assert common_origin("here", [HERE, NOWHERE]) == dataclasses.replace(HERE, position=None)
    assert common_origin("here", [HERE, dataclasses.replace(HERE, typical_norm=9.0)]).typical_norm == 8.0
    assert common_origin("here", [NOWHERE, NOWHERE]) == NOWHERE
    with pytest.raises(ValueError, match="here: the place is 'resid_post 1' of one and 'mlp_out 1' of another"):
        common_origin("here", [HERE, dataclasses.replace(HERE, place=Place("mlp_out", 1))])
    with pytest.raises(ValueError, match="the model is 'LlamaForCausalLM' of one and 'M' of another"):
        common_origin("here", [HERE, Origin("M")])


def test_an_origin_is_checked_and_survives_json() -> None:
    assert Origin(place="blocks.2.hook_mlp_out").place == ("mlp_out", 2)  # type: ignore[arg-type]
    assert Origin.restore(HERE.numbers()) == HERE
    assert Origin.restore(NOWHERE.numbers()) == NOWHERE
    assert (str(HERE), str(NOWHERE)) == ("LlamaForCausalLM, layer 1, resid_post", "")
    with pytest.raises(ValueError, match="typical_norm is -1"):
        Origin(typical_norm=-1)
    with pytest.raises(ValueError, match="typical_norm must be finite"):
        Origin(typical_norm=float("inf"))


MAKERS: dict[str, Callable[[Any], sf.Intervention]] = {
    "Add": sf.Add,
    "Ablate": sf.Ablate,
    "AffineAblate": lambda v: sf.AffineAblate(v, 1.0),
    "Clamp": lambda v: sf.Clamp(v, low=0.0),
    "Amplify": sf.Amplify,
    "Calibrate": lambda v: sf.Calibrate(v, 1.0),
    "Spherical": lambda v: sf.Spherical(v),
    "When": lambda v: sf.When(sf.Condition(V, 0.1), sf.Add(v)),
    "Flow": lambda v: sf.Flow(sf.Barrier(V[None] / V.norm(), torch.zeros(1), torch.ones(1), origin=v.origin), T=1.0),
    "EditFeatures": lambda v: sf.EditFeatures(sf.Features(V[None], V[None], origin=v.origin), {0: 1.0}),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_intervention_keeps_the_origin_of_what_it_is_made_of(name: str, tmp_path: Path) -> None:
    edit = MAKERS[name](direction())
    assert (edit.origin.place, edit.origin.model) == (("resid_post", 1), "LlamaForCausalLM")
    assert MAKERS[name](sf.Direction(V, "given", 1.0)).origin.place is None
    plan = sf.Plan([edit])
    assert plan.edits.keys() == {("resid_post", 1)}
    (again,) = sf.Plan.load(plan.save(tmp_path / "plan")).edits["resid_post", 1]
    assert again.origin == edit.origin


@pytest.mark.parametrize("name", MAKERS)
def test_an_intervention_at_another_place_warns(name: str) -> None:
    edit = MAKERS[name](direction())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.Plan({1: edit, ("resid_pre", 2): edit})
        sf.Plan({-1: edit})  # which layer that is, the model says
        sf.Plan({3: MAKERS[name](sf.Direction(V, "given", 1.0))})
        if name == "Ablate":  # one direction is removed everywhere, as published
            sf.Plan(dict.fromkeys(range(4), edit))
            sf.Plan({3: sf.When(sf.Condition(V, 0.1), edit, layer=1)})
            return
    with pytest.warns(UserWarning, match="belongs to resid_post 1 and is put at resid_post 3"):
        sf.Plan({3: edit})


def test_origins_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="Spherical: the place is 'resid_post 1' of one and 'resid_post 2' of another"):
        sf.Spherical(direction(), avoid=direction(2))


def test_another_model_is_warned_about_and_another_class_of_it_is_not() -> None:
    model = build("llama")
    with pytest.warns(UserWarning, match="comes from activations of GPT2LMHeadModel; this model is a LlamaForCausalLM"):
        sf.steer(model, {1: sf.Add(direction(model="GPT2LMHeadModel"))}).remove()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        for name in ("LlamaForCausalLM", "LlamaModel", "llama", None):
            with sf.steer(model, {1: sf.Add(direction(model=name))}):
                model(torch.ones(1, 2, dtype=torch.long))
    assert family("LlamaModel") == family("llama")


def test_the_median_of_an_even_number_lies_between_the_two_in_the_middle() -> None:
    rows = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert typical_norm_of(rows) == 252.5
    assert sf.extract.mean_difference(rows[:1], rows[1:]).origin.typical_norm == 252.5
    for count in (1, 4, 5):
        values = torch.arange(count, dtype=torch.float64).square()
        assert median_of(values) == float(values.quantile(0.5))
    assert math.isnan(median_of(torch.tensor([])))


def test_a_fitted_barrier_knows_the_median_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pos, neg = torch.randn(40, 8) + 1, torch.randn(40, 8) - 1
    pos[0] *= 1000  # one massive token
    h = sf.fit_barrier(pos, neg, kind="linear")
    assert h.origin.typical_norm == pytest.approx(torch.cat([pos, neg]).norm(dim=1).quantile(0.5).item())
    assert sf.Barrier.load(h.save(tmp_path / "h")).origin == h.origin
    assert (-h).origin == h.origin
    assert isinstance(h.info, BarrierInfo)


def test_a_barrier_of_release_0_1_says_that_its_norm_is_unknown() -> None:
    old = Path(__file__).parent / "data" / "v0.1" / "barriers" / "linear"
    with pytest.warns(UserWarning, match="mean norm of its activations, where the median is wanted"):
        h = sf.Barrier.load(old)
    assert h.origin == Origin("LlamaForCausalLM", Place("resid_post", 3))


def test_a_changed_copy_keeps_its_origin() -> None:
    for name in ("Add", "Ablate", "Clamp", "Amplify", "Spherical", "Flow"):
        edit = MAKERS[name](direction())
        assert dataclasses.replace(edit, keep_norm=True).origin == edit.origin if hasattr(edit, "keep_norm") else True
    stronger = dataclasses.replace(sf.Add(direction()), strength=3.0)
    assert sf.Plan([stronger]).edits.keys() == {("resid_post", 1)}
    elsewhere = dataclasses.replace(stronger, vector=direction(2))
    assert elsewhere.origin.place == ("resid_post", 2)


def test_one_rule_for_sums_plans_and_models() -> None:
    """A family under two names is one, and the output of a block is the input of the next."""
    one, other = direction(), direction(("resid_pre", 2), "llama")
    assert (one + other).origin.place == ("resid_post", 1)
    assert (one + other).origin.model == "LlamaForCausalLM"
    assert sf.Spherical(one, sf.Direction(-V, "given", 1.0, other.origin)).origin.place == ("resid_post", 1)
    with pytest.raises(ValueError, match="the model is 'LlamaForCausalLM' of one and 'gpt2' of another"):
        one + direction(model="gpt2")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sf.Direction(V, "mine", 1.0, None), "origin is None; expected a steerfast.place.Origin"),
        (lambda: sf.Direction(V, "mine", 1.0, "layer 8"), "origin is 'layer 8'"),
        (lambda: sf.Direction(V, "mine", None), "norm must be a number"),
        (lambda: Origin(7), "model is 7; expected the name of a class"),
        (lambda: Origin(position=[1, 2]), "position must be a whole number"),
    ],
)
def test_what_no_file_could_hold_is_refused_when_it_is_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_a_norm_of_any_kind_is_a_number(tmp_path: Path) -> None:
    for norm in (V.norm(), np.float32(3.0), 3):
        made = sf.Direction(V, "mine", norm)
        assert type(made.norm) is float
        sf.save_directions(tmp_path / "set", {"x": made})
        assert sf.load_directions(tmp_path / "set")["x"].norm == made.norm


def test_a_layer_from_the_end_warns_when_the_model_is_there() -> None:
    model = build("llama")
    with pytest.warns(UserWarning, match="belongs to resid_post 1 and is put at resid_post 2"):
        sf.steer(model, {-1: sf.Add(direction())}).remove()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        with sf.steer(model, {-2: sf.Add(direction()), -1: sf.Ablate(direction())}):
            model(torch.ones(1, 2, dtype=torch.long))
