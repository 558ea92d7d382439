"""Detection with a language model for a judge: one that is asked, over any endpoint that speaks OpenAI's chat completions.

Nothing is sent anywhere unless a `Judge` is made and asked; then the words of the features and held-out passages of the corpus
go to its URL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from steerfast._checks import finite_number, instance_of, seed_number, whole_number, whole_numbers

from .evidence import Evidence
from .explanation import Explanations

_ASKED = """A feature inside a language model fires on some texts and not on others. It is described by these words, the most
telling first (publ* stands for words that begin so, *ing for words that end so): {words}

Texts:
{texts}

In which of these texts does the feature fire? Answer with their numbers alone, separated by commas, or with the word none."""


@dataclass(frozen=True)
class Judge:
    """A model behind an endpoint of the form URL/chat/completions.

    Args:
        url: Such as "http://localhost:8000/v1".
        model: The name that the endpoint knows it by.
        key: Sent as a bearer token; None: none is.
        timeout: Seconds until an answer must be there.
        tokens: Of an answer, at most; a model that thinks before it answers needs many more.

    Raises:
        TypeError, ValueError: the URL is not http or https, or timeout or tokens is not above 0.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    tokens: int = 64

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise ValueError(f"Judge: url is {self.url!r}; expected one that begins with http:// or https://")
        if finite_number("Judge", "timeout", self.timeout) <= 0:
            raise ValueError(f"Judge: timeout is {self.timeout}; expected seconds above 0")
        object.__setattr__(self, "tokens", whole_number("Judge", "tokens", self.tokens, 1))

    def ask(self, text: str) -> str:
        """The answer to a text, at temperature 0.

        Raises:
            ConnectionError: there is no answer, or the endpoint refuses.
            ValueError: what comes back is no chat completion, or one without text.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.tokens,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        where = self.url.rstrip("/") + "/chat/completions"
        try:
            with urlopen(Request(where, json.dumps(body).encode(), headers), timeout=self.timeout) as answer:
                content = answer.read()
        except HTTPError as error:
            said = error.read(300).decode("utf-8", "replace")
            raise ConnectionError(f"Judge: {where} answered {error.code} {error.reason}: {said}") from None
        except (HTTPException, OSError) as error:
            raise ConnectionError(f"Judge: {where} cannot be reached ({error}); check url and timeout") from None
        try:
            said = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"Judge: {where} sent no chat completion ({error!r}): {content[:200]!r}") from None
        if not isinstance(said, str) or not said.strip():
            raise ValueError(
                f"Judge: {self.model} answered nothing in {self.tokens} tokens; give Judge(…, tokens=…) more if it thinks first"
            )
        return said


def judged_detection(
    judge: Judge,
    explanations: Explanations,
    evidence: Evidence,
    features: Iterable[int],
    *,
    passages: int = 10,
    seed: int = 0,
) -> dict[int, float]:
    """Detection as in `detect`, where a judge says from the words which held-out passages a feature fires in.

    Args:
        judge: Who is asked, once per feature.
        explanations: Their words are shown.
        evidence: What `observe` returned.
        features: Which ones.
        passages: Shown per feature: half of them firing, drawn evenly over its activations, half not.
        seed: Which are drawn, and their order.

    Returns:
        Feature -> balanced accuracy; 0.5 is chance.

    Raises:
        ValueError: a feature fires in fewer than passages/2 held-out passages, or leaves fewer out; it is out of range; an answer
            that neither names texts nor says none.
        ConnectionError: the judge does not answer.
    """
    instance_of("judged_detection", "explanations", explanations, Explanations, "sf.explain(…)")
    instance_of("judged_detection", "evidence", evidence, Evidence, "sf.sae.observe(…)")
    half = whole_number("judged_detection", "passages", passages, 2) // 2
    chosen = whole_numbers("judged_detection", "features", features, len(evidence))
    generator = np.random.default_rng(seed_number("judged_detection", seed))
    found = {}
    for feature in chosen:
        if not 0 <= feature < len(evidence):
            raise ValueError(f"judged_detection: feature {feature} is out of range; there are {len(evidence)}, from 0")
        shown, fires = _drawn(evidence, feature, half, generator)
        texts = "\n".join(f"{i}. {' '.join(evidence.held_out.texts[one].split())}" for i, one in enumerate(shown, 1))
        answer = judge.ask(_ASKED.format(words=", ".join(explanations.words[feature]) or "(none)", texts=texts))
        named = {int(number) - 1 for number in re.findall(r"\d+", answer)}
        if not named and not re.search(r"\bnone\b", answer, re.IGNORECASE):
            raise ValueError(
                f"judged_detection: {judge.model} neither named texts nor said none for feature {feature}: {answer[:200]!r}"
            )
        said = np.array([i in named for i in range(len(shown))])
        found[feature] = float((said[fires].mean() + (~said[~fires]).mean()) / 2)
    return found


def _drawn(
    evidence: Evidence, feature: int, half: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Held-out passages in random order, and which of them fire."""
    firing, values = evidence.held_out.firing(feature)
    others = np.delete(np.arange(evidence.held_out.passages), firing)
    if min(len(firing), len(others)) < half:
        raise ValueError(
            f"judged_detection: feature {feature} fires in {len(firing)} held-out passages and not in {len(others)}; expected "
            f"{half} of each: leave it out or read more of the corpus"
        )
    by_value = firing[np.argsort(values, kind="stable")]
    on = [generator.choice(part) for part in np.array_split(by_value, half)]
    both = np.concatenate([on, generator.choice(others, half, replace=False)])
    order = generator.permutation(2 * half)
    return both[order], (np.arange(2 * half) < half)[order]
