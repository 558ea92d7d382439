"""Statements of the kernels' source: what the interpreter ran and what an instruction came from are matched by them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("steerfast_kernels", "kernels", "yardsticks")


class Statement(NamedTuple):
    """A statement, as file.py:line of its first line."""

    name: str
    head: bool = False  # the head of a loop, which runs once more than its body
    definition: bool = False  # of a function: runs outside of every program
    function: str = ""  # file.py:name of the function that it stands in


@functools.cache
def is_kernel(file: str) -> bool:
    """Whether a file of source belongs to the kernels; the compiler's own library does not."""
    return Path(file).parent.name in FOLDERS


@functools.cache
def statement(file: str, line: int) -> Statement:
    """The innermost statement around a line; the head of a loop bears the name of the body's first statement.

    A compiler that makes one instruction of two statements may name a line between them: the statement before it counts.
    """
    found = _statements(file)
    while line > 1 and line not in found:
        line -= 1
    return found.get(line, Statement(f"{Path(file).name}:{line}"))


@functools.cache
def _statements(file: str) -> dict[int, Statement]:
    found: dict[int, Statement] = {}
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    inside = {line: f.name for f in functions for line in range(f.lineno, (f.end_lineno or f.lineno) + 1)}
    for node in ast.walk(tree):  # outer statements first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            head = isinstance(node, (ast.For, ast.While))
            first = body[0].lineno if head else node.lineno
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            function = f"{Path(file).name}:{inside.get(node.lineno, '')}"
            this = Statement(f"{Path(file).name}:{first}", head, isinstance(node, ast.FunctionDef), function)
            found |= dict.fromkeys(range(node.lineno, max(last, node.lineno) + 1), this)
    return found
