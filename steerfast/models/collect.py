"""Activations of a model on texts, read by hooks that are gone afterwards."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from steerfast._checks import positive_integer, whole_number, whole_numbers
from steerfast.place import Origin, Place, typical_norm_of

from .layers import Layers, evaluating, find_layers, gathers_weights, home, is_ours, refuse_rows, steered_by_row
from .limits import Limits
from .points import Point
from .proof import known_proof, prove, refuse_split, shape_refusal
from .texts import TextReader, short_text

POSITIONS = ("last", "mean", "all")
_MEDIA = re.compile(r"pixel|image|video|audio|patches|input_features")
_UNFIT = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)
_WINDOW = 16  # batches that are sorted by length together: little padding, and only so many texts in memory


class Activations(dict[int, Tensor]):
    """Activations by layer: a dict of 0-based layer -> float32 CPU tensor (n, d), which knows where it comes from.

    Attributes:
        model: class name of the model.
        site: the site that was read.
        position: "last", "mean", "all" or an index.
        text_index: int64 (n,), the text that each row comes from; with "all" a text has as many rows as real tokens.
    """

    def __init__(
        self, rows: Mapping[int, Tensor], *, model: str, site: str, position: str | int, text_index: Tensor
    ) -> None:
        super().__init__(rows)
        self.model, self.site, self.position, self.text_index = model, site, position, text_index

    @property
    def norms(self) -> dict[int, float]:
        """Typical L2 norm by layer: the median over rows, which a first token of enormous norm does not move."""
        return {layer: typical_norm_of(rows) for layer, rows in self.items()}

    def origin(self, layer: int) -> Origin:
        """Where the rows of a layer were read, and their typical norm."""
        place = Place(self.site, layer)
        return Origin(self.model, place, self.position, typical_norm_of(self[layer]))

    def only(self, layer: int) -> Activations:
        """Those of one layer."""
        known = {"model": self.model, "site": self.site, "position": self.position}
        return Activations({layer: self[layer]}, **known, text_index=self.text_index)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{layer}: {tuple(rows.shape)}" for layer, rows in self.items())
        return f"Activations({self.model}, {self.site}, position {self.position!r}, layers {{{shapes}}})"


def check_same_origin(name: str, pos: Mapping[int, Tensor], neg: Mapping[int, Tensor], paired: bool) -> None:
    """Refuse two sides whose layers, model, site or position differ; `paired`: or whose rows are no pairs."""
    if not pos:
        raise ValueError(f"{name}: pos holds no layers")
    if set(pos) != set(neg):
        raise ValueError(
            f"{name}: pos has layers {sorted(pos)} and neg {sorted(neg)}; collect the same layers for both"
        )
    if not (isinstance(pos, Activations) and isinstance(neg, Activations)):
        return
    for key in ("model", "site", "position"):
        mine, other = getattr(pos, key), getattr(neg, key)
        if mine != other:
            raise ValueError(f"{name}: pos has {key} {mine!r} and neg {other!r}; collect both alike")
    if paired and pos.position == "all" and not torch.equal(pos.text_index, neg.text_index):
        raise ValueError(
            f"{name}: needs pairs, but the texts of pos and neg differ in length at position 'all'; "
            f"use 'last' or 'mean', or mean_difference"
        )


def collect(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Iterable[str | Sequence[Mapping[str, Any]]] | None = None,
    layers: int | slice | Iterable[int] | Tensor | None = None,
    position: str | int = "last",
    site: str = "resid_post",
    *,
    inputs: Iterable[Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> Activations:
    """Return a model's activations on texts, at one site of one or more layers.

    The forward stops after the deepest layer asked for (under FSDP it runs to the end). Texts are padded on the right,
    whatever the tokenizer's side or pad token, so that every position means the same as in a text run alone; the
    tokenizer is not changed. If the model is steered, so are the activations.

    Args:
        model: a `transformers` causal language model. Evaluated without dropout and gradients; its training mode is
            restored.
        tokenizer: the model's tokenizer.
        texts: strings, or chats (lists of messages with "role" and "content"; the chat template is applied, with the
            generation prompt unless the assistant has the last word). Any iterable; read a window of texts at a time.
        layers: 0-based, negative from the end: one, several (also an array or a tensor of integers), or a slice.
        position: "last" (last token), "mean" (over the tokens), "all" (a row per token), or an index into the
            tokens, negative from the end. Tokens count with the tokenizer's special tokens, without padding. The first
            token of a text often has an enormous norm (an attention sink), which also dominates "mean".
        site: "resid_pre", "resid_post", "attn_out", "mlp_out" or "head_out".
        inputs: instead of tokenizer and texts, what the model's forward takes: ready dicts from a processor, for a model
            that wants images or sounds beside the tokens. Each is one forward. `input_ids` is (rows, tokens), or `inputs_embeds`
            (rows, tokens, d); every row counts as a text, whose tokens are those where `attention_mask`, (rows, tokens),
            is not 0, on whichever side.
        batch_size: texts per forward.
        progress: show a progress bar on stderr.

    Returns:
        Layer -> float32 CPU tensor (n, d), rows in the order of the texts; n texts, or all tokens for "all".
        `head_out` has its own width.

    Raises:
        TypeError: model, texts, inputs, layers or position of the wrong type.
        ValueError: an unknown layer, site or position; no texts; texts and inputs; a text without tokens, too long, or
            too short for the index; an id beyond the vocabulary; inputs that the model does not run on.

    Warns:
        UserWarning: a text brings along a special token that the tokenizer adds itself; it is read once.

    Example:
        >>> acts = sf.collect(model, tokenizer, ["I love you", "I hate you"], layers=[14])
        >>> acts[14].shape
        torch.Size([2, 576])
        >>> chat = [{"role": "user", "content": [{"type": "image", "url": "cat.png"}]}]  # doctest: +SKIP
        >>> ready = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")  # doctest: +SKIP
        >>> sf.collect(model, inputs=[ready], layers=[14])  # doctest: +SKIP
    """
    caller = tokenizer.owner if isinstance(tokenizer, TextReader) else "collect"
    position = _position(caller, position)
    batch_size = positive_integer(caller, "batch_size", batch_size)
    found = find_layers(model, caller)
    model = getattr(model, "_orig_mod", model)  # a compiled graph ignores new hooks
    proof = prove(model, found, caller)
    wanted = _wanted_layers(caller, found, layers)
    points = {layer: found.point(layer, site, caller) for layer in wanted}
    for layer in wanted:
        refuse_split(proof, found, layer, site, caller)
    source = _source(caller, tokenizer, texts, inputs)
    reading = _Reading(caller, model, points, position)
    rows: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    index: list[Tensor] = []
    with evaluating(model), _progress_bar(source, progress) as bar:
        if inputs is None:
            tokens = _tokens(reading, TextReader.of(tokenizer, caller), source)
            parts = _read_texts(reading, tokens, batch_size, bar)
        else:
            parts = _read_inputs(reading, source, bar)
        done = 0
        for part, counts in parts:
            for layer in wanted:
                rows[layer].append(part[layer])
            index.append(
                torch.arange(done, done + len(counts), device="cpu").repeat_interleave(
                    torch.tensor(counts, device="cpu")
                )
            )
            done += len(counts)
    if not done:
        raise ValueError(f"{caller}: {'texts' if inputs is None else 'inputs'} is empty; give at least one text")
    whole = {layer: torch.cat(rows.pop(layer)) for layer in wanted}  # pop: one layer at a time is held twice
    return Activations(whole, model=found.name, site=site, position=position, text_index=torch.cat(index))


@dataclass(frozen=True, eq=False)
class _Reading:
    """What is read of a model, and for whom.

    Attributes:
        caller: the public function that asks, for its messages.
        points: layer, or place -> where it is.
        position: as in `collect`.
    """

    caller: str
    model: Any
    points: Mapping[Any, Point]
    position: str | int

    def check_position(self, what: str, count: int) -> None:
        """Refuse a text that is too short for the position."""
        if isinstance(self.position, int) and not -count <= self.position < count:
            raise ValueError(
                f"{self.caller}: position {self.position} is out of range for {what}, which has {count} tokens, {-count} "
                f"to {count - 1}"
            )


class _Stop(Exception):
    """Leaves the forward after the deepest layer. Hooks registered with `always_call` still run."""


def _position(caller: str, position: Any) -> str | int:
    if isinstance(position, str):
        if position not in POSITIONS:
            raise ValueError(f"{caller}: unknown position {position!r}; use {', '.join(POSITIONS)} or an integer index")
        return position
    try:
        return whole_number(caller, "position", position)
    except TypeError:
        raise TypeError(
            f"{caller}: position must be one of {', '.join(POSITIONS)} or an integer, got {position!r}"
        ) from None


def _wanted_layers(caller: str, found: Layers, layers: Any) -> list[int]:
    """0-based layers in ascending order, each once."""
    if layers is None:
        raise TypeError(f"{caller}: layers is missing; name one or several, 0 to {found.count - 1}")
    numbers: list[Any] = [layers] if isinstance(layers, str) else whole_numbers(caller, "layers", layers, found.count)
    wanted = sorted({found.resolve(number, caller) for number in numbers})
    if not wanted:
        raise ValueError(f"{caller}: layers is empty; name at least one layer")
    return wanted


def _source(caller: str, tokenizer: Any, texts: Any, inputs: Any) -> Iterable[Any]:
    """What is read: the texts, or the inputs that stand for them."""
    name, given, what = ("texts", texts, "texts") if inputs is None else ("inputs", inputs, "dicts")
    if texts is not None and inputs is not None:
        raise ValueError(f"{caller}: got texts and inputs; give one of them")
    if given is None:
        raise TypeError(f"{caller}: give tokenizer and texts, or inputs")
    if tokenizer is None and inputs is None:
        raise TypeError(f"{caller}: tokenizer is missing; texts are read with it")
    if isinstance(given, (str, Mapping)):
        raise TypeError(f"{caller}: {name} must be several {what}, got one {type(given).__name__}; put it into a list")
    if not isinstance(given, Iterable):
        raise TypeError(
            f"{caller}: {name} must be several {what}, in a list or another iterable, got {type(given).__name__}"
        )
    return given


def _tokens(reading: _Reading, reader: TextReader, texts: Iterable[Any]) -> Iterator[list[int]]:
    """Token ids of each text, checked one at a time."""
    limits = Limits(reading.caller, reading.model)
    for number, text in enumerate(texts):
        ids, what = _token_ids(reader, text, number), f"text {number} ({short_text(text)})"
        limits.check(what, ids)
        reading.check_position(what, len(ids))
        yield ids


def _token_ids(reader: TextReader, text: Any, number: int) -> list[int]:
    tokenizer = reader.tokenizer
    if isinstance(text, str):
        ids = reader.ids(text)
        if set(ids) <= set(tokenizer.all_special_ids) and not reader.bare(text):
            raise ValueError(
                f"{reader.owner}: text {number} ({short_text(text)}) has no tokens; remove it or give it content"
            )
        return ids
    if isinstance(text, Mapping) and "input_ids" in text:
        raise TypeError(f"{reader.owner}: text {number} is a dict with input_ids; pass ready dicts as inputs=[…]")
    ids = reader.bare(reader.chat(text, f"text {number}"))  # a template brings its own special tokens
    if not ids:
        raise ValueError(
            f"{reader.owner}: text {number} ({short_text(text)}) has no tokens after its chat template; give it content"
        )
    return ids


def _progress_bar(source: Iterable[Any], progress: bool) -> Any:
    from tqdm.auto import tqdm

    total = len(source) if isinstance(source, Sized) else None
    return tqdm(total=total, desc="collect", unit="text", disable=not progress)


_Parts = Iterator[tuple[dict[int, Tensor], list[int]]]
"""Rows of some texts by layer, in the order of the texts, and how many rows each of them has."""


def _read_texts(reading: _Reading, tokens: Iterator[list[int]], batch_size: int, bar: Any) -> _Parts:
    """A window of texts at a time."""
    while window := list(islice(tokens, batch_size * _WINDOW)):
        rows = _read_window(reading, window, batch_size, bar)
        yield rows, [len(ids) if reading.position == "all" else 1 for ids in window]


def _read_window(reading: _Reading, window: list[list[int]], batch_size: int, bar: Any) -> dict[int, Tensor]:
    """The rows of a window of texts, in their own order; they run in batches of similar length, but where rows have plans."""
    if known_proof(reading.model).virtual:  # such a model may take padding for text (CPM-Ant)
        batch_size = 1
    order = list(range(len(window)))
    if not steered_by_row(reading.model):
        order.sort(key=lambda i: len(window[i]))
    pieces: dict[int, dict[int, Tensor]] = {layer: {} for layer in reading.points}
    for start in range(0, len(window), batch_size):
        batch = order[start : start + batch_size]
        for layer, parts in _read_padded(reading, [window[i] for i in batch]).items():
            pieces[layer].update(zip(batch, parts, strict=True))
        bar.update(len(batch))
    return {layer: torch.cat([of_text[i] for i in range(len(window))]) for layer, of_text in pieces.items()}


def _read_inputs(reading: _Reading, inputs: Iterable[Any], bar: Any) -> _Parts:
    """A dict at a time, each one forward."""
    model, limits = reading.model, Limits(reading.caller, reading.model)
    for number, given in enumerate(inputs):
        mask = _mask_of(reading.caller, given, number, limits)
        counts = mask.sum(1).tolist()
        for row, count in enumerate(counts):
            if not count:
                raise ValueError(
                    f"{reading.caller}: inputs {number}: row {row} has no tokens; its attention_mask is all zero"
                )
            limits.check_length(f"row {row} of inputs {number}", count)
            reading.check_position(f"row {row} of inputs {number}", count)
        moved = {name: v.to(home(model)) if isinstance(v, Tensor) else v for name, v in given.items()}
        rows = _run(reading, moved, mask, f"inputs {number} ({', '.join(given)})")
        yield (
            {layer: torch.cat(parts) for layer, parts in rows.items()},
            counts if reading.position == "all" else [1] * len(counts),
        )
        bar.update(1)


def _mask_of(caller: str, given: Any, number: int, limits: Limits) -> Tensor:
    """Which tokens of a dict of inputs are real: bool (rows, tokens), on the CPU."""
    where = f"{caller}: inputs {number}"
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must be a dict of the forward's arguments, got {type(given).__name__}")
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None and isinstance(embeds := given.get("inputs_embeds"), Tensor) and embeds.dim() == 3:
        ids = torch.zeros(embeds.shape[:2], dtype=torch.int64, device="cpu")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        shown = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(
            f"{where}: input_ids must be a tensor (rows, tokens), got {shown}; call the processor with return_tensors='pt'"
        )
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{where}: input_ids has dtype {ids.dtype}; expected int64, token ids; embeddings are inputs_embeds"
        )
    if unknown := limits.unknown(ids.unique().tolist()):
        raise ValueError(
            f"{where}: input_ids has the id {unknown[0]}, beyond the model's vocabulary; is it another model's?"
        )
    if mask is None:
        return torch.ones(ids.shape, dtype=torch.bool, device="cpu")
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shown = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{where}: attention_mask must be a tensor {tuple(ids.shape)} as input_ids, got {shown}")
    return (mask != 0).cpu()


_Key = TypeVar("_Key", bound=Hashable)
"""What a point is asked for by: a layer, or a `Place`, so that one forward reads several sites of a layer."""


def read_batch(
    model: Any, points: Mapping[_Key, Point], batch: list[list[int]], position: str | int
) -> dict[_Key, list[Tensor]]:
    """One forward; for each point and text the rows of its position, (rows, width), float32 on the CPU.

    Raises:
        ValueError: a text is longer than the model reads, or an id beyond its vocabulary.
    """
    refuse_rows(model, "collect")
    limits = Limits("collect", model)
    for ids in batch:
        limits.check("a text", ids)
    return _read_padded(_Reading("collect", model, points, position), batch)


def _read_padded(reading: _Reading, batch: list[list[int]]) -> dict[Any, list[Tensor]]:
    """One forward over texts, padded on the right."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text, device="cpu") for text in batch], batch_first=True)
    mask = torch.arange(ids.shape[1], device="cpu") < torch.tensor([len(text) for text in batch], device="cpu")[:, None]
    device = home(reading.model)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device, torch.int64)}
    return _run(reading, inputs, mask, "token ids alone")


def _run(reading: _Reading, inputs: dict[str, Any], mask: Tensor, what: str) -> dict[Any, list[Tensor]]:
    """One forward, whose failure says what the model was given."""
    model, accepted = reading.model, inspect.signature(reading.model.forward).parameters
    if "token_type_ids" in accepted and hasattr(model.config, "vision_config") and "token_type_ids" not in inputs:
        # PaliGemma attends both ways without them where a batch has no padding, and else not
        inputs["token_type_ids"] = torch.zeros(mask.shape, dtype=torch.int64, device=home(model))
    try:
        return _read_forward(reading, inputs, mask)
    except _UNFIT as error:
        codebooks = getattr(model.config, "num_codebooks", 1)
        if (isinstance(error, RuntimeError) and codebooks == 1) or is_ours(error):  # a device fails so, too
            raise
        if "out of range in self" in str(error):  # what torch's embeddings say of an id
            raise ValueError(
                f"{reading.caller}: {type(model).__name__} has no embedding for one of the token ids; give its own tokenizer"
            ) from error
        beside = next((f", with {name}," for name in accepted if _MEDIA.search(name) and name not in inputs), "")
        raise ValueError(
            f"{reading.caller}: {type(model).__name__} does not run on {what} ({type(error).__name__}: {error}); "
            f"give what its processor makes{beside} as inputs=[…]"
        ) from error


def _read_forward(reading: _Reading, inputs: dict[str, Any], mask: Tensor) -> dict[Any, list[Tensor]]:
    """One forward; for each point and row of the mask the stream's rows of the position, float32 on the CPU."""
    model, points, caller = reading.model, reading.points, reading.caller
    select, counts = _selector(reading.position, mask)
    kept: dict[Any, Tensor] = {}
    proof = known_proof(model)
    front = proof.virtual
    whole = gathers_weights(model)  # a pass that is left early leaves weights gathered, and FSDP inside its pass

    def reader(layer: Any) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            rows, tokens = mask.shape[0], mask.shape[1] + front
            flat = x.dim() == 2 and x.shape[0] == rows * tokens  # OPT's MLP sees the tokens of all texts as one list
            if not flat and (wrong := shape_refusal(tuple(x.shape), rows, tokens, points[layer].width)):
                raise ValueError(f"{caller}: {points[layer].path} {wrong}")
            kept[layer] = select(x.reshape(rows, tokens, x.shape[-1])[:, front:])
            if len(kept) == len(points) and not whole:
                raise _Stop

        return read

    # Outputs that the config asks for are refused: transformers 4.57 captures them by replacing the modules' forwards,
    # and leaves them replaced when it is interrupted.
    refused = ("output_hidden_states", "output_attentions", "output_router_logits")
    inputs = inputs | {"use_cache": False} | {key: False for key in refused if hasattr(model.config, key)}
    handles = [point.attach(reader(layer)) for layer, point in points.items()]
    try:
        model(**inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for key in points.keys() - kept.keys():
        layer, instead = (
            getattr(key, "layer", key),
            "use resid_post if the block runs without it, else leave the layer out",
        )
        if layer in proof.idle:
            instead = "text does not run that block: leave the layer out, or give inputs= that run it, such as an image"
        raise ValueError(
            f"{caller}: the forward never ran {points[key].path}, so layer {layer} cannot be read; {instead}"
        )
    return {layer: list(rows.to("cpu", torch.float32).split(counts)) for layer, rows in kept.items()}


def _selector(position: str | int, mask: Tensor) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """A function from (batch, tokens, width) to the rows of `position`, and how many of them each text has.

    It returns a new tensor, small, still on the device. `mask` says which tokens are real, on whichever side they stand.
    """
    lengths = mask.sum(1)
    if position == "mean":

        def mean(x: Tensor) -> Tensor:
            real = mask.to(x.device)[..., None]
            return torch.where(real, x, 0).sum(1, dtype=torch.float32) / lengths.to(x.device)[:, None]

        return mean, [1] * len(mask)
    text, token = mask.nonzero(as_tuple=True)
    counts = lengths.tolist()
    if position != "all":
        index = -1 if position == "last" else int(position)
        chosen = lengths.cumsum(0) - lengths + index + lengths * (index < 0)
        text, token, counts = text[chosen], token[chosen], [1] * len(mask)
    return lambda x: x[text.to(x.device), token.to(x.device)], counts
