"""`torch.func` and forward-mode gradients through a steered model give what `torch.autograd.grad` gives."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from families import build, token_ids
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import steerfast as sf

D = 48


def drawn(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V, ROWS, IDS = drawn(D), drawn(5, D), token_ids(2, 6)
PADDED = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
CONDITION = sf.Condition(V, 0.05)
BARRIER = sf.Barrier(torch.linalg.qr(ROWS[:2].T)[0].T, torch.tensor([1.0, -1.0]), torch.ones(2))
PLANS = {
    "all": sf.Plan({1: sf.Add(V, 2.0)}),
    "prompt": sf.Plan({1: [sf.Ablate(V), sf.Add(V, 2.0)]}, "prompt"),
    "indices": sf.Plan({1: sf.Ablate(V)}, [1, 2]),
    "last": sf.Plan(
        {1: sf.Ablate(V, keep_norm=True), ("head_out", 0): sf.Add(V), ("mlp_out", 2): sf.Amplify(V)}, "last"
    ),
    "condition": sf.Plan({1: sf.When(CONDITION, sf.Ablate(V), layer=0)}),
    "condition of a token": sf.Plan({1: [sf.WhenToken(CONDITION, sf.Ablate(V)), sf.Add(V)]}),
    "flow": sf.Plan({1: sf.Flow(BARRIER, angle=0.4)}, [1, 2]),
    "features": sf.Plan({1: sf.EditFeatures(sf.Features(ROWS, ROWS), {2: 8.0})}, [1, 2]),
    "selected features": sf.Plan({1: sf.EditFeatures(sf.SAE(ROWS, ROWS, k=2), {2: 8.0})}, [1, 2]),
}


@cache
def model():
    return copy.deepcopy(build("llama")).double()


def embedded() -> torch.Tensor:
    return model().get_input_embeddings()(IDS).detach()


def loss(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model()(inputs_embeds=x, attention_mask=mask, use_cache=False).logits.square().mean()


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The model takes its norms and its softmax in float32."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("per_row", [False, True], ids=["one plan", "a plan per row"])
@pytest.mark.parametrize("name", PLANS)
def test_every_transform_gives_the_gradient_of_autograd(name: str, per_row: bool) -> None:
    """Whatever is in the plan, with padding, too; the counts go on, and nothing of a transform outlives it."""
    plan, x, along = PLANS[name], embedded(), drawn(2, 6, D, seed=7).double()
    with sf.steer(model(), [plan, None] if per_row else plan) as handle:
        for mask in (None, PADDED):
            leaf = x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(loss(leaf, mask), leaf)
            before = handle.stats()
            near(grad(loss)(x, mask), expected)
            near(vjp(lambda x, mask=mask: loss(x, mask), x)[1](torch.ones((), dtype=x.dtype))[0], expected)
            near(jacrev(loss)(x, mask), expected)
            near(jvp(lambda x, mask=mask: loss(x, mask), (x,), (along,))[1], (expected * along).sum())
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, along)
                tangent = torch.autograd.forward_ad.unpack_dual(loss(dual, mask)).tangent
            near(tangent, (expected * along).sum())
            near(torch.autograd.grad(loss(leaf, mask), leaf)[0], expected)
            every = [7 * count for count in before] if mask is None else None  # the pass before, and six since
            assert every is None or handle.stats() == every
        each = [one for one in handle.decisions()[0] if one is not None]
        assert all(torch.equal(one, one.clone()) for one in each)  # a dead wrapper could not be read


@pytest.mark.parametrize("name", PLANS)
def test_vmap_of_grad_gives_each_example_its_gradient(name: str) -> None:
    """A condition decides for each example by itself."""
    x = embedded()
    with sf.steer(model(), PLANS[name]):
        expected = []
        for one in x:
            leaf = one.clone().requires_grad_()
            expected.append(torch.autograd.grad(loss(leaf[None]), leaf)[0])
        near(vmap(grad(lambda one: loss(one[None])))(x), torch.stack(expected))


def test_each_condition_decides_by_itself_under_vmap() -> None:
    """Two examples, of which the condition holds for one."""
    x = embedded()
    with sf.steer(model(), {1: sf.When(sf.Condition(V, 0.04), sf.Add(V), layer=0)}) as handle:
        loss(x)
        assert handle.decisions()[0][0].tolist() == [False, True]
        together = vmap(lambda one: model()(inputs_embeds=one[None], use_cache=False).logits[0])(x)
        torch.testing.assert_close(together, model()(inputs_embeds=x, use_cache=False).logits)


@pytest.mark.parametrize("name", ["last", "flow", "selected features"])
def test_gradients_of_weights_and_second_gradients(name: str) -> None:
    x = embedded()
    with sf.steer(model(), [PLANS[name], None]):
        weight = {key: value.detach() for key, value in model().named_parameters() if key.endswith("down_proj.weight")}

        def of_weight(weight):
            return functional_call(model(), weight, (IDS,), {"use_cache": False}).logits.square().mean()

        found = grad(of_weight)(weight)
        expected = torch.autograd.grad(
            model()(IDS, use_cache=False).logits.square().mean(), [model().get_parameter(key) for key in weight]
        )
        for key, one in zip(weight, expected, strict=True):
            near(found[key], one)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * x).sum(), leaf)
        near(grad(lambda y: (grad(loss)(y) * x).sum())(x), second)


def test_a_mask_that_is_mapped_over_is_refused() -> None:
    with sf.steer(model(), PLANS["last"]):
        with pytest.raises(ValueError, match=r"steer: torch\.vmap maps over the attention mask"):
            vmap(lambda one, mask: loss(one[None], mask[None]))(embedded(), PADDED)
        model()(IDS)


def test_second_gradients_of_ops_that_are_registered() -> None:
    """A gradient that is differentiated itself: what lies behind `create_graph=True`."""
    x = drawn(3, 6).double().requires_grad_()
    weights = drawn(5, 6, seed=6).double()
    table = torch.tensor([[2.0, 0.0, -9.0, 9.0], [0.0, 3.0, -9.0, 9.0]])
    chosen = torch.tensor([1, 2], dtype=torch.int32)

    def edited(x: torch.Tensor) -> torch.Tensor:
        values, indices = sf.ops.sae_encode(x, weights, None, 3)
        return sf.ops.sae_edit(x**2, values**2, indices, chosen, table, weights[1:3] ** 2).square().sum()

    def added(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.steerfast.add(x**2, x**3, None, None).square().sum()

    assert torch.autograd.gradgradcheck(edited, (x,))
    assert torch.autograd.gradgradcheck(added, (x,))
