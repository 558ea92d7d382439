"""One reader for directions of all known formats, recognised by their content."""

from __future__ import annotations

import os
from pathlib import Path

from steerfast.directions.from_plan import directions_of
from steerfast.directions.sets import DirectionSet
from steerfast.files import container
from steerfast.files.torch_file import read_torch_file
from steerfast.plan import Plan

from . import gguf, lm_eval, steering_vectors

_PATHS = (
    "a folder of save_directions, a plan, a GGUF control vector, a torch file of steering-vectors or lm-eval, or "
    "lm-eval's CSV"
)


def load_directions(path: str | os.PathLike[str]) -> DirectionSet:
    """Read directions from any file that holds some, recognised by its content; the file's name does not matter.

    Args:
        path: a folder of `save_directions` or of a plan that only adds, or a file: a GGUF control vector (llama.cpp,
            repeng, Dialz), a torch file (a SteeringVector of steering-vectors, lm-eval's steered model), or lm-eval's
            CSV, whose sparse models must be folders on this machine.

    Returns:
        The directions by name; `.plan(strength)` makes a plan of them. Vectors are float32, those of our own sets bit for
        bit as they were saved; in a file that says its strength, such as a plan, it has been multiplied in, and a plan's
        additions at one place are their sum. In a folder with both, as `steerfast extract` writes it, the set is read.

    Raises:
        FileNotFoundError: there is nothing at that path, or a file of a set is missing.
        ValueError: the content is of no known format or schema, ambiguous, or damaged, or a plan does more than add; the
            text names file and reason.

    Example:
        >>> vectors = sf.load_directions("happy.gguf")  # doctest: +SKIP
        >>> with sf.steer(model, vectors.plan(strength=1.5)):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    source = Path(path)
    if source.is_dir():
        return _load_folder(source)
    if not source.exists():
        raise FileNotFoundError(f"load_directions: {source} does not exist")
    if not source.is_file():
        raise ValueError(f"load_directions: {source} is neither a file nor a folder")
    with open(source, "rb") as file:
        head = file.read(4096)
    if head.startswith(gguf.MAGIC):
        return gguf.read(source)
    if head.startswith(b"PK\x03\x04"):
        return _load_torch_file(source)
    if lm_eval.is_csv(head):
        return lm_eval.read(source)
    raise ValueError(f"load_directions: {source} {_refusal(head)}; expected {_PATHS}")


def _load_folder(source: Path) -> DirectionSet:
    kind, own = container.kind_of(source), container.DIRECTIONS
    if (source / own.text_name).is_file() or (source / own.tensors_name).is_file():
        return DirectionSet.load(source)  # also where a plan stands beside it, as `steerfast extract` leaves them
    if kind is container.PLAN:
        return directions_of(f"load_directions: {source}", Plan.load(source))
    if kind is not None:
        raise container.wrong_kind(own, source, kind)
    known = {
        "adapter_config.json": "a PEFT adapter, which holds weights and no directions",
        "config.json": "a model, or a sparse autoencoder",
        "cfg.json": "a sparse autoencoder",
    }
    nothing = f"a folder without {own.text_name} or {container.PLAN.text_name}"
    what = next((text for name, text in known.items() if (source / name).is_file()), nothing)
    raise ValueError(f"load_directions: {source} is {what}; expected {_PATHS}")


def _load_torch_file(source: Path) -> DirectionSet:
    content = read_torch_file(source, steering_vectors.STAND_IN)
    if steering_vectors.recognises(content):
        return steering_vectors.from_content(content, source)
    if lm_eval.recognises(content):
        return lm_eval.from_content(content, source)
    raise ValueError(
        f"load_directions: {source} is a torch file that holds {_kind(content)}; expected a SteeringVector (or a dict of "
        f"its fields layer_activations and layer_type), or lm-eval's dict of hookpoint -> steering_vector and action. "
        f"Layer numbers and site of anything else would be a guess: make Direction objects of its tensors"
    )


def _kind(content: object) -> str:
    if not isinstance(content, dict) or not content:
        return f"a {type(content).__name__}"
    keys = ", ".join(repr(key)[:40] for key in list(content)[:3])
    more = ", …" if len(content) > 3 else ""
    return f"a dict of {type(next(iter(content.values()))).__name__} with the keys {keys}{more}"


def _refusal(head: bytes) -> str:
    if not head:
        return "is empty"
    if head[:1] == b"\x80" and head[1:2] in b"\x01\x02\x03\x04\x05":
        return "is a bare pickle, which can run any program when it is read, and is never opened here"
    if head.startswith(b"\x93NUMPY"):
        return "is a NumPy array, which says neither layer nor site"
    if head[8:9] == b"{":
        return "looks like a safetensors file alone; a set of ours is the folder that holds it and its JSON"
    if head.lstrip()[:1] in b"{[":
        return "looks like JSON; a set of ours is the folder that holds it and its safetensors file"
    return f"begins with {head[:8]!r}, which is of no known format"
