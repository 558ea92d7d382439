"""Adapters against the hook, by PEFT itself: what equals what, and what is refused by name."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, token_ids
from transformers import AutoModelForCausalLM

import steerfast as sf
from steerfast.cli.main import main
from steerfast.tools.convert import convert, show
from steerfast.tools.lora import describe_lora, write_lora

peft = pytest.importorskip("peft")

POST_NORM = ("gemma3", "gemma2", "olmo2", "glm4")
STACKED = ("mixtral", "qwen2_moe", "gpt_oss")
BIASED = [
    name for name in FAMILIES if name.startswith(("gpt2", "gpt_neo", "falcon", "gptj")) or name in ("phi", "opt")
]
PLAIN = [name for name in FAMILIES if name not in (*POST_NORM, *STACKED, *BIASED, "bloom")]
CLOSE = {"atol": 5e-5, "rtol": 2e-5}


def directions(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(2, 6), use_cache=False).logits


def hooked(model: Any, plan: Any) -> torch.Tensor:
    with sf.steer(model, plan):
        return logits(model)


def adapted(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of base layers without a bias, and of tied embeddings, when merged
        return peft.PeftModel.from_pretrained(deepcopy(model), folder).eval()


def check(model: Any, plan: Any, folder: Path, engine: str) -> Any:
    """With the adapter the hooked model, without it the base, bit for bit."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clean, expected = logits(model), hooked(model, plan)
    assert write_lora(model, plan, folder, engine) == folder
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    both = adapted(model, folder)
    torch.testing.assert_close(logits(both), expected, **CLOSE)
    assert (clean - expected).abs().max() > 0.05
    with both.disable_adapter():
        assert torch.equal(logits(both), clean)
    return both


@pytest.mark.parametrize("name", PLAIN)
def test_an_ablation_everywhere_is_an_adapter_of_its_rank(name: str, tmp_path: Path) -> None:
    model = build(name)
    check(model, sf.tools.everywhere(model, sf.Ablate(directions())), tmp_path / "adapter", "any")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_bias"], config["modules_to_save"]) == (2, 2, False, None)
    assert len(config["target_modules"]) == 1 + 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", BIASED)
def test_where_projections_have_biases_peft_alone_reads_it(name: str, tmp_path: Path) -> None:
    model = build(name)
    plan = sf.tools.everywhere(model, sf.Ablate(directions()))
    check(model, plan, tmp_path / "adapter", "peft")
