"""Another default device or dtype of PyTorch: what steering computes stays where the model is, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import build, token_ids
from test_interventions import EXAMPLES
from test_sweeping import Letters

import steerfast as sf

D = 48
PROMPT = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 10_000}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), device="cpu")


V, ROWS, IDS = drawn(D), drawn(5, D), token_ids(2, 6)
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
CHOSEN = torch.tensor([0, 0, 1, 1, 0, 0]).bool()
NONE, ONE = torch.zeros(2), torch.ones(2)


@contextmanager
def elsewhere(default: str | torch.dtype) -> Iterator[None]:
    """Another device, or another dtype, is the default."""
    choose, before = (
        (torch.set_default_device, None) if isinstance(default, str) else (torch.set_default_dtype, torch.float32)
    )
    choose(default)  # type: ignore[arg-type]
    try:
        yield
    finally:
        choose(before)  # type: ignore[arg-type]


DEFAULTS = pytest.mark.parametrize("default", ["meta", torch.float64, torch.bfloat16], ids=str)


def steered(model, plan) -> list[torch.Tensor]:
    """Logits of a padded pass, tokens of generate, logits at another strength; counts."""
    with torch.no_grad(), sf.steer(model, plan) as handle:
        found = [model(IDS, attention_mask=PADDED).logits, model.generate(IDS, attention_mask=PADDED, **PROMPT)]
        handle.strength = 0.5
        found.append(model(IDS, attention_mask=PADDED, use_cache=False).logits)
        found.append(torch.tensor(handle.stats(), device="cpu"))
    return [*found, model(IDS).logits]


def flow() -> sf.Flow:
    return sf.Flow(sf.Barrier(torch.linalg.qr(ROWS[:2].T)[0].T, ONE, NONE), angle=0.3, method="heun", level=0.5)


def gated() -> sf.Intervention:
    return sf.When(sf.Condition(V, 0.05), sf.Add(V), layer=0)


def sae() -> sf.SAE:
    return sf.SAE(ROWS, ROWS, k=2)


def selected() -> sf.Intervention:
    return sf.EditFeatures(sae(), {2: 8.0}, keep_norm=True)


PLANS: dict[str, Callable[[], object]] = {
    **{
        f"{where}": lambda where=where: sf.Plan({1: sf.Ablate(ROWS), ("head_out", 2): sf.Add(V)}, where)
        for where in ("all", "prompt", "generated", "last")
    },
    "indices": lambda: sf.Plan({1: sf.Add(V.numpy(), 2.0)}, [0, -1]),
    "mask": lambda: sf.Plan({1: sf.Add(V, 2.0)}, CHOSEN),
    "rows": lambda: [sf.Plan({1: [sf.Add(V), selected()]}, "last"), None],
    "condition": lambda: {1: gated()},
    "condition of a token": lambda: {1: sf.WhenToken(sf.Condition(V, 0.3, similarity="tanh"), sf.Amplify(ROWS))},
    "flow": lambda: {1: flow()},
    "features": lambda: {1: sf.EditFeatures(sf.Features(ROWS, ROWS), {2: 8.0, 0: 1.0}, mode="max")},
    "selected features": lambda: {1: selected()},
}


@DEFAULTS
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_made_run_and_removed_under_another_default(name: str, default) -> None:
    model = build("llama")
    expected = steered(model, PLANS[name]())
    with elsewhere(default):
        found = steered(model, PLANS[name]())
    for one, other in zip(found, expected, strict=True):
        assert one.device == other.device
        assert torch.equal(one, other)


@DEFAULTS
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_intervention_is_made_under_another_default(name: str, default) -> None:
    edit = EXAMPLES[name][0]
    with elsewhere(default):
        made = type(edit).restore(edit.tensors(), edit.numbers()).slot()
    for one, other in zip(made, edit.slot(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@DEFAULTS
def test_a_prepared_model_under_another_default(default) -> None:
    def run() -> list[torch.Tensor]:
        model = copy.deepcopy(build("llama"))
        sf.prepare(model, room=sf.Room(batch=2, length=16, slots=4, directions=16))
        return steered(model, [sf.Plan({1: sf.Ablate(V)}, "last"), None])

    expected = run()
    with elsewhere(default):
        found = run()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@DEFAULTS
def test_a_saved_plan_and_a_bank_under_another_default(tmp_path: Path, default) -> None:
    plan = sf.Plan({0: selected(), 1: flow(), 2: gated()}, CHOSEN)
    expected = steered(build("llama"), plan)
    with elsewhere(default):
        plan.save(tmp_path / "plan")
        sae().save(tmp_path / "sae")
        found = steered(build("llama"), sf.Plan.load(tmp_path / "plan", tmp_path / "sae"))
        bank = sf.Bank(D, 2)
        bank.replace(bank.register(sf.Add(V)), sf.Ablate(V))
        bank.set_strength(0, 0.5)
        edited = sf.ops.subspace(ROWS, *bank.tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    unit = V / V.norm()
    torch.testing.assert_close(edited, ROWS - 0.5 * (ROWS @ unit)[:, None] * unit)


@pytest.mark.parametrize("name", EXAMPLES)
def test_autocast_rounds_no_edit(name: str) -> None:
    """A kernel knows nothing of autocast, so the other backend must not either."""
    edit, x = EXAMPLES[name][0], drawn(5, 12)

    def run() -> torch.Tensor:
        return (edit.then if isinstance(edit, sf.When) else edit).apply(x)

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(), expected)


def test_autocast_rounds_no_op() -> None:
    unit = torch.nn.functional.normalize(V, dim=0)
    barrier = sf.Barrier(torch.linalg.qr(ROWS[:2].T)[0].T, ONE, NONE)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values, indices = sf.ops.sae_encode(ROWS, ROWS, None, 3)
            found.append(
                [
                    sf.ops.ablate(ROWS, unit),
                    sf.ops.similarity(ROWS, unit, "tanh"),
                    sf.ops.flow(ROWS, barrier.basis, ONE, ONE, T=0.5),
                    sf.ops.sae_decode(values, indices, ROWS),
                    selected().apply(ROWS),
                    barrier(ROWS),
                ]
            )
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


WORDS = ["good", "poor", "fair", "calm", "loud", "warm", "cold", "kind", "dark", "soft", "new"]
PAIRS = [(f"it was {i}", f" {word}", f" {word[::-1]}") for i, word in enumerate(WORDS)]
NEUTRAL = ["the library opens at nine", "he put the keys away", "two lanes lead to town"]
FITS: dict[str, Callable[[], sf.Intervention]] = {
    "velocity": lambda: sf.Flow(
        sf.fit_velocity(build("gpt2"), Letters(), PAIRS, 1, neutral=NEUTRAL, rank=1, draws=1), T=1.0
    ),
    "vector": lambda: sf.fit_vector(build("gpt2"), Letters(), [one[:2] for one in PAIRS], 1, steps=2),
    "reft_r1": lambda: sf.fit_vector(build("gpt2"), Letters(), [one[:2] for one in PAIRS], 1, sf.ReFTr1(), steps=2),
    "reps": lambda: sf.fit_vector(build("gpt2"), Letters(), PAIRS, 1, sf.RePS(), steps=2),
    "loreft": lambda: sf.fit_loreft(build("gpt2"), Letters(), [one[:2] for one in PAIRS], 1, rank=2, steps=2),
}


@DEFAULTS
@pytest.mark.parametrize("name", FITS)
@pytest.mark.filterwarnings("ignore:.*became no likelier")
def test_what_is_trained_is_the_same_under_another_default(name: str, default) -> None:
    """Draws, gradients and nulls stay in float32 where they are."""
    expected = FITS[name]()
    with elsewhere(default):
        found = FITS[name]()
    assert all(torch.equal(one, found.tensors()[key]) for key, one in expected.tensors().items())
    infos = [edit.barrier.info if isinstance(edit, sf.Flow) else edit.info for edit in (expected, found)]
    assert infos[0] == infos[1]


@DEFAULTS
@pytest.mark.parametrize("objective", [sf.sae.TopK(), sf.sae.JumpReLU()], ids=lambda one: type(one).__name__)
def test_an_sae_is_trained_to_the_same_under_another_default(objective, default) -> None:
    rows, config = drawn(2000, 16), sf.sae.TrainConfig(features=32, k=4, tokens=1024, batch=256, objective=objective)
    expected = sf.sae.train_sae(rows, config)
    with elsewhere(default):
        found = sf.sae.train_sae(rows, config)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"):
        one, other = getattr(expected, name), getattr(found, name)
        assert (one is None and other is None) or torch.equal(one, other)
