"""What the vLLM tests share: a folder of plans of every kind, and what transformers computes with them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steerfast as sf
from steerfast.sae.growing import contexts_of

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# A small engine on a busy machine: one thread, one gigabyte, as little text as possible.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
# A CPU engine never takes up the function that it saved when it compiled. Without one a compiled model starts in half the
# time, and Inductor keeps its graph. The engine of `test_vllm_v1.py` starts as vLLM does by itself.
NO_SAVED_FUNCTION = {"VLLM_USE_AOT_COMPILE": "0"}
PROMPT = "I hate you because"
WIDTH, LAYERS = 576, 30


def unit(seed: int, d: int = WIDTH) -> torch.Tensor:
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def plans(love: torch.Tensor) -> dict[str, sf.Plan]:
    """One plan of every kind, all strong enough to change the text."""
    features = sf.Features(torch.stack([unit(i) for i in range(3)]), torch.stack([unit(i + 9) for i in range(3)]))
    barrier = sf.Barrier(torch.stack([love / love.norm()]), torch.zeros(1), torch.ones(1), 0.0)
    return {
        "love": sf.Plan({8: sf.Add(love, 2.0)}),
        "ablate": sf.Plan({layer: sf.Ablate(love) for layer in range(LAYERS)}),
        "norm": sf.Plan({8: sf.Add(love, 6.0, keep_norm=True), -1: sf.Add(unit(1), 9.0)}),
        "sites": sf.Plan(
            {
                ("resid_pre", 0): sf.Add(unit(2)),
                ("attn_out", 9): sf.Add(unit(3), 8.0),
                ("mlp_out", 20): sf.Add(unit(4), 30.0),
            }
        ),
        "chain": sf.Plan({12: [sf.Clamp(love, high=-2.0), sf.Amplify(torch.stack([unit(5), unit(6)]), 2.0)]}),
        "features": sf.Plan({10: sf.EditFeatures(features, {0: 25.0, 2: 9.0}, mode="set")}),
        "flow": sf.Plan({14: sf.Flow(barrier, angle=0.7, steps=5)}, positions="last"),
        "push": sf.Plan({11: sf.DeficitPush(torch.stack([unit(5), unit(6)]), target=0.5)}),
        "turn": sf.Plan({16: sf.Rotate(torch.linalg.qr(torch.stack([unit(7), unit(8)]).T)[0].T, degrees=60.0)}),
    }


def save(folder: Path) -> dict[str, sf.Plan]:
    """The plans above, with the love vector of the demo model, one folder each."""
    from steerfast.models import demo as demo_model

    model, tokenizer = demo_model.load()
    pos, neg = (sf.collect(model, tokenizer, [f"I {word} you"], layers=[8]) for word in ("love", "hate"))
    made = plans(sf.extract.mean_difference(pos, neg).vector)
    for name, plan in made.items():
        plan.save(folder / name)
    return made


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for an engine and the processes that it starts."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def pretend_that_triton_runs_here() -> None:
    """A driver of Triton that launches nothing; the interpreter needs none. vLLM takes its V2 runner only where there is one."""
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class Interpreted(DriverBase):
        def __init__(self) -> None:
            self.utils = None

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise RuntimeError("nothing is tuned under the interpreter")

    backends["cpu"] = Backend(compiler=next(iter(backends.values())).compiler, driver=Interpreted)
    driver.set_active(Interpreted())


def tiny(folder: Path, head: int = 32) -> Any:
    """A Llama of three layers with random weights and four heads of a size, saved for an engine; its texts are token ids."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.1, max_position_embeddings=256, dtype="float32")
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def tiny_plans(folder: Path) -> dict[str, sf.Plan]:
    """A few plans for it, saved."""
    v, w = (unit(seed, 128) for seed in (1, 2))
    barrier = sf.Barrier(torch.stack([v]), torch.zeros(1), torch.ones(1), 0.0)
    made = {
        "add": sf.Plan({1: sf.Add(v, 3.0)}),
        "many": sf.Plan({layer: sf.Ablate(torch.stack([v, w])) for layer in range(3)}),
        "norm": sf.Plan({0: sf.Add(w, 4.0, keep_norm=True), ("mlp_out", 2): sf.Add(v)}),
        "rows": sf.Plan({1: sf.Add(torch.stack([unit(seed, 128) for seed in (3, 4, 5, 6)]), 3.0)}),
        "flow": sf.Plan({2: [sf.Flow(barrier, angle=0.8, steps=3), sf.Amplify(w, 2.0)]}, positions="last"),
    }
    lean = sf.probes.LinearProbe(unit(11, 128), place=0)
    held = sf.WhenToken(sf.Condition(lean, 0.05, release=-0.05), sf.Add(v, 3.0))
    made["held"] = sf.Plan({1: held, 2: sf.WhenToken(sf.Condition(lean, 0.0, above=False), sf.Add(w, 2.0))})
    made["once"] = sf.Plan({1: [sf.Ablate(v), sf.When(sf.Condition(lean, 0.0), sf.Add(w, 4.0))]})
    for name, plan in made.items():
        plan.save(folder / name)
    return made


class Transformers:
    """The truth: what transformers generates, greedily, and the log-probability of every token."""

    def __init__(self, model: Any = None) -> None:
        from steerfast.models import demo as demo_model

        self.model, self.tokenizer = demo_model.load() if model is None else (model, None)

    @torch.inference_mode()
    def generate(
        self, prompt: str | list[int], steered: list[tuple[sf.Plan, float, str | None]], tokens: int
    ) -> tuple[list[int], torch.Tensor]:
        """Token ids and log-probabilities; `steered` lists plan, strength and positions."""
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        length = ids.shape[1]
        with ExitStack() as stack:
            for plan, strength, positions in steered:
                chosen = sf.Plan(plan.edits, plan.positions if positions is None else positions)
                stack.enter_context(sf.steer(self.model, chosen, strength=strength))
            out = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = out.sequences[0, length:]
        logits = torch.stack(out.logits)[:, 0].log_softmax(-1)
        return ids.tolist(), logits.gather(1, ids[:, None])[:, 0]


def fields(*steered: tuple[Any, ...]) -> dict[str, Any]:
    """The wire form of (name, strength) pairs."""
    return {"steer": [name for name, *_ in steered], "steer_strength": [strength for _, strength, *_ in steered]}


CLOSE_SCORE = 1e-3
"""Of scores, over the largest of them where that is above 1: float32 in another order of summation."""


def reads(*names: str, **more: Any) -> dict[str, Any]:
    """The wire form of reading these probes, token by token."""
    return {"steer_read": list(names), "steer_read_what": "tokens", **more}


def tiny_probes(folder: Path, saes: Path) -> dict[str, sf.probes.Probe]:
    """A few probes for the tiny model, saved; one of them names an SAE, which is saved, too."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(32, 128, generator=generator) / 8
    sae = sf.SAE(rows, rows, k=4)
    sae.save(saes / "sae")
    made = {
        "lean": sf.probes.LinearProbe(unit(11, 128), place=1),
        "sure": sf.probes.LogisticProbe(unit(12, 128), 0.1, place=("mlp_out", 2)),
        "after": sf.probes.SimilarityProbe(unit(13, 128), place=1, after=True),
        "top": sf.probes.TopKProbe(sae, place=2),
    }
    for name, probe in made.items():
        probe.save(folder / name)
    return made


def tiny_edits(folder: Path, probes: dict[str, Any]) -> dict[str, sf.Plan]:
    """Plans for the tiny model, saved, that edit the features of the SAE which its probe "top" reads there."""
    sae = probes["top"].sae
    more = sf.EditFeatures(sae, dict.fromkeys(range(9), 0.5), mode="add")
    made = {
        "top": sf.Plan({2: sf.EditFeatures(sae, {3: 4.0, 9: 2.0})}),
        "between": sf.Plan({1: [sf.Ablate(unit(2, 128)), more, sf.Add(unit(3, 128))]}),
    }
    for name, plan in made.items():
        plan.save(folder / name)
    return made


def gated(folder: Path, text: str) -> dict[str, sf.Plan]:
    """Plans with conditions of every kind, with thresholds in the widest gap of what their probes find on a text."""
    from steerfast.models import demo as demo_model

    model, tokenizer = demo_model.load()
    v, w = unit(40) * 40, unit(41) * 60
    lean = sf.probes.LinearProbe(unit(21), place=8)
    sure = sf.probes.LogisticProbe(unit(24) * 3, place=("mlp_out", 9))
    similar = sf.probes.SimilarityProbe(unit(25), place=12)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode(), sf.read(model, {"lean": lean, "sure": sure, "similar": similar}) as reading:
        model(input_ids=ids)
    found = {name: scores.values[0] for name, scores in reading.scores().items()}
    with torch.inference_mode(), sf.read(model, {"lean": lean}) as reading:
        ends = []
        for prompt in (PROMPT, text):
            model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]))
            ends.append(float(reading["lean"].values[0, -1]))
    on, off = gap(found["lean"], 0.6), gap(found["lean"], 0.3)
    made = {
        "when": sf.Plan({12: sf.When(sf.Condition(lean, sum(ends) / 2, above=ends[0] > ends[1]), sf.Add(v))}),
        "never": sf.Plan({12: sf.When(sf.Condition(lean, 1e6), sf.Add(v))}),
        "token": sf.Plan({12: sf.WhenToken(sf.Condition(lean, on), sf.Add(v))}),
        "held": sf.Plan({12: sf.WhenToken(sf.Condition(lean, on, release=off), sf.Add(w)), 20: sf.Add(v)}),
        "below": sf.Plan(
            {("attn_out", 10): sf.WhenToken(sf.Condition(sure, gap(found["sure"], 0.5), above=False), sf.Add(v))}
        ),
        "own": sf.Plan(
            {12: [sf.WhenToken(sf.Condition(similar, gap(found["similar"], 0.5)), sf.Ablate(unit(25))), sf.Add(v)]}
        ),
        "after": sf.Plan(
            {8: sf.Add(unit(21), 5.0), 9: sf.WhenToken(sf.Condition(lean.at(8, after=True), on + 5.0), sf.Add(v))}
        ),
    }
    for name, plan in made.items():
        plan.save(folder / name)
    late = sf.WhenToken(sf.Condition(lean.at(20), 0.0), sf.Add(v))
    sf.Plan({9: late}).save(folder / "late")
    return made


def gap(scores: torch.Tensor, share: float) -> float:
    """The middle of the widest gap between two scores near this share of them: a threshold that rounding does not meet."""
    near = scores.sort().values[int((share - 0.1) * len(scores)) : int((share + 0.1) * len(scores))]
    at = int(near.diff().argmax())
    return float(near[at : at + 2].mean())


@torch.inference_mode()
def assert_scores(
    model: Any, output: Any, probes: dict[str, Any], steered: list[tuple[sf.Plan, float]], positions: str = "all"
) -> None:
    """An output says what transformers reads of its text, in one pass under the same plans."""
    prompt = len(output.prompt_token_ids)
    ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]])
    with ExitStack() as stack:
        for plan, strength in steered:
            stack.enter_context(sf.steer(model, plan, strength=strength, prompt_length=prompt))
        reading = stack.enter_context(sf.read(model, probes, positions=positions, prompt_length=prompt))
        model(input_ids=ids)
        wanted = reading.scores()
    found = output.kv_transfer_params["steerfast"]
    assert list(found) == list(probes)
    for name, scores in wanted.items():
        read, got = scores.read[0], found[name]
        values = scores.values[0][read].numpy()
        assert got["positions"] == read.nonzero().flatten().tolist(), name
        assert got["tokens"] == len(values)
        within = CLOSE_SCORE * max(1.0, float(np.abs(values).max(initial=0)))
        assert np.abs(np.asarray(got["scores"]).reshape(values.shape) - values).max(initial=0) < within, name
        if scores.indices is not None:
            assert got["features"] == scores.indices[0][read].tolist(), name
            continue
        for reduced in ("max", "mean", "last"):
            expected = getattr(scores, reduced)()[0].numpy() if len(values) else None
            same = (
                got[reduced] is None if expected is None else np.abs(np.asarray(got[reduced]) - expected).max() < within
            )
            assert same, (name, reduced)


@torch.inference_mode()
def assert_rows_captured(
    model: Any,
    output: Any,
    folder: Path,
    steered: list[tuple[sf.Plan, float]],
    edits: str,
    layers: tuple[int, ...] = (1, 2),
) -> None:
    """The rows of a request at resid_post of some layers, in float32, are what transformers has there for every token."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    for layer in layers:
        names = [f"resid_post.{layer}.{when}.float32" for when in dict.fromkeys((edits, "before"))]
        found = [captured_rows(folder / name, output.request_id) for name in names if (folder / name).is_dir()]
        positions, rows, tokens = next(one for one in found if one[0])
        assert positions[: len(ids)] == [*range(len(ids))]
        assert tokens[: len(ids)] == ids
        width = rows.shape[1]
        probe = sf.probes.LinearProbe(torch.eye(width), torch.zeros(width), place=layer, after=edits == "after")
        with ExitStack() as stack:
            for plan, strength in steered:
                stack.enter_context(
                    sf.steer(model, plan, strength=strength, prompt_length=len(output.prompt_token_ids))
                )
            reading = stack.enter_context(sf.read(model, {"all": probe}))
            model(input_ids=torch.tensor([ids]))
            wanted = reading["all"].values[0]
        assert (rows[: len(ids)] - wanted).abs().max() < 1e-3 * max(1.0, float(wanted.abs().max()) / 100), (
            layer,
            edits,
        )


def captured_rows(folder: Path, request: str) -> tuple[list[int], torch.Tensor, list[int]]:
    """Positions, rows and tokens that a cache of captured rows has of a request."""
    cache = sf.sae.ActivationCache.open(folder)
    positions: list[int] = []
    tokens: dict[int, int] = {}
    rows = []
    for shard in range(len(cache.counts)):
        text, where = cache.contexts(shard)
        activations = cache.read(shard)
        for i, (name, first) in enumerate(contexts_of(folder, shard)):
            if name.split("-")[0] == request:
                here = where // cache.info.context == i
                positions += (where[here] % cache.info.context + first).tolist()
                rows.append(activations[here])
                tokens |= dict(enumerate(text[i].tolist(), first))
    return positions, torch.cat([*rows, torch.zeros(0, cache.info.d)]), [tokens[i] for i in sorted(tokens)]
