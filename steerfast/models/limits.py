"""What a model reads: how many tokens of a text, and which."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

_PLACEHOLDER = re.compile(r"token_(id|index)$")


class Limits:
    """The context length and the vocabulary of a model, for whoever gives it token ids.

    Args:
        owner: The public function that asks, for its messages.
        model: A `transformers` model.

    Attributes:
        longest: Number of tokens that the model was built for; None: its config does not say.
    """

    def __init__(self, owner: str, model: Any) -> None:
        self.owner, self.name = owner, type(getattr(model, "_orig_mod", model)).__name__
        text = model.config.get_text_config()
        self.longest: int | None = getattr(text, "max_position_embeddings", None)
        self._size: int | None = getattr(text, "vocab_size", None)
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embedding = None
        if self._size is not None and isinstance(embedding, nn.Module):  # of more than one table in Idefics and Molmo
            self._size = max(self._size, sum(table.shape[0] for table in embedding.parameters() if table.dim() == 2))
        self._named = {v for name, v in vars(model.config).items() if _PLACEHOLDER.search(name) and isinstance(v, int)}

    def unknown(self, ids: Iterable[int]) -> list[int]:
        """The ids that the model has no embedding for and its config does not name: the mark of an image stands for others."""
        size = self._size
        return [] if size is None else [one for one in ids if not 0 <= one < size and one not in self._named]

    def check_length(self, what: str, count: int) -> None:
        """Refuse what is longer than the model was built for."""
        if self.longest is not None and count > self.longest:
            raise ValueError(
                f"{self.owner}: {what} has {count} tokens; this model reads at most {self.longest}; shorten it"
            )

    def check(self, what: str, ids: Iterable[int]) -> None:
        """Refuse the token ids of a text that the model cannot read.

        Raises:
            ValueError: they are too many, or one is beyond the vocabulary.
        """
        found = list(ids)
        self.check_length(what, len(found))
        if unknown := self.unknown(found):
            raise ValueError(
                f"{self.owner}: {what} has the token id {unknown[0]}, beyond the vocabulary of {self.name}; is the tokenizer "
                "another model's, or has it tokens that the model was not resized for?"
            )
