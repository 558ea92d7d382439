"""What a family of files is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from steerfast.sae.model import SAE


@dataclass(frozen=True)
class Family:
    """One family of files.

    Attributes:
        name: As it is called in messages and in `Source.library`.
        weights: Name of the file with the tensors, relative to the directory of the configuration.
        config: Name of the JSON beside it; None: the family has none.
        read: (configuration, tensors, path of the weights) -> SAE; None: the folder or the tensors decide who reads it.
        takes: Which of "k" and "scale" its reader takes, too.
    """

    name: str
    weights: str
    config: str | None
    read: Callable[..., SAE] | None
    takes: tuple[str, ...] = ()
