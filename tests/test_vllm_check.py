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
            findings.append(finding)
            assert [*tmp_path.rglob("*.json")] == [] or len(findings) == 11, "recorded before all proofs have passed"
        assert {name: os.environ.get(name) for name in own} == own
    assert [(finding.name, finding.detail) for finding in findings if finding.outcome != "ok"] == []
    assert len(findings) == 11
    (left,) = tmp_path.rglob("*.json")
    assert findings[-1].detail == str(left)
    assert record.passed("99.0+cpu")
    register()

    class Deaf(proof._Asker):
        """An engine that steers nobody."""

        def __call__(self, prompts: Any, steering: Any) -> Any:
            return super().__call__(prompts, [None] * len(steering))

        def outputs(self, prompts: Any, steering: Any) -> Any:
            heard = [extra and {k: v for k, v in extra.items() if k.startswith("steer_read")} for extra in steering]
            return super().outputs(prompts, heard)

    for one in (proof._prefill, proof._decode, proof._mates, proof._caches, proof._refusals, proof._plan):
        with pytest.raises(RuntimeError):
            one(Deaf(vllm, engines[0]))
    for one in (proof._reads, proof._gates, proof._ends):  # nobody is steered, nothing ends
        with pytest.raises(RuntimeError):
            one(Deaf(vllm, engines[0]))

    class Mute(proof._Asker):
        """An engine in which nobody reads."""

        def outputs(self, prompts: Any, steering: Any) -> Any:
            return super().outputs(prompts, [None] * len(steering))

    with pytest.raises(RuntimeError, match="the output has no scores"):
        proof._reads(Mute(vllm, engines[0]))
    monkeypatch.setattr(seams, "salt", lambda given, *_: given)  # steered keys and values in everybody's cache
    with pytest.raises(RuntimeError, match="got another answer after the same prompt had been steered"):
        proof._caches(proof._Asker(vllm, engines[0]))


def test_what_fails_is_not_recorded_and_a_pass_that_cannot_be_recorded_fails(monkeypatch, tmp_path: Path) -> None:
    from steerfast.tools import check_vllm as proof
    from steerfast.tools.check import Finding

    cache = tmp_path / "cache"
    monkeypatch.setenv("STEERFAST_CACHE", str(cache))
    for outcomes in (["ok", "failed", "ok"], ["ok", "ok"]):
        seen = [Finding(f"proof {i}", outcome, "seen") for i, outcome in enumerate(outcomes)]
        monkeypatch.setattr(proof, "_prove", lambda *_, seen=seen: iter(seen))
        if "failed" in outcomes:
            assert [*proof.prove("model")] == seen
            assert not cache.exists()
            cache.write_text("a file where the folder should be")
            continue
        *proven, last = proof.prove("model")
        assert (proven, last.outcome) == (seen, "failed")
        assert "name a folder that can be written in STEERFAST_CACHE" in last.detail
        cache.unlink()
        assert [finding.outcome for finding in proof.prove("model")] == ["ok"] * 3
        assert len([*cache.rglob("*.json")]) == 1


def test_nothing_of_a_server_on_the_machine_is_read_or_written(monkeypatch, tmp_path: Path) -> None:
    """A check's scores do not go into the server's file, nor its rows into the server's folder."""
    from steerfast.tools import check_vllm as proof

    names = ("PLANS", "PROBES", "DEFAULT", "SLOTS", "COLUMNS", "SCORES", "CAPTURE", "SAES", "CACHE")
    own = {f"STEERFAST_{name}": str(tmp_path / name) for name in names}
    seen: dict[str, str] = {}
    monkeypatch.setattr(proof, "_prove", lambda *_: iter(seen.update(os.environ) or ()))
    with environment(**own):
        list(proof.prove("model"))
        assert {name: os.environ.get(name) for name in own} == own
    left = {name for name in own if seen.get(name) == own[name]}
    assert left == {"STEERFAST_SAES", "STEERFAST_CACHE"}  # a plan may name an SAE
