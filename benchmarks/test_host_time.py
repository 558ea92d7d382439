"""Host time of one hooked layer under pytest-benchmark (`make bench`); `benchmarks/hooks.py` has the paired figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

_spec = importlib.util.spec_from_file_location("steerfast_benchmark_hooks", Path(__file__).with_name("hooks.py"))
hooks: Any = importlib.util.module_from_spec(_spec)  # type: ignore[arg-type]
_spec.loader.exec_module(hooks)  # type: ignore[union-attr]


@pytest.mark.parametrize("case", ["bare module", "hook + add", "steerfast add"])
def test_host_time(benchmark: Any, case: str) -> None:
    module, x = nn.Identity(), torch.zeros(1, 1, hooks.WIDTH)
    vector = torch.ones(hooks.WIDTH)
    if case == "hook + add":
        module.register_forward_hook(lambda module, args, output: output + vector)
    elif case == "steerfast add":
        hooks.dispatched(module)
    with torch.inference_mode():
        out = benchmark(module, x)
    assert torch.equal(out, x if case == "bare module" else x + vector)
