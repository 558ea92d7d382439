"""`steerfast check --engine vllm` on a real engine: its proofs hold there, and each fails where what it proves does not hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import ENVIRONMENT, environment, needs_vllm, unit

import steerfast as sf

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.model]


def test_the_proofs_hold_and_each_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On an engine that calls itself a release which nobody has tested: it starts for the proofs, and afterwards for anybody."""
    import vllm

    from steerfast.models import demo as demo_model
    from steerfast.tools import check_vllm as proof
    from steerfast.vllm import record, register, seams

    model = str(demo_model.path())
    monkeypatch.setenv("STEERFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(vllm, "__version__", "99.0+cpu")

    engines: list[Any] = []
    start = vllm.LLM

    def eager(*args: Any, **options: Any) -> Any:
        engines.append(start(*args, enforce_eager=True, gpu_memory_utilization=0.2, **options))
        return engines[0]

    monkeypatch.setattr(vllm, "LLM", eager)
    plan = sf.Plan({8: sf.Add(unit(0), 30.0)})
    own = {
        "STEERFAST_DEFAULT": '{"steer": "mine"}',
        "STEERFAST_SLOTS": "7",
    }  # about other plans than those of the proofs
    with pytest.raises(
        RuntimeError, match=r"vLLM 99\.0\+cpu .* was not tested; run `steerfast check MODEL --engine vllm`"
    ):
        register()
    with environment(**ENVIRONMENT, **own):
        findings = []
        for finding in proof.prove(model, plan, dtype="float32"):
            assert [*tmp_path.rglob("*.json")] == [], "recorded before all proofs have passed"
            findings.append(finding)
        assert {name: os.environ.get(name) for name in own} == own
    assert [(finding.name, finding.detail) for finding in findings if finding.outcome != "ok"] == []
    assert len(findings) == 8
    (left,) = tmp_path.rglob("*")
    assert findings[-1].detail == str(left)
    assert record.passed("99.0+cpu")
    register()

    class Deaf(proof._Asker):
        """An engine that steers nobody."""

        def __call__(self, prompts: Any, steering: Any) -> Any:
            return super().__call__(prompts, [None] * len(steering))

    for one in (proof._prefill, proof._decode, proof._mates, proof._caches, proof._refusals, proof._plan):
        with pytest.raises(RuntimeError):
            one(Deaf(vllm, engines[0]))
    monkeypatch.setattr(seams, "salt", lambda given, *_: given)  # steered keys and values in everybody's cache
    with pytest.raises(RuntimeError, match="got another answer after the same prompt had been steered"):
        proof._caches(proof._Asker(vllm, engines[0]))
