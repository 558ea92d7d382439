"""`steerfast plan show | convert`: what is in a file of steering, and the same in another format."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from steerfast.edits.base import Intervention
from steerfast.edits.features import EditFeatures
from steerfast.edits.linear import Add
from steerfast.plan import Plan

from .lora import CONFIG, describe_lora, write_lora

if TYPE_CHECKING:
    from steerfast.directions.sets import DirectionSet

FORMATS = ("plan", "directions", "gguf", "steering-vectors", "lm-eval", "lora")
_Path = str | os.PathLike[str]


def show(path: _Path, saes: Any = None) -> str:
    """Return a readable summary of a plan, of vectors in any format that `load_directions` reads, or of a LoRA adapter.

    Args:
        path: The directory of a plan or an adapter, or a directory or file of vectors.
        saes: Where the SAEs of a plan are, as in `Plan.load`.

    Returns:
        A few lines: the model, the positions, and one line per intervention with its norms.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: it is damaged, or of no known format.

    Example:
        >>> import tempfile, torch, steerfast as sf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(show(sf.Plan({8: sf.Add(torch.tensor([3.0, 4.0]), 2.0)}).save(folder)).splitlines()[-1].split())
        ['resid_post', '8', 'Add', '1', '×', '2', '5', 'strength=2,', '‖c·v‖', '=', '10']
    """
    if (Path(path) / CONFIG).exists():
        return describe_lora(path)
    found = _read(path, saes)
    return _describe(found) if isinstance(found, Plan) else repr(found)


def convert(
    source: _Path,
    target: _Path,
    to: str,
    strength: float = 1.0,
    saes: Any = None,
    model: nn.Module | None = None,
    engine: str = "any",
) -> Path:
    """Write a plan or vectors in another format.

    Only `Add` without keep_norm is a vector in other formats: a plan's strengths are multiplied in, and its additions at one
    layer and site become their sum, as do vectors of one layer where the format has one. An adapter also holds `Ablate`
    (see `write_lora`).

    Args:
        source: The directory of a plan, or vectors in any format that `load_directions` reads.
        target: What is written, a directory for "plan", "directions" and "lora" and else a file; it must not exist.
        to: "plan", "directions" (ours), "gguf" (llama.cpp, repeng), "steering-vectors", "lm-eval" or "lora" (PEFT, vLLM).
        strength: Multiplies every vector.
        saes: Where the SAEs of a plan are, as in `Plan.load`.
        model: For "lora": the model whose weights the adapter changes.
        engine: For "lora": "any" or "peft", as in `write_lora`.

    Returns:
        The target.

    Raises:
        FileExistsError: the target exists.
        FileNotFoundError, ValueError: the source is missing, damaged, or holds what the format cannot.

    Example:
        >>> convert("love", "love.gguf", to="gguf")  # doctest: +SKIP
    """
    from steerfast.directions.from_plan import summed
    from steerfast.directions.sets import save_directions
    from steerfast.integrations import gguf, lm_eval, steering_vectors

    if to not in FORMATS:
        raise ValueError(f"convert: to is {to!r}; expected one of {', '.join(FORMATS)}")
    destination = Path(target)
    if destination.exists():
        raise FileExistsError(f"convert: {destination} exists; choose another name, or remove it")
    found = _read(source, saes)
    if to in ("plan", "lora"):
        plan = _scaled(found, strength) if isinstance(found, Plan) else found.plan(strength)
        return plan.save(destination) if to == "plan" else write_lora(_needed(model), plan, destination, engine)
    vectors = _vectors(found, strength, source)
    if to == "directions":
        return save_directions(destination, vectors)
    write: Any = {"gguf": gguf.write, "steering-vectors": steering_vectors.write, "lm-eval": lm_eval.write}[to]
    return write(destination, summed("convert", vectors))


def _needed(model: nn.Module | None) -> nn.Module:
    if model is None:
        raise ValueError(
            "convert: an adapter is a change of weights, made from them; give the model (on the command line: --model)"
        )
    return model


def _read(path: _Path, saes: Any) -> Plan | DirectionSet:
    from steerfast.integrations.read import load_directions

    source = Path(path)
    if not source.exists():
        raise FileNotFoundError(f"plan: {source} does not exist")
    return Plan.load(source, saes) if (source / "plan.json").exists() else load_directions(source)


def _scaled(plan: Plan, strength: float) -> Plan:
    """The plan with every vector multiplied; other interventions have no one strength."""
    if strength == 1.0:
        return plan
    edits: dict[Any, list[Intervention]] = {}
    for place, chain in plan.edits.items():
        for edit in chain:
            if not isinstance(edit, Add):
                raise ValueError(
                    f"convert: {type(edit).__name__} at {place[0]} {place[1]} has no strength to multiply; use 1"
                )
            edits.setdefault(place, []).append(replace(edit, strength=edit.strength * strength))
    return Plan(edits, plan.positions, plan.model, plan.special)


def _vectors(found: Plan | DirectionSet, strength: float, source: _Path) -> DirectionSet:
    """Everything as directions that already carry their strength."""
    from steerfast.directions.from_plan import directions_of
    from steerfast.directions.sets import DirectionSet

    if isinstance(found, Plan):
        return directions_of(f"convert: {os.fspath(source)}", _scaled(found, strength))
    return found if strength == 1.0 else DirectionSet({name: d * strength for name, d in found.items()}, found.model)


def _describe(plan: Plan) -> str:
    card = plan.model
    model = "any of this width" if card is None else f"{card.name} (width {card.width}, {card.layers} layers)"
    positions = plan.positions
    where = f"mask {tuple(positions.shape)}" if isinstance(positions, Tensor) else str(positions)
    lines = [f"model      {model}", f"positions  {where}", ""]
    lines.append(f"{'site':<12}{'layer':>5}  {'intervention':<14}{'tensor':>14}  {'norm of rows':<18} numbers")
    for (site, layer), chain in plan.edits.items():
        for edit in chain:
            for i, (name, tensor) in enumerate(_tensors(edit)):
                head = f"{site:<12}{layer:>5}  {type(edit).__name__:<14}" if i == 0 else " " * 33
                shown = (
                    f"{tensor.shape[0]} × {tensor.shape[1]}"
                    if name in ("vector", "")
                    else f"{name} {tensor.shape[0]} × {tensor.shape[1]}"
                )
                lines.append(f"{head}{shown:>14}  {_norms(tensor):<18} {_numbers(edit) if i == 0 else ''}".rstrip())
    return "\n".join(lines)


def _tensors(edit: Intervention) -> list[tuple[str, Tensor]]:
    """The tensors of an intervention as rows of directions."""
    if isinstance(edit, EditFeatures):  # where its SAE is named, the file has no rows
        return [("decoder", edit.decoder)]
    rows = [(name, t.reshape(1, -1) if t.dim() < 2 else t) for name, t in edit.tensors().items()]
    return rows or [("", edit.slot().lift)]


def _norms(rows: Tensor) -> str:
    norms = rows.float().norm(dim=-1)
    low, high = float(norms.min()), float(norms.max())
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"


def _numbers(edit: Intervention) -> str:
    numbers = [
        f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}"
        for k, v in edit.numbers().items()
        if v is not None and v is not False and k != "sae"  # a bound of 0 equals False
    ]
    if isinstance(sae := edit.numbers().get("sae"), dict):
        numbers.append(f"{sae['about']} {sae['fingerprint'][:12]}…")
    if isinstance(edit, Add):
        sizes = _norms(abs(edit.strength) * edit.tensors()["vector"].reshape(-1, edit.width))
        numbers.append(f"‖c·v‖ = {sizes}" + (", one row per prompt token" if edit.by_token else ""))
    return ", ".join(numbers)
