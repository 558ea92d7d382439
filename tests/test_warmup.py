"""warmup launches what traffic will: keys of compiled kernels are compared, without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from families import build, token_ids

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from test_specialisation import LAUNCHES, decoded, encoded, encoded_above, keys_of

import steerfast as sf
from steerfast.ops import backends

D = 48


@pytest.fixture
def on_kernels(monkeypatch):
    """CPU tensors take the kernels, whose launches are then recorded; their modules are imported before the variable is set."""
    for name in (
        "add",
        "sae_decode",
        "sae_edit",
        "sae_edit_topk",
        "sae_encode",
        "sae_encode_threshold",
        "similarity",
        "subspace",
    ):
        backends.kernels(name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "_chosen", "triton")
    backends.interpreted.cache_clear()
    yield
    backends.interpreted.cache_clear()


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(D, generator=torch.Generator().manual_seed(seed))


def features(count: int) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(9))


def dictionary() -> sf.SAE:
    weight = torch.nn.functional.normalize(features(64), dim=1)
    return sf.SAE(weight, weight, torch.zeros(64), torch.zeros(D), k=4)


PLANS = {
    "add": lambda: {1: sf.Add(vector(), 2.0)},
    "two methods": lambda: {0: [sf.Ablate(vector()), sf.Add(vector(1))], 2: sf.Amplify(features(3), 0.5)},
    "tiles and lengths": lambda: {1: sf.Amplify(features(20), 0.5, keep_norm=True), 2: sf.Add(vector())},
    "generated": lambda: sf.Plan({1: [sf.Add(vector()), sf.Ablate(vector(1))]}, positions="generated"),
    "a condition": lambda: {2: sf.WhenToken(sf.Condition(vector(), 0.0), sf.Add(vector(1)), layer=1)},
    "features": lambda: {1: [sf.EditFeatures(dictionary(), {3: 8.0}), sf.Add(vector())]},
    "five in a row": lambda: {1: [sf.Add(vector(i)) for i in range(5)]},
}


def traffic(model: torch.nn.Module) -> None:
    """One token, a prompt, an odd one, a batch of many: 1, 16, 34 and 1152 tokens a pass."""
    with torch.no_grad():
        for rows, tokens in ((1, 1), (1, 16), (2, 17), (9, 128)):
            model(token_ids(rows, tokens, 0), use_cache=False)


@pytest.mark.parametrize("name", PLANS)
def test_traffic_launches_what_was_warm(name, on_kernels):
    model, plan = build("llama"), PLANS[name]()
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()]
    warm = keys_of([lambda: sf.warmup(model, plan)])
    assert hooks == [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules()]
    assert not sf.active(model)
    with sf.steer(model, plan, prompt_length=1):
        met = keys_of([lambda: traffic(model)])
        again = keys_of([lambda: sf.warmup(model)])
    assert met
    for found in (warm, again):
        assert all(keys <= found.get(kernel, set()) for kernel, keys in met.items()), met.keys() - found.keys()


def test_a_prepared_model_needs_one_warmup_for_all_plans(on_kernels):
    model = build("llama")
    sf.prepare(model, room=sf.Room(batch=9, length=128, rank=20))
    try:
        warm = keys_of([lambda: sf.warmup(model)])
        for plan in ({1: sf.Add(vector(), 2.0)}, {0: [sf.Ablate(vector()), sf.Add(vector(1))]}):
            with sf.steer(model, plan):
                met = keys_of([lambda: traffic(model)])
            assert met
            assert all(keys <= warm.get(kernel, set()) for kernel, keys in met.items())
    finally:
        sf.unprepare(model)


@pytest.mark.parametrize("name", [*LAUNCHES, "encode", "threshold", "decode"])
def test_the_sizes_of_a_warmup_meet_every_choice_that_launchers_make(name):
    others = {"encode": encoded, "threshold": encoded_above, "decode": decoded}
    launch = others[name] if name in others else lambda n: LAUNCHES[name](n, "own")
    sizes = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 2048, 2112, 2113]
    sizes += [3000, 4224, 4225, 8191, 8448, 8449, 9000]
    warm = keys_of([lambda n=n: launch(n) for n in backends.STEP_SIZES])
    assert warm.keys() == keys_of([lambda n=n: launch(n) for n in sizes]).keys()


def test_a_cpu_has_nothing_to_compile():
    model = build("llama")
    assert keys_of([lambda: sf.warmup(model, PLANS["two methods"]())]) == {}
    with pytest.raises(ValueError, match="width"):
        sf.warmup(model, {1: sf.Add(torch.ones(7))})
    with pytest.raises(RuntimeError, match="nothing steers this model"):
        sf.warmup(model)
