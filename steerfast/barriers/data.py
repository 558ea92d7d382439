"""The activations that a barrier or a probe is fitted on: checked, with groups that are held out together."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfast._checks import seed_number, tensor_of, warn_user
from steerfast.models.collect import Activations
from steerfast.place import NOWHERE, Origin, common_origin, median_of, typical_norm_of

from .barrier import BarrierInfo

SEARCHED = 1000
"""Rows, drawn by group, on which settings are compared."""
FOLDS = 5
LONGEST = 3.0
"""Times the typical length that a row has at most in a raw fit: the first token of a text may have a hundred."""
SHORT, LONG = 1e-16, 1e16
"""Typical lengths between which squares, and their squares, are numbers of float32."""


@dataclass(frozen=True)
class Data:
    """Checked activations: rows in float32, positives first."""

    x: Tensor  # (n, d)
    labels: Tensor  # (n,) bool
    groups: Tensor  # (n,) int64
    origin: Origin
    seed: int
    owner: str = "fit_barrier"  # the public function, as errors name it
    raw: bool = False  # rows keep their lengths
    balanced: bool = False  # the share of the classes is taken out of what is fitted

    @classmethod
    def of(cls, pos: Any, neg: Any, groups: Iterable[Any] | None, seed: int, owner: str = "fit_barrier") -> Data:
        """Check both sides and put them together."""
        seed = seed_number(owner, seed)
        (first, pos_texts), (second, neg_texts) = _origin(pos), _origin(neg)
        sides = [_activations(owner, "pos", pos), _activations(owner, "neg", neg)]
        if sides[0].shape[1] != sides[1].shape[1]:
            raise ValueError(
                f"{owner}: pos has width {sides[0].shape[1]} and neg {sides[1].shape[1]}; both must come from one layer"
            )
        origin = common_origin(f"{owner}: pos and neg", [first, second])
        few = next(((name, len(side)) for name, side in zip(("pos", "neg"), sides, strict=True) if len(side) < 2), None)
        if few is not None:
            raise ValueError(f"{owner}: {few[0]} has {few[1]} row(s); expected at least 2 on each side")
        prints = [sorted(hash(row.tobytes()) for row in side.numpy()) for side in sides]
        if prints[0] == prints[1]:
            raise identical(owner)
        x = torch.cat(sides)
        if groups is not None:
            names: list[Any] = labels_of(owner, groups)
        elif pos_texts is not None and neg_texts is not None:
            names = [(0, t) for t in pos_texts.tolist()] + [(1, t) for t in neg_texts.tolist()]
        else:
            names = list(range(len(x)))
        if len(names) != len(x):
            raise ValueError(
                f"{owner}: groups has {len(names)} labels; expected {len(x)}, one per row of pos and then of neg"
            )
        codes = {name: i for i, name in enumerate(dict.fromkeys(names))}
        if groups is not None and len(codes) < 2:
            raise ValueError(f"{owner}: all rows are in one group, so none can be held out; give two groups at least")
        typical = typical_norm_of(x)
        if not SHORT < typical < LONG:
            raise ValueError(
                f"{owner}: the typical row has length {typical:g}; expected {SHORT:g} to {LONG:g}, in another unit"
            )
        return cls(
            x,
            torch.arange(len(x), device="cpu") < len(sides[0]),
            torch.tensor([codes[name] for name in names], device="cpu"),
            replace(origin, typical_norm=typical),
            seed,
            owner,
        )

    @functools.cached_property
    def bounded(self) -> Tensor:
        """The rows, those of more than `LONGEST` typical lengths cut to it: a few of them would outweigh all others."""
        norms = torch.linalg.vector_norm(self.x, dim=1, keepdim=True)
        return self.x / (norms / (LONGEST * median_of(norms))).clamp(min=1)

    def scaled(self, raw: bool) -> Data:
        """The same rows at length 1; raw: all in units of the typical length, and bounded."""
        norms = torch.linalg.vector_norm(self.x, dim=1, keepdim=True)
        typical = median_of(norms)
        count = int((norms > LONGEST * typical).sum())
        if raw and count:
            warn_user(
                f"{self.owner}: {count} of {len(norms)} rows are longer than {LONGEST:g} times the typical one, and count as "
                "so long; leave out what they are of, such as the first token, or fit with raw=False"
            )
        return replace(self, x=self.bounded / typical if raw else self.x / norms, raw=raw, balanced=True)

    @property
    def prior(self) -> float:
        """log n₊/n₋, the share of the classes in a fitted log-odds."""
        share = float(self.labels.double().mean())
        return math.log(share / (1 - share))

    def take(self, index: Tensor) -> Data:
        """Some of the rows."""
        return replace(self, x=self.x[index], labels=self.labels[index], groups=self.groups[index])

    def searched(self) -> Data:
        """At most `SEARCHED` rows, whole groups as far as they fit, in random order of the groups.

        Each class has its share of them, and where it is rare a twentieth, or all that there is of it.
        """
        if len(self.x) <= SEARCHED:
            return self
        order = torch.randperm(int(self.groups.max()) + 1, generator=seeded(self.seed))[self.groups].argsort(
            stable=True
        )
        side = self.labels[order]
        count = torch.stack([(~side).sum(), side.sum()])  # of the negatives and the positives
        rare = int(count.argmin())
        kept = min(int(count[rare]), max(SEARCHED * int(count[rare]) // len(side), SEARCHED // 20))
        place = torch.where(side, side.cumsum(0), (~side).cumsum(0))  # from 1, within its class
        return self.take(order[place <= torch.where(side == bool(rare), kept, SEARCHED - kept)])

    @functools.cached_property
    def folds(self) -> list[tuple[Tensor, Tensor]]:
        """(fitted, held out) rows; none where the groups are too few for both classes to be in every part."""
        from sklearn.model_selection import StratifiedGroupKFold

        count = min(FOLDS, *(len(self.groups[self.labels == side].unique()) for side in (True, False)))
        if count < 2:
            return []
        parts = StratifiedGroupKFold(count, shuffle=True, random_state=self.seed).split(
            self.x, self.labels, self.groups
        )
        found = [(torch.from_numpy(fitted), torch.from_numpy(held)) for fitted, held in parts]
        return [(f, h) for f, h in found if 0 < int(self.labels[f].sum()) < len(f) and len(h)]

    def info(self, kind: str, held: Held, h: Tensor, settings: dict[str, float]) -> BarrierInfo:
        """What is known after a fit; h are the fitted log-odds of the rows."""
        separable = bool(((h > self.prior) == self.labels).all())
        if math.isnan(held.log_likelihood):
            what, so = (
                ("separable and too few", "the size of h is set by the penalty alone")
                if separable
                else ("too few, or in too few groups,", "the settings are the defaults and the accuracy is unknown")
            )
            warnings.warn(
                f"fit_barrier: the {len(self.x)} rows are {what} to hold some out, so {so}; give more examples",
                UserWarning,
                stacklevel=4,
            )
        return BarrierInfo(
            kind,
            log_likelihood=held.log_likelihood,
            accuracy=held.accuracy,
            separable=separable,
            settings=settings,
        )


def labels_of(owner: str, groups: Any) -> list[Any]:
    """One label per row, of an array, a tensor, or an iterable of whatever: two that are equal are one key of a dict.

    A tensor is a key by its identity, so tensors of one number in a list become numbers.

    Raises:
        TypeError: one label, a text, or labels that are no keys of a dict.
        ValueError: a label is NaN, which equals no other.
    """

    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor | np.ndarray) else value

    given = plain(groups)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"{owner}: groups is {given!r}; expected a list of labels, one per row of pos and then of neg")
    labels = [plain(label) for label in given]
    if (bad := next((label for label in labels if not isinstance(label, Hashable)), None)) is not None:
        raise TypeError(f"{owner}: groups has the label {bad!r}; expected a number or a text for each row")
    if any(label != label for label in labels):
        raise ValueError(f"{owner}: groups has labels that are NaN, which equal no other; name the group of each row")
    return labels


class Held(NamedTuple):
    """What held-out rows say of a fit: mean log-likelihood, share on the right side, standard error of that mean, area under
    the ROC curve.
    """

    log_likelihood: float
    accuracy: float
    error: float
    auroc: float


UNKNOWN = Held(math.nan, math.nan, math.nan, math.nan)


def _origin(value: Any) -> tuple[Origin, Tensor | None]:
    if not isinstance(value, Activations) or len(value) != 1:
        return NOWHERE, None
    return value.origin(next(iter(value))), value.text_index


def _activations(owner: str, name: str, value: Any) -> Tensor:
    if isinstance(value, dict):
        if len(value) != 1:
            raise ValueError(f"{owner}: {name} holds {len(value)} layers; pass one of them, such as acts[14]")
        value = next(iter(value.values()))
    try:
        rows = tensor_of(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = "rows (n, d), such as sf.collect returns"
        raise TypeError(f"{owner}: {name} is {repr(value)[:60]}; expected {what} ({error})") from None
    if not rows.is_floating_point():
        raise TypeError(f"{owner}: {name} has dtype {rows.dtype}; expected a floating dtype")
    rows = rows.detach().float().cpu()
    if rows.dim() != 2 or rows.shape[0] == 0:
        raise ValueError(f"{owner}: {name} has shape {tuple(rows.shape)}; expected (n, d) with n >= 1")
    bad = (~rows.isfinite()).any(1) | (rows == 0).all(1)
    if bad.any():
        raise ValueError(f"{owner}: row {int(bad.nonzero()[0])} of {name} is zero or holds NaN or Inf; remove it")
    return rows


def identical(owner: str) -> ValueError:
    """The error for sides that no direction separates."""
    return ValueError(f"{owner}: the two sides are identical, so no direction separates them")


def not_flat(w: Tensor, owner: str = "fit_barrier") -> float:
    """The length of the fitted weights; sides that no direction separates are an error."""
    length = float(w.norm())
    if not length > 1e-9:
        raise identical(owner)
    return length


def seeded(seed: int) -> torch.Generator:
    """A generator of its own, for draws that must not depend on what else is drawn."""
    return torch.Generator("cpu").manual_seed(seed)
