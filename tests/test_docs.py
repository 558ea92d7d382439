"""What the documentation shows is run: every example in a docstring, and the stub against the names."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import steerfast as sf

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(sf.__path__, "steerfast.")
    if not info.name.endswith(("__main__", "vllm", "hidden_connector"))  # the last is a class of vLLM's
)

TEXTS = {
    "true_statements": ["Water is wet.", "Fire is hot.", "Two is even."],
    "false_statements": ["Water is dry.", "Fire is cold.", "Two is odd."],
    "kind_texts": ["Thank you, my friend.", "How good of you."],
    "rude_texts": ["Go away, you fool.", "Nobody asked you."],
    "happy_texts": ["We won the game!", "The sun is out again."],
    "sad_texts": ["We lost the game.", "It rains again."],
}


@pytest.mark.model
@pytest.mark.parametrize("name", MODULES)
def test_examples(name, smollm, tmp_path, monkeypatch):
    """Every example prints what it shows, with SmolLM2 as `model`; only what takes long or ends a program is skipped."""
    monkeypatch.chdir(tmp_path)
    torch.set_printoptions(profile="default")
    model, tokenizer = smollm
    shown = {
        "sf": sf,
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        **TEXTS,
    }
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs=shown, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_stub_names_what_the_package_names():
    stub = ast.parse((Path(sf.__file__).parent / "__init__.pyi").read_text())
    shown = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert shown == set(sf.__all__)


@pytest.mark.parametrize("name", sf.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(sf, name)
    assert value.__doc__
    assert len(value.__doc__.strip()) > 20


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'stear'"):
        sf.stear  # noqa: B018
