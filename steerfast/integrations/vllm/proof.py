"""Proofs that steering works in the user's own installation of vLLM, by what the engine returns and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from steerfast.check import Finding
from steerfast.interventions import Add
from steerfast.plan import Plan

PROMPTS = ("The quick brown fox jumps over", "Once upon a time", "The capital of France is", "One, two, three,")
TOKENS = 6
_CACHE = 1 << 30  # bytes for keys and values: enough for these prompts, whatever else runs on the machine
_TURN = (
    1e4  # v is far longer than any row: with its length kept, a row becomes v's direction, whatever the model's scale
)


def prove(model: str, plan: Plan | None = None, dtype: str = "auto") -> Iterator[Finding]:
    """Start vLLM on a model as a user would, compile and CUDA graphs included, and prove steering on it.

    Args:
        model: Folder or name of the model.
        plan: A plan that must fit and change what is generated.
        dtype: As vLLM takes it.

    Yields:
        A finding per proof: prefill, cached decode, batch-mates, caches, refusals, the plan.

    Raises:
        RuntimeError: vLLM is not installed, or has not loaded the plugin.
    """
    try:
        import vllm
    except ImportError:
        raise RuntimeError("check: vLLM is not installed here; install it, or leave out --engine vllm") from None
    with tempfile.TemporaryDirectory(prefix="steerfast-check-") as folder:
        before = os.environ.get("STEERFAST_PLANS")
        os.environ["STEERFAST_PLANS"] = folder
        try:
            yield from _prove(vllm, Path(folder), model, plan, dtype)
        finally:
            if before is None:
                del os.environ["STEERFAST_PLANS"]
            else:
                os.environ["STEERFAST_PLANS"] = before


def _prove(vllm: Any, folder: Path, model: str, plan: Plan | None, dtype: str) -> Iterator[Finding]:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    vector = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(0))
    turn = Add(vector / vector.norm(), _TURN, keep_norm=True)
    Plan({config.num_hidden_layers // 2: turn}).save(folder / "turn")
    if plan is not None:
        plan.save(folder / "plan")
    small = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": _CACHE}
    engine = vllm.LLM(model, dtype=dtype, **small)
    if not hasattr(engine.llm_engine.input_processor, "steerfast"):
        raise RuntimeError("check: vLLM has not loaded the plugin; is `steerfast` missing in VLLM_PLUGINS?")
    ask = _Asker(vllm, engine)
    mode = engine.llm_engine.vllm_config.compilation_config.mode
    yield Finding("the engine starts with the plugin", "ok", f"vLLM {vllm.__version__}, compilation mode {mode}")
    proofs: list[tuple[str, Callable[[_Asker], str]]] = [
        ("prefill: the prompt is steered", _prefill),
        ("cached decode: generated tokens are steered, the prompt is not", _decode),
        ("batch-mates are equal, token for token, to the same batch with nobody steered", _mates),
        ("steered keys and values are not shared with unsteered requests", _caches),
        ("what cannot be followed is refused", _refusals),
    ]
    if plan is not None:
        proofs.append(("the plan fits and changes what is generated", _plan))
    for name, proof in proofs:
        try:
            yield Finding(name, "ok", proof(ask))
        except (ValueError, RuntimeError) as reason:
            yield Finding(name, "failed", str(reason))


class _Asker:
    """Greedy generation with log-probabilities, one steering per prompt."""

    def __init__(self, vllm: Any, engine: Any) -> None:
        self.params, self.engine = vllm.SamplingParams, engine

    def __call__(
        self, prompts: tuple[str, ...], steering: list[dict[str, Any] | None]
    ) -> list[list[tuple[int, float]]]:
        """Per prompt: every token with its log-probability."""
        params = [
            self.params(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, extra_args=extra)
            for extra in steering
        ]
        found = []
        for output in self.engine.generate(list(prompts), params, use_tqdm=False):
            steps = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
            found.append([(token, step[token].logprob) for token, step in steps])
        return found


def _prefill(ask: _Asker) -> str:
    plain, steered = ask(PROMPTS[:1] * 2, [None, {"steer": "turn", "steer_positions": "prompt"}])
    if plain[0] == steered[0]:
        raise RuntimeError("the first token and its log-probability are those of an unsteered request")
    return f"log-probability of the first token: {steered[0][1]:.3f}, unsteered {plain[0][1]:.3f}"


def _decode(ask: _Asker) -> str:
    plain, steered = ask(PROMPTS[:1] * 2, [None, {"steer": "turn", "steer_positions": "generated"}])
    if plain[0][0] != steered[0][0]:
        raise RuntimeError("the first token changed, which comes from the prompt alone")
    if plain[1] == steered[1]:
        raise RuntimeError("the second token and its log-probability are those of an unsteered request")
    return f"log-probability of the second token: {steered[1][1]:.3f}, unsteered {plain[1][1]:.3f}"


def _mates(ask: _Asker) -> str:
    alone = [[token for token, _ in row] for row in ask(PROMPTS, [None] * 4)]
    for where in range(4):
        steering: list[dict[str, Any] | None] = [None] * 4
        steering[where] = {"steer": "turn"}
        mixed = [[token for token, _ in row] for row in ask(PROMPTS, steering)]
        for i in set(range(4)) - {where}:
            if mixed[i] != alone[i]:
                raise RuntimeError(
                    f"request {i} changed when request {where} was steered: {mixed[i]}, before {alone[i]}"
                )
        if mixed[where] == alone[where]:
            raise RuntimeError(f"request {where} did not change when it was steered")
    return f"4 batches of 4 requests, {TOKENS} tokens each"


def _caches(ask: _Asker) -> str:
    prompt = (" ".join(PROMPTS) + " ") * 4
    first = ask((prompt,), [None])
    ask((prompt,), [{"steer": "turn"}])
    if [token for token, _ in ask((prompt,), [None])[0]] != [token for token, _ in first[0]]:
        raise RuntimeError("an unsteered request changed after the same prompt had been steered")
    return "unsteered, steered, unsteered again"


def _refusals(ask: _Asker) -> str:
    for bad in ({"steer": "nobody"}, {"steer": "turn", "steer_strength": float("nan")}, {"steering": "turn"}):
        try:
            ask(PROMPTS[:1], [bad])
        except ValueError:
            continue
        raise RuntimeError(f"{bad} was accepted")
    return "an unknown plan, a strength that is no number, an unknown field"


def _plan(ask: _Asker) -> str:
    plain, steered = ask(PROMPTS[:1] * 2, [None, {"steer": "plan"}])
    if plain == steered:
        raise RuntimeError("tokens and log-probabilities are those of an unsteered request; is a strength 0?")
    changed = sum(a != b for (a, _), (b, _) in zip(plain, steered, strict=True))
    return f"{changed} of {TOKENS} tokens changed"
