"""What stops an engine before it steers wrongly: seams of another form, untested releases, tokens that are split or reordered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm_engines import needs_vllm

import steerfast as sf
from steerfast.vllm import counters, guards, record, register, seam_table, seams, sources

pytestmark = [needs_vllm, pytest.mark.vllm]


def test_the_installed_engine_has_the_forms_that_its_release_was_seen_with() -> None:
    import vllm

    found, differs = sources.forms(Path(vllm.__file__).parent)
    version = vllm.__version__.partition("+")[0]
    assert differs == []
    assert [seam for seam, form in found.items() if version not in form.seen] == []


def test_an_untested_release_stops_the_engine_until_it_has_passed_the_check(monkeypatch, tmp_path: Path) -> None:
    import vllm

    monkeypatch.setenv("STEERFAST_CACHE", str(tmp_path))
    register()
    monkeypatch.setattr(vllm, "__version__", "99.0+cpu")
    reason = r"vLLM 99\.0\+cpu has all that steering builds on, but was not tested; run `steerfast check MODEL --engine vllm`"
    with pytest.raises(RuntimeError, match=reason):
        register()
    record.write("99.0+cpu")
    register()
    monkeypatch.setattr(vllm, "__version__", "99.1")
    with pytest.raises(RuntimeError, match=r"vLLM 99\.1 .* was not tested"):
        register()


def test_a_seam_of_another_form_stops_the_engine_by_name_whatever_its_number(monkeypatch, tmp_path: Path) -> None:
    """The installed engine's own source, with one argument renamed."""
    import vllm

    root = Path(vllm.__file__).parent
    for seam in seam_table.SEAMS:
        path = Path(*seam.partition(":")[0].split(".")[1:])
        file = next(f for f in (path.with_suffix(".py"), path / "__init__.py") if (root / f).is_file())
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((root / file).read_bytes())
    monkeypatch.setattr(vllm, "__file__", str(tmp_path / "__init__.py"))
    register()
    changed = tmp_path / "v1/engine/input_processor.py"
    changed.write_text(
        changed.read_text().replace("        resumable: bool = False,", "        growing: bool = False,")
    )
    for version in (vllm.__version__, "99.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        with pytest.raises(RuntimeError, match=r"another .*:InputProcessor\.process_inputs, which takes no resumable"):
            register()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"enable_dbo": True}, "dual-batch overlap"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"enable_expert_parallel": True}, "expert parallelism on a CPU"),
        ({"enable_expert_parallel": True, "data_parallel_size": 2}, "expert parallelism with data parallelism"),
        ({"enable_hc_sp": True}, "sequence parallelism of hyper-connections"),
        (
            {"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 2},
            "sequence parallelism of experts",
        ),
    ],
)
def test_what_splits_or_reorders_tokens_is_refused_by_name(change, reason: str) -> None:
    from vllm.config import ParallelConfig

    parallel = ParallelConfig()
    config = SimpleNamespace(parallel_config=parallel)
    guards.check_parallelism(config)
    for name, value in change.items():
        assert hasattr(parallel, name), "vLLM has renamed it"
        object.__setattr__(parallel, name, value)
    with pytest.raises(ValueError, match=f"{reason} .* cannot be combined with steering; turn it off"):
        guards.check_parallelism(config)


def test_a_pipeline_writes_no_request_in_parts() -> None:
    from vllm.config import ParallelConfig

    parallel = ParallelConfig()
    config = SimpleNamespace(parallel_config=parallel)
    guards.check_parallelism(config, capturing=True)
    object.__setattr__(parallel, "pipeline_parallel_size", 2)
    guards.check_parallelism(config)
    with pytest.raises(ValueError, match="STEERFAST_CAPTURE cannot be combined with pipeline parallelism"):
        guards.check_parallelism(config, capturing=True)


def test_what_an_engine_cannot_read_and_heads_that_are_split_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values from elsewhere have no stream here; over two devices none has all heads."""
    register()
    lean = sf.probes.LinearProbe(torch.ones(8), place=1)
    lean.save(tmp_path / "probes" / "lean")
    sf.Plan({1: sf.Add(torch.ones(8))}).save(tmp_path / "plans" / "add")
    sf.Plan({("head_out", 1): sf.Add(torch.ones(8))}).save(tmp_path / "plans" / "heads")
    for name in ("plans", "probes"):
        monkeypatch.setenv(f"STEERFAST_{name.upper()}", str(tmp_path / name))

    def served(elsewhere: object, devices: int) -> seams.Served:
        model = SimpleNamespace(
            get_total_num_hidden_layers=lambda: 3,
            get_hidden_size=lambda: 8,
            get_head_size=lambda: 4,
            get_num_attention_heads=lambda parallel: 2,
            hf_text_config=SimpleNamespace(),
            dtype=torch.float32,
            max_model_len=64,
        )
        parallel = SimpleNamespace(tensor_parallel_size=devices)
        scheduler = SimpleNamespace(max_num_batched_tokens=64)
        return seams.Served(
            SimpleNamespace(
                model_config=model, parallel_config=parallel, scheduler_config=scheduler, kv_transfer_config=elsewhere
            )
        )

    after = {"steer": "add", "steer_positions": "after:ids:3"}
    for wish in ({"steer_read": "lean"}, after, {"steer": "heads"}):
        assert any(served(None, 1).accept(wish))
    with pytest.raises(ValueError, match="probes cannot be read with keys and values from elsewhere"):
        served(object(), 1).accept({"steer_read": "lean"})
    with pytest.raises(ValueError, match="not all of them are seen with keys and values from elsewhere"):
        served(object(), 1).accept(after)
    assert served(object(), 1).accept({"steer": "add"})[0]
    with pytest.raises(ValueError, match="'head_out' cannot be steered or read inside vLLM on several devices"):
        served(None, 2).accept({"steer": "heads"})


def test_a_default_leaves_no_pooling_request_unsteered_in_silence() -> None:
    """It has no sampling parameters that could say what acts on it, and is run as if there were no plans."""
    pooled = SimpleNamespace(cache_salt=None, sampling_params=None)
    served = SimpleNamespace(
        accept=lambda given: ((object(),), None, None), refusal=lambda text, given: ValueError(text)
    )
    params = SimpleNamespace(extra_kwargs=None)
    with pytest.raises(ValueError, match="pooling requests cannot be steered, as STEERFAST_DEFAULT says"):
        seams._process_inputs(lambda self, params: pooled, SimpleNamespace(steerfast=served), params=params)
    served.accept = lambda given: ((), None, None)
    assert (
        seams._process_inputs(lambda self, params: pooled, SimpleNamespace(steerfast=served), params=params) is pooled
    )


@pytest.mark.parametrize("servers", ["one", "several"])
def test_the_metrics_of_one_and_of_several_api_servers_add_up_what_all_processes_counted(
    monkeypatch, tmp_path: Path, servers: str
) -> None:
    """Several API servers answer with a registry that knows the files of one folder and nothing else."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator import metrics

    monkeypatch.delenv(counters.OF_SEVERAL_SERVERS, raising=False)
    monkeypatch.setenv(counters.FOLDER, str(tmp_path / "one"))
    (tmp_path / "one").mkdir()
    if servers == "several":
        monkeypatch.setenv(counters.OF_SEVERAL_SERVERS, str(tmp_path))
    for _ in range(2):  # a second engine in this process goes on where the first has stopped
        made = counters.Counters(["polite", "terse"])
        made.publish()
        made.add("requests", "polite", 3)
    made.add("refused", "who")
    code = (
        "from steerfast.vllm.counters import Counters; made = Counters(['polite', 'terse']);"
        "made.add('tokens', 'polite', 5); made.add('requests', 'polite', 10);"
        "made.add('waiting', 'terse', 2); made.add('waiting', 'terse', -1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    app = FastAPI()
    metrics.attach_router(app)
    shown = TestClient(app).get("/metrics").text.splitlines()
    expected = {("requests_total", "polite"): 16, ("tokens_total", "polite"): 5, ("refused_total", ""): 1}
    expected |= {("waiting", "terse"): 1}
    for field in ("requests_total", "tokens_total", "refused_total", "waiting", "slots"):
        for plan in ("", "polite", "terse"):
            line = f'steerfast:{field}{{plan="{plan}"}} {float(expected.get((field, plan), 0))}'
            assert shown.count(line) == 1, line
    assert made.total()["requests"] == {"": 0, "polite": 16, "terse": 0}


def test_the_measure_of_host_time_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "vllm_host.py"
    shown = subprocess.run([sys.executable, script, "--out", tmp_path], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    (rows,) = tmp_path.iterdir()
    found = [name for line in rows.read_text(encoding="utf-8").splitlines() for name in json.loads(line)["values"]]
    assert {"per_vector", "idle", "steered_64", "waiting_64", "read_30_host", "edits_64"} <= {*found}


def test_an_engine_on_a_cpu_starts_beside_numba() -> None:
    """It takes the `vars` of all that modules hold (vLLM 0.32); what llvmlite's library answered to that had no `get`."""
    pytest.importorskip("numba").njit(lambda x: x + 1)(1)
    from llvmlite.binding import ffi

    register()
    assert not hasattr(ffi.lib, "__dict__")
    assert callable(ffi.lib.LLVMPY_AddSymbol)
