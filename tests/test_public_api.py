"""What users type, against the list in data/public_api.json: names, signatures, entry points, commands with their options.

Where a change is meant, this writes the list anew; the difference belongs into the review and the changelog:

    python tests/test_public_api.py
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import steerfast as sf

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).resolve().parent / "data" / "public_api.json"
MEANT = "if that is meant, `python tests/test_public_api.py` writes tests/data/public_api.json anew"

# The modules that users import from, with the names they take from there; None: the module's own `__all__`.
PLACES: dict[str, tuple[str, ...] | None] = {
    "steerfast": None,
    "steerfast.ops": None,
    "steerfast.probes": None,
    "steerfast.sae": None,
    "steerfast.tools": None,
    "steerfast.place": ("Origin", "Place", "place_of"),
    "steerfast.plan": ("ModelCard",),
    "steerfast.barriers.barrier": ("BarrierInfo",),
    "steerfast.edits.fitted": ("ConditionInfo", "FitInfo", "LayerFit"),
    "steerfast._null": ("Null",),
    "steerfast.directions.fits.heads": ("HeadFit",),
    "steerfast.models.collect": ("Activations",),
    "steerfast.directions.sets": ("DirectionInfo",),
    "steerfast.directions.extract": ("difference", "logistic", "mean_difference", "pca"),
    "steerfast.integrations": None,
    "steerfast.integrations.gguf": ("read", "write"),
    "steerfast.integrations.lm_eval": ("read", "read_plan", "write"),
    "steerfast.integrations.repeng": ("from_object", "to_object"),
    "steerfast.integrations.steering_vectors": ("from_object", "read", "to_object", "write"),
    "steerfast.models.demo": ("load", "path"),
    "steerfast.cli.main": ("main",),
    "steerfast.sae.cache": ("CacheInfo",),
    "steerfast.sae.training.corpus": ("wikipedia",),
    "steerfast.sae.evidence": ("Passage",),
    "steerfast.sae.explanation": ("RANKINGS", "vocabulary_of"),
    "steerfast.sae.words": ("KINDS",),
    "steerfast.sae.formats": ("load", "save_saelens"),
    "steerfast.sae.model": ("NORMALISATIONS", "SAE", "Source"),
    "steerfast.sae.training.config": ("TrainReport",),
}  # fmt: skip

# What users hold without importing it: results and their parts, and what an argument may be. Found by name, wherever it lives.
HELD = ("Cell", "HasFeatures", "HasVector", "LayerDose", "Listing", "Ridge", "Rows", "Sketch", "Slot")

# What only `steer` makes: the rest of it is between `steer` and the hooks.
HANDLE = {"Steering": ("__enter__", "__exit__", "decisions", "plans", "remove", "stats", "strength")}

OPERATORS = {
    f"__{name}__"
    for name in (
        "add", "array", "call", "contains", "enter", "exit", "getitem", "iter", "len", "mul", "neg", "radd", "rmul", "str",
        "sub", "truediv",
    )
}  # fmt: skip


# --- names -------------------------------------------------------------------------------------------------------------


def names() -> dict[str, Any]:
    """Every public name that is there, described; a second name of the same thing points to the first."""
    found: dict[str, Any] = {}
    first: dict[int, str] = {}
    for place, chosen in PLACES.items():
        module = importlib.import_module(place) if importlib.util.find_spec(place) else None
        for name in sorted(getattr(module, "__all__", ()) if chosen is None else chosen):
            if not hasattr(module, name):
                continue
            value, path = getattr(module, name), f"{place}.{name}"
            known = first.setdefault(id(value), path) if callable(value) else path
            found[path] = described(value) if known == path else f"is {known}"
    return found | {name: class_of(class_named(name)) for name in HELD}


def class_named(name: str) -> type:
    """The one class of that name in the modules of steerfast that are loaded."""
    modules = [module for path, module in sys.modules.items() if path.startswith("steerfast.")]
    found = {value for module in modules if inspect.isclass(value := vars(module).get(name))}
    assert len(found) == 1, f"{name}: {sorted(map(repr, found))} in steerfast; expected one class of that name"
    return found.pop()


def described(value: Any) -> Any:
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return class_of(value)
    if callable(value):
        return f"function {signature(value)}"
    return f"constant {value!r}"


def class_of(kind: type) -> dict[str, Any]:
    """How it is made, what it is a kind of, and its members as far as no public base has them alike."""
    found = members(kind)
    if kind.__name__ in HANDLE:
        return {name: found[name] for name in HANDLE[kind.__name__]}
    bases = [base for base in kind.__mro__[1:-1] if not base.__name__.startswith("_")]
    for base in bases:
        inherited = members(base) if base.__module__.startswith("steerfast") else {}
        found = {name: told for name, told in found.items() if inherited.get(name) != told}
    made = {} if getattr(kind, "_is_protocol", False) else {"call": signature(kind)}
    return {"bases": [base.__name__ for base in bases], **made, **found}


def members(kind: type) -> dict[str, str]:
    """Public methods, properties and attributes, and operators; the fields of a dataclass stand in how it is made."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    fields |= set(getattr(kind, "_fields", ()))  # of a named tuple
    found = {}
    for name in sorted((set(dir(kind)) | set(inspect.get_annotations(kind)) | set(assigned(kind))) - fields):
        owner = next((base for base in kind.__mro__ if name in vars(base)), kind)
        if owner.__module__.startswith("steerfast") and (not name.startswith("_") or name in OPERATORS):
            found[name] = member(inspect.getattr_static(kind, name, None))
    return found


def member(value: Any) -> str:
    if isinstance(value, property):
        return f"property{', can be set' if value.fset else ''}{result(inspect.signature(value.fget))}"
    if isinstance(value, functools.cached_property):
        return f"property{result(inspect.signature(value.func))}"
    if isinstance(value, (classmethod, staticmethod)):
        return f"{type(value).__name__} {signature(value.__func__)}"
    return f"method {signature(value)}" if inspect.isfunction(value) else "attribute"


def assigned(kind: type) -> Iterator[str]:
    """The attributes that a hand-written `__init__` sets."""
    for base in kind.__mro__:
        if "__init__" in vars(base) and base.__module__.startswith("steerfast") and not dataclasses.is_dataclass(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base.__init__)))
            for node in ast.walk(tree):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.ctx, ast.Store)
                    and not node.attr.startswith("_")
                ):
                    yield node.attr


def signature(value: Callable[..., Any]) -> str:
    """A signature as it is written, whatever module its defaults and annotations come from."""
    found, parts, kinds = inspect.signature(value), [], inspect.Parameter
    for i, (name, parameter) in enumerate(parameters := list(found.parameters.items())):
        before = parameters[i - 1][1].kind if i else None
        if parameter.kind is kinds.KEYWORD_ONLY and before not in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL):
            parts.append("*")
        stars = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        note = "" if parameter.annotation is kinds.empty else f": {written(parameter.annotation)}"
        default = "" if parameter.default is kinds.empty else f" = {written(repr(parameter.default))}"
        parts.append(f"{stars}{name}{note}{default}")
        if parameter.kind is kinds.POSITIONAL_ONLY and (
            i + 1 == len(parameters) or parameters[i + 1][1].kind is not kinds.POSITIONAL_ONLY
        ):
            parts.append("/")
    return f"({', '.join(parts)}){result(found)}"


def result(found: inspect.Signature) -> str:
    return "" if found.return_annotation is inspect.Signature.empty else f" -> {written(found.return_annotation)}"


def written(value: Any) -> str:
    """An annotation, or the text of a default, without our own modules and without addresses."""
    text = getattr(value, "__forward_arg__", value)  # a named tuple wraps its annotations
    text = text if isinstance(text, str) else inspect.formatannotation(text)
    text = re.sub(r"\bsteerfast(\.\w+)*\.(?=\w)", "", text)
    return re.sub(r" at 0x\w+|\b(Posix|Windows)(?=Path\()", "", text)


# --- entry points and commands -----------------------------------------------------------------------------------------


def metadata() -> dict[str, Any]:
    """The entry points and extras that setup.py states."""
    calls = (node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call))
    (call,) = (node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "setup")
    wanted = ("entry_points", "extras_require")
    return {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg in wanted}


def entry_points() -> dict[str, list[str]]:
    """Group -> names; what they lead to may move."""
    given = metadata()["entry_points"]
    return {group: [point.partition("=")[0].strip() for point in points] for group, points in given.items()}


def targets() -> dict[str, Callable[..., Any]]:
    """Group and name, as one text -> what is called."""
    found = {}
    for group, points in metadata()["entry_points"].items():
        for point in points:
            name, _, target = (part.strip() for part in point.partition("="))
            module, _, attribute = target.partition(":")
            found[f"{group} {name}"] = getattr(importlib.import_module(module), attribute)
    return found


class Caught(Exception):
    """Carries the parser out of the command."""


def parser(*arguments: str) -> argparse.ArgumentParser:
    """The parser that the command makes for these arguments, caught where it would read them."""

    def catch(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise Caught(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", catch):
        try:
            targets()["console_scripts steerfast"](list(arguments))
        except Caught as caught:
            return caught.args[0]
    raise AssertionError("the command steerfast has read its arguments without argparse")


def commands() -> dict[str, Any]:
    """Command -> its options; a command that is imported when it is called is called by its name."""
    return {name: options(subparsers(parser(name))[name]) for name in subparsers(parser())}


def subparsers(of: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action.choices for action in of._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def options(of: argparse.ArgumentParser) -> dict[str, Any]:
    """Option strings, or the name of a positional argument, to what is accepted; then the actions of the command."""
    found: dict[str, Any] = {}
    for action in of._actions:
        if isinstance(action, (argparse._SubParsersAction, argparse._HelpAction)):
            continue
        told = {name: getattr(action, name) for name in ("nargs", "choices") if getattr(action, name) is not None}
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
        told |= {"required": True} if action.required else {"default": written(repr(action.default))}
        found[" ".join(action.option_strings) or action.dest] = told
    return found | {f"{name} …": options(below) for name, below in subparsers(of).items()}


# --- the comparison ----------------------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[], Any]] = {
    "names": names,
    "entry points": entry_points,
    "extras": lambda: sorted(metadata()["extras_require"]),
    "commands": commands,
}


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """One line per name that is gone, new or changed."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield f"{where}\n    was {old}\n    is  {new}"
        return
    for key in sorted(old.keys() | new.keys()):
        path = f"{where}: {key}" if where else key
        if key not in new:
            yield f"{path} is gone"
        elif key not in old:
            yield f"{path} is new"
        else:
            yield from differences(old[key], new[key], path)


@pytest.mark.parametrize("part", PARTS)
def test_nothing_public_has_changed(part: str) -> None:
    old = json.loads(LIST.read_text(encoding="utf-8"))[part]
    found = list(differences(old, PARTS[part](), part))
    assert not found, "\n".join([f"the public API has changed; {MEANT}", *found])


def test_entry_points_lead_somewhere() -> None:
    found = targets()
    assert found.keys() == {f"{group} {name}" for group, names in entry_points().items() for name in names}
    assert all(callable(target) for target in found.values())


def test_dir_shows_the_public_names_alone() -> None:
    assert dir(sf) == sorted(sf.__all__)


def test_no_public_name_loads_what_is_heavy() -> None:
    heavy = {"triton", "numba", "transformers", "sklearn", "scipy", "gguf", "matplotlib", "vllm", "steerfast_kernels"}
    code = (
        "import sys, torch; before = set(sys.modules); import steerfast as sf\n"
        "for name in sf.__all__: getattr(sf, name)\n"
        f"print(sorted((set(sys.modules) - before) & {heavy!r}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_comparison_names_what_differs() -> None:
    old = {"names": {"a": "function (x)", "b": {"call": "()", "go": "method (self)"}, "c": "module"}}
    new = {"names": {"a": "function (x, y = 1)", "b": {"call": "()"}, "d": "module"}}
    assert list(differences(old, new)) == [
        "names: a\n    was function (x)\n    is  function (x, y = 1)",
        "names: b: go is gone",
        "names: c is gone",
        "names: d is new",
    ]


if __name__ == "__main__":
    content = {part: read() for part, read in PARTS.items()}
    LIST.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
