"""What steering must do to a model, found by plain PyTorch hooks; nothing here asks steerfast.

The decoder blocks are the modules whose input is `hidden_states[k]` and whose output is `hidden_states[k + 1]`, or, where a
model records something else there, the list of modules each of which takes what the one before returned. A plain hook that
adds v to a block's output, in an uncached loop over growing ids, gives the logits that a steered model must give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import zoo
from torch import Tensor, nn

TOLERANCE = 1e-3  # of the largest logit, or of 1; float32
PROMPT, NEW, PADS = 6, 4, 2


class NotComparable(Exception):
    """The unsteered model does not do what the check is about."""


class Wrong(Exception):
    """Steering did something else than the oracle, and nobody said so."""


# --- reading modules -------------------------------------------------------------------------------------------------------


def first_tensor(value: Any) -> Tensor | None:
    """A tensor, or the first one of a tuple or of an output object."""
    if isinstance(value, Tensor):
        return value
    items = value if isinstance(value, (tuple, list)) else vars(value).values() if hasattr(value, "__dict__") else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


def replaced(value: Any, new: Tensor) -> Any:
    """What a module returned, with its first tensor replaced."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple):
        place = next(place for place, item in enumerate(value) if isinstance(item, Tensor))
        items = [*value[:place], new, *value[place + 1 :]]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [new, *value[1:]]
    name = next(name for name, item in vars(value).items() if isinstance(item, Tensor))
    setattr(value, name, new)
    return value


def arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Tensor]:
    """The tensors that a module was called with, by position or name."""
    given: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    return {key: value for key, value in given.items() if isinstance(value, Tensor) and value.is_floating_point()}


@dataclass
class Call:
    """What a module was given and what it returned, the first time in a pass; copies."""

    given: dict[int | str, Tensor]
    tensor: Tensor | None
    kind: str  # the type of what it returned
    times: int = 1


@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Call]]:
    """Calls by module, in the order in which they returned."""
    calls: dict[nn.Module, Call] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module in calls:
            calls[module].times += 1
            return
        given = {key: value.detach().clone() for key, value in arguments(args, kwargs).items()}
        tensor = first_tensor(output)
        calls[module] = Call(given, None if tensor is None else tensor.detach().clone(), type(output).__name__)

    with ExitStack() as stack:
        for module in dict.fromkeys(modules):
            stack.enter_context(module.register_forward_hook(record, with_kwargs=True))
        yield calls


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and torch.equal(one, other)


# --- the blocks ------------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A decoder block: the module, and which of its arguments is the stream."""

    module: nn.Module
    argument: int | str | None  # None: the block did not run


def hidden_states_of(output: Any) -> tuple[Tensor, ...]:
    """The hidden states of the decoder, wherever an output keeps them; () where it has none."""
    for name in ("hidden_states", "decoder_hidden_states"):
        found = getattr(output, name, None)
        if isinstance(found, (tuple, list)) and found and all(isinstance(one, Tensor) for one in found):
            return tuple(found)
    inner = getattr(output, "language_model_outputs", None)
    return () if inner is None else hidden_states_of(inner)


def same_size(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.numel() == other.numel()


def find_blocks(model: nn.Module, forward: Callable[..., Any]) -> tuple[list[Block], bool]:
    """The decoder blocks, first to last, and whether `hidden_states` shows them; a picture's tower is none, whose tensors
    are as large for fewer ids.

    Args:
        model: The model.
        forward: Runs it; `less=3` with three ids fewer, `output_hidden_states=True` as transformers means it.

    Raises:
        NotComparable: no list of modules hands a stream from one to the next.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    members = {member: None for one in lists for member in one}
    with recording(list(members)) as calls:
        try:
            states = hidden_states_of(forward(output_hidden_states=True))
        except Exception:  # some models cannot record them
            calls.clear()
            states = ()
            forward()
    with recording(members) as calls_of_less:
        forward(less=3)
    shorter = {member: call.tensor for member, call in calls_of_less.items()}
    best: tuple[tuple[int, int], list[Block]] | None = None
    for one in lists:
        ran = [member for member in one if member in calls and calls[member].tensor is not None]
        if len(ran) < 2 or len(ran) < len(one) / 2 or same_size(calls[ran[0]].tensor, shorter.get(ran[0])):
            continue
        how = (
            3
            if _shown(ran, calls, states)
            else 2
            if _returned(ran, calls, states)
            else 1
            if _chained(ran, calls)
            else 0
        )
        if how and (best is None or (how, len(ran)) > best[0]):
            before = dict(zip(ran[1:], ran[:-1], strict=True))
            blocks = [Block(member, _stream_argument(member, before.get(member), calls, states)) for member in one]
            best = (how, len(ran)), blocks
    if best is None:
        raise NotComparable("no list of modules hands a stream from one to the next")
    return best[1], best[0][0] > 1


def _shown(ran: list[nn.Module], calls: dict[nn.Module, Call], states: tuple[Tensor, ...]) -> bool:
    """Whether hidden_states holds the input and the output of each, the last output excepted, which may be normed."""
    place = next(
        (k for k, state in enumerate(states) if any(same(x, state) for x in calls[ran[0]].given.values())), None
    )
    if place is None or place + len(ran) > len(states):
        return False
    return all(any(same(x, states[place + k]) for x in calls[one].given.values()) for k, one in enumerate(ran)) and all(
        same(calls[one].tensor, states[place + k + 1]) for k, one in enumerate(ran[:-1])
    )


def _returned(ran: list[nn.Module], calls: dict[nn.Module, Call], states: tuple[Tensor, ...]) -> bool:
    """Whether hidden_states holds the outputs at least: something else may act between two blocks, as in Idefics."""
    return len(states) > len(ran) and all(same(calls[one].tensor, states[k + 1]) for k, one in enumerate(ran[:-1]))


def _chained(ran: list[nn.Module], calls: dict[nn.Module, Call]) -> bool:
    return all(
        any(same(x, calls[before].tensor) for x in calls[after].given.values()) for before, after in pairwise(ran)
    )


def _stream_argument(
    member: nn.Module, before: nn.Module | None, calls: dict[nn.Module, Call], states: tuple[Tensor, ...]
) -> int | str | None:
    """Which argument of a block is the stream: what the block before returned, or what hidden_states holds."""
    if member not in calls:
        return None
    given = calls[member].given
    known = () if before is None else (calls[before].tensor,)
    found = [key for tensor in (*known, *states) for key, one in given.items() if same(one, tensor)]
    return next(iter([*found, *given]), None)  # else the first tensor: a block behind a module of another kind


# --- the oracle's own steering ---------------------------------------------------------------------------------------------

Where = Callable[[int, int], Tensor]
"""bool (rows, tokens): which tokens of a text are steered, given the rows and the tokens so far."""


def by_position(chosen: Callable[[Tensor], Tensor]) -> Where:
    return lambda rows, tokens: chosen(torch.arange(tokens)).expand(rows, tokens)


EVERYWHERE = by_position(lambda here: here >= 0)
FIRST_ROW: Where = lambda rows, tokens: (torch.arange(rows) == 0)[:, None].expand(rows, tokens)  # noqa: E731
NOT_PADS: Where = lambda rows, tokens: (torch.arange(rows) > 0)[:, None] | (torch.arange(tokens) >= PADS)  # noqa: E731
ALL = (EVERYWHERE, FIRST_ROW, NOT_PADS)


def moved(tensor: Tensor, vector: Tensor, where: Where, rows: int, tokens: int, front: int = 0) -> Tensor:
    """A stream with v added to the tokens that `where` names of (rows, tokens).

    A model may put `front` tokens of its own before the text: they belong to "all", not to the prompt. It may pad the text
    behind, and it may run the text's last tokens only, as it does with a cache.
    """
    weight = where(rows, tokens).to(tensor.dtype)
    if tensor.ndim == 3 and tensor.shape[0] == rows:
        if tensor.shape[1] < tokens:
            weight = weight[:, tokens - tensor.shape[1] :]
        else:
            steered = weight.amax(1, keepdim=True) if where in ALL else weight.new_zeros(rows, 1)
            behind = weight.new_zeros(rows, tensor.shape[1] - tokens - front)
            weight = torch.cat([steered.expand(rows, front), weight, behind], 1)
        return tensor + weight[:, :, None] * vector
    if tensor.ndim == 3 and tensor.shape[1] == rows and tensor.shape[0] <= tokens:  # tokens first
        return tensor + weight.T[tokens - tensor.shape[0] :, :, None] * vector
    raise NotComparable(f"a block's output is {tuple(tensor.shape)} for ids ({rows}, {tokens})")


@contextmanager
def plainly(subject: Subject, edits: list[tuple[int, str, Tensor]], where: Where = EVERYWHERE) -> Iterator[None]:
    """Add vectors at (layer, "resid_pre" or "resid_post") by plain hooks."""
    front = subject.front  # runs the model, so before there are hooks
    with ExitStack() as stack:
        for layer, site, vector in edits:
            block = subject.blocks[layer]

            def edit(tensor: Tensor, vector: Tensor = vector) -> Tensor:
                return moved(tensor, vector, where, subject.rows, subject.tokens, front)

            if site == "resid_post":

                def after(module: nn.Module, args: Any, output: Any, edit: Any = edit) -> Any:
                    tensor = first_tensor(output)
                    assert tensor is not None
                    return replaced(output, edit(tensor))

                stack.enter_context(block.module.register_forward_hook(after))
            else:

                def before(
                    module: nn.Module, args: Any, kwargs: Any, edit: Any = edit, key: Any = block.argument
                ) -> Any:
                    if isinstance(key, int):
                        return (*args[:key], edit(args[key]), *args[key + 1 :]), kwargs
                    return args, {**kwargs, key: edit(kwargs[key])}

                stack.enter_context(block.module.register_forward_pre_hook(before, with_kwargs=True))
        yield


# --- one model -------------------------------------------------------------------------------------------------------------


class Subject:
    """One tiny model, and what the oracle knows of it."""

    def __init__(self, kind: str, class_name: str) -> None:
        self.kind = kind
        self.model: Any = zoo.build(kind, class_name)
        if getattr(self.model, "generation_config", None) is not None:
            self.model.generation_config.pad_token_id = zoo.PAD
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 90, (1, PROMPT), generator=generator)
        self.two = torch.randint(5, 90, (2, PROMPT), generator=generator)
        self.rows, self.tokens = 1, PROMPT  # of the text so far, whatever part of it a pass sees
        self.times: list[int] = []  # how often each block runs in one pass
        self.counts: dict[str, int] = {}  # what stats() said after each generate

    def forward(self, ids: Tensor, **more: Any) -> Any:
        """An uncached pass."""
        self.rows, self.tokens = ids.shape
        torch.manual_seed(0)  # a diffusion model draws its start
        with torch.no_grad():
            return self.model(**zoo.inputs(self.kind, self.model, ids), use_cache=False, **more)

    def logits(self, ids: Tensor, **more: Any) -> Tensor:
        return self.forward(ids, **more).logits

    @cached_property
    def clean(self) -> Tensor:
        """The logits of one pass; proof that it runs, always in the same way."""
        try:
            logits = self.logits(self.ids)
        except Exception as error:
            raise NotComparable(f"the model does not run on ids alone: {shortly(error)}") from None
        if not isinstance(logits, Tensor) or not logits.isfinite().all():
            raise NotComparable("the model has no finite logits")
        if not torch.equal(logits, self.logits(self.ids)):
            raise NotComparable("two passes of the model differ")
        return logits

    @cached_property
    def _found(self) -> tuple[list[Block], bool]:
        _ = self.clean
        return find_blocks(self.model, lambda less=0, **more: self.forward(self.ids[:, less:], **more))

    @property
    def blocks(self) -> list[Block]:
        return self._found[0]

    @property
    def shown(self) -> bool:
        """Whether hidden_states shows the blocks."""
        return self._found[1]

    @cached_property
    def width(self) -> int:
        """Of the residual stream, as a user would look it up."""
        config = self.model.config.get_text_config(decoder=True)
        width = getattr(config, "hidden_size", None)
        return width if isinstance(width, int) else self.model.get_input_embeddings().weight.shape[1]

    @cached_property
    def outputs(self) -> list[Tensor | None]:
        """What each block returns on `ids`; None where it does not run."""
        with recording([block.module for block in self.blocks]) as calls:
            self.forward(self.ids)
        self.times = [calls[block.module].times if block.module in calls else 0 for block in self.blocks]
        return [calls[block.module].tensor if block.module in calls else None for block in self.blocks]

    @cached_property
    def front(self) -> int:
        """How many tokens of its own the model puts before the text: what another last id changes in the embeddings."""
        if all(held is None or held.ndim != 3 or held.shape[1] <= PROMPT for held in self.outputs):
            return 0
        block = next(block for block in self.blocks if block.argument is not None)
        embedded = []
        for last in (self.ids[:, -1:], self.ids[:, -1:] + 1):
            with recording([block.module]) as calls:
                self.forward(torch.cat([self.ids[:, :-1], last], 1))
            embedded.append(calls[block.module].given[block.argument])
        one, other = embedded
        return max(0, int((one != other).any(-1)[0].nonzero()[0]) - (PROMPT - 1))

    def vector(self, layer: int) -> Tensor:
        """A random v about as long as what the layer holds."""
        noise = torch.randn(self.width, generator=torch.Generator().manual_seed(layer + 17))
        held = self.outputs[layer]
        return noise if held is None else noise * float(held.float().std())

    @cached_property
    def layers(self) -> range:
        return range(len(self.blocks))

    def one_stream(self) -> None:
        """Nobody may steer, without a word, a model whose blocks hold several streams, or run several times in one pass.

        Raises:
            Wrong: if the model is such; the caller has steered it.
        """
        for layer, held in enumerate(self.outputs):
            if held is not None and (held.ndim != 3 or held.shape[-1] != self.width):
                raise Wrong(f"block {layer} returns {tuple(held.shape)} for ids (1, {PROMPT}) and width {self.width}")
            if self.times[layer] > 1:
                raise Wrong(f"block {layer} runs {self.times[layer]} times in one pass")


def shortly(error: BaseException) -> str:
    """Type and first line of an error."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:220]}"


MASKED = 1e9
"""Logits beyond are those that a model forbids; Chameleon's of image tokens are the smallest number there is."""


def largest(logits: Tensor) -> float:
    return float(logits[logits.abs() < MASKED].abs().max())


def differ(got: Tensor, wanted: Tensor) -> float | None:
    """The largest difference, None if it is within the tolerance."""
    if got.shape != wanted.shape:
        return float("inf")
    off = float((got.float() - wanted.float()).abs().max())
    return None if off <= TOLERANCE * max(1.0, largest(wanted)) else off


def compare(got: Tensor, wanted: Tensor, clean: Tensor, what: str) -> None:
    """Steered logits against the oracle's.

    Raises:
        Wrong: they differ.
        NotComparable: the edit hardly moves the logits, so that equality proves nothing.
    """
    off = differ(got, wanted)
    if off is not None:
        untouched = ", as if unsteered" if differ(got, clean) is None else ""
        raise Wrong(f"{what}: the logits are off by {off:.2g}{untouched}")
    effect = float((wanted - clean).abs().max())
    if effect < 10 * TOLERANCE * max(1.0, largest(wanted)):
        raise NotComparable(f"{what}: v moves the logits by {effect:.1g} only")


# --- what a block adds to the stream ---------------------------------------------------------------------------------------


@dataclass
class Term:
    """A module of a block whose output, or output minus one of its arguments, times a factor is added to the stream."""

    module: nn.Module
    argument: int | str | None
    factor: float
    mixes: bool = False  # whether it sees other tokens


def _terms(block: nn.Module, calls: dict[nn.Module, Call], like: Tensor) -> list[tuple[Term, Tensor]]:
    found: list[tuple[Term, Tensor]] = []
    names = {module: name for name, module in block.named_modules()}
    for module in sorted((m for m in calls if m is not block), key=lambda m: names[m].count(".")):  # outermost first
        tensor = calls[module].tensor
        if tensor is None or tensor.numel() != like.numel() or tensor.shape[-1] != like.shape[-1]:
            continue
        found.append((Term(module, None, 1.0), tensor.reshape(-1)))
        for key, given in calls[module].given.items():
            if given.numel() == like.numel() and given.shape[-1] == like.shape[-1]:
                found.append((Term(module, key, 1.0), (tensor.reshape(-1) - given.reshape(-1))))
    return found


def added(subject: Subject, layer: int) -> tuple[Term | None, Term | None]:
    """The modules that make up resid_post − resid_pre: (attention, MLP), None where the block has one of them only.

    Raises:
        NotComparable: no module and no two modules do.
    """
    block = subject.blocks[layer]
    if block.argument is None:
        raise NotComparable("the block never runs")
    with recording(list(block.module.modules())) as calls:
        subject.forward(subject.ids)
    own = calls[block.module]
    after, before = own.tensor, own.given[block.argument]
    if after is None or after.shape != before.shape:
        raise NotComparable("the block's output has not the shape of its input")
    change = (after - before).reshape(-1).double()
    flat = after.reshape(-1)
    terms = [
        (term, value.double())
        for term, value in _terms(block.module, calls, after)
        if not (term.argument is not None and torch.allclose(value.double(), change, atol=1e-5))
        and not torch.equal(value, flat)
    ]
    order = {module: place for place, module in enumerate(calls)}
    pair = _solve([value for _, value in terms], change)
    if pair is None:
        raise NotComparable("no two modules of the block add up to resid_post - resid_pre")
    chosen = []
    for place, factor in pair:
        term = terms[place][0]
        term.factor = factor
        chosen.append(term)
    chosen.sort(key=lambda term: order[term.module])
    _mark_mixers(subject, block, chosen)
    attention = next((term for term in chosen if term.mixes), None)
    mlp = next((term for term in chosen if term is not attention), None)
    return attention, mlp


def _solve(values: list[Tensor], change: Tensor) -> list[tuple[int, float]] | None:
    """One or two of the values whose weighted sum is the change: [(index, factor), …]."""
    if not values:
        return None
    stacked = torch.stack(values)
    scale = float(change.abs().max())

    def exact(chosen: list[int]) -> list[tuple[int, float]] | None:
        part = stacked[chosen]
        factors = torch.linalg.lstsq(part.T, change[:, None]).solution[:, 0]
        if float((part.T @ factors - change).abs().max()) > 1e-4 * scale:
            return None
        weights = factors.abs() * part.norm(dim=1)
        if float(weights.min()) < 1e-2 * float(change.norm()):
            return None
        return list(zip(chosen, factors.tolist(), strict=True))

    for place in range(len(values)):
        if (found := exact([place])) is not None:
            return found
    gram, target = stacked @ stacked.T, stacked @ change
    norms = gram.diagonal()
    determinant = norms[:, None] * norms[None, :] - gram**2
    one = (target[:, None] * norms[None, :] - gram * target[None, :]) / determinant
    left = (change @ change) - one * target[:, None] - one.T * target[None, :]
    left = torch.where(determinant > 1e-9 * norms[:, None] * norms[None, :], left, torch.inf)
    for row, column in (left < 1e-6 * (change @ change)).nonzero().tolist():
        if row < column and (found := exact([row, column])) is not None:
            return found
    return None


def _mark_mixers(subject: Subject, block: Block, terms: list[Term]) -> None:
    """Which modules see other tokens: those whose last token changes when the block's earlier inputs do."""
    modules = [term.module for term in terms]
    key = block.argument

    def disturb(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given = args[key] if isinstance(key, int) else kwargs[key]
        noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(3))
        noise[:, -1:] = 0
        new = given + noise
        return ((*args[:key], new, *args[key + 1 :]), kwargs) if isinstance(key, int) else (args, {**kwargs, key: new})

    with recording(modules) as clean:
        subject.forward(subject.ids)
    with block.module.register_forward_pre_hook(disturb, with_kwargs=True), recording(modules) as disturbed:
        subject.forward(subject.ids)
    for term in terms:
        one, other = clean[term.module].tensor, disturbed[term.module].tensor
        assert one is not None
        assert other is not None
        width = one.shape[-1]
        term.mixes = not torch.allclose(one.reshape(-1, width)[-1], other.reshape(-1, width)[-1], atol=1e-5)


@contextmanager
def clamping(subject: Subject, layer: int, term: Term, direction: Tensor, value: float) -> Iterator[None]:
    """Set the projection on a unit direction of what a module adds to the stream; an edit that must read what it changes.

    Only while the block runs: another block may share the module.
    """
    inside = [False]
    block = subject.blocks[layer].module

    def enter(module: nn.Module, args: Any) -> None:
        inside[0] = True

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        inside[0] = False

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not inside[0]:
            return None
        tensor = first_tensor(output)
        assert tensor is not None
        own = tensor if term.argument is None else tensor - arguments(args, kwargs)[term.argument].reshape(tensor.shape)
        missing = value - (term.factor * own) @ direction
        return replaced(output, tensor + missing[..., None] * direction / term.factor)

    with ExitStack() as stack:
        stack.enter_context(block.register_forward_pre_hook(enter))
        stack.enter_context(block.register_forward_hook(leave))
        stack.enter_context(term.module.register_forward_hook(after, with_kwargs=True))
        yield


# --- generation ------------------------------------------------------------------------------------------------------------


def generate(subject: Subject, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """New tokens (rows, NEW) and their logits (rows, NEW, vocabulary), greedy, with the model's cache."""
    given = zoo.inputs(subject.kind, subject.model, ids.clone())  # BLIP writes into them
    given["attention_mask"] = torch.ones_like(given["input_ids"]) if mask is None else mask
    first = subject.blocks[0]
    subject.rows, subject.tokens = ids.shape[0], ids.shape[1] - 1

    def grow(module: nn.Module, args: Any, kwargs: Any) -> None:  # at the block: some models generate by one inside
        shape = arguments(args, kwargs)[first.argument].shape
        seen = shape[1] if shape[0] == ids.shape[0] else shape[0]
        if len(shape) == 3 and subject.tokens < ids.shape[1] and seen < ids.shape[1]:
            raise NotComparable(f"generate hands on {seen} of {ids.shape[1]} tokens")
        subject.tokens += 1

    with torch.no_grad(), first.module.register_forward_pre_hook(grow, with_kwargs=True):
        out = subject.model.generate(
            **given,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.stack(list(out.logits), 1)
    if logits.shape[1] != NEW:
        raise NotComparable(f"generate made {logits.shape[1]} tokens instead of {NEW}")
    return out.sequences[:, -NEW:], logits


def loop(subject: Subject, ids: Tensor, new: Tensor) -> Tensor:
    """The logits of the same tokens, each by an uncached pass over all ids before it."""
    steps = []
    for step in range(NEW):
        grown = torch.cat([ids, new[:, :step]], 1)
        steps.append(subject.logits(grown)[:, -1])
    return torch.stack(steps, 1)


POSITIONS: dict[str, tuple[Where, int]] = {  # which tokens, and how many of one text
    "all": (EVERYWHERE, PROMPT + NEW - 1),
    "prompt": (by_position(lambda here: here < PROMPT), PROMPT),
    "generated": (by_position(lambda here: here >= PROMPT), NEW - 1),
    "last": (by_position(lambda here: here >= PROMPT - 1), NEW),
}


def unsteered(subject: Subject, ids: Tensor, mask: Tensor | None = None) -> bool:
    """Whether the first row of a generate is the uncached loop over that row alone.

    Raises:
        NotComparable: the model does not generate.
    """
    if not hasattr(subject.model, "generate"):
        raise NotComparable("the model has no generate")
    try:
        new, logits = generate(subject, ids, mask)
        again = generate(subject, ids, mask)[1]
        alone = ids[:1] if mask is None else ids[:1, mask[0].bool()]
        wanted = loop(subject, alone, new[:1])
    except NotComparable:
        raise
    except Exception as error:
        raise NotComparable(f"the unsteered model does not generate: {shortly(error)}") from None
    if differ(logits, again) is not None:
        raise NotComparable("unsteered, two runs of generate differ")
    return differ(logits[:1], wanted) is None
