"""A pipeline of two stages on vLLM's V2 runner, eagerly, with every Triton kernel of vLLM and ours interpreted. Run by itself:

TRITON_INTERPRET=1 python -m pytest tests/test_vllm_v2_pp.py
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from test_vllm_pp import across
from vllm_engines import (
    ENVIRONMENT,
    Transformers,
    assert_scores,
    environment,
    fields,
    needs_vllm,
    pretend_that_triton_runs_here,
    reads,
    tiny,
    tiny_edits,
    tiny_plans,
    tiny_probes,
)

pytestmark = [
    needs_vllm,
    pytest.mark.vllm,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]
TOKENS = 4
IN_WORKERS = """import pathlib, runpy, sys
for folder in sys.path[sys.path.index({here!r}) + 1 :]:
    if pathlib.Path(folder, "sitecustomize.py").is_file():
        runpy.run_path(str(pathlib.Path(folder, "sitecustomize.py")))
        break
sys.path.append({tests!r})
import vllm_engines
vllm_engines.pretend_that_triton_runs_here()
"""
"""What Python runs first in each process that the engine starts."""


def test_two_stages_of_the_second_runner_steer_read_and_decide_as_one(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model")
    probes = tiny_probes(tmp_path / "probes", tmp_path / "saes")
    plans = tiny_plans(tmp_path / "plans") | tiny_edits(tmp_path / "plans", probes)
    more, probes["early"] = across(tmp_path / "plans")
    plans |= more
    probes["early"].save(tmp_path / "probes" / "early")
    asked = [None, "many", "held", "top", "by token", "held on"]
    texts = [random.Random(i).choices(range(3, 120), k=6 + i) for i in range(len(asked))]
    pretend_that_triton_runs_here()
    here = tmp_path / "in workers"
    here.mkdir()
    script = IN_WORKERS.format(here=str(here), tests=str(Path(__file__).parent))
    (here / "sitecustomize.py").write_text(script)
    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    folders |= {"STEERFAST_BACKEND": "triton", "STEERFAST_COLUMNS": "4", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    folders["PYTHONPATH"] = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    with environment(**ENVIRONMENT, **folders):
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=64,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
            pipeline_parallel_size=2,
        )
        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(**common, extra_args=reads(*probes) | (fields((name, 1.0)) if name else {}))
            for name in asked
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
    truth = Transformers(model)
    for ids, name, output in zip(texts, asked, outputs, strict=True):
        steered = [(plans[name], 1.0)] if name else []
        assert list(output.outputs[0].token_ids) == truth.generate(ids, [(*one, None) for one in steered], TOKENS)[0], (
            name
        )
        assert_scores(model, output, probes, steered)
