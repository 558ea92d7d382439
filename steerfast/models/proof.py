"""What the blocks of a model do, shown by one short unsteered forward: never assumed, never read from a name.

Steering reads and writes a tensor (batch, tokens, d) behind every block, once a pass. Some models carry several streams at
once, run tokens first, run their blocks twice, skip some, or put tokens of their own in front. `prove` looks, once per
model; what it cannot run on plain token ids (a model that demands an image) is looked at in its first pass instead. An error
that may pass, such as no memory, proves nothing: it is raised, and the model is looked at anew the next time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .layers import IDS, Layers, is_distributed, read_ids, refuse_unloaded
from .points import NoStream, Point

_proofs: WeakKeyDictionary[nn.Module, Proof] = WeakKeyDictionary()


@dataclass(frozen=True)
class Proof:
    """What one short forward has shown.

    Attributes:
        refusal: Why the blocks cannot be steered or read, after "LlamaForCausalLM …"; "" if they can.
        virtual: Tokens that the model puts in front of the text.
        idle: Layers that plain text does not run.
        split: Layer -> why attn_out and mlp_out are not what it adds to the stream.
        parted: (layer, site) -> why no process holds that site's whole tensor.
    """

    refusal: str = ""
    virtual: int = 0
    idle: frozenset[int] = frozenset()
    split: Mapping[int, str] = field(default_factory=dict)
    parted: Mapping[tuple[int, str], str] = field(default_factory=dict)


def prove(model: nn.Module, layers: Layers, caller: str) -> Proof:
    """Look at a model once, and refuse what cannot be followed.

    Raises:
        TypeError: its blocks cannot be steered or read; the text says what they do instead.
        ValueError: its weights have not been loaded.
        Exception: the short forward failed for a reason that may pass; nothing is kept of it.
    """
    if model not in _proofs:
        refuse_unloaded(model, layers, caller)
        _proofs[model] = _look(model, layers, caller)
    found = _proofs[model]
    if found.refusal:
        raise TypeError(f"{caller}: {layers.name} {found.refusal}")
    return found


def known_proof(model: nn.Module) -> Proof:
    """What is known of a model, as far as it has been looked at."""
    return _proofs.get(model, Proof())


def refuse_split(proof: Proof, layers: Layers, layer: int, site: str, caller: str) -> None:
    """Refuse attn_out or mlp_out where the two are not what a layer adds to the stream, and a site that is split over processes.

    Raises:
        ValueError: with how far the sum is off, or with the part that this process holds.
    """
    if (layer, site) in proof.parted:
        raise ValueError(
            f"{caller}: cannot steer or read {site} of layer {layer} in a {type(layers.blocks[layer]).__name__} "
            f"({layers.name}): {proof.parted[layer, site]}; use attn_out, mlp_out, resid_pre or resid_post, or one process"
        )
    if site in ("attn_out", "mlp_out") and layer in proof.split:
        raise ValueError(
            f"{caller}: cannot steer or read {site} of layer {layer} in a {type(layers.blocks[layer]).__name__} "
            f"({layers.name}): {proof.split[layer]}; use resid_pre or resid_post"
        )


def shape_refusal(shape: tuple[int, ...], rows: int, tokens: int, d: int) -> str:
    """What a block does that returns this shape for (rows, tokens) of width d; "" if it is one stream of them."""
    returned = f"(a block returns {shape} for {rows} rows of {tokens} tokens)"
    if shape == (rows, tokens, d):
        return ""
    if shape == (tokens, rows, d):
        return f"runs tokens first {returned}; only models whose stream is (batch, tokens, width) can be steered"
    if len(shape) == 4 and shape[-1] == d:
        others = list(shape[:-1])
        for size in (rows, tokens):
            if size in others:
                others.remove(size)
        return f"carries {others[0]} parallel streams of width {d} {returned}; which of them is meant cannot be said"
    if len(shape) == 3 and shape[-1] != d and shape[-1] % d == 0:
        return (
            f"carries {shape[-1] // d} parallel streams of width {d} {returned}; which of them is meant cannot be said"
        )
    if len(shape) != 3 or shape[-1] != d:
        return f"has blocks that return no stream of width {d} {returned}"
    if shape[0] != rows:
        return f"runs {shape[0]} rows where it is given {rows} {returned}, so no row can be told its plan"
    return f"runs {shape[1]} tokens where it is given {tokens} {returned}"


def given_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """What a forward pass reads, (batch, tokens, …): ids, or embeddings; None where neither is shown."""
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name]
    return None


@dataclass
class _Seen:
    """One pass, as ordinary hooks saw it."""

    given: int | None = None  # tokens that the decoder was given as ids or embeddings
    calls: dict[int, int] = field(default_factory=dict)
    kinds: dict[int, Any] = field(default_factory=dict)  # what a block returned, as a type
    streams: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    parted: dict[tuple[int, str], str] = field(default_factory=dict)
    odd: dict[tuple[int, str], str] = field(default_factory=dict)  # what stands where a tensor is needed

    def forget(self) -> None:
        """Begin anew, after a pass that broke off."""
        self.given = None
        for seen in (self.calls, self.kinds, self.streams, self.parted, self.odd):
            seen.clear()


def _look(model: nn.Module, layers: Layers, caller: str) -> Proof:
    decoder = model.get_submodule(layers.path.rpartition(".")[0])
    seen, handles = _Seen(), []
    names = list(inspect.signature(decoder.forward).parameters)
    try:
        handles.append(decoder.register_forward_pre_hook(partial(_note_given, seen, names), with_kwargs=True))
        for layer, block in enumerate(layers.blocks):
            handles.append(block.register_forward_hook(partial(_note_output, seen, layer)))
            for site in ("resid_pre", "attn_out", "mlp_out", "head_out"):
                try:
                    point = layers.point(layer, site)
                except ValueError:  # not offered there
                    continue
                keep = partial(_keep, seen, (layer, site), point)
                if point.kind == "pre":
                    handles.append(point.module.register_forward_pre_hook(keep, with_kwargs=True))
                else:
                    handles.append(point.module.register_forward_hook(keep, with_kwargs=True))
        for module in (model, decoder):
            if read_ids(model, [module], caller):
                break
            seen.forget()
        else:
            return Proof()
    finally:
        for handle in handles:
            handle.remove()
    return _judge(seen, layers)


def _judge(seen: _Seen, layers: Layers) -> Proof:
    ran = [layer for layer in range(layers.count) if seen.calls.get(layer)]
    rows, tokens = len(IDS), len(IDS[0])
    if seen.given is None:
        return Proof("gives its decoder neither input_ids nor inputs_embeds, so tokens cannot be counted")
    if not ran:
        return Proof(f"runs none of its {layers.count} blocks on plain text")
    if often := [layer for layer in ran if seen.calls[layer] > 1]:
        return Proof(f"runs block {often[0]} {seen.calls[often[0]]} times in one pass; an edit would act each time")
    for layer in ran:
        if isinstance(seen.kinds[layer], str):
            return Proof(
                f"has blocks that return {seen.kinds[layer]}; a tensor, or a tuple that begins with one, is needed"
            )
        if (layer, "resid_pre") in seen.odd:
            return Proof(f"has blocks that are given {seen.odd[layer, 'resid_pre']}; a tensor is needed")
    shape = tuple(seen.streams[ran[0], "resid_post"].shape)
    virtual = shape[1] - tokens if len(shape) == 3 and shape[0] == rows and shape[2] == layers.d else 0
    if virtual > 0 and not (seen.given == shape[1] and _in_front(seen.streams.get((ran[0], "resid_pre")))):
        return Proof(f"adds {virtual} virtual tokens, not all of them in front of the text and before its decoder")
    for layer in ran:
        wrong = shape_refusal(tuple(seen.streams[layer, "resid_post"].shape), rows, tokens + max(virtual, 0), layers.d)
        if wrong:
            return Proof(wrong)
    idle = frozenset(set(range(layers.count)) - set(ran))
    split = {layer: reason for layer in ran if (reason := _off(seen, layer))}
    return Proof("", max(virtual, 0), idle, split, seen.parted)


def _in_front(stream: Tensor | None) -> bool:
    """Whether what the rows do not share, their last token, is the last column where the stream begins."""
    if stream is None or stream.dim() != 3 or stream.shape[0] != len(IDS):
        return False
    differs = (stream[0] != stream[1]).any(-1)
    return bool(differs[-1]) and not bool(differs[:-1].any())


def _off(seen: _Seen, layer: int) -> str:
    """Why attn_out + mlp_out is not resid_post - resid_pre; "" if it is, or if the two are not offered together."""
    for site in ("attn_out", "mlp_out"):
        if (layer, site) in seen.odd:
            return f"what {site} shows is {seen.odd[layer, site]}, no tensor"
    return sum_error(seen.streams, layer)


def sum_error(streams: Mapping[tuple[int, str], Tensor], layer: int) -> str:
    """Why what a pass showed at attn_out and mlp_out does not add up to resid_post - resid_pre; "" if it does.

    Args:
        streams: (layer, site) -> (batch, tokens, d), of the four sites; a block may have one of the two alone.
        layer: Which of them.
    """
    found = [streams.get((layer, site)) for site in ("attn_out", "mlp_out", "resid_pre", "resid_post")]
    if found[0] is None or found[2] is None or found[3] is None:
        return ""
    post = found[3]
    if any(part is not None and part.numel() != post.numel() for part in found):
        return "what they show has another size than the stream"
    wide = torch.promote_types(post.dtype, torch.float32)
    rest = (torch.zeros_like(post) if part is None else part.reshape(post.shape) for part in found[:3])
    attn, mlp, pre, end = (part.to(wide) for part in (*rest, post))
    rounding = 16 * torch.finfo(post.dtype).eps * (attn.abs() + mlp.abs() + pre.abs() + end.abs())
    error = (attn + mlp - (end - pre)).abs()
    if bool((error <= rounding).all()) or not bool(error.isfinite().all()):
        return ""
    return f"attn_out + mlp_out is off by {float(error.max()):.3g} from what the block adds to the stream"


def _note_given(
    seen: _Seen, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    tokens = given_tokens({**dict(zip(names, args, strict=False)), **kwargs})
    seen.given = None if tokens is None else tokens.shape[1]


def _note_output(seen: _Seen, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    seen.calls[layer] = seen.calls.get(layer, 0) + 1
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if is_distributed(first):
        seen.kinds[layer] = "a DTensor, split over processes"
    elif hasattr(output, "_fields") and sum(isinstance(x, Tensor) and x.shape == first.shape for x in output) > 1:
        seen.kinds[layer] = f"a {type(output).__name__} of several streams"  # reversible blocks (Reformer)
    elif isinstance(first, Tensor):
        seen.kinds[layer] = type(output)
        seen.streams[layer, "resid_post"] = first.detach().clone()
    else:
        seen.kinds[layer] = f"a {type(first).__name__}"


def _keep(
    seen: _Seen,
    key: tuple[int, str],
    point: Point,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any = None,
) -> None:
    try:
        x = point.read(args, kwargs, output)
    except NoStream as found:
        seen.odd[key] = found.kind
        return
    if is_distributed(x):
        seen.parted[key] = "it is a DTensor, of which each process holds a part (tensor parallelism)"
    elif key[1] != "head_out":
        seen.streams[key] = x.detach().clone()
    elif x.shape[-1] != point.width:
        seen.parted[key] = f"a process holds {x.shape[-1]} of its {point.width} values (tensor parallelism)"
