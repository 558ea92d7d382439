"""Fixtures for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from interpreted import quicken

    quicken()


@pytest.fixture(scope="session", autouse=True)
def _poison_fresh_allocations() -> Iterator[None]:
    """Fill what `torch.empty` and its kin allocate with NaN (integers: the largest value), so that an element that a
    kernel forgets to write is seen. PyTorch does so only while deterministic algorithms are asked for."""
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # a module property
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 and eval mode, with its tokenizer; shared by all tests: leave no hook behind."""
    from steerfast.models import demo as demo_model

    return demo_model.load()
