"""Activations of a model on prompts, and directions from them.

`collect` reads a site of some layers on many texts. `difference`, `mean_difference`, `pca` and `logistic` turn two
sides of activations into a `Direction` per layer. All arithmetic on the sides is float64; what is stored is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ._checks import direction_rows, finite_number
from .layers import Layers, Point, evaluating, find_layers

POSITIONS = ("last", "mean", "all")
_WINDOW = 16  # batches that are sorted by length together: little padding, and only so many texts in memory
_LONGEST_METHOD = 500  # characters of an expression of directions that are kept
_ROUNDING = 1e-6  # a difference below this share of the activations' norm is float32 noise


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
        return {layer: _typical_norm(rows) for layer, rows in self.items()}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{layer}: {tuple(rows.shape)}" for layer, rows in self.items())
        return f"Activations({self.model}, {self.site}, position {self.position!r}, layers {{{shapes}}})"


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the stream that knows its origin. Interventions take it wherever they take a vector.

    Directions of one model, layer and site form a vector space: `a + b`, `a - b`, `-a`, `2 * a`, `a / 3`,
    `sum(directions)`. The result's `method` says what was combined. A layer, site or model that only one operand
    knows is kept; two different ones are an error, because such vectors live in different spaces.

    Attributes:
        vector: float32 (d,), on the CPU; finite and not zero.
        method: the function that made it, or the expression of such functions.
        norm: L2 norm before normalisation, in the activations' unit.
        activation_norm: typical (median) L2 norm of the activations it was made from; None if that is unknown, as in
            most files of other libraries. Of two operands the mean is kept.
        layer, site, position, model: where they were read; None if they were plain tensors. A position on which two
            operands differ becomes None: it says nothing about where the direction can be used.

    Raises:
        TypeError, ValueError: vector is not one finite non-zero row of floats; operands do not belong together.

    Example:
        >>> import torch
        >>> a, b = (Direction(torch.tensor(v), "mean_difference", 5.0, 50.0) for v in ([3.0, 4.0], [3.0, 0.0]))
        >>> (2 * a - b).vector.tolist(), (2 * a - b).method
        ([3.0, 8.0], '2.0·mean_difference − mean_difference')
    """

    vector: Tensor = field(repr=False)
    method: str
    norm: float
    activation_norm: float | None
    layer: int | None = None
    site: str | None = None
    position: str | int | None = None
    model: str | None = None

    __array_ufunc__ = None  # NumPy's scalars leave `numpy.float32(2) * direction` to this class

    def __post_init__(self) -> None:
        row = direction_rows("Direction", "vector", self.vector, one=True)[0]
        object.__setattr__(self, "vector", row.clone())  # the caller may change the tensor it came from

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.vector.numpy()
        array = array if dtype is None else array.astype(dtype, copy=False)
        return array.copy() if copy else array

    def __add__(self, other: Direction) -> Direction:
        return _sum(self, other, 1.0) if isinstance(other, Direction) else NotImplemented

    def __radd__(self, other: Any) -> Direction:
        return self if type(other) is int and other == 0 else NotImplemented  # what the built-in sum starts with

    def __sub__(self, other: Direction) -> Direction:
        return _sum(self, other, -1.0) if isinstance(other, Direction) else NotImplemented

    def __neg__(self) -> Direction:
        return self._made(-self.vector, f"−{_factor(self.method)}")

    def __mul__(self, scale: float) -> Direction:
        if isinstance(scale, (Direction, Tensor)):
            return NotImplemented
        number = finite_number("Direction", "the factor", scale)
        return self._made(self.vector.double() * number, f"{number!r}·{_factor(self.method)}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if isinstance(divisor, (Direction, Tensor)):
            return NotImplemented
        number = finite_number("Direction", "the divisor", divisor)
        if number == 0:
            raise ValueError(f"Direction: cannot divide {self!r} by zero")
        return self._made(self.vector.double() / number, f"{_factor(self.method)} / {number!r}")

    def project_out(self, *others: Direction | Tensor) -> Direction:
        """Return the part that is orthogonal to the span of other directions: v − QQᵀv, Q an orthonormal basis of it.

        Args:
            others: directions, vectors (d,) or rows (m, d). They need not be independent.

        Returns:
            The direction; its `method` names what was removed.

        Raises:
            TypeError, ValueError: nothing to remove; another width, layer, site or model; nothing is left.

        Example:
            >>> import torch
            >>> Direction(torch.tensor([3.0, 4.0]), "pca", 5.0, 50.0).project_out(torch.tensor([1.0, 0.0])).vector
            tensor([0., 4.])
        """
        if not others:
            raise TypeError("project_out: expected at least one direction to remove")
        origin: Direction = self
        for other in others:
            if isinstance(other, Direction):
                origin = replace(origin, **_common_origin("project_out", origin, other))
        rows = torch.cat([_rows("project_out", "a direction", other) for other in others if _fits(self, other)])
        rest = _project_out("project_out", self.vector.double(), rows)
        removed = ", ".join(other.method if isinstance(other, Direction) else "a tensor" for other in others)
        return origin._made(rest, f"{_factor(self.method)} without ({removed})")

    def normalized(self) -> Direction:
        """Return the direction at norm 1: v / ‖v‖. `norm` keeps the length that it had before.

        Example:
            >>> import torch
            >>> unit = Direction(torch.tensor([3.0, 4.0]), "pca", 5.0, 50.0).normalized()
            >>> unit.norm, float(unit.vector.norm())
            (5.0, 1.0)
        """
        length = float(self.vector.double().norm())
        return replace(self, vector=self.vector.double() / length, norm=length, method=f"unit({self.method})")

    def dose(self, strength: float = 1.0) -> float:
        """Return the relative dose of adding c·v, ‖c·v‖ / ‖x‖; ‖x‖ is typical of the activations it was made from.

        `steerfast.dose` measures it on texts of your own, for a whole plan, and says which doses are too large.

        Args:
            strength: c, as in `Add`.

        Returns:
            A number without unit: 1 adds as much as there was.

        Raises:
            ValueError: `activation_norm` is unknown.

        Example:
            >>> import torch
            >>> Direction(torch.tensor([3.0, 4.0]), "pca", 5.0, 50.0).dose(4.0)
            0.4
        """
        if self.activation_norm is None:
            raise ValueError(
                f"dose: {self!r} does not know the norm of the activations; "
                f"measure it with steerfast.dose(model, tokenizer, plan, texts)"
            )
        strength = finite_number("dose", "strength", strength)
        return abs(strength) * float(self.vector.double().norm()) / self.activation_norm

    def _made(self, vector: Tensor, method: str) -> Direction:
        """The result of an expression, with its own norm."""
        short = method if len(method) <= _LONGEST_METHOD else f"{method[: _LONGEST_METHOD - 2]} …"
        return replace(self, vector=vector, method=short, norm=float(vector.double().norm()))

    def __repr__(self) -> str:
        parts = [self.model, f"layer {self.layer}" if self.layer is not None else None, self.site]
        where = f" of {', '.join(part for part in parts if part)}" if any(parts) else ""
        typical = "unknown" if self.activation_norm is None else f"{self.activation_norm:.4g}"
        norms = f"norm {self.norm:.4g}, typical activation {typical}"
        return f"Direction({self.method}{where}: d {self.vector.numel()}, {norms})"


def _sum(a: Direction, b: Direction, sign: float) -> Direction:
    """a + sign·b."""
    origin = replace(a, **_common_origin("+" if sign > 0 else "−", a, b))
    vector = a.vector.double() + sign * b.vector.double()
    text = f"{a.method} + {b.method}" if sign > 0 else f"{a.method} − {_factor(b.method)}"
    if vector.norm() <= _ROUNDING * max(a.vector.norm(), b.vector.norm()):
        raise ValueError(f"Direction: {text} cancels to zero; a zero direction steers nothing")
    return origin._made(vector, text)


def _common_origin(operation: str, a: Direction, b: Direction) -> dict[str, Any]:
    """What two directions that belong together say of their origin."""
    _fits(a, b)
    origin: dict[str, Any] = {}
    for key in ("model", "layer", "site"):
        mine, other = getattr(a, key), getattr(b, key)
        if mine is not None and other is not None and mine != other:
            raise ValueError(
                f"Direction: {a.method} {operation} {b.method}: the {key} is {mine!r} on the left and {other!r} on the "
                f"right; such vectors live in different spaces (dataclasses.replace(v, {key}=None) forgets the {key})"
            )
        origin[key] = other if mine is None else mine
    origin["position"] = a.position if a.position == b.position else None
    norms = [norm for norm in (a.activation_norm, b.activation_norm) if norm is not None]
    origin["activation_norm"] = sum(norms) / len(norms) if norms else None
    return origin


def _fits(a: Direction, other: Direction | Tensor) -> bool:
    """Whether `other` has the width of `a`; if not, an error."""
    width = torch.as_tensor(getattr(other, "vector", other)).shape[-1:]
    if width != a.vector.shape:
        raise ValueError(
            f"Direction: {a!r} has width {len(a.vector)}, the other {tuple(width)}; they must come from one model"
        )
    return True


def _factor(method: str) -> str:
    """A method as a factor: in parentheses if it is a sum."""
    return f"({method})" if any(sign in method for sign in (" ", "−")) else method


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
                f"collect: text {number} ({_short(text)}) has {len(ids)} tokens; "
                f"this model reads at most {longest}; shorten it"
            )
        if isinstance(position, int) and not -len(ids) <= position < len(ids):
            raise ValueError(
                f"collect: position {position} is out of range for text {number} ({_short(text)}), "
                f"which has {len(ids)} tokens, {-len(ids)} to {len(ids) - 1}"
            )
        yield ids


def _token_ids(tokenizer: Any, text: Any, number: int) -> list[int]:
    if isinstance(text, str):
        ids = tokenizer(text)["input_ids"]
        if set(ids) <= set(tokenizer.all_special_ids) and not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"collect: text {number} ({_short(text)}) has no tokens; remove it or give it content")
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
            f"collect: text {number} ({_short(text)}) has no tokens after its chat template; give it content"
        )
    return ids


def _short(text: Any) -> str:
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
        for layer, parts in _read_batch(model, points, [window[i] for i in batch], position).items():
            pieces[layer].update(zip(batch, parts, strict=True))
        bar.update(len(batch))
    return {layer: torch.cat([of_text[i] for i in range(len(window))]) for layer, of_text in pieces.items()}


def _read_batch(
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


Side: TypeAlias = Tensor | Mapping[int, Tensor]
Directions: TypeAlias = (
    Any  # a Direction, or for several layers dict[int, Direction]: the data decide, no type can say it
)
_Method = Callable[[Tensor, Tensor], Tensor]


def difference(pos: Side, neg: Side, *, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the mean difference of pairs: row i of `pos` against row i of `neg`.

        v = 1/n · Σᵢ (posᵢ − negᵢ)

    The value is that of `mean_difference`; the pairing is checked. One pair is activation addition's love − hate.

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, the same layers, site and number of rows.
        normalize: scale to norm 1; the original norm stays in `norm`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction; for activations of several layers a dict of layer -> direction.

    Raises:
        ValueError: sides that do not match, without rows, with NaN or Inf, or that do not differ.

    Reference:
        Turner et al. 2023, Activation Addition, arXiv:2308.10248.

    Example:
        >>> acts = sf.collect(model, tokenizer, ["Love", "Hate"], layers=[8])
        >>> v = sf.extract.difference(acts[8][0], acts[8][1])
        >>> plan = sf.Plan({8: sf.Add(v, 4.0)})
    """
    return _extract("difference", _mean_difference, pos, neg, normalize, project_out, paired=True)


def mean_difference(pos: Side, neg: Side, *, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the difference of the two sides' means; they may have different numbers of rows.

        v = mean(pos) − mean(neg)

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, (m, d), the same layers and site.
        normalize: scale to norm 1; the original norm stays in `norm`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction; for activations of several layers a dict of layer -> direction.

    Raises:
        ValueError: sides that do not match, without rows, with NaN or Inf, or that do not differ.

    Reference:
        Rimsky et al. 2023, Contrastive Activation Addition, arXiv:2312.06681; Arditi et al. 2024, refusal direction,
        arXiv:2406.11717.

    Example:
        >>> pos = sf.collect(model, tokenizer, kind_texts, layers=[14])
        >>> neg = sf.collect(model, tokenizer, rude_texts, layers=[14])
        >>> v = sf.extract.mean_difference(pos, neg)
    """
    return _extract("mean_difference", _mean_difference, pos, neg, normalize, project_out)


def pca(pos: Side, neg: Side, *, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the first principal component of the paired differences, pointing from `neg` to `pos`.

        v = argmax over ‖v‖ = 1 of Σᵢ ((posᵢ − negᵢ)·v)², with the sign for which the mean of (posᵢ − negᵢ)·v is
        positive

    Each pair is centred on its own middle; the mean difference is *not* subtracted, since it is what one looks for.
    This is the convention of steering-vectors' `pca_aggregator` and of repeng's `pca_center`; repeng's default
    `pca_diff` subtracts the mean difference as well.

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, the same layers, site and number of rows.
        normalize: scale to norm 1; a component has norm 1 already, so this matters only after `project_out`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction, of norm 1; for activations of several layers a dict of layer -> direction.

    Raises:
        ValueError: sides that do not match, without rows, with NaN or Inf, or that do not differ.

    Reference:
        Zou et al. 2023, Representation Engineering, arXiv:2310.01405.

    Example:
        >>> pos = sf.collect(model, tokenizer, happy_texts, layers=range(10, 20))
        >>> neg = sf.collect(model, tokenizer, sad_texts, layers=range(10, 20))
        >>> directions = sf.extract.pca(pos, neg)
    """
    return _extract("pca", _first_component, pos, neg, normalize, project_out, paired=True)


def logistic(pos: Side, neg: Side, *, C: float = 1.0, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the weight of a logistic regression that tells `pos` from `neg`, in units of log-odds per unit of
    activation.

        log p(pos | x) / p(neg | x) = v·x + b,   penalty ‖s·v‖² / 2C,   s = root mean square of the centred activations

    The activations are centred and divided by the one number s, so `C` means the same whatever their unit; v is in
    the original unit.

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, (m, d), the same layers and site.
        C: inverse strength of the L2 penalty, as in scikit-learn.
        normalize: scale to norm 1; the original norm stays in `norm`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction; for activations of several layers a dict of layer -> direction.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: C not positive; sides that do not match, without rows, with NaN or Inf, or that do not differ.

    Reference:
        Li et al. 2023, Inference-Time Intervention, arXiv:2306.03341.

    Example:
        >>> pos = sf.collect(model, tokenizer, true_statements, layers=[12])
        >>> neg = sf.collect(model, tokenizer, false_statements, layers=[12])
        >>> v = sf.extract.logistic(pos, neg, C=0.1, normalize=True)
    """
    if not C > 0 or float("inf") == C:
        raise ValueError(f"logistic: C must be positive and finite, got {C!r}")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("logistic: needs scikit-learn; pip install scikit-learn, or use mean_difference") from error

    def weight(p: Tensor, n: Tensor) -> Tensor:
        x = torch.cat([p, n])
        x = x - x.mean(0)
        scale = x.square().mean().sqrt()
        fit = LogisticRegression(C=C, max_iter=1000).fit((x / scale).numpy(), [1] * len(p) + [0] * len(n))
        return torch.from_numpy(fit.coef_[0]) / scale

    return _extract("logistic", weight, pos, neg, normalize, project_out)


def _mean_difference(p: Tensor, n: Tensor) -> Tensor:
    return p.mean(0) - n.mean(0)


def _first_component(p: Tensor, n: Tensor) -> Tensor:
    delta = p - n
    if len(delta) <= delta.shape[1]:  # the smaller of the two Gram matrices has the same leading eigenvector
        component = delta.T @ torch.linalg.eigh(delta @ delta.T).eigenvectors[:, -1]
    else:
        component = torch.linalg.eigh(delta.T @ delta).eigenvectors[:, -1]
    component = component / component.norm()
    return -component if delta.mean(0) @ component < 0 else component


def _extract(
    name: str, method: _Method, pos: Side, neg: Side, normalize: bool, project_out: Any, *, paired: bool = False
) -> Directions:
    """Apply `method` to each layer of the two sides, and finish the result."""
    if not isinstance(pos, Mapping) and not isinstance(neg, Mapping):
        return _direction(name, method, pos, neg, normalize, project_out, paired)
    if not (isinstance(pos, Mapping) and isinstance(neg, Mapping)):
        raise ValueError(
            f"{name}: pos is a {type(pos).__name__} and neg a {type(neg).__name__}; "
            f"give both as activations or both as tensors"
        )
    _check_same_origin(name, pos, neg, paired)
    directions = {}
    for layer in pos:
        direction = _direction(f"{name}: layer {layer}", method, pos[layer], neg[layer], normalize, project_out, paired)
        origin: dict[str, Any] = {key: getattr(pos, key, None) for key in ("site", "position", "model")}
        directions[layer] = replace(direction, method=name, layer=layer, **origin)
    return directions if len(directions) != 1 else next(iter(directions.values()))


def _check_same_origin(name: str, pos: Mapping[int, Tensor], neg: Mapping[int, Tensor], paired: bool) -> None:
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


def _direction(
    name: str, method: _Method, pos: Any, neg: Any, normalize: bool, project_out: Any, paired: bool
) -> Direction:
    p, n = _rows(name, "pos", pos), _rows(name, "neg", neg)
    if p.shape[1] != n.shape[1]:
        raise ValueError(
            f"{name}: pos has width {p.shape[1]} and neg {n.shape[1]}; they must come from the same model and site"
        )
    if paired and len(p) != len(n):
        raise ValueError(
            f"{name}: needs pairs, got {len(p)} rows in pos and {len(n)} in neg; use mean_difference or logistic"
        )
    typical = _typical_norm(torch.cat([p, n]))
    apart = (p - n).norm(dim=1).max() if paired else _mean_difference(p, n).norm()
    if apart <= _ROUNDING * typical:
        raise ValueError(
            f"{name}: pos and neg do not differ (by {float(apart):.3g} at a typical norm of {typical:.3g}); "
            f"check the texts and position"
        )
    vector = method(p, n)
    if vector.norm() <= _ROUNDING * typical and method is _mean_difference:
        raise ValueError(f"{name}: the differences of pos and neg cancel to zero; try pca")
    if project_out is not None:
        vector = _project_out(name, vector, project_out)
    norm = float(vector.norm())
    return Direction((vector / norm if normalize else vector).float(), name, norm, typical)


def _rows(name: str, argument: str, side: Any) -> Tensor:
    """The rows (n, d) of one argument in float64 on the CPU, checked."""
    rows = torch.as_tensor(getattr(side, "vector", side))
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"{name}: {argument} must be floating point of shape (n, d) or (d,), got {rows.dtype} {tuple(rows.shape)}"
        )
    if not rows.numel():
        raise ValueError(f"{name}: {argument} has no rows, shape {tuple(rows.shape)}; give at least one")
    if bad := int((~rows.isfinite().all(1)).sum()):
        raise ValueError(
            f"{name}: {argument} has NaN or Inf in {bad} of {len(rows)} rows; "
            f"collect in bfloat16 or float32 instead of float16"
        )
    return rows.detach().to("cpu", torch.float64)


def _project_out(name: str, vector: Tensor, directions: Any) -> Tensor:
    """`vector` without its part in the span of the rows of `directions`."""
    rows = _rows(name, "project_out", directions)
    if rows.shape[1] != len(vector):
        raise ValueError(f"{name}: project_out has width {rows.shape[1]}, pos and neg {len(vector)}")
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > _ROUNDING * sizes[0]]
    rest = vector - basis.T @ (basis @ vector)
    if rest.norm() <= _ROUNDING * vector.norm():
        raise ValueError(
            f"{name}: nothing is left after project_out: the direction lies in the span of its {len(rows)} rows"
        )
    return rest


def _typical_norm(rows: Tensor) -> float:
    return float(rows.norm(dim=1).median())
