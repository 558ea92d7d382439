"""What `make seams` runs: the seams of a release of vLLM, or of a source tree, against the table, none of it run or imported.

    python tests/vllm_sources.py 0.33.0 path/to/vllm --keep build/vllm-sources

A release is fetched once, as the wheel that pip chooses for this machine, of which the Python files are kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from steerfast.vllm.seam_table import RELEASES
from steerfast.vllm.sources import forms, release


def main(arguments: list[str]) -> int:
    """Print what every tree has; 1 if one has a seam of a form that the table does not know."""
    parser = argparse.ArgumentParser(description="compare vLLM's sources with the table of seams")
    parser.add_argument("wanted", nargs="*", help="releases or folders; by default the releases of the table")
    parser.add_argument("--keep", type=Path, required=True, help="folder for the sources of releases")
    given = parser.parse_args(arguments)
    return max(judge(_tree(wanted, given.keep)) for wanted in given.wanted or RELEASES)


def judge(root: Path) -> int:
    """Print what one tree has; 1 if the table does not say so."""
    found, differs = forms(root)
    version = release(root).partition("+")[0]
    tested = version in RELEASES
    if tested:
        differs += [
            f"has a form of {seam} that {version} was not seen with"
            for seam, form in found.items()
            if version not in form.seen
        ]
    if differs:
        say(f"{version}: {len(differs)} of the seams differ from steerfast/vllm/seam_table.py:")
        for line in differs:
            say(f"  {line}")
        return 1
    verdict = "of the form that it was seen with" if tested else "of a known form; not among the tested releases"
    say(f"{version}: {len(found)} seams, all {verdict}")
    return 0


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _tree(wanted: str, keep: Path) -> Path:
    """The folder `vllm` of a release, or of a folder that is it or holds it."""
    if "/" not in wanted and not Path(wanted).is_dir():
        return fetch(wanted, keep)
    for root in (Path(wanted), Path(wanted) / "vllm"):
        if (root / "v1").is_dir():
            return root
    raise SystemExit(f"seams: {wanted!r} is no folder of vLLM's sources; expected one with vllm/v1 in it, or a release")


def fetch(version: str, keep: Path) -> Path:
    """The Python files of a release, fetched unless they are there; whole or not at all."""
    target = keep / version
    if not target.is_dir():
        keep.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{version}.", dir=keep) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            if subprocess.run([*command, "--no-cache-dir", "--dest", scratch, f"vllm=={version}"]).returncode:
                raise SystemExit(f"seams: vLLM {version} cannot be fetched as a wheel; give the folder of its sources")
            (wheel,) = Path(scratch).glob("*.whl")
            half = Path(scratch) / "half"
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
                archive.extractall(half, names)
            half.rename(target)
    return target / "vllm"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
