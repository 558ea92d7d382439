"""The page of features: one HTML file with its style, its script and its data inside, and nothing from elsewhere.

The data are JSON that only the page's script reads, and what it shows goes through text nodes, so a corpus can put no markup
into the page. A content security policy allows exactly this style and this script, by their hashes, and no connection at all.
A feature takes about 1 to 2 kB: its passages are text with one letter per token for its length and one digit for its
activation.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from steerfast._checks import instance_of, whole_number
from steerfast.files.replace import replace_file
from steerfast.place import median_of

from .detection import Detection
from .evidence import Evidence, Passage
from .explanation import Explanations
from .relations import Relations

_ORDERS = {
    "best": "best first", "detection": "detection", "intruder": "intruder", "dense": "fires often", "rare": "fires rarely",
    "number": "number",
}  # fmt: skip
_KEYS = (
    "<kbd>/</kbd> search <kbd>j</kbd> <kbd>k</kbd> next and previous <kbd>n</kbd> <kbd>p</kbd> page <kbd>Esc</kbd> all"
)
_LEVELS = 9
_LENGTH = 96  # the letter of a token of no length


def write_page(
    file: str | os.PathLike[str],
    explanations: Explanations,
    evidence: Evidence | None = None,
    *,
    detection: Detection | None = None,
    relations: Relations | None = None,
    limit: int | None = None,
) -> Path:
    """Write a page to look features up in: one file that needs no other one and no network.

    Args:
        file: The page.
        explanations: The words.
        evidence: What `observe` returned: densities, histograms and passages.
        detection: What `detect` returned: scores.
        relations: What `relate` returned: logits and neighbours.
        limit: Features on the page, the best ones by score (else by the term of their first word); None: all. Those that
            never fired, as far as that is known, are left out.

    Returns:
        The file.

    Raises:
        ValueError: one of them knows another number of features; limit is less than 1.

    Example:
        >>> found = sf.sae.Explanations((("love",), ("war",)), torch.tensor([[0.5], [0.2]]), "information", 2)
        >>> sf.sae.write_page("features.html", found).name
        'features.html'
    """
    instance_of("write_page", "explanations", explanations, Explanations, "sf.explain(…)")
    if evidence is not None:
        instance_of("write_page", "evidence", evidence, Evidence, "sf.sae.observe(…)")
    path = Path(file)
    replace_file(path, _page(explanations, evidence, detection, relations, limit).encode())
    return path


def _page(
    found: Explanations,
    evidence: Evidence | None,
    detection: Detection | None,
    relations: Relations | None,
    limit: int | None,
) -> str:
    known = {
        "evidence": evidence,
        "relations": relations,
        "detection": None if detection is None else detection.accuracy,
    }
    for name, part in known.items():
        if part is not None and len(part) != len(found):
            raise ValueError(
                f"write_page: {name} knows {len(part)} features, the explanations {len(found)}; of the same SAE?"
            )
    order = _order(found, evidence, detection)
    order = order if limit is None else order[: whole_number("write_page", "limit", limit, 1)]
    data: dict[str, Any] = {"features": [_feature(i, found, evidence, detection, relations) for i in order]}
    if evidence is not None:
        data["edges"] = [float(f"{edge:.4g}") for edge in evidence.edges.tolist()]
    return _document(_about(found, evidence, detection, len(order)), data, detection is not None)


def _order(found: Explanations, evidence: Evidence | None, detection: Detection | None) -> list[int]:
    """Features by score, those without one behind, by the term of their first word; without those that never fired."""
    term = found.scores[:, 0].double()
    if detection is not None:
        term = torch.where(detection.scored, 1e6 + detection.accuracy.nan_to_num(0).double(), term)
    order: list[int] = term.argsort(descending=True, stable=True).tolist()
    return order if evidence is None else [feature for feature in order if evidence.fired[feature] > 0]


def _about(found: Explanations, evidence: Evidence | None, detection: Detection | None, shown: int) -> str:
    place = found.about.get("place")
    parts = [f"{shown} of {len(found)} features", f"words by {found.ranking}", str(found.about.get("model", ""))]
    parts += [f"{place[0]} of layer {place[1]}"] if place else []
    parts += [f"{evidence.tokens} tokens of {sum(evidence.documents)} documents"] if evidence else []
    if detection is not None and bool(detection.scored.any()):
        parts += [f"median detection {median_of(detection.accuracy[detection.scored]):.2f} (chance 0.5)"]
    return " · ".join(part for part in parts if part)


def _feature(
    feature: int, found: Explanations, evidence: Evidence | None, detection: Detection | None, relations: Relations | None
) -> dict[str, Any]:  # fmt: skip
    """A feature as the script reads it: one letter a name, and no entry where nothing is known."""
    one: dict[str, Any] = {"n": feature, "w": found.words[feature]}
    if found.words[feature]:
        one["s"] = _short(found.scores[feature, 0])
    if detection is not None and bool(detection.scored[feature]):
        one |= {"d": _short(detection.accuracy[feature]), "i": _short(detection.intruder[feature])}
    if evidence is not None:
        counts = evidence.histogram[feature]
        used = counts.nonzero().flatten().tolist()
        one |= {"f": _short(evidence.density[feature]), "h": [used[0], counts[used[0] : used[-1] + 1].tolist()]}
        passages = evidence.passages(feature)
        strongest = max((passage.activations[passage.peak] for passage in passages), default=1.0)
        one["p"] = [_passage(passage, strongest) for passage in passages]
    if relations is not None:
        near = zip(relations.neighbours[feature].tolist(), relations.cosines[feature], strict=True)
        one |= {"r": relations.raised[feature], "l": relations.lowered[feature]}
        one["c"] = [[other, _short(cosine)] for other, cosine in near]
    return one


def _passage(passage: Passage, strongest: float) -> list[Any]:
    """Activation, text, a letter per token for its length in UTF-16 units, a digit per token for its activation."""
    sizes = "".join(chr(_LENGTH + len(piece.encode("utf-16-le", "surrogatepass")) // 2) for piece in passage.tokens)
    levels = "".join(str(_level(value / strongest)) for value in passage.activations).rstrip("0")
    return [_short(passage.activations[passage.peak]), str(passage), sizes, levels]


def _level(share: float) -> int:
    return 0 if share <= 0 else max(1, min(_LEVELS, round(share * _LEVELS)))


def _short(value: Any) -> float:
    return float(f"{float(value):.3g}")


def _document(about: str, data: dict[str, Any], scored: bool) -> str:
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    content = content.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    content = content.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes "?"
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    options = "".join(
        f'<option value="{value}">{text}</option>'
        for value, text in _ORDERS.items()
        if scored or value not in ("detection", "intruder")
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<title>SAE features</title>\n'
        f"<style>{style}</style></head>\n"
        f'<body><h1>What the features of this SAE mean</h1>\n<p class="about">{escape(about)}</p>\n'
        f'<noscript><p>This page needs its own script; allow it and load the page again.</p></noscript>\n<nav class="bar">'
        f'<input id="search" type="search" placeholder="words, or a number" aria-label="search">'
        f'<select id="order" aria-label="order">{options}</select><button id="back" aria-label="previous page">‹</button>'
        f'<button id="next" aria-label="next page">›</button><span id="count" class="quiet" role="status"></span></nav>\n'
        f'<p class="quiet keys">{_KEYS}</p>\n<main id="list"></main><svg hidden id="shape"></svg>\n'
        f'<script type="application/json" id="data">{content}</script>\n<script>{script}</script></body></html>\n'
    )


def _hash(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"
