"""Texts as token ids: the one place where a tokenizer is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steerfast._checks import warn_user

_PROBES = ("a", "0", ".")
"""Texts of one token or so, of which one at least has a token in any vocabulary."""
WORD = "a"
"""What a text follows that begins with a space, so that its tokens are those of running text."""
_OTHER_PARTS = ("image_processor", "feature_extractor", "video_processor")
"""What a processor has beside its tokenizer."""


class TextReader:
    """A tokenizer that adds its special tokens once, and says once if a text brought them along.

    A chat template writes the beginning-of-text token into its text, and the tokenizer then adds it again: two of them
    change every activation behind them (31 % of their length on a Llama). So a text that begins with what the tokenizer
    adds in front, or ends with what it adds behind, is read as if it did not.

    Args:
        tokenizer: A tokenizer of `transformers`, or a callable like one.
        owner: The public function that reads, for its messages.

    Raises:
        TypeError: it is no tokenizer, or a processor, whose tokenizer is what reads texts.

    Example:
        >>> TextReader(tokenizer, "collect").ids("I hate you")
        [57, 13735, 346]
    """

    def __init__(self, tokenizer: Any, owner: str) -> None:
        if not callable(tokenizer):
            raise TypeError(f"{owner}: tokenizer must be a tokenizer of transformers; got {type(tokenizer).__name__}")
        if any(hasattr(tokenizer, part) for part in _OTHER_PARTS):
            raise TypeError(
                f"{owner}: tokenizer is a {type(tokenizer).__name__}; pass its .tokenizer, which is what reads texts"
            )
        self.tokenizer, self.owner = tokenizer, owner
        self._around: tuple[list[int], list[int]] | None = None
        self._warned = False

    @classmethod
    def of(cls, tokenizer: Any, owner: str) -> TextReader:
        """The reader of a tokenizer; a reader is its own, so that functions that call each other warn once."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer, owner)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that the tokenizer adds, each once."""
        return self._read(text, self._added()[1])

    def beginning(self, text: str) -> list[int]:
        """Token ids of a text that goes on: as `ids`, without the end-of-text token that some tokenizers add behind."""
        return self._read(text, [])

    def bare(self, text: str) -> list[int]:
        """Token ids of a text as it stands: nothing is added, nothing left out."""
        return list(self.tokenizer(self._whole(text), add_special_tokens=False)["input_ids"])

    def inside(self, text: str) -> list[int]:
        """Token ids of a text as it stands inside another one: what begins with a space follows a word."""
        return self.following(WORD, text) if text[:1].isspace() else self.bare(text)

    def following(self, before: str, text: str) -> list[int]:
        """Token ids of a text as it follows another: what both together have behind the tokens of the first.

        A tokenizer of Llama 2's kind begins whatever it reads alone with a token of a space, which running text has not. Where
        the first text's tokens do not begin both together, as one token spans the two, the text is read alone.
        """
        own, both = self.bare(before), self.bare(before + text)
        return both[len(own) :] if both[: len(own)] == own else self.bare(text)

    def each_following(self, before: str, texts: list[str]) -> list[list[int]]:
        """`following` of each text, in one call of the tokenizer."""
        whole = [self._whole(before + text) for text in texts]
        own, found = self.bare(before), self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return [
            list(ids[len(own) :]) if list(ids[: len(own)]) == own else self.bare(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    def own(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text without what the tokenizer adds around it, for a caller who adds his own."""
        found = self.tokenizer([self._whole(text) for text in texts], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return [self._without(text, list(ids)) for text, ids in zip(texts, found, strict=True)]

    def located(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids as `own` gives them, and where in the text each token stands: (first character, behind the last).

        Raises:
            ValueError: the tokenizer cannot say where its tokens stand.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{self.owner}: {type(self.tokenizer).__name__} does not say where in a text its tokens stand; load a fast one "
                "(AutoTokenizer.from_pretrained(name))"
            )
        read = self.tokenizer(self._whole(text), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = list(read["input_ids"]), [(int(first), int(behind)) for first, behind in read["offset_mapping"]]
        front = self._added()[0]
        start = len(front) if front and ids[: len(front)] == front else 0
        own = self._without(text, ids)
        return own, spans[start : start + len(own)]

    def chat(self, messages: Any, what: str) -> str:
        """The text that the chat template makes, with the generation prompt unless the assistant has the last word.

        Args:
            messages: Of a chat, each with "role" and, but for calls of tools, "content".
            what: They are, for the messages of errors.

        Raises:
            TypeError, ValueError: they are no chat, or the template does not take them; there is no template.
        """
        where = f"{self.owner}: {what}"
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise TypeError(f"{where} must be a string or a list of chat messages, got {type(messages).__name__}")
        if not messages:
            raise ValueError(f"{where} is a chat without messages; remove it or give it content")
        for number, message in enumerate(messages):
            if not isinstance(message.get("role"), str):
                raise ValueError(
                    f"{where}: message {number} has {message.get('role')!r} as its role; expected a word such as 'user' or "
                    "'assistant'"
                )
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"{where} is a chat, but the tokenizer has no chat template; set one or pass strings")
        goes_on = messages[-1]["role"] != "assistant"
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=goes_on))
        except Exception as error:  # a template is a program, which refuses in its own words
            raise ValueError(
                f"{where} is no chat that this tokenizer's template takes ({type(error).__name__}: {error}); mind the roles, "
                "their order and the contents"
            ) from error

    def _whole(self, text: str) -> str:
        """A text without halves of characters, which no tokenizer reads."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.owner}: the text {short_text(text)} holds {text[error.start]!r} as character {error.start}, half "
                "a character (a lone surrogate); read its source as UTF-8, or leave the character out"
            ) from None
        return text

    def _read(self, text: str, end: list[int]) -> list[int]:
        ids = list(self.tokenizer(self._whole(text))["input_ids"])
        front, behind = self._added()
        stop = len(ids) - len(behind)
        if stop < len(front) or ids[: len(front)] != front or ids[stop:] != behind:
            return ids
        return front + self._without(text, ids[len(front) : stop]) + end

    def _without(self, text: str, ids: list[int]) -> list[int]:
        """The ids of a text without those at its ends that the tokenizer adds itself."""
        front, behind = self._added()
        if front and ids[: len(front)] == front:
            self._warn(text, "begins", front)
            ids = ids[len(front) :]
        if behind and ids[-len(behind) :] == behind:
            self._warn(text, "ends", behind)
            ids = ids[: -len(behind)]
        return ids

    def _added(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it."""
        if self._around is None:
            self._around = [], []
            for probe in _PROBES:
                bare, whole = self.bare(probe), list(self.tokenizer(probe)["input_ids"])
                places = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
                if bare and places:
                    self._around = whole[: places[0]], whole[places[0] + len(bare) :]
                    break
        return self._around

    def _warn(self, text: str, where: str, ids: list[int]) -> None:
        if self._warned:
            return
        self._warned = True
        decode = getattr(self.tokenizer, "decode", str)
        warn_user(
            f"{self.owner}: a text {where} with {decode(ids)!r}, which the tokenizer adds itself "
            f"({short_text(text)}); it is read once, here and in every such text"
        )


def short_text(text: Any) -> str:
    """The beginning of a text, for a message."""
    shown = repr(text)
    return shown if len(shown) <= 40 else shown[:37] + "..."
