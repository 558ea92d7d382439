"""Proofs on the user's own model that steering does what it says, by hooks that are none of ours.

Each proof compares what an ordinary PyTorch hook reads behind a block, with and without steering. `check` yields one
`Finding` per proof.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast.edits.linear import Add
from steerfast.hooks.steer import steer
from steerfast.models.caches import cache_in
from steerfast.models.layers import Layers, evaluating, find_layers, home
from steerfast.models.proof import Proof, prove, refuse_split, sum_error
from steerfast.models.texts import TextReader
from steerfast.place import typical_norm_of
from steerfast.plan import Plan

ROUNDING = 8.0
"""Units in the last place that v, added in the stream's dtype, may differ from v: one addition, one difference."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one proof.

    Attributes:
        name: What was to be proven.
        outcome: "ok", "failed", or "skipped" where the model does not have what the proof is about.
        detail: The numbers, or the reason.
    """

    name: str
    outcome: str
    detail: str


class _Failed(Exception):
    """A proof did not hold; the text says where."""


class _Skipped(Exception):
    """A proof does not apply to this model; the text says why."""


@dataclass(frozen=True)
class _Subject:
    """The model under test and the tokens that it is tested on."""

    model: Any
    layers: Layers
    ids: Tensor  # (1, tokens)
    plan: Plan | None

    proof: Proof

    @property
    def chosen(self) -> list[int]:
        """First, middle and last of the layers that text runs."""
        run = [layer for layer in range(self.layers.count) if layer not in self.proof.idle]
        return sorted({run[0], run[len(run) // 2], run[-1]})

    @property
    def middle(self) -> int:
        """One layer that text runs."""
        return self.chosen[len(self.chosen) // 2]


def check(model: Any, tokenizer: Any, plan: Plan | None = None) -> Iterator[Finding]:
    """Prove steering on a model, one finding at a time.

    Args:
        model: A transformers causal language model that is not being steered.
        tokenizer: Its tokenizer.
        plan: A plan that must fit the model and change its logits.

    Yields:
        A finding per proof: prefill, cached decode, generate, batch-mates and padding, sites, the plan, removal.

    Raises:
        TypeError, ValueError: no decoder blocks are found in the model, or they cannot be steered; the text says why.

    Example:
        >>> all(finding.outcome != "failed" for finding in check(model, tokenizer))
        True
    """
    layers = find_layers(model, "check")
    found = prove(model, layers, "check")
    ids = torch.tensor([TextReader.of(tokenizer, "check").ids("The quick brown fox jumps over the lazy dog")[:12]])
    if ids.shape[1] < 3:
        raise ValueError(f"check: the tokenizer made {ids.shape[1]} tokens of a sentence; at least 3 are needed")
    subject = _Subject(model, layers, ids.to(home(model)), plan, found)
    proofs: list[tuple[str, Callable[[_Subject], str]]] = [
        ("prefill: every prompt token moves by v", _prefill),
        ("cached decode: the new token moves by v", _decode),
        ("generate: every generated token is edited", _generate),
        ("batch-mates and padding keep their bits", _mates),
        ("attn_out + mlp_out = resid_post − resid_pre", _sites),
    ]
    if plan is not None:
        proofs.append(("the plan fits and changes the logits", _plan))
    with evaluating(model):
        try:
            clean = _unsteered(lambda: model(subject.ids, use_cache=False).logits)
        except _Skipped as reason:
            yield Finding("the model reads plain text", "failed", str(reason))
            return
        for name, proof in proofs:
            yield _finding(name, proof, subject)
        yield _finding("removal restores the logits bit for bit", lambda s: _removal(s, clean), subject)


def _finding(name: str, proof: Callable[[_Subject], str], subject: _Subject) -> Finding:
    try:
        return Finding(name, "ok", proof(subject))
    except _Skipped as reason:
        return Finding(name, "skipped", str(reason))
    except (_Failed, ValueError, RuntimeError, TypeError) as reason:
        return Finding(name, "failed", str(reason))


def _unsteered(forward: Callable[[], Any]) -> Any:
    """A pass of the model alone: what it raises is not about steering, and means that a proof cannot be made this way."""
    try:
        return forward()
    except Exception as error:
        said = " ".join(str(error).split())
        raise _Skipped(f"check: the unsteered model does not run this way ({type(error).__name__}: {said})") from error


def _prefill(subject: _Subject) -> str:
    worst = 0.0
    for layer in subject.chosen:
        vector, clean = _vector(subject, layer)
        with steer(subject.model, {layer: Add(vector)}):
            seen = _stream(subject, layer, lambda: subject.model(subject.ids, use_cache=False))
        worst = max(worst, _moved(clean, seen, vector, f"layer {layer}"))
    return f"layers {_list(subject.chosen)}; off by {worst:.1g} of |v|"


def _decode(subject: _Subject) -> str:
    """Generated tokens only: the prompt's pass must keep its bits, the pass of one cached token must move."""
    worst, model, ids = 0.0, subject.model, subject.ids
    for layer in subject.chosen:
        vector, _ = _vector(subject, layer)

        def two_passes() -> Any:
            found = cache_in(model(ids[:, :-1], use_cache=True))
            if found is None:
                raise _Skipped("the model returns no cache that counts its tokens")
            name, cache = found  # what a model returns under a name it takes under the same
            return model(ids[:, -1:], **{name: cache}, use_cache=True)

        clean = _unsteered(lambda at=layer, run=two_passes: _streams(subject, at, run))  # type: ignore[misc]
        with steer(model, Plan({layer: Add(vector)}, positions="generated")):
            seen = _streams(subject, layer, two_passes)
        if len(seen) != 2 or not torch.equal(clean[0], seen[0]):
            raise _Failed(f"layer {layer}: the prompt was edited by a plan for generated tokens")
        worst = max(worst, _moved(clean[1], seen[1], vector, f"layer {layer}"))
    return f"layers {_list(subject.chosen)}; off by {worst:.1g} of |v|"


def _generate(subject: _Subject, tokens: int = 5) -> str:
    if not hasattr(subject.model, "generate"):
        raise _Skipped("the model has no generate")
    layer = subject.middle
    vector, _ = _vector(subject, layer)
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    options |= {"do_sample": False, "pad_token_id": 0, "use_cache": True}
    mask = torch.ones_like(subject.ids)
    _unsteered(lambda: subject.model.generate(input_ids=subject.ids, attention_mask=mask, **options))
    counts = {}
    for positions, expected in (
        ("generated", tokens - 1),
        ("all", subject.proof.virtual + subject.ids.shape[1] + tokens - 1),
    ):
        with steer(subject.model, Plan({layer: Add(vector)}, positions=positions)) as handle:
            subject.model.generate(input_ids=subject.ids, attention_mask=mask, **options)
        counts[positions] = handle.stats()[0]
        if counts[positions] != expected:
            raise _Failed(f"positions={positions!r} edited {counts[positions]} tokens, expected {expected}")
    return f"{counts['generated']} of {tokens} (the last is never fed back); {counts['all']} with the prompt"


def _mates(subject: _Subject) -> str:
    """Row 0 is left-padded and steered, row 1 is not: only the real tokens of row 0 may move."""
    layer, model = subject.middle, subject.model
    vector, _ = _vector(subject, layer)
    ids = subject.ids.repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0

    def forward() -> Any:
        return model(ids, attention_mask=mask, use_cache=False)

    logits: list[Tensor] = []
    clean = _unsteered(lambda: _stream(subject, layer, lambda: logits.append(forward().logits)))
    with steer(model, [Plan({layer: Add(vector)}), None]):
        seen = _stream(subject, layer, lambda: logits.append(forward().logits))
    text = slice(subject.proof.virtual, None)  # a model may put tokens of its own before the text
    clean, seen = clean.reshape(2, -1, clean.shape[-1])[:, text], seen.reshape(2, -1, seen.shape[-1])[:, text]
    if not _same(seen[1], clean[1]):
        raise _Failed("the unsteered row of a batch of two was edited")
    if not _same(seen[0, :2], clean[0, :2]):
        raise _Failed("left padding was edited")
    _moved(clean[0, 2:], seen[0, 2:], vector, f"layer {layer}")
    before, after = logits[0][1].float(), logits[1][1].float()
    off = float((after - before).abs().max() / before.abs().max())
    if off > torch.finfo(logits[0].dtype).eps ** 0.5:
        raise _Failed(f"the logits of the unsteered row of a batch of two changed by {off:.3g} of the largest")
    note = f"; its logits round differently by {off:.1g}, since experts see the whole batch" if off else ""
    return f"a steered, left-padded row beside an unsteered one{note}"


def _sites(subject: _Subject) -> str:
    """As the model was proven on three tokens, so on these; a site that is refused cannot be used wrongly."""
    layers = subject.layers
    try:
        for layer in subject.chosen:
            for site in ("attn_out", "mlp_out"):
                layers.point(layer, site, "check")
        for layer in range(layers.count):
            for site in ("attn_out", "mlp_out"):
                refuse_split(subject.proof, layers, layer, site, "check")
    except ValueError as reason:
        raise _Skipped(str(reason)) from None
    streams: dict[tuple[int, str], Tensor] = {}
    handles = []
    try:
        for layer in subject.chosen:
            for site in ("attn_out", "mlp_out", "resid_pre", "resid_post"):
                handles.append(layers.point(layer, site, "check").attach(_keep_in(streams, (layer, site))))
        subject.model(subject.ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for layer in subject.chosen:
        if wrong := sum_error(streams, layer):
            raise _Failed(f"layer {layer}: {wrong}")
    return f"all {layers.count - len(subject.proof.idle)} layers that text runs; on this text {_list(subject.chosen)}"


def _keep_in(streams: dict[tuple[int, str], Tensor], key: tuple[int, str]) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        streams[key] = x.clone()  # Falcon adds to its MLP's output in place

    return keep


def _plan(subject: _Subject) -> str:
    clean = subject.model(subject.ids, use_cache=False).logits
    with steer(subject.model, subject.plan, prompt_length=subject.ids.shape[1]):  # type: ignore[arg-type]
        seen = subject.model(subject.ids, use_cache=False).logits
    change = float((seen - clean).abs().max())
    if not seen.isfinite().all():
        raise _Failed("the steered logits are not finite; lower the strength")
    if subject.plan is not None and subject.plan.positions == "generated":
        return f"{subject.plan!r}; edits generated tokens only"
    if change == 0.0:
        raise _Failed("the logits did not change; is a strength 0?")
    return f"{subject.plan!r}; largest change {change:.3g}"


def _removal(subject: _Subject, clean: Tensor) -> str:
    logits = subject.model(subject.ids, use_cache=False).logits
    if not torch.equal(logits, clean):
        raise _Failed(f"the logits differ by up to {float((logits - clean).abs().max()):.3g}")
    return f"{logits.numel()} logits"


def _vector(subject: _Subject, layer: int) -> tuple[Tensor, Tensor]:
    """A random vector as long as a typical activation after a layer, and the stream there."""
    stream = _stream(subject, layer, lambda: subject.model(subject.ids, use_cache=False))
    generator = torch.Generator().manual_seed(layer)
    vector = torch.randn(subject.layers.d, generator=generator)
    length = typical_norm_of(stream.float().reshape(-1, subject.layers.d))
    vector = vector * (length / vector.norm())
    return vector.to(stream.dtype).float(), stream


def _stream(subject: _Subject, layer: int, forward: Callable[[], Any]) -> Tensor:
    return _streams(subject, layer, forward)[-1]


def _streams(subject: _Subject, layer: int, forward: Callable[[], Any]) -> list[Tensor]:
    """What a plain PyTorch hook reads behind a block, once per pass."""
    seen: list[Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, (tuple, list)) else output).clone())

    with subject.layers.blocks[layer].register_forward_hook(read):
        forward()
    return seen


def _moved(clean: Tensor, seen: Tensor, vector: Tensor, where: str) -> float:
    """How far the stream's movement is from v, as a share of |v|; fails above the rounding of its dtype."""
    wanted = vector.to(clean.device)
    error = (seen.float() - clean.float() - wanted).abs()
    allowed = ROUNDING * torch.finfo(clean.dtype).eps * (seen.float().abs() + clean.float().abs() + wanted.abs())
    share = float(error.norm(dim=-1).max() / vector.norm())
    if not bool((error <= allowed).all()):
        raise _Failed(f"{where}: the stream did not move by v; off by {share:.3g} of its length")
    return share


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal bits; a row that attends to nothing may be NaN in both."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
