"""The SAEs that a plan or a probe names: found by their fingerprint among objects, files and folders."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import container

VARIABLE = "STEERFAST_SAES"
_SHOWN = 4  # SAEs, and folders that hold none, that an error names


class Shelf:
    """Where to look for SAEs; what has been found is held, so that all edits and plans share it.

    Args:
        caller: The public function, as errors name it.
        saes: An SAE; the path of a folder or file that `SAE.load` reads, or of a folder of such folders; or several of
            these. None: the folder that the environment variable STEERFAST_SAES names, if it is set.

    Raises:
        TypeError: something else.
        FileNotFoundError: nothing is at a path.
    """

    def __init__(self, caller: str, saes: Any = None) -> None:
        self.caller, self._named = caller, ""
        if saes is None and os.environ.get(VARIABLE):
            saes, self._named = os.environ[VARIABLE], f"{VARIABLE}="
        given = [] if saes is None else [saes] if _is_one(saes) else saes
        if not isinstance(given, Iterable) or not all(map(_is_one, given := list(given))):
            raise TypeError(
                f"{caller}: saes must be an SAE, the path of one or of a folder of them, or a list; got {saes!r}"
            )
        self._paths = [Path(item).expanduser() for item in given if isinstance(item, (str, os.PathLike))]
        self._objects = [item for item in given if not isinstance(item, (str, os.PathLike))]
        for path in self._paths:
            if not self._named and not path.exists():  # the variable may serve other plans
                raise FileNotFoundError(
                    f"{caller}: saes: {path} does not exist; give the folder of an SAE, or one of such folders"
                )
        self._seen: dict[Path, str] = {}
        self._unread: dict[Path, str] = {}

    def find(self, name: Mapping[str, str], where: str) -> Any:
        """The SAE with the fingerprint that a file names.

        Args:
            name: `{"fingerprint": …, "about": …}`, as `EditFeatures.numbers` and `FeatureProbe.numbers` say it.
            where: The file that names it.

        Raises:
            FileNotFoundError: it is not there; what was looked at, and what to do.
        """
        wanted = name["fingerprint"]
        for sae in self._objects:
            if sae.fingerprint == wanted:
                return sae
        for path in self._candidates():
            if (sae := self._load(path, wanted)) is not None:
                self._objects.append(sae)
                return sae
        raise FileNotFoundError(
            f"{self.caller}: {where} names {name['about']} with the fingerprint {wanted}, which {self._looked()}. Pass it as "
            f"saes= (the SAE, its folder, or a folder of SAE folders), or set {VARIABLE} to that folder; sae.save writes "
            "one. Other weights, another k or another dtype are another SAE"
        )

    def _candidates(self) -> Iterator[Path]:
        """What may be an SAE: first those of our own format, which say their fingerprint without being loaded."""
        found: list[Path] = []
        for root in self._paths:
            found.append(root)
            if root.is_dir() and not _is_ours(root):
                found += [path for path in sorted(root.iterdir()) if path.is_dir()]
        yield from sorted(found, key=lambda path: not _is_ours(path))

    def _load(self, path: Path, wanted: str) -> Any:
        """The SAE at a path; None: there is none, or another one."""
        import steerfast

        if path in self._unread or self._seen.get(path, wanted) != wanted:
            return None
        try:
            if _is_ours(path) and (said := container.read_text(container.SAE, path).get("fingerprint")) is not None:
                self._seen[path] = said
            sae = steerfast.SAE.load(path) if self._seen.get(path, wanted) == wanted else None
        except (ValueError, OSError) as error:
            self._unread[path] = str(error)
            return None
        if sae is not None:
            self._seen[path] = sae.fingerprint
        return sae if self._seen[path] == wanted else None

    def _looked(self) -> str:
        if not self._paths and not self._objects:
            return f"was not given, and {VARIABLE} is not set"
        places = ", ".join([*(f"{self._named}{path}" for path in self._paths), *map(repr, self._objects)])
        others = [f"{path.name} is {seen[:12]}…" for path, seen in self._seen.items()]
        others += [f"{sae!r} is {sae.fingerprint[:12]}…" for sae in self._objects]
        roots = self._paths if len(self._unread) + len(self._seen) > len(self._paths) else []
        unread = [f"{path.name}: {reason}" for path, reason in self._unread.items() if path not in roots]
        text = f"is not among {places}: {_few(others) or 'there is no SAE'}"
        return text + (f"; {_few(unread)}" if unread else "")


def with_saes(numbers: Any, shelf: Shelf, where: str) -> Any:
    """What `numbers` of an intervention or a probe said, with the SAEs in place of their names, those of its inner ones, too."""
    if not isinstance(numbers, dict):
        return numbers
    if numbers.keys() == {"fingerprint", "about"}:
        return shelf.find(numbers, where)
    return {key: with_saes(value, shelf, where) for key, value in numbers.items()}


def _is_one(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike)) or (hasattr(item, "rows") and hasattr(type(item), "fingerprint"))


def _is_ours(path: Path) -> bool:
    return (path / container.SAE.text_name).is_file()


def _few(items: list[str]) -> str:
    return "; ".join(items if len(items) <= _SHOWN else [*items[:_SHOWN], f"and {len(items) - _SHOWN} more"])
