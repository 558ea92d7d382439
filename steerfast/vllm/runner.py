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

TRACE = "STEERFAST_TRACE"
"""A file that every step appends its applied owners to, as JSON lines; for tests and soaks, since it waits for the device."""


class Steered:
    """The steering of one model on one device.

    Args:
        model: vLLM's model, loaded and not compiled yet.
        layers: How many decoder blocks it has.
        library: The plans that requests may name.
        chains: What each of them does, by name.
        slots: How many slots each bank has; at least those of four interventions.
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
        self._hooked: set[tuple[str, int]] = set()
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
        visited = dict.fromkeys([*wanted, *(one.place for one in (*read.values(), *watched.values()))])
        if visited:
            found = self.look_at(model, layers, visited)
            for (site, layer), edits in wanted.items():
                places[f"{site}.{layer}"] = EditedPlace(edits, slots, found.d, self.dtype, device)
        self.table = RowTable(tokens, device, (slots, library.by_token))
        self.readers = Readers({**read, **watched}, {**(loaded or {}), **self.gates.probes}, tokens, device)
        self.places = Places(places, self.table, self.readers, self.gates if watched else None)
        if library.slots <= slots:  # all of them stay, and no request ever waits for another's slot
            for served in library.plans.values():
                self._hold(served)
                self._residents.release(served)
            self._chains = {}
            for here in places.values():
                here.seal()

    def look_at(self, model: nn.Module, layers: int, places: Iterable[tuple[str, int]]) -> Layers:
        """Have a hook at each of these places of a model that is not compiled yet. Returns its blocks."""
        found = decoder_blocks(model, layers)
        for place in places:
            if place not in self._hooked:
                self._hooked.add(place)
                _hook(found, *place)
        return found

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
        """Before a batch runs: send what has changed to the device and write its row table."""
        if self._loaded:
            for place in self.places.places.values():
                place.bank.commit()
            self._loaded = False
        self.table.fill(requests, starts, positions, tokens, ids)
        gated = self.gates.begin(requests, starts, positions, tokens)
        self.readers.begin(requests, starts, positions, tokens, gated)
        if TRACE in os.environ:
            self._trace(requests, starts, positions)

    def take(self) -> Taken | None:
        """What the requests of the step that has run have read; None: nobody reads."""
        return self.readers.take()

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
                for number, edit in chain.items():
                    self.places.places[f"{site}.{layer}"].load(numbers[number], edit)
                    self.gates.load(served.name, f"{site}.{layer}", number, numbers[number])
            for run in served.runs(numbers):
                self.table.spread(run)
            self._names |= dict.fromkeys(numbers, served.name)
            self._loaded = True
        return numbers

    def _trace(self, requests: Iterable[str], starts: Tensor, positions: Tensor) -> None:
        """What the kernels will read, said in words: request, plan, strength, positions."""
        rows, scale = self.table.rows[: self.table.tokens].tolist(), self.table.scale[: self.table.tokens].tolist()
        bounds, lines = starts.tolist(), []
        for i, request in enumerate(requests if rows else ()):
            for token in range(bounds[i], bounds[i + 1]):
                applied = [[self._names[s], w] for s, w in zip(rows[token], scale[token], strict=True) if s >= 0]
                lines.append(json.dumps([request, int(positions[token]), applied]) + "\n")
        with open(os.environ[TRACE], "a") as file:
            file.writelines(lines)


def decoder_blocks(model: nn.Module, count: int) -> Layers:
    """The decoder blocks of a vLLM model: its one list of `count` modules that hold modules of their own.

    Raises:
        ValueError: there is none, or more than one.
    """
    name = type(model).__name__
    text: Any = model.get_language_model() if hasattr(model, "get_language_model") else model  # type: ignore[operator]
    found = {
        path: module
        for path, module in text.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(any(b.children()) for b in module)
    }
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise ValueError(
            f"steerfast: {name} has {len(outer)} lists of {count} decoder blocks ({', '.join(outer) or 'none'}); expected one"
        )
    width = int(text.config.get_text_config().hidden_size)
    return Layers(tuple(found[outer[0]]), outer[0], width, name)


def stream_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the stream: that of the norms and embeddings, which quantisation leaves alone."""
    floats = (torch.float16, torch.bfloat16, torch.float32)
    return next(parameter.dtype for parameter in model.parameters() if parameter.dtype in floats)


def _hook(found: Layers, site: str, layer: int) -> None:
    """One hook per place. It holds nothing but the place's name, so that a compiled graph can be kept on disk."""
    place = f"{site}.{layer}"
    block = found.blocks[layer]
    if site == "resid_post":
        if _carries_two(block):
            block.register_forward_hook(partial(_after_pair, place))
        else:
            block.register_forward_hook(partial(_after, place))
    elif site == "resid_pre":  # of layer 0: what the embedding gives
        block.register_forward_pre_hook(partial(_before, place), with_kwargs=True)
    else:
        _added(block, site, found.name).register_forward_hook(partial(_after, place))


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
    torch.ops.steerfast.engine_edit_(residual, hidden, place)


def _after(place: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor):
        raise RuntimeError(
            f"steerfast: {place} ({type(module).__name__}) gives a {type(output).__name__} that is neither the stream nor "
            "(hidden, residual); this model cannot be steered there"
        )
    torch.ops.steerfast.engine_edit_(output, None, place)


def _before(place: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = list(inspect.signature(module.forward).parameters)
    if "hidden_states" in kwargs:
        hidden = kwargs["hidden_states"].clone()
        torch.ops.steerfast.engine_edit_(hidden, None, place)
        return args, {**kwargs, "hidden_states": hidden}
    index = names.index("hidden_states")
    hidden = args[index].clone()
    torch.ops.steerfast.engine_edit_(hidden, None, place)
    return (*args[:index], hidden, *args[index + 1 :]), kwargs


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
