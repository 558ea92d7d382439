"""vLLM's sources, read without running them: which of the known forms every seam has, and what differs where it has none."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .seam_table import REQUESTS, SEAMS, Form

Function = ast.FunctionDef | ast.AsyncFunctionDef
_MAKER = "to_sampling_params"


def release(root: Path) -> str:
    """The version that a source tree states, or "unknown"; `root` is its folder `vllm`."""
    file = root / "_version.py"
    for node in _parse(file).body if file.is_file() else ():
        if isinstance(node, ast.Assign) and "__version__" in _bound(node):
            return str(ast.literal_eval(node.value))
    return "unknown"


def forms(root: Path, seams: Mapping[str, tuple[Form, ...]] = SEAMS) -> tuple[dict[str, Form], list[str]]:
    """Compare a source tree with a table of seams.

    Args:
        root: The folder `vllm`.
        seams: Seam -> its known forms.

    Returns:
        The form of every seam that has a known one, and what this release has, in words, for every other.
    """
    read = functools.cache(functools.partial(_module, root))
    found: dict[str, Form] = {}
    differs: list[str] = []
    for seam, known in seams.items():
        reasons = [_differs(read, form.at or seam, form) for form in known]
        if all(reasons):
            differs.append(" or ".join(dict.fromkeys(reasons)))
        else:
            found[seam] = known[reasons.index("")]
    differs += [f"makes sampling parameters in {name}, too" for name in _strangers(root)]
    return found, differs


def _differs(read: Callable[[str], ast.Module | None], place: str, form: Form) -> str:
    """How what stands at a place differs from a form, in words; "" if it does not."""
    module, _, path = place.partition(":")
    node = _inside(read(module), path)
    if node is None:
        return f"has no {place}"
    lacks = _lacks(node, form)
    return f"has another {place}, which {lacks}" if lacks else ""


def _strangers(root: Path) -> list[str]:
    """Classes of requests that stand in no row of the table: theirs would be steered, or not, without our having looked."""
    found = []
    for file in sorted((root / "entrypoints").rglob("*.py")):
        if f"def {_MAKER}" in file.read_text(encoding="utf-8"):
            module = ".".join(("vllm", *file.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
            classes = [node for node in _parse(file).body if isinstance(node, ast.ClassDef)]
            found += [f"{module}:{node.name}" for node in classes if _inside(node, _MAKER) is not None]
    return [name for name in found if name not in REQUESTS]


def _module(root: Path, module: str) -> ast.Module | None:
    base = root.joinpath(*module.split(".")[1:])
    file = next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)
    return None if file is None else _parse(file)


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def _inside(tree: ast.AST | None, path: str) -> ast.AST | None:
    """The class or function of that dotted path, or the tree itself."""
    here = tree
    for name in filter(None, path.split(".")):
        here = next((node for node in _definitions(here) if node.name == name), None)
    return here


def _definitions(node: ast.AST | None) -> Iterator[ast.ClassDef | Function]:
    """What a module or class defines, under a condition, too (`if TYPE_CHECKING`, a version)."""
    for child in ast.iter_child_nodes(node) if node is not None else ():
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler)):
            yield from _definitions(child)


def _lacks(node: ast.AST, form: Form) -> str:
    """What a definition lacks of a form, in words; "" for nothing."""
    reasons = []
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        declared = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        declared = [name for name in declared if name not in ("self", "cls")]
        missing = [name for name in form.takes if name not in declared]
        if missing:
            reasons.append(f"takes no {', '.join(missing)}")
        elif form.takes and [name for name in declared if name in form.takes] != list(form.takes):
            reasons.append(f"takes {', '.join(declared)} in another order")
        elif form.takes and declared[0] != form.takes[0]:
            reasons.append(f"takes {declared[0]} before {form.takes[0]}")
        present = _mentioned(node)
    else:
        present = _members(node)
    absent = [name for name in form.names if name not in present]
    if absent:
        reasons.append(f"has no {', '.join(absent)}")
    return " and ".join(reasons)


def _mentioned(function: Function) -> set[str]:
    """Every name in a function's body: variables, attributes, arguments that it passes by name."""
    found: set[str] = set()
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                found.add(node.arg)
    return found


def _members(owner: ast.AST) -> set[str]:
    """What a class or module holds: definitions, imports, variables, and what methods set on `self`."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(owner):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= _bound(node)
    for inner in _definitions(owner):
        found.add(inner.name)
        if not isinstance(inner, ast.ClassDef):
            set_there = (one for one in ast.walk(inner) if isinstance(one, ast.Attribute))
            found |= {
                one.attr
                for one in set_there
                if isinstance(one.ctx, ast.Store) and isinstance(one.value, ast.Name) and one.value.id == "self"
            }
    return found


def _bound(statement: ast.AST) -> set[str]:
    """The variables that an assignment binds."""
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
