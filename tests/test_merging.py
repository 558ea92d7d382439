"""Plans that are made of vectors, and plans that become one."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, build

import steerfast as sf
from steerfast.plan import ModelCard

D = 48
V, U = torch.linspace(-1, 1, D), torch.linspace(2, -1, D)
IDS = torch.arange(3, 15).view(2, 6) % VOCAB


def logits(model: Any, plan: Any, **how: Any) -> torch.Tensor:
    with torch.no_grad(), sf.steer(model, plan, **how):
        return model(IDS).logits


@pytest.mark.parametrize("vector", [V, V.numpy(), sf.Direction(V, "given", 1.0)], ids=["tensor", "array", "direction"])
def test_a_vector_in_a_plan_is_added_at_strength_1(vector: Any) -> None:
    model = build("llama")
    assert torch.equal(logits(model, {1: vector}), logits(model, {1: sf.Add(V)}))
    assert torch.equal(logits(model, {1: [vector, sf.Ablate(U)]}), logits(model, {1: [sf.Add(V), sf.Ablate(U)]}))


@pytest.mark.parametrize("wrong", ["love", 1.5, None, [], object()])
def test_what_is_no_vector_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="at 1 expected an intervention, a vector to add, or a non-empty list of them"):
        sf.Plan({1: wrong})


def test_merged_plans_act_in_their_order() -> None:
    model = build("llama")
    one, two = sf.Plan({1: sf.Add(V), 0: sf.Add(U)}), sf.Plan({1: sf.Ablate(V)}, model=model)
    both = one | two
    assert both.edits == {("resid_post", 1): (*one.edits["resid_post", 1], *two.edits["resid_post", 1]),
        ("resid_post", 0): one.edits["resid_post", 0]
    }  # fmt: skip
    assert both.model == two.model
    assert torch.equal(logits(model, both), logits(model, {1: [sf.Add(V), sf.Ablate(V)], 0: sf.Add(U)}))
    assert not torch.equal(logits(model, both), logits(model, two | one))
    assert torch.equal(logits(model, one.merge(two, {2: V})), logits(model, one | two | {2: V}))


def test_what_stands_at_one_layer_under_two_names_acts_in_the_order_of_the_plans() -> None:
    """2 and -1 are one layer of three: the third plan's edit joined the first one's, in front of the second's."""
    model = build("llama")
    chain = [sf.Add(V, 3.0), sf.Ablate(V + U), sf.Add(U)]
    first, second, third = (sf.Plan({layer: edit}) for layer, edit in zip((2, -1, 2), chain, strict=True))
    expected = logits(model, {2: chain})
    assert torch.equal(logits(model, sf.Plan(first.edits, model=model) | second | third), expected)
    assert torch.equal(logits(model, first | second | {-1: chain[2]}), expected)
    with pytest.raises(ValueError, match=r"resid_post 2 and resid_post -1 may be one layer"):
        first.merge(second, third)
    apart = sf.Plan(first.edits, model=ModelCard("other", D, 12)).merge(second, third)
    assert list(map(len, apart.edits.values())) == [2, 1]


def test_plans_that_differ_are_not_merged() -> None:
    plan, mask = sf.Plan({1: sf.Add(V)}), torch.tensor([True, False])
    with pytest.raises(
        ValueError, match=r"Plan\.merge: the plans have different positions, 'all' and 'last'; steer with"
    ):
        plan | sf.Plan({1: sf.Add(V)}, positions="last")
    masked = [sf.Plan({1: sf.Add(V)}, positions=m) for m in (mask, mask.clone(), ~mask)]
    assert torch.equal(masked[0].merge(masked[1]).positions, mask)
    with pytest.raises(ValueError, match="different positions"):
        masked[0].merge(masked[2])
    cards = [sf.Plan({1: sf.Add(V)}, model=ModelCard(name, D, 3)) for name in ("A", "B")]
    with pytest.raises(ValueError, match="different models"):
        cards[0].merge(cards[1])
    assert ({2: V} | plan).edits.keys() == {("resid_post", 2), ("resid_post", 1)}
    with pytest.raises(TypeError):
        plan | 3  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"Plan\.merge: expected a Plan or a dict"):
        plan.merge(3)  # type: ignore[arg-type]


def test_no_strength_is_no_reason_to_warn() -> None:
    model = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, {1: sf.Add(V)}, strength=0.0)
        logits(model, [{1: sf.Add(V)}, None], strength=[0.0, 0.0])
    with pytest.warns(RuntimeWarning, match="no token was edited"), sf.steer(model, {1: sf.Add(V)}):
        pass


def test_plans_per_row_of_another_batch() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="3 plans were given for a batch of 2 prompts; give one per row"):
        logits(model, [{1: sf.Add(V)}, None, None])


def test_plans_per_row_inside_of_another_steering_are_for_the_next_batch() -> None:
    """What ran last may have had other rows; a text that goes on with the wrong number is refused."""
    model = build("llama")
    one, two = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    outer, inner = {0: sf.Add(V)}, {1: sf.Add(V, 2.0)}
    both = {0: sf.Add(V), 1: sf.Add(V, 2.0)}
    with torch.no_grad():
        with sf.steer(model, [both, outer]):
            expected = model(two).logits
        with sf.steer(model, outer):
            before = model(one).logits
            with sf.steer(model, [inner, None]):
                found = model(two).logits
            with sf.steer(model, [inner]):
                alone = model(one).logits
            assert torch.equal(model(one).logits, before)
            cache = model(one, use_cache=True).past_key_values
            with (
                sf.steer(model, [inner, None]),
                pytest.raises(ValueError, match="2 plans were given for a batch of 1 prompts"),
            ):
                model(one[:, :1], past_key_values=cache)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, expected[:1], atol=1e-5, rtol=1e-5)


def test_paths_are_named() -> None:
    h = sf.Barrier.linear(V)
    with pytest.raises(TypeError, match="positional"):
        sf.Flow(h, 0.4)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        sf.flow(V[None], h, 0.4)  # type: ignore[misc]


@pytest.mark.parametrize("k", [3, None])
def test_an_sae_under_the_names_of_its_field(k: int | None) -> None:
    torch.manual_seed(0)
    sae, x = sf.SAE(torch.randn(20, 6), torch.randn(20, 6), b_dec=torch.randn(6), k=k), torch.randn(4, 6)
    assert sae.W_enc is sae.w_enc
    assert sae.W_dec is sae.w_dec
    with pytest.raises(AttributeError):
        sae.W_enc = sae.W_dec  # type: ignore[misc]
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)))
    torch.testing.assert_close(sae(x), sae.decode_topk(*sae.topk(x)))


def test_names_one_level_down() -> None:
    assert dir(sf.sae) == sorted(sf.sae.__all__)
    assert dir(sf.tools) == sorted(sf.tools.__all__)
    for room in (sf.sae, sf.tools):
        assert all(callable(getattr(room, name)) for name in room.__all__)
        with pytest.raises(AttributeError, match=f"module '{room.__name__}' has no attribute 'nothing'"):
            room.nothing  # noqa: B018


def test_a_set_of_directions_steers_as_it_is() -> None:
    model, directions = build("llama"), sf.DirectionSet({1: sf.Direction(V, "given", 1.0)})
    assert torch.equal(logits(model, directions), logits(model, {1: sf.Add(V)}))
    with pytest.raises(TypeError, match=r"got Add; one that knows its place goes into sf\.Plan"):
        sf.steer(model, [sf.Add(V)])
    with pytest.raises(TypeError, match=r"wrap a vector in sf\.Add"):
        sf.Plan([V])


def test_arrays_of_any_strides_and_byte_order() -> None:
    backwards = V.numpy()[::-1]
    for array in (backwards, backwards.astype(">f4"), np.asfortranarray(backwards)):
        assert torch.equal(sf.Add(array).tensors()["vector"], V.flip(0))


def test_a_plan_says_no_path(tmp_path: Any) -> None:
    model = build("llama")
    model.config.name_or_path = str(tmp_path)
    made = sf.Plan({1: V}, model=model).model
    assert made is not None
    assert made.name == f"LlamaForCausalLM:{tmp_path.name}"
    model.config.name_or_path = ""
