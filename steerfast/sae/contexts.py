"""Texts packed into contexts of equal length, and which of their tokens count.

Texts are joined with the end-of-text token and cut into contexts, each begun with the beginning-of-text token (where the
tokenizer has one), once. What is packed lies in an unnamed file, so that memory does not grow with the text.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast._checks import whole_number
from steerfast.models.texts import TextReader

_TOKENIZED_AT_A_TIME = 512
_IN_MEMORY = 1 << 26  # bytes of tokens that are kept out of a file


class Contexts:
    """Packed texts: contexts of equal length, one after another, in memory up to 64 MB and else in an unnamed file.

    Args:
        tokenizer: A tokenizer of `transformers`.
        texts: Strings; read once.
        length: Tokens of a context, beginning-of-text included. A last context that is not full is dropped.
        directory: Where the file is; None: the system's place for temporary files.

    Attributes:
        length: Tokens of a context.
        digest: SHA-256 of all the tokens, int32.

    Raises:
        TypeError: texts is one string, or holds something else.
        ValueError: the length is below 8, or the texts do not fill one context.
        OSError: the disk is full.

    Warns:
        UserWarning: a text brings along a special token that the tokenizer adds itself; it is left out.
    """

    def __init__(
        self, tokenizer: Any, texts: Iterable[str], length: int, directory: str | os.PathLike[str] | None = None
    ) -> None:
        self.length = whole_number("pack", "context", length, 8)
        self._special = sorted(TextReader.of(tokenizer, "pack").tokenizer.all_special_ids)
        folder = None if directory is None else os.fspath(directory)
        self._file = SpooledTemporaryFile(_IN_MEMORY, dir=folder)  # noqa: SIM115 - it lives as long as this
        seen, self._count = hashlib.sha256(), 0
        for block in packed(tokenizer, texts, self.length):
            content = block.tobytes()
            self._file.write(content)
            seen.update(content)
            self._count += len(block)
        self.digest = seen.hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> Tensor:
        """Contexts of a slice without a step, int32 (contexts, length)."""
        start, stop, step = part.indices(self._count)
        if step != 1:
            raise ValueError(f"Contexts: got a step of {step}; expected a slice of neighbours")
        size = 4 * self.length
        self._file.seek(size * start)
        content = bytearray(self._file.read(size * max(0, stop - start)))
        if not content:
            return torch.empty(0, self.length, dtype=torch.int32, device="cpu")
        return torch.frombuffer(content, dtype=torch.int32).view(-1, self.length)

    def real(self, contexts: Tensor) -> Tensor:
        """Which tokens of contexts count: neither the first of a context nor special; bool like contexts."""
        return real_tokens(self._special, contexts)


def packed(tokenizer: Any, texts: Iterable[str], length: int) -> Iterator[NDArray[np.int32]]:
    """Contexts of texts, some at a time, (contexts, length): no more than 512 texts and a part of a context are held.

    Raises and warns as `Contexts`.
    """
    if isinstance(texts, str):
        raise TypeError("pack: texts must be several texts, got one string; put it into a list")
    length = whole_number("pack", "context", length, 8)
    reader = TextReader.of(tokenizer, "pack")
    tokenizer = reader.tokenizer
    first, last = (
        np.array([] if one is None else [one], dtype=np.int32)
        for one in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    rest, seen, found = np.empty(0, dtype=np.int32), 0, 0
    for window in _windows(texts, _TOKENIZED_AT_A_TIME):
        pieces = [rest]
        for ids in reader.own(window):
            pieces += [np.array(ids, dtype=np.int32), last]
        tokens = np.concatenate(pieces)
        seen += len(tokens) - len(rest)
        block, used = _cut(tokens, first, length)
        rest = tokens[used:].copy()
        if block:
            found += len(block)
            yield np.stack(block)
    if not found:
        least = length - len(first)
        raise ValueError(f"pack: the texts have {seen} tokens; expected {least} at least, one context: give more")


def real_tokens(special: Iterable[int], contexts: Tensor) -> Tensor:
    """Which tokens of packed contexts count: neither the first of a context nor special; bool like contexts."""
    keep = ~torch.isin(contexts, torch.tensor(sorted(special), dtype=contexts.dtype, device=contexts.device))
    keep[:, 0] = False
    return keep


def _cut(tokens: NDArray[np.int32], first: NDArray[np.int32], length: int) -> tuple[list[NDArray[np.int32]], int]:
    """The full contexts at the beginning of tokens, and how many tokens they take."""
    contexts, at = [], 0
    while at < len(tokens):
        # a chat's first token, or an end of text that is both
        begin = first[:0] if np.array_equal(tokens[at : at + 1], first) else first
        until = at + length - len(begin)
        if until > len(tokens):
            break
        contexts.append(np.concatenate([begin, tokens[at:until]]))
        at = until
    return contexts, at


def _windows(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    window: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"pack: a text is {type(text).__name__}; expected strings")
        window.append(text)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window
