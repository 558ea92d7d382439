"""`ops.flow`: the ODE of a low-rank barrier, beside the ways that step in all d dimensions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from lab import cases
from setting import AT, PLACE, pick

RANK = pick(64, 64, 17)


@pytest.mark.parametrize("n", pick((1, 64, 8192), (1, 128), (3,)))
def test_flow(race: Any, n: int) -> None:
    ways = peers.published_flow(AT)
    race(lambda: cases.flow(AT, n, RANK), peers=peers.flow(steps=10), yardsticks=ways)


@pytest.mark.parametrize("n", pick((64, 8192), (128,), (3,)))
@pytest.mark.parametrize(("method", "steps"), [("euler", 40), ("rk4", 10)])
def test_solver(race: Any, n: int, method: str, steps: int) -> None:
    race(lambda: cases.flow(AT, n, RANK, steps, method))


def test_full_rank(race: Any) -> None:
    """A barrier that no small basis holds: two products around the steps."""
    race(lambda: cases.flow(AT, pick(8192, 128, 3), AT.d))


@pytest.mark.slow
@pytest.mark.skipif(PLACE != "cpu", reason="barriers are fitted on a CPU")
def test_fit(sample: Any, ledger: Any, tmp_path: Path) -> None:
    """A quadratic barrier from 20 000 activations of width 4096, in a fresh process; a quick run takes a tenth of them."""
    size = str(20_000 if ledger.thorough else 2_000), "4096"
    values: dict[str, float] = {}

    def once() -> dict[str, float]:
        script = Path(__file__).with_name("flow_cpu.py")
        options = ["--fit", *size, "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
        run = subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True)
        values.update(json.loads(run.stdout))
        return {"ours": values["seconds"]}

    sample(f"fit_barrier {'x'.join(size)}", once, rounds=1, values=lambda: values)
