"""Plans as weights: what a hook would do at every token, written into the matrices that write into the stream.

The stream is a sum: embeddings, plus what each attention and each MLP adds. Each summand comes out of one linear map
Wh + b, so two edits need no hook:

    Ablate   (I - VVᵀ)(Wh + b) = (W - VVᵀW)h + (b - VVᵀb)          weight orthogonalisation
    Add      (Wh + b) + c·v    = Wh + (b + c·v)

An edit is baked at its own place: `attn_out` and `mlp_out` of a layer into the output projection there, `resid_pre` of
layer 0 into the embeddings, a vector at `resid_post` into the bias of that layer's MLP. Ablating at `resid_post`
is no product of weights, since the stream there also holds what earlier layers wrote; ablating each summand is
(`everywhere`), and it never lets the direction arise.

Nothing is assumed about names: one short forward proves, before any weight changes, that the projection found makes
what is added to the stream. A norm in between (Gemma 2 and 3, OLMo 2), a mixture of experts or a norm behind the
embedding (BLOOM) fails it and is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import FLOATS
from steerfast.edits.base import Intervention, untrained
from steerfast.edits.linear import Ablate, Add
from steerfast.models.layers import Layers, evaluating, find_layers, gathers_weights, is_distributed, refuse_flat
from steerfast.models.points import Point
from steerfast.plan import Plan, as_plan

_PROBE = 8  # tokens of the forward that proves the places
_CHUNK = 1 << 14  # rows of an embedding that are projected at once
_EMBEDDING = ("resid_pre", 0)


def bake(model: nn.Module, plan: Plan | dict[Any, Any]) -> nn.Module:
    """Write a plan into a model's weights, in place; the model then needs no steerfast and saves as any checkpoint.

        W ← W - VVᵀW,  b ← b - VVᵀb   for Ablate;      b ← b + c·v   for Add

    Logits equal those of the hooked model up to the rounding of the weights' dtype. (A hook leaves padding alone and
    weights do not, which no real token sees.) Everything is checked before the first weight changes. Nothing is copied
    except a head that shares the embedding's weights, which is untied first, with a warning; to keep the original, pass
    `copy.deepcopy(model)`.

    Args:
        model: A transformers causal language model whose blocks add linear maps to the stream: no norm after them, no
            mixture of experts, no quantised weights.
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
    layers = find_layers(model, "bake")
    model = getattr(model, "_orig_mod", model)
    plan = as_plan("bake", plan)
    _check_model(model, layers, plan)
    edits = _by_writer(plan, layers)
    writers = _prove(model, layers, edits)
    if _EMBEDDING in edits:
        _untie(model, writers[_EMBEDDING])
    with torch.no_grad():
        for place, chain in edits.items():
            for edit in chain:
                for writer in writers[place]:
                    writer.apply(edit)
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
    places: list[tuple[str, int]] = [_EMBEDDING]
    for layer in range(layers.count):
        for site in ("attn_out", "mlp_out"):
            layers.point(layer, site, "everywhere")
            places.append((site, layer))
    return Plan(dict.fromkeys(places, edit), model=getattr(model, "_orig_mod", model))


@dataclass(frozen=True, eq=False)
class _Writer:
    """A map that writes into the stream: its parameters, and what the block multiplies its output with."""

    module: nn.Module
    path: str
    rows: bool  # the weight's rows are in the stream's space (an embedding, a Conv1D); else its columns' outputs are
    scale: float

    def apply(self, edit: Intervention) -> None:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        bias: Tensor | None = getattr(self.module, "bias", None)
        if isinstance(edit, Ablate):
            basis = edit.tensors()["direction"].to(weight.device, _wide(weight.dtype))
            _project(weight if self.rows else weight.T, basis)
            if bias is not None:
                _project(bias[None], basis)
        elif isinstance(edit, Add) and bias is not None:
            v = edit.tensors()["vector"].to(bias.device, _wide(bias.dtype))
            bias.copy_(bias.to(v) + edit.strength / self.scale * v)


def _project(rows: Tensor, basis: Tensor) -> None:
    """rows ← rows - rows·VᵀV in place, a chunk at a time, rounded once to the rows' dtype."""
    for first in range(0, rows.shape[0], _CHUNK):
        part = rows[first : first + _CHUNK]
        wide = part.to(basis)
        part.copy_(wide - (wide @ basis.T) @ basis)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- what can be baked ------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module, layers: Layers, plan: Plan) -> None:
    if "_steerfast" in vars(model):
        raise RuntimeError("bake: the model is being steered or was prepared; remove the handles, or load it anew")
    quantised = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    if any(found is not None for found in quantised):
        raise ValueError(f"bake: {layers.name} has quantised weights, which take no exact edit; load it unquantised")
    _check_whole(model, layers)
    if plan.positions != "all":
        raise ValueError(f"bake: weights act at every position; this plan has positions={plan.positions!r}, use steer")
    if plan.model is not None and (plan.model.width, plan.model.layers) != (layers.d, layers.count):
        raise ValueError(
            f"bake: the plan was made for {plan.model.name} (width {plan.model.width}, {plan.model.layers} layers); "
            f"{layers.name} has width {layers.d} and {layers.count} layers"
        )
    widths = {edit.width for chain in plan.edits.values() for edit in chain}
    if widths != {layers.d}:
        raise ValueError(f"bake: the plan's directions have width {sorted(widths)}; {layers.name} has {layers.d}")


def _check_whole(model: nn.Module, layers: Layers) -> None:
    """Refuse weights of which each process holds a part; FSDP shows some whole between two passes, and forgets what they took."""
    refuse_flat(model, "bake")
    parted = [name for name, parameter in model.named_parameters() if is_distributed(parameter)]
    if parted or gathers_weights(model):
        raise ValueError(
            f"bake: {layers.name} keeps its weights in parts{f' ({parted[0]})' if parted else ''}, one for each process; "
            "bake in one process, save, and load what was saved in all of them"
        )


def _by_writer(plan: Plan, layers: Layers) -> dict[tuple[str, int], list[Intervention]]:
    """The plan's edits by the place whose weights take them: a vector behind the MLP goes into the MLP."""
    found: dict[tuple[str, int], list[Intervention]] = {}
    order = {"attn_out": 0, "mlp_out": 1, "resid_post": 2, "resid_pre": 3, "head_out": 4}
    for (site, given), chain in sorted(plan.edits.items(), key=lambda item: order[item[0][0]]):
        layer = layers.resolve(given, "bake")
        place = (site, layer)
        for edit in chain:
            _check_edit(edit, site, layer)
        if site == "resid_post":
            place = ("mlp_out", layer)
        elif site == "resid_pre" and layer > 0:
            place = ("mlp_out", layer - 1)
        found.setdefault(place, []).extend(chain)
    return found


def _check_edit(edit: Intervention, site: str, layer: int) -> None:
    where = f"{type(edit).__name__} at {site} {layer}"
    untrained("bake", edit)
    if not isinstance(edit, (Ablate, Add)):
        raise ValueError(
            f"bake: {where} is not linear in the stream; bake takes Ablate and Add, for the rest use steer"
        )
    if edit.by_token:
        raise ValueError(
            f"bake: {where} adds a row of its own to each prompt token, which no weight tells apart; use steer"
        )
    if edit.keep_norm:
        raise ValueError(f"bake: {where} has keep_norm=True, which depends on each token's norm; use steer")
    if site == "head_out":
        raise ValueError(f"bake: {where} acts before the attention's output projection; use attn_out, or steer")
    if isinstance(edit, Ablate) and (site == "resid_post" or (site == "resid_pre" and layer > 0)):
        raise ValueError(
            f"bake: {where} also removes what earlier layers wrote, which is no product of weights; ablate what is "
            "written instead: everywhere(model, Ablate(...)), or use steer"
        )
    if isinstance(edit, Add) and (site, layer) == _EMBEDDING:
        raise ValueError(f"bake: {where} has no bias to go into; add at resid_post of a layer, or use steer")


# --- where it goes: measured, not guessed -----------------------------------------------------------------------------


def _prove(
    model: nn.Module, layers: Layers, edits: dict[tuple[str, int], list[Intervention]]
) -> dict[tuple[str, int], list[_Writer]]:
    """The writers of each place, proven by one short forward."""
    sites, calls = _observe(model, layers, [place for place in edits if place != _EMBEDDING])
    writers: dict[tuple[str, int], list[_Writer]] = {}
    for place, chain in edits.items():
        if place == _EMBEDDING:
            writers[place] = _embeddings(model, layers, sites[place], calls)
            continue
        writer = _projection(layers, place, sites[place], calls)
        if any(isinstance(edit, Add) for edit in chain) and getattr(writer.module, "bias", None) is None:
            raise ValueError(
                f"bake: {writer.path} of this {layers.name} has no bias for Add at {place[0]} {place[1]}; a checkpoint "
                "has room for a vector only where its config has an output bias (mlp_bias, attention_bias); use steer"
            )
        writers[place] = [writer]
    _check_shared(model, layers, [w for place, found in writers.items() for w in found], _EMBEDDING in edits)
    return writers


@dataclass(frozen=True, eq=False)
class _Call:
    """What one map did in the probe."""

    path: str
    module: nn.Module
    output: Tensor
    plain: bool  # the output is that of the weight and bias alone


def _observe(
    model: nn.Module, layers: Layers, places: list[tuple[str, int]]
) -> tuple[dict[tuple[str, int], Tensor], list[_Call]]:
    """One forward: the tensors of the places and of resid_pre 0, and every map to the stream's width that ran."""
    sites: dict[tuple[str, int], Tensor] = {}
    calls: list[_Call] = []
    points: dict[tuple[str, int], Point] = {place: layers.point(place[1], place[0], "bake") for place in places}
    points[_EMBEDDING] = layers.point(0, "resid_pre", "bake")
    inside = {f"{layers.path}.{layer}" for _, layer in places}

    def keep(place: tuple[str, int]) -> Callable[[Tensor], None]:
        return lambda x: sites.update({place: x.clone().reshape(-1, layers.d).float()})

    def watch(path: str) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[-1:] == (layers.d,) and output.is_floating_point():
                flat = output.clone().reshape(-1, layers.d).float()
                calls.append(_Call(path, module, flat, _is_plain(module, args, output)))

        return after

    handles = [point.attach(keep(place)) for place, point in points.items()]
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or (_is_map(module) and any(path.startswith(f"{p}.") for p in inside)):
            handles.append(module.register_forward_hook(watch(path)))
    vocabulary = _config(model).get_text_config().vocab_size
    ids = torch.arange(3, 3 + _PROBE)[None] % vocabulary
    try:
        with evaluating(model):
            model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sites, calls


def _is_map(module: nn.Module) -> bool:
    transposed = hasattr(module, "nf") and isinstance(getattr(module, "weight", None), Tensor)  # Conv1D
    return isinstance(module, nn.Linear) or transposed


def _is_plain(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether a map does what its weight and bias say: no adapter, no quantised storage."""
    weight: Any = module.weight
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or not args:
        return False
    if isinstance(module, nn.Embedding):
        return weight.shape[-1] == output.shape[-1]
    x, bias = args[0], getattr(module, "bias", None)
    expected = nn.functional.linear(x, weight.T if hasattr(module, "nf") else weight, bias)
    return expected.shape == output.shape and _same(output.float(), expected.float(), output.dtype)


def _same(a: Tensor, b: Tensor, dtype: torch.dtype, terms: Tensor | None = None) -> bool:
    """Equal up to the rounding of a few additions in a dtype."""
    largest = max(float(t.abs().max()) for t in (a, b, b if terms is None else terms))
    return float((a - b).abs().max()) <= 32 * torch.finfo(dtype).eps * largest


def _projection(layers: Layers, place: tuple[str, int], site: Tensor, calls: list[_Call]) -> _Writer:
    """The one linear map inside the block whose output is what is added to the stream."""
    point = layers.point(place[1], place[0], "bake")
    block = f"{layers.path}.{place[1]}."
    dtype = next(point.module.parameters()).dtype
    for call in calls:
        if call.path.startswith(block) and call.plain and call.output.shape == site.shape:
            stream = call.output if point.residual is None else torch.cat([call.output, site + call.output])
            if _same(call.output * point.scale, site, dtype, stream):
                return _Writer(call.module, call.path, hasattr(call.module, "nf"), point.scale)
    matrices = any(parameter.ndim > 1 for parameter in point.module.parameters())
    reason = (
        "no single linear map with plain weights makes it (a mixture of experts, an adapter, or quantised weights)"
        if matrices
        else f"a norm ({point.path}) stands between the projection and the stream"
    )
    raise ValueError(f"bake: {place[0]} {place[1]} of {layers.name} cannot be baked: {reason}; use steer")


def _embeddings(model: nn.Module, layers: Layers, site: Tensor, calls: list[_Call]) -> list[_Writer]:
    """The embeddings whose sum, up to one factor, is the stream that enters the first block."""
    if _config(model).get_text_config() is not _config(model):
        raise ValueError(f"bake: in {layers.name} images enter the stream beside the embeddings; use steer")
    outside = [call for call in calls if not call.path.startswith(f"{layers.path}.")]
    found = [call for call in outside if isinstance(call.module, nn.Embedding)]
    total = torch.zeros_like(site)
    for call in found:
        total += call.output if call.output.shape == site.shape else torch.nan
    factor = float((total * site).sum() / total.square().sum()) if total.any() and total.isfinite().all() else 0.0
    dtype = next(layers.blocks[0].parameters()).dtype
    if not factor or not all(call.plain for call in found) or not _same(total * factor, site, dtype, total):
        raise ValueError(
            f"bake: what enters the first block of {layers.name} is not the sum of its embeddings (a norm or "
            "projection follows them), so no weights keep a direction out of it; use steer"
        )
    return [_Writer(call.module, call.path, True, factor) for call in found]


def _check_shared(model: nn.Module, layers: Layers, writers: list[_Writer], embedding: bool) -> None:
    """Refuse a weight that other modules use as well; the head is untied instead."""
    head = _head(model)
    mine = {id(writer.module): writer for writer in writers}
    owners: dict[int, nn.Module] = {id(writer.module.weight): writer.module for writer in writers}
    for path, module in model.named_modules(remove_duplicate=False):
        owner = owners.get(id(getattr(module, "weight", None)))
        if owner is not None and (module is not owner or path != mine[id(owner)].path) and module is not head:
            raise ValueError(f"bake: {mine[id(owner)].path} of {layers.name} shares its weights with {path}; use steer")


def _head(model: Any) -> Any:
    """The output embedding, None if the model has none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _config(model: Any) -> Any:
    return model.config


def _untie(model: nn.Module, writers: list[_Writer]) -> None:
    """Give the head its own copy of the embedding's weights, and warn."""
    head = _head(model)
    if head is None or all(head.weight is not writer.module.weight for writer in writers):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    for config in (_config(model), _config(model).get_text_config()):
        config.tie_word_embeddings = False
    warnings.warn(
        f"bake: the head shared the embedding's weights; it now has its own copy, {head.weight.nbytes / 2**20:.0f} MB",
        UserWarning,
        stacklevel=3,
    )
