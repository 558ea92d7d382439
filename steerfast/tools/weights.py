"""Which weights write into the stream, and what a plan does to them: shared by `bake` and `lora`.

The stream is a sum: embeddings, plus what each attention and each MLP adds. Nothing is assumed about names: one short
forward proves, before anything is written, which parameters make a summand and along which of their axes the stream lies.

A dense projection is the one linear map inside the block whose output is what is added. In a mixture of experts no map
is: there a parameter writes along an axis if projecting it along that axis changes the sum by what lies in the
projection's own direction and by nothing else, and all that do, projected together, must project the whole sum. Parameters
that differ in a number of their name alone (experts in a list) are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from steerfast._checks import FLOATS
from steerfast.edits.base import Intervention, untrained
from steerfast.edits.linear import Ablate, Add
from steerfast.models.layers import Layers, evaluating, find_layers, gathers_weights, home, is_distributed, refuse_flat
from steerfast.models.points import Point
from steerfast.ops.backends import in_full_precision
from steerfast.plan import Plan, as_plan

EMBEDDING = ("resid_pre", 0)
_PROBE = 8  # tokens of the forward that proves the places
_NOISE = 0.01
"""Of what a change of the embeddings does, what may come by another way: two passes may differ in last bits."""
_CHUNK = 1 << 14  # rows of an embedding that are projected at once


@dataclass(frozen=True, eq=False)
class Writer:
    """A map that writes into the stream: its parameters, and what the block multiplies its output with.

    Attributes:
        module: What holds them.
        path: Its dotted name inside the model.
        weight: Name of its weight (d_out, d_in), (d_in, d_out), (tokens, d), or of one matrix for each expert.
        axis: The weight's axis that is the stream's.
        bias: Name of its bias (d,), or of one row for each expert, (experts, d); None if it has none.
        scale: What the block multiplies the map's output with; of an embedding what the stream has of its rows.
        looks_up: Of an embedding: whether the rows are those that its input names, so that an adapter finds them, too.
    """

    module: nn.Module
    path: str
    weight: str
    axis: int
    bias: str | None
    scale: float
    looks_up: bool = True

    def rows(self) -> Tensor:
        """The weight, a view with the stream's axis last."""
        return _parameter(self.module, self.weight).movedim(self.axis, -1)

    def offset(self) -> Tensor | None:
        """The bias, None if there is none."""
        return None if self.bias is None else _parameter(self.module, self.bias)

    def parameters(self) -> dict[str, Tensor]:
        """Its parameters by their name inside the model."""
        names = [name for name in (self.weight, self.bias) if name is not None]
        return {f"{self.path}.{name}": _parameter(self.module, name) for name in names}


def changes(
    owner: str, model: nn.Module, plan: Plan | dict[Any, Any]
) -> list[tuple[tuple[str, int], list[Intervention], list[Writer]]]:
    """The places whose weights a plan changes, each with its edits in order and the maps that write there.

    Args:
        owner: Whose errors they are.
        model: A transformers causal language model; no weight of it changes.
        plan: `Ablate` and `Add`.

    Returns:
        (site, layer), edits, writers; an edit behind an MLP stands at that MLP.

    Raises:
        TypeError, ValueError: what no weights can say, by name and with the reason.
        RuntimeError: the model is being steered.
    """
    layers = find_layers(model, owner)
    model = unwrapped(model)
    plan = as_plan(owner, plan)
    _check_model(owner, model, layers, plan)
    edits = _by_writer(owner, plan, layers)
    writers = _proved(next(model.parameters()), owner, model, layers, list(edits))
    return [(place, chain, writers[place]) for place, chain in edits.items()]


@in_full_precision
def _proved(
    _: Tensor, owner: str, model: nn.Module, layers: Layers, places: list[tuple[str, int]]
) -> dict[tuple[str, int], list[Writer]]:
    return _Proof(owner, model, layers, [place for place in places if place != EMBEDDING]).writers(places)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` returned."""
    return getattr(model, "_orig_mod", model)


@in_full_precision
def project(rows: Tensor, basis: Tensor) -> None:
    """rows ← rows - rows·VᵀV in place, a part at a time, rounded once to the rows' dtype."""
    if rows.ndim == 1:
        rows = rows[None]
    parts = rows.unbind(0) if rows.ndim > 2 else rows.split(_CHUNK)
    for part in parts:
        wide = part.to(basis)
        part.copy_(wide - (wide @ basis.T) @ basis)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which weights of this dtype are edited."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_of(model: Any) -> Any:
    """The output embedding, None if the model has none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _parameter(module: nn.Module, name: str) -> Tensor:
    found: Tensor = getattr(module, name)
    return found


# --- what weights can say ---------------------------------------------------------------------------------------------


def _check_model(owner: str, model: nn.Module, layers: Layers, plan: Plan) -> None:
    if "_steerfast" in vars(model):
        raise RuntimeError(f"{owner}: the model is being steered or was prepared; remove the handles, or load it anew")
    quantised = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    if any(found is not None for found in quantised):
        raise ValueError(f"{owner}: {layers.name} has quantised weights, which take no exact edit; load it unquantised")
    _check_whole(owner, model, layers)
    if plan.positions != "all":
        raise ValueError(
            f"{owner}: weights act at every position; this plan has positions={plan.positions!r}, use steer"
        )
    if plan.model is not None and (plan.model.width, plan.model.layers) != (layers.d, layers.count):
        raise ValueError(
            f"{owner}: the plan was made for {plan.model.name} (width {plan.model.width}, {plan.model.layers} layers); "
            f"{layers.name} has width {layers.d} and {layers.count} layers"
        )
    widths = {edit.width for chain in plan.edits.values() for edit in chain}
    if widths != {layers.d}:
        raise ValueError(f"{owner}: the plan's directions have width {sorted(widths)}; {layers.name} has {layers.d}")


def _check_whole(owner: str, model: nn.Module, layers: Layers) -> None:
    """Refuse weights of which each process holds a part; FSDP shows some whole between two passes, and forgets what they took."""
    refuse_flat(model, owner)
    parted = [name for name, parameter in model.named_parameters() if is_distributed(parameter)]
    if parted or gathers_weights(model):
        raise ValueError(
            f"{owner}: {layers.name} keeps its weights in parts{f' ({parted[0]})' if parted else ''}, one for each process; "
            f"{owner} in one process, save, and load what was saved in all of them"
        )


def _by_writer(owner: str, plan: Plan, layers: Layers) -> dict[tuple[str, int], list[Intervention]]:
    """The plan's edits by the place whose weights take them: a vector behind the MLP goes into the MLP."""
    found: dict[tuple[str, int], list[Intervention]] = {}
    order = {"attn_out": 0, "mlp_out": 1, "resid_post": 2, "resid_pre": 3, "head_out": 4}
    for (site, given), chain in sorted(plan.edits.items(), key=lambda item: order[item[0][0]]):
        layer = layers.resolve(given, owner)
        place = (site, layer)
        for edit in chain:
            _check_edit(owner, edit, site, layer)
        if site == "resid_post":
            place = ("mlp_out", layer)
        elif site == "resid_pre" and layer > 0:
            place = ("mlp_out", layer - 1)
        found.setdefault(place, []).extend(chain)
    return found


def _check_edit(owner: str, edit: Intervention, site: str, layer: int) -> None:
    where = f"{type(edit).__name__} at {site} {layer}"
    untrained(owner, edit)
    if not isinstance(edit, (Ablate, Add)):
        raise ValueError(
            f"{owner}: {where} is not linear in the stream; weights take Ablate and Add, for the rest use steer"
        )
    if edit.by_token:
        raise ValueError(
            f"{owner}: {where} adds a row of its own to each prompt token, which no weight tells apart; use steer"
        )
    if edit.keep_norm:
        raise ValueError(f"{owner}: {where} has keep_norm=True, which depends on each token's norm; use steer")
    if site == "head_out":
        raise ValueError(f"{owner}: {where} acts before the attention's output projection; use attn_out, or steer")
    if isinstance(edit, Ablate) and (site == "resid_post" or (site == "resid_pre" and layer > 0)):
        raise ValueError(
            f"{owner}: {where} also removes what earlier layers wrote, which is no product of weights; ablate what is "
            "written instead: everywhere(model, Ablate(...)), or use steer"
        )


# --- where it goes: measured, not guessed -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """What one map did in the probe."""

    path: str
    module: nn.Module
    output: Tensor
    plain: bool  # the output is that of the weight and bias alone
    factor: float  # of an embedding: what it multiplies the rows with that its input names; 0 where it gives others


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the probe saw at a place: the site's tensor, (tokens, d), and what its module was called with."""

    stream: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Proof:
    """One short forward, and the maps that it shows to write at some places."""

    def __init__(self, owner: str, model: nn.Module, layers: Layers, places: list[tuple[str, int]]) -> None:
        self.owner, self.model, self.layers = owner, model, layers
        self.points: dict[tuple[str, int], Point] = {
            place: layers.point(place[1], place[0], owner) for place in [*places, EMBEDDING]
        }
        self.seen: dict[tuple[str, int], _Seen] = {}
        self.calls: list[_Call] = []
        self._observe()

    def writers(self, places: list[tuple[str, int]]) -> dict[tuple[str, int], list[Writer]]:
        """The writers of each place; weights that others use as well are refused."""
        found = {place: self._embeddings() if place == EMBEDDING else self._block(place) for place in places}
        self._check_shared([writer for writers in found.values() for writer in writers])
        return found

    def _observe(self) -> None:
        """Run the probe: the places, resid_pre 0 among them, and every map to the stream's width that ran."""
        inside = {f"{self.layers.path}.{layer}." for site, layer in self.points if (site, layer) != EMBEDDING}
        handles = []
        for place, point in self.points.items():
            handles += self._watch_point(place, point)
        for path, module in self.model.named_modules():
            if isinstance(module, nn.Embedding) or (_is_map(module) and path.startswith(tuple(inside))):
                handles.append(module.register_forward_hook(self._watch_map(path)))
        self._run(handles)

    def _run(self, handles: list[Any]) -> Tensor:
        """What the model makes of a few tokens with these hooks, which are then removed."""
        ids = torch.arange(3, 3 + _PROBE)[None] % _config(self.model).get_text_config().vocab_size
        try:
            with evaluating(self.model):
                found: Tensor = self.model(input_ids=ids.to(home(self.model)), use_cache=False)[0]
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _watch_point(self, place: tuple[str, int], point: Point) -> list[Any]:
        called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called.append((_copied(args), _copied(kwargs)))

        def keep(x: Tensor) -> None:
            self.seen[place] = _Seen(x.clone().reshape(-1, self.layers.d).float(), *called[-1])

        return [point.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True), point.attach(keep)]

    def _watch_map(self, path: str) -> Callable[..., None]:
        d = self.layers.d

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.shape[-1:] == (d,) and output.is_floating_point():
                flat = output.clone().reshape(-1, d).float()
                factor = _looked_up(module, args, flat) if isinstance(module, nn.Embedding) else 0.0
                plain = bool(factor) or _is_plain(module, args, output)
                self.calls.append(_Call(path, module, flat, plain, factor))

        return after

    def _block(self, place: tuple[str, int]) -> list[Writer]:
        """The one linear map inside the block whose output is what is added to the stream, or the parts of a mixture."""
        point, stream = self.points[place], self.seen[place].stream
        dtype = next(point.module.parameters()).dtype
        for call in self.calls:
            inside = call.path.startswith(f"{self.layers.path}.{place[1]}.")
            if inside and call.plain and call.output.shape == stream.shape:
                terms = call.output if point.residual is None else torch.cat([call.output, stream + call.output])
                if _same(call.output * point.scale, stream, dtype, terms):
                    bias = None if getattr(call.module, "bias", None) is None else "bias"
                    axis = 1 if hasattr(call.module, "nf") else 0
                    return [Writer(call.module, call.path, "weight", axis, bias, point.scale)]
        if not any(parameter.ndim > 1 for parameter in point.module.parameters()):
            raise self._refused(place, f"a norm ({point.path}) stands between the projection and the stream")
        mixture = _mixture(point, self.seen[place], self.layers.d)
        if not mixture:
            raise self._refused(place, "no plain weights make it by a product (an adapter, or quantised weights)")
        return mixture

    def _refused(self, place: tuple[str, int], reason: str) -> ValueError:
        return ValueError(
            f"{self.owner}: {place[0]} {place[1]} of {self.layers.name} is no product of weights: {reason}; use steer"
        )

    def _embeddings(self) -> list[Writer]:
        """The embeddings whose sum, up to one factor, is the stream that enters the first block."""
        layers, site = self.layers, self.seen[EMBEDDING].stream
        if _config(self.model).get_text_config() is not _config(self.model):
            raise ValueError(f"{self.owner}: in {layers.name} images enter the stream beside the embeddings; use steer")
        outside = [call for call in self.calls if not call.path.startswith(f"{layers.path}.")]
        found = [call for call in outside if isinstance(call.module, nn.Embedding)]
        total = torch.zeros_like(site)
        for call in found:
            total += call.output if call.output.shape == site.shape else torch.nan
        factor = float((total * site).sum() / total.square().sum()) if total.any() and total.isfinite().all() else 0.0
        dtype = next(layers.blocks[0].parameters()).dtype
        if not factor or not all(call.plain for call in found) or not _same(total * factor, site, dtype, total):
            raise ValueError(
                f"{self.owner}: what enters the first block of {layers.name} is not the sum of its embeddings (a norm or "
                "projection follows them), so no weights keep a direction out of it; use steer"
            )
        if self._lead_elsewhere([call.module for call in found]):
            raise ValueError(
                f"{self.owner}: the embeddings of {layers.name} reach more than its first block (later ones read them, too), "
                "which an edit of the stream does not touch and one of the weights does; use steer"
            )
        return [
            Writer(call.module, call.path, "weight", 1, None, factor * (call.factor or 1.0), bool(call.factor))
            for call in found
        ]

    def _lead_elsewhere(self, embeddings: list[nn.Module]) -> bool:
        """Whether turning embeddings around still acts where the first block is given what it had before, as in Zamba."""
        entered: list[Tensor] = []
        point = self.points[EMBEDDING]

        def turned() -> list[Any]:
            return [module.register_forward_hook(lambda _, __, output: output.flip(-1)) for module in embeddings]

        plain = self._run([point.attach(lambda x: entered.append(x.clone()))])
        whole = self._run(turned()) - plain
        beside = self._run([*turned(), point.attach(lambda _: entered[0])]) - plain
        return not float(beside.abs().max()) <= _NOISE * float(whole.abs().max())

    def _check_shared(self, writers: list[Writer]) -> None:
        """Refuse a weight that other modules use as well; a head may share the embedding's."""
        head = head_of(self.model)
        mine = {id(p): (name, w) for w in writers for name, p in w.parameters().items()}
        for path, module in self.model.named_modules(remove_duplicate=False):
            for name, parameter in module.named_parameters(path, recurse=False):
                own, writer = mine.get(id(parameter), (name, None))
                if own != name and not (
                    module is head and writer is not None and isinstance(writer.module, nn.Embedding)
                ):
                    raise ValueError(
                        f"{self.owner}: {own.rpartition('.')[0]} of {self.layers.name} shares its weights with {path}; use steer"
                    )


def _mixture(point: Point, seen: _Seen, d: int) -> list[Writer]:
    """The parameters of a module that together make what it adds, and nothing else; [] if there are none."""
    module, state = point.module, {**dict(point.module.named_parameters()), **dict(point.module.named_buffers())}
    if point.residual is not None or any(p.dtype not in FLOATS for p in module.parameters()):
        return []
    calm = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}
    args, kwargs = _floating(seen.args), _floating(seen.kwargs)
    basis = torch.randn(1, d, generator=torch.Generator().manual_seed(0)).to(next(module.parameters()).device)
    basis /= basis.norm()

    def added(changed: dict[str, Tensor]) -> Tensor:
        with evaluating(module):
            output = functional_call(module, {**calm, **changed}, args, kwargs)
        return point.read(args, kwargs, output).reshape(-1, d)

    before = added({})
    axes: dict[str, int] = {}
    for names in _alike(dict(module.named_parameters())):
        for axis in [i for i, size in enumerate(calm[names[0]].shape) if size == d]:
            change = added(_projected(calm, dict.fromkeys(names, axis), basis)) - before
            own = change @ basis.T @ basis
            if _same(change, own, torch.float32, before) and not _same(own, own * 0, torch.float32, before):
                axes.update(dict.fromkeys(names, axis))
                break
    whole = before - before @ basis.T @ basis
    if not axes or not _same(added(_projected(calm, axes, basis)), whole, torch.float32, before):
        return []
    return _grouped(point, axes)


def _alike(parameters: dict[str, Tensor]) -> list[list[str]]:
    """Names by groups that differ in numbers alone."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((re.sub(r"\d+", "#", name), tuple(parameter.shape)), []).append(name)
    return list(groups.values())


def _projected(state: dict[str, Tensor], axes: dict[str, int], basis: Tensor) -> dict[str, Tensor]:
    found = {}
    with torch.no_grad():
        for name, axis in axes.items():
            found[name] = state[name].clone()
            project(found[name].movedim(axis, -1), basis)
    return found


def _grouped(point: Point, axes: dict[str, int]) -> list[Writer]:
    """Weights with their biases: what one module holds under `x` or `x.weight`, and `x_bias` or `x.bias`."""
    writers, taken = [], set()
    for name, axis in axes.items():
        owner, _, leaf = name.rpartition(".")
        module = point.module.get_submodule(owner)
        if _parameter(module, leaf).ndim < 2 or leaf.endswith("bias"):
            continue
        prefix = f"{owner}." if owner else ""
        bias = next((b for b in ("bias", f"{leaf}_bias") if b != leaf and f"{prefix}{b}" in axes), None)
        taken |= {name, f"{prefix}{bias}"}
        writers.append(Writer(module, f"{point.path}.{owner}".rstrip("."), leaf, axis, bias, point.scale))
    return writers if set(axes) <= taken else []


def _copied(value: Any) -> Any:
    return _mapped(value, lambda t: t.clone())


def _floating(value: Any) -> Any:
    return _mapped(value, lambda t: t.float() if t.is_floating_point() else t)


def _mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with every tensor in them replaced."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {key: _mapped(item, fn) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, fn) for item in value)
    return value


def _is_map(module: nn.Module) -> bool:
    transposed = hasattr(module, "nf") and isinstance(getattr(module, "weight", None), Tensor)  # Conv1D
    return isinstance(module, nn.Linear) or transposed


def _is_plain(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> bool:
    """Whether a map does what its weight and bias say: no adapter, no quantised storage."""
    weight: Any = module.weight
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS or not args:
        return False
    if isinstance(module, nn.Embedding):  # rows of its own choice, as OPT's positions are, and no norm of them
        flat = output.reshape(-1, output.shape[-1]).to(weight)
        return weight.shape[-1] == flat.shape[-1] and all(bool((weight == row).all(1).any()) for row in flat)
    x, bias = args[0], getattr(module, "bias", None)
    expected = nn.functional.linear(x, weight.T if hasattr(module, "nf") else weight, bias)
    return expected.shape == output.shape and _same(output.float(), expected.float(), output.dtype)


def _looked_up(module: nn.Embedding, args: tuple[Any, ...], flat: Tensor) -> float:
    """The factor of an embedding whose output (tokens, d) is that times the rows that its input names; 0 of any other."""
    ids = args[0].flatten() if args and isinstance(args[0], Tensor) and not args[0].is_floating_point() else None
    weight = module.weight
    if ids is None or len(ids) != len(flat) or weight.shape[-1] != flat.shape[-1] or int(ids.max()) >= len(weight):
        return 0.0  # as of OPT's positions, which are counted from the mask that it is given
    rows = weight[ids].float()
    factor = float((rows * flat).sum() / rows.square().sum())
    return factor if _same(rows * factor, flat, weight.dtype) else 0.0


def _same(a: Tensor, b: Tensor, dtype: torch.dtype, terms: Tensor | None = None) -> bool:
    """Equal up to the rounding of a few additions in a dtype."""
    largest = max(float(t.abs().max()) for t in (a, b, b if terms is None else terms))
    return float((a - b).abs().max()) <= 32 * torch.finfo(dtype).eps * largest


def _config(model: Any) -> Any:
    return model.config
