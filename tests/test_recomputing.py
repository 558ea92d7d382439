"""Gradient checkpointing: a steered pass that runs again in the backward pass has the gradient of one that does not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from families import build, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

import steerfast as sf

D = 48
IDS = token_ids(2, 6)
SHORT = token_ids(2, 5, seed=1)
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")


def drawn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


V = drawn(D)
CONDITION = sf.Condition(V, 0.05)


def trained(name: str = "llama") -> nn.Module:
    return copy.deepcopy(build(name)).train()


def checkpointed(name: str = "llama", reentrant: bool = False) -> nn.Module:
    model = trained(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def loss(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, labels=ids, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, one in found.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].abs().max()) + 1e-9)


# --- when the backward pass comes -------------------------------------------------------------------------------------

Plans = Callable[[], object]


def while_steered(model: nn.Module, plans: Plans) -> None:
    with sf.steer(model, plans()):
        loss(model).backward()


def after_removal(model: nn.Module, plans: Plans) -> None:
    """What a Trainer does that steers in compute_loss."""
    with sf.steer(model, plans()):
        found = loss(model)
    found.backward()


def two_forwards(model: nn.Module, plans: Plans) -> None:
    """Prompts of two lengths."""
    with sf.steer(model, plans()):
        (loss(model) + loss(model, SHORT)).backward()


def another_strength(model: nn.Module, plans: Plans) -> None:
    with sf.steer(model, plans()) as handle:
        first = loss(model)
        handle.strength = -1.0
        (first + loss(model)).backward()


def steered_and_not(model: nn.Module, plans: Plans) -> None:
    with sf.steer(model, plans()):
        first = loss(model)
    (first + loss(model)).backward()


def steered_afterwards(model: nn.Module, plans: Plans) -> None:
    """The pass came first: it is not steered."""
    first = loss(model)
    with sf.steer(model, plans()):
        first.backward()
        model(IDS)


def another_plan(model: nn.Module, plans: Plans) -> None:
    """The slots of the first plan have gone to a second one when the first pass runs again."""
    with sf.steer(model, plans()):
        first = loss(model)
    with sf.steer(model, {1: sf.Add(V, 9.0), ("attn_out", 1): sf.Ablate(drawn(D, seed=4))}):
        (first + loss(model)).backward()


def two_backwards(model: nn.Module, plans: Plans) -> None:
    with sf.steer(model, plans()):
        first = loss(model)
        first.backward(retain_graph=True)
    first.backward()


FORMS = (
    while_steered,
    after_removal,
    two_forwards,
    another_strength,
    steered_and_not,
    steered_afterwards,
    another_plan,
    two_backwards,
)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("site", SITES)
def test_the_gradient_is_that_without_checkpointing(site: str, form: Callable, reentrant: bool) -> None:
    chain = [sf.Ablate(V), sf.Add(V, 2.0)]
    plain, again = trained(), checkpointed(reentrant=reentrant)
    for plans in (
        lambda: {(site, 1): chain},
        lambda: [sf.Plan({(site, 1): chain}, [1, 2]), None],
    ):
        for model in (plain, again):
            form(model, plans)
        assert_same(gradients(again), gradients(plain))
    for module in again.modules():
        assert type(vars(module).get("_gradient_checkpointing_func")).__module__ != "steerfast.hooks.recomputing"
        assert not [hook for hook in module._forward_hooks.values() if "steerfast" in getattr(hook, "__module__", "")]


EDITS = {
    "flow": lambda: sf.Flow(sf.Barrier(torch.eye(D)[:2], torch.tensor([1.0, -1.0]), torch.ones(2)), angle=0.4),
    "condition": lambda: sf.When(CONDITION, sf.Ablate(V), layer=0),
    "condition of a token": lambda: sf.WhenToken(CONDITION, sf.Ablate(V)),
    "selected features": lambda: sf.EditFeatures(sf.SAE(drawn(5, D), drawn(5, D), k=2), {2: 8.0}),
}


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name", EDITS)
def test_other_edits_have_the_gradient_without_checkpointing(name: str, reentrant: bool) -> None:
    for form in (after_removal, two_forwards):
        found = []
        for model in (checkpointed(reentrant=reentrant), trained()):
            form(model, lambda: sf.Plan({("attn_out", 1): EDITS[name](), 2: EDITS[name]()}, "last"))
            found.append(gradients(model))
        assert_same(*found)


@pytest.mark.parametrize("family", ["gpt2", "falcon_parallel", "bloom", "gemma3"])
def test_other_families(family: str) -> None:
    found = []
    for model in (checkpointed(family), trained(family)):
        torch.manual_seed(0)  # dropout
        after_removal(model, lambda: {("attn_out", 1): sf.Ablate(V), ("mlp_out", 0): sf.Amplify(V), 2: sf.Add(V)})
        found.append(gradients(model))
    assert_same(*found)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_a_trained_vector_has_the_gradient_without_checkpointing(reentrant: bool) -> None:
    found = []
    for model in (checkpointed(reentrant=reentrant), trained()):
        v = V.clone().requires_grad_()
        after_removal(model, lambda v=v: {("attn_out", 1): sf.Add(v), ("mlp_out", 0): sf.Ablate(v)})
        found.append({"v": v.grad})
    assert_same(*found)


def test_tokens_are_counted_once_and_hooks_of_others_stay_in_order() -> None:
    model, seen = checkpointed(), []
    with sf.steer(model, {("attn_out", 1): sf.Add(V, 5.0)}) as handle:
        module = model.model.layers[1].self_attn
        watch = module.register_forward_hook(lambda module, args, output: seen.append(output[0].detach().clone()))
        found = loss(model)
        counted = handle.stats()
    found.backward()
    watch.remove()
    assert counted == [IDS.numel()]
    assert len(seen) == 2
    assert torch.equal(*seen)  # the steered output, both times


def test_a_trainer_that_steers_in_compute_loss(tmp_path: Path) -> None:
    """One step of SGD, with and without checkpointing."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Steering(transformers.Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            with sf.steer(model, sf.Plan({("attn_out", 1): sf.Ablate(V), ("head_out", 0): sf.Add(V)}, "last")):
                return super().compute_loss(model, inputs, **kwargs)

    found = []
    for use in (True, False):
        model = trained()
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=1,
            learning_rate=0.5,
            optim="sgd",
            max_grad_norm=0,
            gradient_checkpointing=use,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(4, 6)]
        Steering(model, arguments, train_dataset=rows).train()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    before = dict(trained().named_parameters())
    assert any(not torch.equal(one, before[name]) for name, one in found[0].items())
    assert_same(*({name: one - before[name].detach() for name, one in part.items()} for part in found))


# --- what cannot be followed ------------------------------------------------------------------------------------------


def by_itself(module: nn.Module, reentrant: bool) -> None:
    """Let a module checkpoint what it runs, its tensors in front."""
    forward = type(module).forward.__get__(module)

    def run(*args, **kwargs):
        args = args or (kwargs.pop("hidden_states"),)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)

    module.forward = run


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointing_by_others_is_refused_in_the_forward_pass(reentrant: bool) -> None:
    model = trained()
    model.enable_input_require_grads()
    layer = model.model.layers[1]
    inner = layer.mlp
    with sf.steer(model, {("mlp_out", 1): sf.Add(V)}):
        by_itself(inner, reentrant)  # the hook is outside
        loss(model).backward()
    with sf.steer(model, {("head_out", 1): sf.Add(V)}):
        by_itself(layer.self_attn, reentrant)
        with pytest.raises(RuntimeError, match=r"steer: model.layers.1.self_attn.o_proj is recomputed in the backward"):
            loss(model)
        with torch.no_grad():
            model(IDS)  # nothing is recomputed without gradients


def test_checkpointing_of_the_whole_model_is_refused() -> None:
    model = trained()
    with sf.steer(model, {1: sf.Add(V)}):
        with pytest.raises(RuntimeError, match="is recomputed in the backward pass"):
            checkpoint(loss, model, use_reentrant=False)
        outside = torch.zeros((), requires_grad=True)
        whole = checkpoint(lambda zero: loss(model) + zero, outside, use_reentrant=True)
        with pytest.raises(RuntimeError, match="is recomputed in the backward pass"):
            whole.backward()
        loss(model).backward()


def test_a_prepared_model_that_checkpoints_is_refused() -> None:
    model = checkpointed()
    sf.prepare(model, layers=[1], site="attn_out", room=sf.Room(batch=2, length=8))
    handle = sf.steer(model, {("attn_out", 1): sf.Add(V)})
    with handle, pytest.raises(RuntimeError, match="a prepared model that trains with gradient checkpointing"):
        loss(model)


def test_a_compiled_model_that_checkpoints_is_refused() -> None:
    """Its forward pass was not steered inside the checkpointed blocks, without a word."""
    model = checkpointed()
    sf.prepare(model, layers=[1], site="attn_out", room=sf.Room(batch=2, length=8))
    plain = trained()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    with sf.steer(model, {("attn_out", 1): sf.Add(V)}), sf.steer(plain, {("attn_out", 1): sf.Add(V)}):
        with pytest.raises(RuntimeError, match="a prepared model that trains with gradient checkpointing"):
            loss(model)
        model.gradient_checkpointing_disable()
        torch.testing.assert_close(loss(model), loss(plain))


def test_nothing_keeps_a_model_alive() -> None:
    model = checkpointed()
    with sf.steer(model, {("attn_out", 1): sf.Add(V)}):
        found = loss(model)
    found.backward()
    gone = weakref.ref(model)
    del model, found
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("positions", ["all", [1]])
def test_a_trace_is_refused_by_name(positions) -> None:
    model = copy.deepcopy(build("llama"))

    class Logits(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return model(ids, use_cache=False).logits

    with sf.steer(model, sf.Plan({1: sf.Add(V)}, positions)):
        with pytest.raises(RuntimeError, match=r"steer: torch\.jit\.trace .* would freeze this pass's plan"):
            torch.jit.trace(Logits(), (IDS,))
        model(IDS)


class Again(torch.autograd.Function):
    """Checkpointing as a library of its own would do it."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


def test_checkpointing_by_a_stranger_is_refused_where_it_repeats() -> None:
    """Of two passes, nobody knows which one is repeated."""
    model = trained()
    model.enable_input_require_grads()
    attention = model.model.layers[1].self_attn
    plain = type(attention).forward.__get__(attention)
    attention.forward = lambda hidden_states, **kwargs: (
        Again.apply(lambda x: plain(x, **kwargs)[0], hidden_states),
        None,
    )
    with sf.steer(model, {("head_out", 1): sf.Add(V)}):
        found = loss(model)
        with pytest.raises(RuntimeError, match=r"o_proj runs again in a backward pass"):
            found.backward()
