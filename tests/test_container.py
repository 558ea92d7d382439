"""The folder of JSON and tensors: one wording for each error of all kinds, and a write that is whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import steerfast as sf
from steerfast.files import container
from steerfast.files.container import BARRIER, DIRECTIONS, KINDS, PLAN, PROBE, SAE, VELOCITY, Kind
from steerfast.place import Origin

V = torch.tensor([3.0, 4.0, 0.0, 1.0, 0.5])
PLACE = ("resid_post", 1)


def plan(size: float = 1.0) -> sf.Plan:
    return sf.Plan({1: sf.Add(size * V, 2.0)})


def directions(size: float = 1.0) -> sf.DirectionSet:
    return sf.DirectionSet({"a": sf.Direction(size * V, "given", 1.0, Origin(place=1))})


def barrier(size: float = 1.0) -> sf.Barrier:
    return sf.Barrier.linear(size * V)


def sae(size: float = 1.0) -> sf.SAE:
    return sf.SAE(size * torch.ones(7, 5), torch.ones(7, 5), k=2)


def velocity(size: float = 1.0) -> sf.VelocityField:
    one = torch.ones(1, 1)
    return sf.VelocityField(torch.eye(5)[:1], torch.zeros(1), one, torch.zeros(1), size * one)


def probe(size: float = 1.0) -> sf.probes.Probe:
    return sf.probes.LinearProbe(size * V, place=1)


MAKERS: dict[str, tuple[Kind, Callable[..., Any], Callable[[Any], Any]]] = {
    "plan": (PLAN, plan, sf.Plan.load),
    "directions": (DIRECTIONS, directions, sf.load_directions),
    "barrier": (BARRIER, barrier, sf.Barrier.load),
    "velocity": (VELOCITY, velocity, sf.VelocityField.load),
    "sae": (SAE, sae, sf.SAE.load),
    "probe": (PROBE, probe, sf.probes.Probe.load),
}


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return MAKERS[request.param][0]


@pytest.fixture
def make(kind: Kind) -> Callable[..., Any]:
    return MAKERS[kind.name][1]


@pytest.fixture
def load(kind: Kind) -> Callable[[Any], Any]:
    return MAKERS[kind.name][2]


def rewrite(folder: Path, of: Kind, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    """Other tensors with their right checksum, or other entries of the JSON: what only a hand could have written."""
    if tensors is not None:
        blob = save(tensors)
        (folder / of.tensors_name).write_bytes(blob)
        changes["tensors_sha256"] = hashlib.sha256(blob).hexdigest()
    path = folder / of.text_name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def first_tensor(folder: Path, kind: Kind) -> tuple[str, dict[str, torch.Tensor]]:
    tensors = load_file(folder / kind.tensors_name)
    return next(iter(tensors)), tensors


def test_every_kind_is_tried() -> None:
    assert [kind for kind, _, _ in MAKERS.values()] == list(KINDS)


DAMAGE: dict[str, tuple[Callable[[Path, Kind], object], str]] = {
    "no JSON": (lambda f, k: (f / k.text_name).write_text("{"), "{text} is not JSON"),
    "too deep": (lambda f, k: (f / k.text_name).write_text("[" * 100_000), "{text} is not JSON"),
    "binary": (lambda f, k: (f / k.text_name).write_bytes(b"\xff\xfe\x00"), "{text} is not JSON"),
    "a list": (lambda f, k: (f / k.text_name).write_text("[]"), r'{text} is not {noun} \("kind" is not "{label}"\)'),
    "nobody's": (lambda f, k: rewrite(f, k, kind="other"), r'{text} is not {noun} \("kind" is not "{label}"\)'),
    "newer": (
        lambda f, k: rewrite(f, k, schema=k.schema + 1),
        "{text} has schema {newer}, newer than this version of steerfast, which reads {known}: upgrade it",
    ),
    "no number": (
        lambda f, k: rewrite(f, k, schema="1"),
        "{text} has schema '1'; this version of steerfast reads {known}",
    ),
    "zero": (lambda f, k: rewrite(f, k, schema=0), "{text} has schema 0; this version of steerfast reads {known}"),
    "unknown key": (lambda f, k: rewrite(f, k, more=1), "{text} has keys .*'more'.*; expected"),
    "checksum": (
        lambda f, k: (f / k.tensors_name).write_bytes((f / k.tensors_name).read_bytes()[:-1] + b"!"),
        "{tensors} is not the file that {name} beside it was written with; copy both again",
    ),
    "missing tensor": (
        lambda f, k: rewrite(f, k, dict(list(first_tensor(f, k)[1].items())[1:])),
        "{tensors} lacks the tensor '{first}', which {name} names",
    ),
    "unknown tensor": (
        lambda f, k: rewrite(f, k, first_tensor(f, k)[1] | {"more": torch.ones(2)}),
        "{tensors} holds the tensor 'more', which {name} does not name",
    ),
    "NaN": (
        lambda f, k: rewrite(f, k, first_tensor(f, k)[1] | {first_tensor(f, k)[0]: V / 0}),
        "{tensors}: '{first}' holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_the_same_words(damage: str, kind: Kind, make, load, tmp_path: Path) -> None:
    make().save(tmp_path)
    first, _ = first_tensor(tmp_path, kind)
    spoil, message = DAMAGE[damage]
    spoil(tmp_path, kind)
    known = "1" if kind.schema == 1 else f"1 to {kind.schema}"
    words = {"text": tmp_path / kind.text_name, "tensors": tmp_path / kind.tensors_name, "name": kind.text_name}
    about = {"noun": kind.noun, "label": kind.label, "newer": kind.schema + 1, "known": known, "first": first}
    with pytest.raises(ValueError, match=f"^{kind.reader}: " + message.format(**words, **about)):
        load(tmp_path)


def test_a_file_that_is_cut_short_is_damaged_even_with_its_checksum(kind: Kind, make, load, tmp_path: Path) -> None:
    make().save(tmp_path)
    blob = (tmp_path / kind.tensors_name).read_bytes()[:-3]
    (tmp_path / kind.tensors_name).write_bytes(blob)
    rewrite(tmp_path, kind, tensors_sha256=hashlib.sha256(blob).hexdigest())
    with pytest.raises(ValueError, match=rf"^{kind.reader}: .*{kind.tensors_name} is damaged \("):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"), [("directions", "a"), ("sae", "b_enc"), ("barrier", "bias"), ("plan", "0.vector")]
)
def test_a_tensor_of_another_shape(name: str, tensor: str, tmp_path: Path) -> None:
    kind, make, load = MAKERS[name]
    make().save(tmp_path)
    rewrite(tmp_path, kind, first_tensor(tmp_path, kind)[1] | {tensor: torch.ones(3, 3, 3)})
    shape = (
        r"has shape \(3, 3, 3\); .*json says"
        if kind in (DIRECTIONS, SAE)
        else f"does not describe {kind.noun}: .*{tensor[-4:]}"
    )
    with pytest.raises(ValueError, match=rf"^{kind.reader}: .*{shape}"):
        load(tmp_path)


def test_what_is_missing_is_named(kind: Kind, make, load, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^{kind.reader}: {tmp_path / 'nowhere'} does not exist"):
        load(tmp_path / "nowhere")
    make().save(tmp_path / "saved")
    for name in (kind.tensors_name, kind.text_name):
        copy = tmp_path / f"without {name}"
        make().save(copy)
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{kind.reader}: .*{name}"):
            load(copy)
    if kind is not SAE:  # which has files of many families
        (tmp_path / "empty").mkdir()
        error = ValueError if kind is DIRECTIONS else FileNotFoundError
        with pytest.raises(error, match=kind.reader):
            load(tmp_path / "empty")


@pytest.mark.parametrize("other", MAKERS)
def test_another_kind_says_who_reads_it(kind: Kind, load, other: str, tmp_path: Path) -> None:
    found, make_other, _ = MAKERS[other]
    make_other().save(tmp_path / "there")
    if found is kind or (kind is DIRECTIONS and found is PLAN):  # a plan that only adds holds directions
        load(tmp_path / "there")
        return
    words = f"^{kind.reader}: {tmp_path / 'there'} holds {found.noun}, not {kind.noun}: read it with {found.reader}$"
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "there")
    (tmp_path / "renamed").mkdir()
    for end in (".json", ".safetensors"):  # its files under this kind's names
        (tmp_path / "renamed" / f"{kind.name}{end}").write_bytes(
            (tmp_path / "there" / f"{found.name}{end}").read_bytes()
        )
    with pytest.raises(ValueError, match=words.replace("there", "renamed")):
        load(tmp_path / "renamed")


def test_a_folder_may_hold_one_of_each_kind(tmp_path: Path) -> None:
    for _, make, _ in MAKERS.values():
        make().save(tmp_path)
    assert len(os.listdir(tmp_path)) == 2 * len(KINDS)
    for _, make, load in MAKERS.values():
        assert type(load(tmp_path)) is type(make())
    (tmp_path / "directions.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"directions\.safetensors does not exist"):
        sf.load_directions(tmp_path)


# --- writing -----------------------------------------------------------------------------------------------------------


def bits(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_rename_that_fails_leaves_the_old_pair(
    kind: Kind, make, load, renames: int, tmp_path: Path, monkeypatch
) -> None:
    """The old tensors step aside, the new ones take their place, the new JSON decides: whichever of the three fails."""
    make().save(tmp_path)
    before, done, rename = bits(tmp_path), [], os.replace

    def failing(source: Path, target: Path) -> None:
        if len(done) == renames:
            done.append(target)
            raise OSError("disk full")
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        make(2.0).save(tmp_path)
    assert bits(tmp_path) == before
    monkeypatch.undo()
    make(2.0).save(tmp_path)
    assert bits(tmp_path).keys() == before.keys()
    assert bits(tmp_path) != before
    load(tmp_path)


def test_a_full_disk_leaves_nothing_behind(kind: Kind, make, tmp_path: Path, monkeypatch) -> None:
    def full(path: Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make().save(tmp_path / "old")
    before = bits(tmp_path / "old")
    monkeypatch.setattr(Path, "write_bytes", full)
    for folder in (tmp_path / "old", tmp_path / "new" / "deep"):
        with pytest.raises(OSError, match=rf"No space left on device: '{folder}/\w+\.safetensors'"):
            make(2.0).save(folder)
    assert bits(tmp_path / "old") == before
    assert os.listdir(tmp_path) == ["old"]


def test_a_first_save_that_cannot_finish_leaves_no_half(kind: Kind, make, tmp_path: Path, monkeypatch) -> None:
    rename = os.replace
    monkeypatch.setattr(
        os,
        "replace",
        lambda a, b: rename(a, b) if str(b).endswith("tensors") else (_ for _ in ()).throw(OSError("gone")),
    )
    (tmp_path / "here").mkdir()
    for folder in ("here", "new"):
        with pytest.raises(OSError, match="gone"):
            make().save(tmp_path / folder)
    assert os.listdir(tmp_path) == ["here"]
    assert os.listdir(tmp_path / "here") == []


def test_a_file_in_the_way_is_refused(kind: Kind, make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        ValueError, match=rf"^{kind.writer}: .*file is a file; {kind.noun} is a folder with {kind.text_name}"
    ):
        make().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def anything() -> Iterator[Callable[[torch.Tensor, float], sf.Intervention]]:
    """What a user's own class may put into a plan."""

    @dataclass(frozen=True, eq=False)
    class Anything(sf.Intervention):
        values: torch.Tensor
        number: float

        @property
        def width(self) -> int:
            return len(self.values)

    yield Anything
    del sf.Intervention.registry["Anything"]


def test_what_no_file_can_hold_is_refused_before_anything_is_written(anything, tmp_path: Path) -> None:
    for made, message in (
        (anything(V / 0, 1.0), r"Plan\.save: '0\.values' holds NaN or Inf"),
        (anything(V, float("inf")), r"Plan\.save: a plan holds a number that is NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            sf.Plan({1: made}).save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    (back,) = sf.Plan.load(sf.Plan({1: anything(V, 2.0)}).save(tmp_path / "p")).edits["resid_post", 1]
    assert torch.equal(back.values, V)  # type: ignore[attr-defined]


def test_the_one_name_that_safetensors_keeps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_directions: '__metadata__' is a name that safetensors keeps for itself"):
        sf.save_directions(tmp_path / "new", {"__metadata__": directions()["a"]})
    assert not (tmp_path / "new").exists()


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    both = torch.randn(14, 5)
    made = sf.SAE(both[:7], both[7:], k=2)
    back = sf.SAE.load(made.save(tmp_path))
    assert torch.equal(back.w_enc, both[:7])
    assert torch.equal(back.w_dec, both[7:])
    assert back.fingerprint == made.fingerprint


def test_the_json_alone_is_read_without_the_tensors(kind: Kind, make, tmp_path: Path) -> None:
    make().save(tmp_path)
    (tmp_path / kind.tensors_name).unlink()
    assert container.read_text(kind, tmp_path)["kind"] == kind.label


def test_threads_that_save_to_one_folder_leave_a_whole_one(tmp_path: Path) -> None:
    plans = [sf.Plan({1: sf.Add(torch.full((3,), i + 1.0))}) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: plans[i % 4].save(tmp_path / "plan"), range(80)))
    assert sf.Plan.load(tmp_path / "plan").edits.keys() == {("resid_post", 1)}
    assert {path.name for path in (tmp_path / "plan").iterdir()} == {"plan.json", "plan.safetensors"}
