"""Activations of a model on texts, read by hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layers, evaluating, find_layers
from .points import Point

POSITIONS = ("last", "mean", "all")
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

    def __repr__(self) -> str:
        shapes = ", ".join(f"{layer}: {tuple(rows.shape)}" for layer, rows in self.items())
        return f"Activations({self.model}, {self.site}, position {self.position!r}, layers {{{shapes}}})"


def collect(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str | Sequence[Mapping[str, Any]]],
    layers: int | Iterable[int],
    position: str | int = "last",
    site: str = "resid_post",
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Activations:
    """Return a model's activations on texts, at one site of one or more layers.

    The forward stops after the deepest layer asked for. Texts are padded on the right, whatever the tokenizer's side
    or pad token, so that every position means the same as in a text run alone; the tokenizer is not changed. If the
    model is steered, so are the activations.

    Args:
        model: a `transformers` causal language model. Evaluated without dropout and gradients; its training mode is
            restored.
        tokenizer: the model's tokenizer.
        texts: strings, or chats (lists of messages with "role" and "content"; the chat template is applied, with the
            generation prompt unless the assistant has the last word). Any iterable; read a window of texts at a time.
        layers: 0-based, negative from the end.
        position: "last" (last token), "mean" (over the tokens), "all" (a row per token), or an index into the
            tokens, negative from the end. Tokens count with the tokenizer's special tokens, without padding. The first
            token of a text often has an enormous norm (an attention sink), which also dominates "mean".
        site: "resid_pre", "resid_post", "attn_out", "mlp_out" or "head_out".
        batch_size: texts per forward.
        progress: show a progress bar on stderr.

    Returns:
        Layer -> float32 CPU tensor (n, d), rows in the order of the texts; n texts, or all tokens for "all".
        `head_out` has its own width.

    Raises:
        TypeError: model, texts, layers or position of the wrong type.
        ValueError: an unknown layer, site or position; no texts; a text without tokens, too long, or too short for
            the index.

    Example:
        >>> acts = sf.collect(model, tokenizer, ["I love you", "I hate you"], layers=[14])
        >>> acts[14].shape
        torch.Size([2, 576])
    """
    _check_position(position)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"collect: batch_size must be a positive integer, got {batch_size!r}")
    if isinstance(texts, (str, Mapping)):
        raise TypeError(f"collect: texts must be several texts, got one {type(texts).__name__}; put it into a list")
    found = find_layers(model, "collect")
    wanted = _wanted_layers(found, layers)
    points = {layer: found.point(layer, site, "collect") for layer in wanted}
    model = getattr(model, "_orig_mod", model)  # a compiled graph ignores new hooks
    tokens = _tokens(tokenizer, texts, position, _longest(model))

    rows: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    index: list[Tensor] = []
    with evaluating(model), _progress_bar(texts, progress) as bar:
        done = 0
        while window := list(islice(tokens, batch_size * _WINDOW)):
            for layer, part in _read_window(model, points, window, position, batch_size, bar).items():
                rows[layer].append(part)
            counts = torch.tensor([len(ids) if position == "all" else 1 for ids in window])
            index.append(torch.arange(done, done + len(window)).repeat_interleave(counts))
            done += len(window)
    if not done:
        raise ValueError("collect: texts is empty; give at least one text")
    whole = {layer: torch.cat(rows.pop(layer)) for layer in wanted}  # pop: one layer at a time is held twice
    return Activations(whole, model=found.name, site=site, position=position, text_index=torch.cat(index))


class _Stop(Exception):
    """Leaves the forward after the deepest layer. Hooks registered with `always_call` still run."""


def _check_position(position: str | int) -> None:
    if isinstance(position, bool) or not isinstance(position, (str, int)):
        raise TypeError(f"collect: position must be one of {', '.join(POSITIONS)} or an integer, got {position!r}")
    if isinstance(position, str) and position not in POSITIONS:
        raise ValueError(f"collect: unknown position {position!r}; use {', '.join(POSITIONS)} or an integer index")


def _wanted_layers(found: Layers, layers: int | Iterable[int]) -> list[int]:
    """0-based layers in ascending order, each once."""
    several: Iterable[Any] = layers if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    wanted = sorted({found.resolve(layer, "collect") for layer in several})
    if not wanted:
        raise ValueError("collect: layers is empty; name at least one layer")
    return wanted


def _longest(model: Any) -> int | None:
    """Number of tokens that the model was built for, None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _tokens(tokenizer: Any, texts: Iterable[Any], position: str | int, longest: int | None) -> Iterator[list[int]]:
    """Token ids of each text, checked one at a time."""
    for number, text in enumerate(texts):
        ids = _token_ids(tokenizer, text, number)
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"collect: text {number} ({short_text(text)}) has {len(ids)} tokens; "
                f"this model reads at most {longest}; shorten it"
            )
        if isinstance(position, int) and not -len(ids) <= position < len(ids):
            raise ValueError(
                f"collect: position {position} is out of range for text {number} ({short_text(text)}), "
                f"which has {len(ids)} tokens, {-len(ids)} to {len(ids) - 1}"
            )
        yield ids


def _token_ids(tokenizer: Any, text: Any, number: int) -> list[int]:
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
        if set(ids) <= set(tokenizer.all_special_ids) and not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"collect: text {number} ({short_text(text)}) has no tokens; remove it or give it content")
        return ids
    if not isinstance(text, Sequence) or not all(isinstance(message, Mapping) for message in text):
        raise TypeError(
            f"collect: text {number} must be a string or a list of chat messages, got {type(text).__name__}"
        )
    if not text:
        raise ValueError(f"collect: text {number} is a chat without messages; remove it or give it content")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"collect: text {number} is a chat, but the tokenizer has no chat template; set one or pass strings"
        )
    prompt = tokenizer.apply_chat_template(
        text, tokenize=False, add_generation_prompt=text[-1].get("role") != "assistant"
    )
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(
            f"collect: text {number} ({short_text(text)}) has no tokens after its chat template; give it content"
        )
    return ids


def short_text(text: Any) -> str:
    """The beginning of a text, for a message."""
    shown = repr(text)
    return shown if len(shown) <= 40 else shown[:37] + "..."


def _progress_bar(texts: Iterable[Any], progress: bool) -> Any:
    from tqdm.auto import tqdm

    total = len(texts) if isinstance(texts, Sized) else None
    return tqdm(total=total, desc="collect", unit="text", disable=not progress)


def _read_window(
    model: Any, points: dict[int, Point], window: list[list[int]], position: str | int, batch_size: int, bar: Any
) -> dict[int, Tensor]:
    """The rows of a window of texts, in their own order; they run in batches of similar length."""
    by_length = sorted(range(len(window)), key=lambda i: len(window[i]))
    pieces: dict[int, dict[int, Tensor]] = {layer: {} for layer in points}
    for start in range(0, len(window), batch_size):
        batch = by_length[start : start + batch_size]
        for layer, parts in read_batch(model, points, [window[i] for i in batch], position).items():
            pieces[layer].update(zip(batch, parts, strict=True))
        bar.update(len(batch))
    return {layer: torch.cat([of_text[i] for i in range(len(window))]) for layer, of_text in pieces.items()}


def read_batch(
    model: Any, points: dict[int, Point], batch: list[list[int]], position: str | int
) -> dict[int, list[Tensor]]:
    """One forward; for each layer and text the rows of its position, (rows, width), float32 on the CPU."""
    counts = [len(ids) for ids in batch]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in batch], batch_first=True).to(model.device)
    lengths = torch.tensor(counts, device=model.device)
    mask = torch.arange(max(counts), device=model.device) < lengths[:, None]
    select = _selector(position, mask, lengths)
    kept: dict[int, Tensor] = {}
    deepest = max(points)

    def reader(layer: int) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            kept[layer] = select(
                x.reshape(*mask.shape, x.shape[-1])
            )  # OPT's MLP sees the tokens of all texts as one list
            if layer == deepest:
                raise _Stop

        return read

    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    # Outputs that the config asks for are refused: transformers 4.57 captures them by replacing the modules' forwards,
    # and leaves them replaced when it is interrupted.
    inputs |= {
        key: False
        for key in ("output_hidden_states", "output_attentions", "output_router_logits")
        if hasattr(model.config, key)
    }
    handles = [point.attach(reader(layer)) for layer, point in points.items()]
    try:
        model(**inputs)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if missing := [layer for layer in points if layer not in kept]:
        raise ValueError(
            f"collect: the forward never ran {points[missing[0]].path}, so layer {missing[0]} cannot be read; "
            f"use resid_post"
        )
    rows_of = counts if position == "all" else [1] * len(batch)
    return {layer: list(rows.to("cpu", torch.float32).split(rows_of)) for layer, rows in kept.items()}


def _selector(position: str | int, mask: Tensor, lengths: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from (batch, tokens, width) to the rows of `position`: a new tensor, small, still on the device."""
    if position == "mean":

        def mean(x: Tensor) -> Tensor:
            real = mask.to(x.device)[..., None]
            return torch.where(real, x, 0).sum(1, dtype=torch.float32) / lengths.to(x.device)[:, None]

        return mean
    if position == "all":
        text, token = mask.nonzero(as_tuple=True)
    else:
        index = -1 if position == "last" else int(position)
        text, token = torch.arange(len(lengths), device=lengths.device), index + lengths * (index < 0)
    return lambda x: x[text.to(x.device), token.to(x.device)]


def typical_norm_of(rows: Tensor) -> float:
    """The median length of the rows."""
    return float(rows.norm(dim=1).median())
