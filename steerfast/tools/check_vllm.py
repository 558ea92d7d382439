"""Proofs that steering works in the user's own installation of vLLM, by what the engine returns and nothing else."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from steerfast.edits.conditions import Condition, When, WhenToken
from steerfast.edits.linear import Add
from steerfast.plan import Plan
from steerfast.probes import SimilarityProbe
from steerfast.vllm import record

from .check import Finding

PROMPTS = ("The quick brown fox jumps over", "Once upon a time", "The capital of France is", "One, two, three,")
TOKENS = 6
_CACHE = 1 << 30  # bytes for keys and values: enough for these prompts, whatever else runs on the machine
_SETTINGS = tuple(
    f"STEERFAST_{name}" for name in ("PLANS", "PROBES", "DEFAULT", "SLOTS", "COLUMNS", "SCORES", "CAPTURE")
)
"""Of a server on this machine: they speak of other plans, and name its own files."""
_TURN = (
    1e4  # v is far longer than any row: with its length kept, a row becomes v's direction, whatever the model's scale
)

_NOISE = 0.01  # of a log-probability; what proves something moves by far more
_MET = 0.9  # of the direction in a row: most that were turned are above, all others below
_Answer = list[tuple[int, float]]  # every token with its log-probability


def prove(model: str, plan: Plan | None = None, dtype: str = "auto") -> Iterator[Finding]:
    """Start vLLM on a model as a user would, compile and CUDA graphs included, and prove steering on it.

    That it passed is recorded in the user's cache (`steerfast.vllm.record`), after which a release that we have not tested
    starts with the plugin. So that it starts here, the record lies among the plans of the proofs, until they end.

    Args:
        model: Folder or name of the model.
        plan: A plan that must fit and change what is generated.
        dtype: As vLLM takes it.

    Yields:
        A finding per proof: prefill, cached decode, batch-mates, caches, refusals, reading, conditions, ending, the plan; and, if
        none failed, the record.

    Raises:
        RuntimeError: vLLM is not installed, or has not loaded the plugin.
    """
    try:
        import vllm
    except ImportError:
        raise RuntimeError("check: vLLM is not installed here; install it, or leave out --engine vllm") from None
    with tempfile.TemporaryDirectory(prefix="steerfast-check-") as folder:
        before = {name: os.environ.pop(name, None) for name in _SETTINGS}
        os.environ |= {"STEERFAST_PLANS": f"{folder}/plans", "STEERFAST_PROBES": f"{folder}/probes"}
        failed = False
        try:
            record.write(vllm.__version__, Path(folder) / "plans")
            for finding in _prove(vllm, Path(folder), model, plan, dtype):
                failed |= finding.outcome == "failed"
                yield finding
            if not failed:
                yield _recorded(vllm.__version__)
        finally:
            del os.environ["STEERFAST_PLANS"], os.environ["STEERFAST_PROBES"]
            os.environ.update({name: value for name, value in before.items() if value is not None})


def _recorded(version: str) -> Finding:
    name = "that it passed is recorded, so that this vLLM may start with steering"
    try:
        return Finding(name, "ok", str(record.write(version)))
    except OSError as reason:
        return Finding(name, "failed", f"{reason}; name a folder that can be written in STEERFAST_CACHE")


def _prove(vllm: Any, folder: Path, model: str, plan: Plan | None, dtype: str) -> Iterator[Finding]:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    vector = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(0))
    turn, layer = Add(vector / vector.norm(), _TURN, keep_norm=True), config.num_hidden_layers // 2
    gated = {"open": WhenToken(Condition(vector, 1.0, above=False), turn), "shut": When(Condition(vector, 1.0), turn)}
    for name, edit in {"turn": turn, **gated}.items():
        Plan({layer: edit}).save(folder / "plans" / name)
    for after in (False, True):
        SimilarityProbe(vector, place=layer, after=after).save(folder / "probes" / ("after" if after else "before"))
    if plan is not None:
        plan.save(folder / "plans" / "plan")
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
        ("batch-mates are equal, token for token, to the same batch unsteered", _mates),
        ("steered keys and values are not shared with unsteered requests", _caches),
        ("what cannot be followed is refused", _refusals),
        ("probes read every token, before and after the edits of their place", _reads),
        ("conditions act where they are met, and only there", _gates),
        ("a request ends with the token that crosses its limit", _ends),
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

    def __call__(self, prompts: Sequence[Any], steering: Sequence[dict[str, Any] | None]) -> list[_Answer]:
        found = []
        for output in self.outputs(prompts, steering):
            steps = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
            found.append([(token, step[token].logprob) for token, step in steps])
        return found

    def outputs(self, prompts: Sequence[Any], steering: Sequence[dict[str, Any] | None]) -> list[Any]:
        """What the engine returns."""
        params = [
            self.params(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, extra_args=extra)
            for extra in steering
        ]
        return list(self.engine.generate(list(prompts), params, use_tqdm=False))

    def read(self, steering: dict[str, Any], **more: Any) -> tuple[Any, dict[str, list[float]]]:
        """One output, and the scores of every token before and after the edit."""
        asked = {"steer_read": ["before", "after"], "steer_read_what": "tokens", **steering, **more}
        output = self.outputs([PROMPTS[0], *PROMPTS[1:]], [asked, None, None, None])[0]
        answer = (output.kv_transfer_params or {}).get("steerfast")
        if answer is None:
            raise RuntimeError("the output has no scores")
        return output, {name: answer[name].get("scores", []) for name in ("before", "after")}

    def moved(self, steering: dict[str, Any], token: int) -> tuple[bool, str]:
        """Whether steering moves that token, beyond what an unsteered one moves from run to run, and what was seen.

        It is the second request of a batch each time: rows of one batch may differ in their last bits, and so may runs.
        """
        plain, again, steered = (self(PROMPTS[:1] * 2, [None, extra])[1] for extra in (None, None, steering))
        noise = _distance(plain[: token + 1], again[: token + 1])
        seen = f"log-probability of token {token + 1}: {steered[token][1]:.3f}, unsteered {plain[token][1]:.3f}"
        return _distance(plain[token:][:1], steered[token:][:1]) > _NOISE + 4 * noise, seen

    def long_prompt(self) -> dict[str, list[int]]:
        """Longer than a block of the cache, which has up to 128 tokens, so that there is something to share."""
        ids = self.engine.get_tokenizer().encode(" ".join(PROMPTS))
        return {"prompt_token_ids": (ids * 200)[:200]}


def _prefill(ask: _Asker) -> str:
    moved, seen = ask.moved({"steer": "turn", "steer_positions": "prompt"}, 0)
    if not moved:
        raise RuntimeError(f"the first token is that of an unsteered request; {seen}")
    return seen


def _decode(ask: _Asker) -> str:
    steering = {"steer": "turn", "steer_positions": "generated"}
    moved, seen = ask.moved(steering, 0)
    if moved:
        raise RuntimeError(f"the first token changed, which comes from the prompt alone; {seen}")
    moved, seen = ask.moved(steering, 1)
    if not moved:
        raise RuntimeError(f"the second token is that of an unsteered request; {seen}")
    return seen


def _mates(ask: _Asker) -> str:
    alone = _tokens(ask(PROMPTS, [None] * 4))
    for where in range(4):
        steering: list[dict[str, Any] | None] = [None] * 4
        steering[where] = {"steer": "turn"}
        mixed = _tokens(ask(PROMPTS, steering))
        for i in set(range(4)) - {where}:
            if mixed[i] != alone[i]:
                raise RuntimeError(
                    f"request {i} changed when request {where} was steered: {mixed[i]}, before {alone[i]}"
                )
        if mixed[where] == alone[where]:
            raise RuntimeError(f"request {where} did not change when it was steered")
    return f"4 batches of 4 requests, {TOKENS} tokens each"


def _caches(ask: _Asker) -> str:
    prompt = [ask.long_prompt()]
    ask.engine.reset_prefix_cache()
    steered = _tokens(ask(prompt, [{"steer": "turn"}]))
    after = _tokens(ask(prompt, [None]))
    ask.engine.reset_prefix_cache()
    alone = _tokens(ask(prompt, [None]))
    if steered == alone:
        raise RuntimeError("a prompt of 200 tokens did not change when it was steered")
    if after != alone:
        raise RuntimeError("an unsteered request got another answer after the same prompt had been steered")
    return "a prompt of 200 tokens: steered, unsteered, and unsteered with an empty cache"


def _tokens(answers: Sequence[_Answer]) -> list[list[int]]:
    return [[token for token, _ in answer] for answer in answers]


def _refusals(ask: _Asker) -> str:
    for bad in ({"steer": "nobody"}, {"steer": "turn", "steer_strength": float("nan")}, {"steering": "turn"}):
        try:
            ask(PROMPTS[:1], [bad])
        except ValueError:
            continue
        raise RuntimeError(f"{bad} was accepted")
    return "an unknown plan, a strength that is no number, an unknown field"


def _reads(ask: _Asker) -> str:
    output, plain = ask.read({})
    _, turned = ask.read({"steer": "turn"})
    count = len(output.prompt_token_ids) + TOKENS - 1  # the last one that is generated is not run
    scores = {"unsteered, before": plain["before"], "unsteered, after": plain["after"], **turned}
    for name, found in scores.items():
        if len(found) != count or (_middle(found) > _MET) != (name == "after"):
            raise RuntimeError(f"{name}: {len(found)} scores for {count} tokens, {_middle(found):.3f} in the middle")
    return (
        f"{count} tokens: {_middle(turned['before']):.3f} before the edit and {_middle(turned['after']):.3f} after it"
    )


def _gates(ask: _Asker) -> str:
    opened, shut = (_middle(ask.read({"steer": name})[1]["after"]) for name in ("open", "shut"))
    seen = f"{opened:.3f} of the direction where a condition is met, {shut:.3f} where it is not"
    if opened < _MET or shut > _MET:
        raise RuntimeError(seen)
    return seen


def _middle(scores: Sequence[float]) -> float:
    """The median: the rows of a few tokens are so long that nothing turns them."""
    return statistics.median(scores) if scores else 0.0


def _ends(ask: _Asker) -> str:
    limit = {"steer_abort": f"after>{_MET}", "steer_read_positions": "generated"}
    lengths = []
    for steering in ({}, {"steer": "turn", "steer_positions": "generated"}):
        output, _ = ask.read(steering, **limit)
        lengths.append(len(output.outputs[0].token_ids))
    if lengths != [TOKENS, 1]:
        raise RuntimeError(f"{lengths[0]} tokens without a crossing and {lengths[1]} with one; expected {TOKENS} and 1")
    return str(output.outputs[0].stop_reason)


def _plan(ask: _Asker) -> str:
    found = [ask.moved({"steer": "plan"}, token) for token in range(TOKENS)]
    if not any(moved for moved, _ in found):
        raise RuntimeError("all tokens are those of an unsteered request; is a strength 0?")
    return next(seen for moved, seen in found if moved)


def _distance(one: _Answer, other: _Answer) -> float:
    """The largest difference of log-probabilities, infinite where tokens differ."""
    return max(math.inf if a != b else abs(x - y) for (a, x), (b, y) in zip(one, other, strict=True))
