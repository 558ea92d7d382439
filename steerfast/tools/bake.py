"""Plans as weights: what a hook would do at every token, written into the matrices that write into the stream.

The stream is a sum: embeddings, plus what each attention and each MLP adds. Each summand comes out of one linear map
Wh + b, so two edits need no hook:

    Ablate   (I - VVᵀ)(Wh + b) = (W - VVᵀW)h + (b - VVᵀb)          weight orthogonalisation
    Add      (Wh + b) + c·v    = Wh + (b + c·v)

An edit is baked at its own place: `attn_out` and `mlp_out` of a layer into the output projection there, `resid_pre` of
layer 0 into the embeddings, a vector at `resid_post` into the bias of that layer's MLP. Ablating at `resid_post`
is no product of weights, since the stream there also holds what earlier layers wrote; ablating each summand is
(`everywhere`), and it never lets the direction arise.

Nothing is assumed about names: one short forward proves, before any weight changes, that the projections found (in a mixture,
every expert's) make what is added to the stream. A norm in between (Gemma 2 and 3, OLMo 2) or behind the embedding (BLOOM)
fails it and is refused.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from steerfast.edits.base import Intervention
from steerfast.edits.linear import Ablate, Add
from steerfast.models.layers import class_name, find_layers
from steerfast.plan import Plan

from .weights import EMBEDDING, Writer, changes, head_of, project, unwrapped, wide


def bake(model: nn.Module, plan: Plan | dict[Any, Any]) -> nn.Module:
    """Write a plan into a model's weights, in place; the model then needs no steerfast and saves as any checkpoint.

        W ← W - VVᵀW,  b ← b - VVᵀb   for Ablate;      b ← b + c·v   for Add

    Logits equal those of the hooked model up to the rounding of the weights' dtype. (A hook leaves padding alone and
    weights do not, which no real token sees.) Everything is checked before the first weight changes. Nothing is copied
    except a head that shares the embedding's weights, which is untied first, with a warning; to keep the original, pass
    `copy.deepcopy(model)`.

    Args:
        model: A transformers causal language model whose blocks add linear maps to the stream, mixtures of experts among
            them: no norm after them, no quantised weights.
        plan: `Ablate` at `attn_out` or `mlp_out` of any layer or at `resid_pre` of layer 0, `everywhere` for all of
            them; `Add` at `attn_out`, `mlp_out` or `resid_post` where that projection has a bias. positions="all", no
            keep_norm.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: what cannot be baked, by name and with the reason; no weight has changed.
        RuntimeError: the model is being steered.

    Reference:
        Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717),
        section 4.1.

    Example:
        >>> sf.bake(model, sf.tools.everywhere(model, sf.Ablate(r))).save_pretrained("ablated")  # doctest: +SKIP
    """
    found = changes("bake", model, plan)
    model = unwrapped(model)
    _check_room(model, found)
    if any(place == EMBEDDING for place, _, _ in found):
        _untie(model, [writer for place, _, writers in found if place == EMBEDDING for writer in writers])
    with torch.no_grad():
        for _, chain, writers in found:
            for edit in chain:
                for writer in writers:
                    _apply(edit, writer)
    return model


def everywhere(model: nn.Module, edit: Intervention) -> Plan:
    """The plan that edits everything written into the stream: the embeddings, and each attention's and MLP's output.

    With `Ablate` no part of the model ever sees the direction: the hooked form of weight orthogonalisation.

    Args:
        model: A transformers causal language model.
        edit: What is done at each place, usually `Ablate`.

    Returns:
        The plan, made for this model.

    Raises:
        TypeError, ValueError: not a model or not an intervention, another width, or blocks that do not show these
            sites.

    Example:
        >>> with sf.steer(model, sf.tools.everywhere(model, sf.Ablate(r))):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    layers = find_layers(model, "everywhere")
    places: list[tuple[str, int]] = [EMBEDDING]
    for layer in range(layers.count):
        for site in ("attn_out", "mlp_out"):
            layers.point(layer, site, "everywhere")
            places.append((site, layer))
    return Plan(dict.fromkeys(places, edit), model=getattr(model, "_orig_mod", model))


def _apply(edit: Intervention, writer: Writer) -> None:
    rows, bias = writer.rows(), writer.offset()
    if isinstance(edit, Ablate):
        basis = edit.tensors()["direction"].to(rows.device, wide(rows.dtype))
        project(rows, basis)
        if bias is not None:
            project(bias, basis)
    elif isinstance(edit, Add) and bias is not None:
        v = edit.tensors()["vector"].to(bias.device, wide(bias.dtype))
        bias.copy_(bias.to(v) + edit.strength / writer.scale * v)


def _check_room(model: nn.Module, found: list[tuple[tuple[str, int], list[Intervention], list[Writer]]]) -> None:
    """Refuse a vector where the checkpoint has no bias for it."""
    for place, chain, writers in found:
        if not any(isinstance(edit, Add) for edit in chain):
            continue
        if place == EMBEDDING:
            raise ValueError(
                "bake: Add at resid_pre 0 has no bias to go into; add at resid_post of a layer, or use steer"
            )
        where = f"Add at {place[0]} {place[1]}"
        if len(writers) > 1 or writers[0].rows().ndim > 2:
            raise ValueError(
                f"bake: {writers[0].path} of this {class_name(model)} is a part of a mixture of experts, which has no bias of "
                f"its own for {where}; use steer"
            )
        if writers[0].bias is None:
            raise ValueError(
                f"bake: {writers[0].path} of this {class_name(model)} has no bias for {where}; a checkpoint "
                "has room for a vector only where its config has an output bias (mlp_bias, attention_bias); use steer, "
                "or an adapter (steerfast.tools.write_lora)"
            )


def _untie(model: nn.Module, writers: list[Writer]) -> None:
    """Give the head its own copy of the embedding's weights, and warn."""
    head = head_of(model)
    if head is None or all(head.weight is not writer.module.weight for writer in writers):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    whole: Any = model.config
    for config in (whole, whole.get_text_config()):
        config.tie_word_embeddings = False
    warnings.warn(
        f"bake: the head shared the embedding's weights; it now has its own copy, {head.weight.nbytes / 2**20:.0f} MB",
        UserWarning,
        stacklevel=3,
    )
