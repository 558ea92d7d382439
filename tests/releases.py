"""What `make test-newest` prints first: the releases that this environment got, beside those that constraints.txt pins."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    """Package and pinned release, as far as the pin is for this Python."""
    lines = "".join((ROOT / name).read_text() for name in ("constraints.txt", "constraints-common.txt")).splitlines()
    stated = [Requirement(line.partition(" #")[0].strip()) for line in lines if line[:1].isalpha()]
    here = [pin for pin in stated if pin.marker is None or pin.marker.evaluate()]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in here}


def bounds() -> dict[str, SpecifierSet]:
    """What setup.py itself asks for, extras included."""
    return {wanted.name: wanted.specifier for wanted in map(Requirement, metadata.requires("steerfast") or [])}


def row(package: str, pinned: str, allowed: SpecifierSet) -> str:
    try:
        got = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"{package:18}{pinned:12}none\n"
    base = Version(Version(got).public)  # 2.13.0 of 2.13.0+cpu
    notes = ["newer"] * (base > Version(pinned)) + ["older"] * (base < Version(pinned))
    notes += [f"outside {allowed} of setup.py"] * (not allowed.contains(base, prereleases=True))
    return f"{package:18}{pinned:12}{got:12}{', '.join(notes)}".rstrip() + "\n"


if __name__ == "__main__":
    allowed, anything = bounds(), SpecifierSet()
    sys.stdout.write(f"{'package':18}{'pinned':12}got, on Python {sys.version.split()[0]}\n")
    sys.stdout.writelines(row(name, pinned, allowed.get(name, anything)) for name, pinned in pins().items())
