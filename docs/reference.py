"""The API reference from the docstrings, by pdoc: `python docs/reference.py FOLDER`, or `make docs`.

A warning of pdoc's is an error: a module that cannot be imported, a name that is announced and not there.
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pdoc

import steerfast

PAGES = ("steerfast", "steerfast.models.demo", "steerfast.place", "steerfast.sae.formats", "steerfast.sae.model")
"""What the documentation names: the front door with `ops`, `probes`, `sae`, `tools` and `integrations` behind it, and the modules
that it imports from."""


def _below(base: type) -> list[type]:
    """All classes that are made of a class."""
    return [one for kind in base.__subclasses__() for one in (kind, *_below(kind))]


def lend_names(kind: type, base: type) -> None:
    """An inherited field is annotated in the words of the base's module, and pdoc looks them up in the module of the class."""
    here, home = sys.modules[kind.__module__], sys.modules[base.__module__]
    for word in re.findall(r"\w+", " ".join(map(str, base.__annotations__.values()))):
        if hasattr(home, word) and not hasattr(here, word):
            setattr(here, word, getattr(home, word))


def main() -> None:
    """Write the pages."""
    (folder,) = sys.argv[1:]
    warnings.filterwarnings("error", module=r"pdoc\b")
    # A package imports a name at its first use, and pdoc looks at the names that are there.
    for package in (steerfast, steerfast.probes, steerfast.sae, steerfast.tools):
        for name in package.__all__:
            setattr(package, name, getattr(package, name))
    for base in (steerfast.Intervention, steerfast.probes.Probe, steerfast.SAE):
        for kind in _below(base):
            lend_names(kind, base)
    pdoc.render.configure(docformat="google", math=False)
    pdoc.pdoc(*PAGES, output_directory=Path(folder))
    print(f"{len(list(Path(folder).rglob('*.html')))} pages; begin at {Path(folder) / 'index.html'}")


if __name__ == "__main__":
    main()
