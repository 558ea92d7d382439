"""A model runner of vLLM with steering: blocks found by structure, hooks that call one opaque op, requests that come and go."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.models.layers import Layers
from steerfast.models.points import MIXER, NORM, SCALE, Unresolved, post_norm
from steerfast.probes.probe import Probe

from .edits import EditedPlace, Places
from .gating import Gates
from .pieces import Piece
from .plans import Chains, Library, ServedPlan
from .probes import ProbeLibrary
from .reading import Readers, Taken, Wanted
from .slots import Residents
from .table import Owner, RowTable
from .wire import Part

_MLP = re.compile(r"mlp|ffn|feed_forward|moe", re.IGNORECASE)

TRAVELLING = SCORES, DECISIONS = "steerfast_scores", "steerfast_decisions"
"""What stages of a pipeline hand on beside the stream."""
TRACE = "STEERFAST_TRACE"
"""A file to which every step appends what it applied and decided, as JSON lines; for tests and soaks: it waits for the device."""


class Steered:
    """The steering of one model on one device.

    Args:
        model: vLLM's model, loaded and not compiled yet.
        layers: How many decoder blocks it has.
        library: The plans that requests may name.
        chains: What each of them does, by name.
        slots: How many slots each bank has; at least those of whatever one request may name.
        tokens: How many tokens a batch can have, padding included.
        probes: The probes that requests may name.
        loaded: The probes themselves, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: int,
        library: Library,
        chains: dict[str, Chains],
        slots: int,
        tokens: int,
        probes: ProbeLibrary | None = None,
        loaded: Mapping[str, Probe] | None = None,
    ) -> None:
        self.library = library
        self._residents = Residents(slots)
        self._chains = chains
        self._requests: dict[str, tuple[Part, ...]] = {}
        self._names: dict[int, str] = {}  # slot -> plan
        self._loaded = False  # since the last step
        self._hooked: dict[tuple[str, int], int] = {}  # place -> width
        self.busy = False
        """Whether a step has anything to write or to take: a request is steered or reads, or was in the step before."""
        self._trace_file = os.environ.get(TRACE)
        self._lines: list[tuple[str, int, list[Any]]] = []  # of the running step: request, token of the batch, line
        wanted: dict[tuple[str, int], list[Any]] = {}
        for plan in chains.values():
            for place, chain in plan.items():
                wanted.setdefault(place, []).extend(chain.values())
        places: dict[str, EditedPlace] = {}
        device = next(model.parameters()).device
        read = {} if probes is None else probes.probes
        self.gates = Gates(chains, library.entered, layers, (slots, tokens), device)
        watched = self.gates.served(sum(one.columns for one in read.values()))
        self.dtype = stream_dtype(model)
        readable = {**(loaded or {}), **self.gates.probes}
        seen = (*read.values(), *watched.values())
        visited = dict.fromkeys([*wanted, *(one.place for one in seen)])
        found = self.look_at(model, layers, visited) if visited else {}
        self.gates.keep(found)
        for (site, layer), width in found.items():
            edits = wanted.get((site, layer), [])
            _check_width(
                (site, layer), width, [*edits, *(readable[one.name] for one in seen if one.place == (site, layer))]
            )
            if edits:
                places[f"{site}.{layer}"] = EditedPlace(edits, slots, width, self.dtype, device)
        self.table = RowTable(tokens, device, (slots, library.by_token), library.width)
        self.readers = Readers({**read, **watched}, readable, tokens, device, found)
        self.places = Places(places, self.table, self.readers, self.gates if watched else None)
        if library.slots <= slots:  # all of them stay, and no request ever waits for another's slot
            for served in library.plans.values():
                self._hold(served)
                self._residents.release(served)
            self._chains = {}
            for here in places.values():
                here.seal()

    def look_at(self, model: nn.Module, layers: int, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int]:
        """Have a hook at each of these places of a model that is not compiled yet.

        Returns:
            The width of each, without those whose layer lies on another stage of a pipeline.
        """
        found = decoder_blocks(model, layers)
        here = [place for place in places if _holds_modules(found.blocks[place[1]])]
        for place in here:
            if place not in self._hooked:
                self._hooked[place] = _hook(found, *place)
        return {place: self._hooked[place] for place in here}

    def expect_drafts(self, drafts: int) -> None:
        """A step may take back up to so many tokens at a request's end, and with them what spans and conditions remember."""
        self.table.remember(drafts + 1)
        self.gates.remember(drafts + 1)

    def start(self, request: str, prompt: int, parts: tuple[Part, ...], wanted: Wanted | None = None) -> None:
        """A request arrives, with its prompt's length in tokens, and with what it reads."""
        self.end([request])
        owners: list[Owner] = []
        for part in parts:
            numbers = self._hold(part.served)
            if part.strength != 0.0:
                where = part.pieces(prompt)
                for (slot, *_), tokens in zip(part.served.runs(numbers), part.served.columns, strict=True):
                    pieces = (Piece(0, min(tokens, prompt)),) if tokens else where
                    owners += [Owner(slot, part.strength, *piece) for piece in pieces]
        self.busy = self.busy or bool(parts) or wanted is not None
        if parts:
            self._requests[request] = parts
        self.table.put(request, owners)
        self.gates.start(request, prompt, [part.served.name for part in parts if part.served.gated])
        if wanted is not None:
            self.readers.start(request, wanted)

    def end(self, requests: Iterable[str]) -> None:
        """Requests have left, or were preempted by a runner that will be told of them anew."""
        for request in requests:
            for part in self._requests.pop(request, ()):
                self._residents.release(part.served)
            self.table.drop(request)
            self.gates.end(request)
            self.readers.end(request)

    def step(
        self, requests: Iterable[str], starts: Tensor, positions: Tensor, tokens: int, ids: Tensor | None = None
    ) -> None:
        """Before a batch runs: send what has changed to the device and write its row table. Only where steering is `busy`."""
        self.busy = bool(self._requests) or bool(self.readers)
        if self._loaded:
            self.places.forget()
            for place in self.places.places.values():
                place.bank.commit()
            self._loaded = False
        self.table.fill(requests, starts, positions, tokens, ids)
        gated = self.gates.begin(requests, starts, positions, tokens)
        self.readers.begin(requests, starts, positions, tokens, gated)
        if self._trace_file is not None:
            self._lines = self._applied(requests, starts, positions[:tokens], ids)

    def take(self) -> Taken | None:
        """What the requests of the step that has run have read; None: nobody reads."""
        if self._trace_file is not None:
            self._trace(self._trace_file)
        return self.readers.take()

    @property
    def travels(self) -> bool:
        """Whether a later stage of a pipeline must be told what probes have found and conditions decided before it."""
        return self.readers.scores.shape[1] > 0

    def hand_on(self) -> dict[str, Tensor]:
        """What the next stage of a pipeline must know of the step that has run on this one."""
        self._lines = []  # the last stage writes them
        parts = {SCORES: self.readers.hand_on(), DECISIONS: self.gates.hand_on()}
        return {name: part for name, part in parts.items() if part is not None}

    def receive(self, parts: Mapping[str, Tensor]) -> None:
        """What the stage before this one has handed on, before the same step runs here."""
        if SCORES in parts:
            self.readers.receive(parts[SCORES])
        if DECISIONS in parts:
            self.gates.receive(parts[DECISIONS])

    @property
    def reading(self) -> int:
        """Requests in flight that read."""
        return len(self.readers)

    @property
    def steered(self) -> int:
        """Requests in flight that are steered."""
        return len(self.table)

    @property
    def held(self) -> int:
        """Plans that a request in flight holds."""
        return self._residents.held

    def _hold(self, served: ServedPlan) -> tuple[int, ...]:
        """The slots of a plan, which is now held and loaded."""
        numbers, emptied, missing = self._residents.hold(served)
        for slot in emptied:
            for place in self.places.places.values():
                place.unload(slot)
            self.gates.unload(slot)
        if missing:
            for (site, layer), chain in self._chains[served.name].items():
                here = self.places.places.get(f"{site}.{layer}")
                if here is None:
                    continue
                for number, edit in chain.items():
                    here.load(numbers[number], edit)
                    self.gates.load(served.name, f"{site}.{layer}", number, numbers[number])
            for run in served.runs(numbers):
                self.table.spread(run)
            self._names |= dict.fromkeys(numbers, served.name)
            self._loaded = True
        return numbers

    def _applied(
        self, requests: Iterable[str], starts: Tensor, positions: Tensor, ids: Tensor | None
    ) -> list[tuple[str, int, list[Any]]]:
        """What the kernels will read, said in words: request, position, token, and (plan, strength) of its slots."""
        rows, scale = self.table.rows[: self.table.tokens].tolist(), self.table.scale[: self.table.tokens].tolist()
        bounds, where, lines = starts.tolist(), positions.tolist(), []
        tokens = [None] * len(where) if ids is None else ids[: len(where)].tolist()
        for i, request in enumerate(requests if rows else ()):
            for token in range(bounds[i], bounds[i + 1]):
                applied = [[self._names[s], w] for s, w in zip(rows[token], scale[token], strict=True) if s >= 0]
                lines.append((request, token, [request, where[token], tokens[token], applied]))
        return lines

    def _trace(self, path: str) -> None:
        """Write these lines, each with what the conditions of its request have decided: at once, for other workers do, too."""
        written = ""
        for request, token, line in self._lines:
            plans = [part.served.name for part in self._requests.get(request, ())]
            written += json.dumps([*line, self.gates.decided(plans, token)]) + "\n"
        with open(path, "ab", buffering=0) as file:
            file.write(written.encode())
        self._lines = []


def _check_width(place: tuple[str, int], width: int, what: Iterable[Any]) -> None:
    """Refuse what was made for other heads than a model has: its config does not say the width of head_out for every layer."""
    for one in what if place[0] == "head_out" else ():
        if one.width != width:
            raise ValueError(
                f"steerfast: {place[0]} of layer {place[1]} has width {width} in this model, and {one!r} has {one.width}; leave "
                "it out"
            )


def decoder_blocks(model: nn.Module, count: int) -> Layers:
    """The decoder blocks of a vLLM model: its one list of `count` modules that hold modules of their own, or lie elsewhere.

    Raises:
        ValueError: there is none, or more than one.
    """
    name = type(model).__name__
    text: Any = model.get_language_model() if hasattr(model, "get_language_model") else model  # type: ignore[operator]
    lists = {
        path: module
        for path, module in text.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and any(map(_holds_modules, module))
    }
    # On a stage of a pipeline there stands something empty for each block of the others.
    found = {path: blocks for path, blocks in lists.items() if all(map(_holds_modules, blocks))} or lists
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ValueError(
            f"steerfast: {name} has {len(outer)} lists of {count} decoder blocks ({', '.join(outer) or 'none'}); expected one"
        )
    width = int(text.config.get_text_config().hidden_size)
    return Layers(tuple(found[outer[0]]), outer[0], width, name)


def _holds_modules(block: nn.Module) -> bool:
    return any(True for _ in block.children())


def allocated(device: torch.device) -> int:
    """Bytes of a GPU's memory that tensors of this process take; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def stream_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the stream: that of the norms and embeddings, which quantisation leaves alone."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return next(parameter.dtype for parameter in model.parameters() if parameter.dtype in floats)


def _hook(found: Layers, site: str, layer: int) -> int:
    """One hook per place, and the width there. It holds nothing but the place's name, so that a compiled graph can be kept."""
    place = f"{site}.{layer}"
    block = found.blocks[layer]
    if site == "resid_post":
        if _carries_two(block):
            block.register_forward_hook(partial(_after_pair, place))
        else:
            block.register_forward_hook(partial(_after, place))
    elif site == "resid_pre":  # of layer 0: what the embedding gives
        block.register_forward_pre_hook(partial(_before, place), with_kwargs=True)
    elif site == "head_out":
        projection, width = _projection(block, found)
        projection.register_forward_pre_hook(partial(_entering, place), with_kwargs=True)
        return width
    else:
        _added(block, site, found.name).register_forward_hook(partial(_after, place))
    return found.d


def _projection(block: nn.Module, found: Layers) -> tuple[nn.Module, int]:
    """The attention's last map: the one linear layer of the block's mixer that takes what several devices hold parts of.

    Where adapters may be loaded it is what stands around that layer, which is itself never called.
    """
    mixers = [child for name, child in block.named_children() if MIXER.search(name) and any(child.children())]
    maps = {
        name.removesuffix(".base_layer"): (mixer.get_submodule(name.removesuffix(".base_layer")), module)
        for mixer in mixers
        for name, module in mixer.named_modules()
        if hasattr(module, "input_is_parallel") and getattr(module, "output_size", 0) == found.d
    }
    if len(mixers) != 1 or len(maps) != 1:
        raise ValueError(
            f"steerfast: head_out cannot be located in a {type(block).__name__} ({found.name}): expected one attention with one "
            f"output projection, found {', '.join(maps) or 'none'}; use attn_out, resid_pre or resid_post"
        )
    ((called, projection),) = maps.values()
    return called, int(projection.input_size)


def _added(block: nn.Module, site: str, model: str) -> nn.Module:
    """The child whose output is added to the stream as it is: the attention or the MLP, or the norm behind it.

    Found by name: vLLM packs weights away on some platforms, so the shapes by which
    `steerfast.models.layers` knows them are gone.
    """
    children = [name for name, _ in block.named_children()]
    parts = [name for name, child in block.named_children() if any(child.children())]  # no norm, no dropout
    mixers = [name for name in parts if MIXER.search(name)]
    mlps = [name for name in parts if _MLP.search(name)]
    chosen = mlps if site == "mlp_out" else mixers
    scaled = [name for name, value in vars(block).items() if isinstance(value, float) and SCALE.search(name)]
    if len(mixers) != 1 or len(mlps) != 1 or scaled:
        raise ValueError(
            f"steerfast: {site} cannot be located in a {type(block).__name__} ({model}): expected one attention and one MLP "
            f"and no scale among {', '.join(children + scaled)}; use resid_pre or resid_post"
        )
    try:
        norm = post_norm([name for name in children if NORM.search(name)], mlp=site == "mlp_out")
    except Unresolved as reason:
        raise ValueError(
            f"steerfast: {site} cannot be located in a {type(block).__name__} ({model}): {reason}"
        ) from None
    return block.get_submodule(norm or chosen[0])


def _after_pair(place: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    hidden, residual = output
    torch.ops.steerfast.engine_edit_.default(residual, hidden, place)


def _after(place: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor):
        raise RuntimeError(
            f"steerfast: {place} ({type(module).__name__}) gives a {type(output).__name__} that is neither the stream nor "
            "(hidden, residual); this model cannot be steered there"
        )
    torch.ops.steerfast.engine_edit_.default(output, None, place)


def _before(place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = list(inspect.signature(module.forward).parameters)
    if "hidden_states" in kwargs:
        hidden = kwargs["hidden_states"].clone()
        torch.ops.steerfast.engine_edit_.default(hidden, None, place)
        return args, {**kwargs, "hidden_states": hidden}
    index = names.index("hidden_states")
    hidden = args[index].clone()
    torch.ops.steerfast.engine_edit_.default(hidden, None, place)
    return (*args[:index], hidden, *args[index + 1 :]), kwargs


def _entering(place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What the heads give is nobody else's: it is edited in place."""
    (heads,) = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    torch.ops.steerfast.engine_edit_.default(heads, None, place)


def _carries_two(block: nn.Module) -> bool:
    """Whether a block carries the stream as (hidden, residual): its forward takes a residual, and its norms add the two.

    Proven on the block's own norm, not guessed from the forward's signature: Cohere's blocks hand a residual through
    that their norm ignores, and there the stream is `hidden` alone.
    """
    if "residual" not in inspect.signature(block.forward).parameters:
        return False
    for name, norm in block.named_children():
        formula = getattr(norm, "forward_native", norm.forward)  # vLLM's own forward takes anything
        if "norm" not in name or "residual" not in inspect.signature(formula).parameters:
            continue
        weight = next(norm.parameters())
        x = torch.linspace(-1, 1, weight.shape[-1], dtype=weight.dtype, device=weight.device)[None].repeat(2, 1)
        out = norm(x.clone(), (0.5 * x).clone())
        if isinstance(out, tuple) and len(out) == 2 and torch.allclose(out[1].float(), 1.5 * x.float(), atol=0.02):
            return True
    return False
