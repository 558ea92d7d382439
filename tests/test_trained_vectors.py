"""A vector that requires a gradient: one reaches it through the hook, or an error names it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from families import build, token_ids
from test_interventions import EXAMPLES
from torch import Tensor

import steerfast as sf
from steerfast.models.layers import find_layers

D = 48
IDS = token_ids(2, 6)
LAYER = 1


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int = 5) -> Tensor:
    return drawn(*shape, seed=seed).requires_grad_()


def orthonormal_rows() -> Tensor:
    return torch.linalg.qr(drawn(D, 2, seed=9))[0].T.contiguous()


def ablated(x: Tensor, v: Tensor) -> Tensor:
    return x - x @ torch.linalg.pinv(v) @ v


def reft(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    r = orthonormal_rows()
    return x + (x @ w.T + b - x @ r.T) @ r


# (the intervention made from its live tensors, the formula, the tensors)
Case = tuple[Callable[..., sf.Intervention], Callable[..., Tensor], list[Tensor]]
CASES: dict[str, Callable[[], Case]] = {
    "Add": lambda: (partial(sf.Add, strength=2.0), lambda x, v: x + 2.0 * v, [leaf(D)]),
    "Add, float64": lambda: (sf.Add, lambda x, v: x + v.float(), [leaf(D).detach().double().requires_grad_()]),
    "Add, length kept": lambda: (
        partial(sf.Add, keep_norm=True),
        lambda x, v: (x + v) * (x.norm(dim=-1, keepdim=True) / (x + v).norm(dim=-1, keepdim=True)),
        [leaf(D)],
    ),
    "Add from zero": lambda: (sf.Add, lambda x, v: x + v, [torch.zeros(D, requires_grad=True)]),
    "Ablate": lambda: (sf.Ablate, lambda x, v: ablated(x, v[None]), [leaf(D)]),
    "Ablate, three": lambda: (sf.Ablate, ablated, [leaf(3, D)]),
    "Amplify": lambda: (
        partial(sf.Amplify, alpha=0.5),
        lambda x, s: x + 0.5 * torch.relu(x @ s.T) @ s,
        [leaf(3, D)],
    ),
    "Calibrate": lambda: (
        partial(sf.Calibrate, beta=2.0),
        lambda x, s: x - torch.relu(x @ s.T) @ s + 2.0 * s.mean(0),
        [leaf(3, D)],
    ),
    "Affine": lambda: (sf.Affine, lambda x, w, b: w * x + b, [leaf(D), leaf(D, seed=6)]),
    "Affine from the identity": lambda: (
        sf.Affine,
        lambda x, w, b: w * x + b,
        [torch.ones(D, requires_grad=True), torch.zeros(D, requires_grad=True)],
    ),
    "Affine, a bias": lambda: (partial(sf.Affine, 0.5), lambda x, b: 0.5 * x + b, [leaf(D)]),
    "LoReFT": lambda: (
        lambda w, b: sf.LoReFT(orthonormal_rows(), w, b),
        reft,
        [leaf(2, D), leaf(2, seed=6)],
    ),
    "LoReFT, a weight": lambda: (
        lambda w: sf.LoReFT(orthonormal_rows(), w),
        lambda x, w: reft(x, w, torch.zeros(2)),
        [leaf(2, D)],
    ),
}
TRAINED = {name.partition(",")[0].partition(" ")[0] for name in CASES}


def gradients(model, tensors: list[Tensor], run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = run()
    return loss.detach(), list(torch.autograd.grad(loss, tensors))


def hooked(model, formula: Callable[[Tensor], Tensor], mask: Tensor) -> Callable[[], Tensor]:
    """The loss with a plain hook in place of steerfast."""

    def hook(module, args, output):
        return torch.where(mask[..., None], formula(output), output)

    def run() -> Tensor:
        handle = find_layers(model).blocks[LAYER].register_forward_hook(hook)
        try:
            return model(IDS, labels=IDS).loss
        finally:
            handle.remove()

    return run


def near(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_a_plain_hook(name: str) -> None:
    """One plan for all tokens, indices, a plan per row, and a condition that holds."""
    model = build("llama")
    make, formula, tensors = CASES[name]()
    every, some = torch.ones(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    some[:, [1, -1]] = True
    first = every.clone()
    first[1] = False
    always = sf.Condition(drawn(D), 0.0)
    for plan, mask in (
        ({LAYER: make(*tensors)}, every),
        (sf.Plan({LAYER: make(*tensors)}, [1, -1]), some),
        ([{LAYER: make(*tensors)}, None], first),
        ({LAYER: sf.WhenToken(always, make(*tensors))}, every),
        ([{LAYER: [sf.Add(drawn(D, seed=8)), make(*tensors)]}, {LAYER: [sf.Add(drawn(D, seed=8))]}], None),
    ):
        if mask is None:  # beside an edit that has a slot
            expected = gradients(
                model,
                tensors,
                hooked(
                    model,
                    lambda x: torch.where(
                        first[..., None],
                        formula(x + drawn(D, seed=8), *tensors),
                        x + drawn(D, seed=8),
                    ),
                    every,
                ),
            )
        else:
            expected = gradients(model, tensors, hooked(model, lambda x: formula(x, *tensors), mask))
        with sf.steer(model, plan):
            found = gradients(model, tensors, lambda: model(IDS, labels=IDS).loss)
        torch.testing.assert_close(found[0], expected[0])
        near(found[1], expected[1])


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_step_is_seen_by_the_next_pass(name: str) -> None:
    """Steered once, trained inside: the loss falls, and equals what an intervention of copies gives."""
    model = build("llama")
    make, _, tensors = CASES[name]()
    optimizer = torch.optim.Adam(tensors, lr=0.05)
    losses = []
    with sf.steer(model, {LAYER: make(*tensors)}) as handle:
        for _ in range(6):
            loss = model(IDS, labels=IDS).loss
            optimizer.zero_grad()
            loss.backward(inputs=tensors)
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            live = model(IDS).logits
        assert handle.stats() == [7 * IDS.numel()]
    assert losses[-1] < losses[0] - 0.01
    with torch.no_grad(), sf.steer(model, {LAYER: make(*(tensor.detach() for tensor in tensors))}):
        torch.testing.assert_close(model(IDS).logits, live, rtol=1e-4, atol=1e-4)


def test_a_vector_that_is_computed_passes_the_gradient_on() -> None:
    """A non-leaf, such as the output of a net."""
    model, net, seed = build("llama"), torch.nn.Linear(4, D), drawn(4)
    with sf.steer(model, {LAYER: sf.Add(net(seed))}):
        model(IDS, labels=IDS).loss.backward(inputs=[net.weight])
    expected = gradients(model, [net.weight], hooked(model, lambda x: x + net(seed), torch.ones(2, 6).bool()))
    near([net.weight.grad], expected[1])


def test_the_gradient_of_torch_func_reaches_a_vector() -> None:
    model, v = build("llama"), drawn(D)

    def loss(v: Tensor) -> Tensor:
        with sf.steer(model, {LAYER: sf.Add(v)}):
            return model(IDS, labels=IDS, use_cache=False).loss

    near([torch.func.grad(loss)(v)], [torch.autograd.grad(loss(x := v.clone().requires_grad_()), x)[0]])


def test_generate_reads_the_live_vector() -> None:
    model, v = build("llama"), leaf(D)
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 10_000}
    with sf.steer(model, sf.Plan({LAYER: sf.Add(v, 4.0)}, "last")):
        live = model.generate(IDS, **settings)
    with sf.steer(model, sf.Plan({LAYER: sf.Add(v.detach(), 4.0)}, "last")):
        assert torch.equal(model.generate(IDS, **settings), live)


# --- where no gradient can reach --------------------------------------------------------------------------------------


def test_where_copies_are_kept_an_error_names_the_vector(tmp_path: Path) -> None:
    live = sf.Add(leaf(D))
    model = copy.deepcopy(build("llama"))
    refusals: list[Callable[[], object]] = [
        lambda: sf.Plan({LAYER: live}).save(tmp_path),
        lambda: sf.Plan({LAYER: sf.When(sf.Condition(drawn(D), 0.1), live)}).save(tmp_path),
        lambda: sf.Bank(D, 2).register(live),
        lambda: sf.bake(model, {LAYER: live}),
    ]
    for refusal in refusals:
        with pytest.raises(ValueError, match=r"vector of .* requires a gradient.*vector\.detach\(\)"):
            refusal()
    sf.prepare(model, layers=[LAYER], room=sf.Room(batch=2, length=8, slots=2, directions=4))
    with pytest.raises(ValueError, match=r"a prepared model: vector of Add.* requires a gradient"):
        sf.steer(model, {LAYER: live})
    with sf.steer(model, {LAYER: sf.Add(drawn(D))}):  # nothing is left of the refused one
        model(IDS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_tensor_of_every_intervention_takes_a_gradient_or_is_refused_by_name(name: str) -> None:
    edit = EXAMPLES[name][0]
    tensors, numbers = edit.tensors(), edit.numbers()
    for key in tensors:
        given = {**tensors, key: tensors[key].clone().requires_grad_()}
        inner = getattr(edit, "then", edit)
        if type(inner).__name__ in TRAINED and key not in ("R", "probe.direction"):
            assert type(edit).restore(given, numbers).trained == (key,)
        else:
            with pytest.raises(TypeError, match=r"requires a gradient.*detach\(\)"):
                type(edit).restore(given, numbers)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: sf.Add(drawn(D), c),
        lambda c: sf.Amplify(drawn(D), c),
        lambda c: sf.Rotate(orthonormal_rows(), c),
        lambda c: sf.steer(build("llama"), {LAYER: sf.Add(drawn(D))}, strength=c),
        lambda c: sf.EditFeatures(sf.Features(drawn(3, D), drawn(3, D)), {1: c}),
        lambda c: sf.ops.amplify(drawn(1, D), drawn(D), c),
        lambda c: sf.Direction(leaf(D), "mean difference", 1.0, None),
    ],
)
def test_a_number_that_requires_a_gradient_is_refused(make: Callable[[Tensor], object]) -> None:
    with pytest.raises(TypeError, match=r"requires a gradient.*detach\(\)"):
        make(torch.tensor(2.0, requires_grad=True))
