"""Quantised weights in vLLM: GPTQ and AWQ in four bits, and eight bits of weights and inputs, beside the same numbers written out
in transformers, in bfloat16. And keys and values in eight bits."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_engines import (
    ENVIRONMENT,
    environment,
    fields,
    needs_vllm,
    reads,
    tiny,
    tiny_edits,
    tiny_plans,
    tiny_probes,
)

import steerfast as sf

pytestmark = [needs_vllm, pytest.mark.vllm]
GROUP, TOKENS = 32, 5
CLOSE = {"gptq": 0.08, "awq": 0.08, "int8": 0.2, "keys and values": 0.3}
"""Of log-probabilities: bfloat16 in another order of operations, which may round an input to the next of 255 numbers; keys and
values with three bits behind the first, which the truth does not round."""
ORDER = {"gptq": range(8), "awq": [0, 2, 4, 6, 1, 3, 5, 7]}
CONFIG = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "int8": {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "dynamic": True,
                },
            }
        },
    },
}


def packed(numbers: torch.Tensor, dim: int, order: Any) -> torch.Tensor:
    """Eight numbers of four bits in each int32, along a dimension."""
    numbers = numbers.int().movedim(dim, -1)
    eight = numbers.reshape(*numbers.shape[:-1], -1, 8)[..., list(order)]
    return (eight << (4 * torch.arange(8, dtype=torch.int32))).sum(-1, dtype=torch.int32).movedim(-1, dim).contiguous()


def in_eight_bits(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers up to 127 for each row, and what they are multiplied with."""
    scale = rows.float().abs().amax(-1, keepdim=True) / 127
    return (rows.float() / scale).round(), scale


def round_inputs(model: Any) -> None:
    """What each linear layer of the blocks takes, in eight bits, token by token."""
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, args: torch.mul(*in_eight_bits(args[0])).to(args[0].dtype))


def quantise(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Write a saved model's blocks in four or eight bits. Returns the weights that they stand for."""
    written: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." not in name or weight.ndim != 2:
            written[name] = meant[name] = weight.bfloat16()
            continue
        if kind == "int8":
            numbers, scale = in_eight_bits(weight)
            written[name], written[f"{name}_scale"] = numbers.to(torch.int8), scale
            meant[name] = (numbers * scale).bfloat16()
            continue
        groups = weight.reshape(len(weight), -1, GROUP)
        scale = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
        numbers = (groups / scale).round().clamp(-8, 7)
        meant[name] = (numbers * scale).reshape(weight.shape).bfloat16()
        base, across = name.removesuffix(".weight"), int(kind == "awq")  # packed along the inputs, or the outputs
        scales = scale[..., 0].T.bfloat16().contiguous()
        zeros = torch.full(scales.shape, 8 if kind == "awq" else 7)
        written[f"{base}.qweight"] = packed(numbers.reshape(weight.shape).T + 8, across, ORDER[kind])
        written[f"{base}.qzeros"] = packed(zeros, 1, ORDER[kind])
        written[f"{base}.scales"] = scales
        if kind == "gptq":
            written[f"{base}.g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    save_file(written, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": CONFIG[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@torch.inference_mode()
def likelihoods(model: Any, ids: list[int], made: Any, plan: sf.Plan | None, strength: float) -> torch.Tensor:
    """Log-probabilities of the tokens that an engine has made, in one pass under a plan."""
    with ExitStack() as stack:
        if plan is not None:
            stack.enter_context(sf.steer(model, plan, strength=strength, prompt_length=len(ids)))
        logits = model(torch.tensor([[*ids, *made[:-1]]])).logits[0, len(ids) - 1 :]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(made)[:, None])[:, 0]


@pytest.mark.parametrize("kind", CLOSE)
def test_a_quantised_engine_is_steered_and_read(kind: str, tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams

    model = tiny(tmp_path / "model")
    probes = tiny_probes(tmp_path / "probes", tmp_path / "saes")
    plans = tiny_plans(tmp_path / "plans") | tiny_edits(tmp_path / "plans", probes)
    if kind in CONFIG:
        model.load_state_dict(quantise(tmp_path / "model", kind))
    if kind == "int8":
        round_inputs(model)
    model.bfloat16()
    ids = random.Random(0).choices(range(3, 120), k=9)
    asked = (
        [None, *plans] if CLOSE[kind] < 0.1 else [None, "add", "many", "norm", "rows", "flow"]
    )  # nothing that is decided
    strength = 1.0 if CLOSE[kind] < 0.1 else 2.0
    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    with environment(**ENVIRONMENT, **folders, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=64,
            max_num_seqs=8,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
            kv_cache_dtype="auto" if kind in CONFIG else "fp8",
        )
        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(**common, logprobs=0, extra_args=reads("lean") | (fields((name, strength)) if name else {}))
            for name in asked
        ]
        outputs = llm.generate([{"prompt_token_ids": ids}] * len(asked), params, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
    moved = 0
    for name, output in zip(asked, outputs, strict=True):
        made = output.outputs[0]
        likely, plain = (likelihoods(model, ids, made.token_ids, plan, strength) for plan in (plans.get(name), None))
        got = torch.tensor([at[token].logprob for at, token in zip(made.logprobs, made.token_ids, strict=True)])
        assert (got - likely).abs().max() < CLOSE[kind], name
        moved += bool((likely - plain).abs().max() > CLOSE[kind])
        assert output.kv_transfer_params["steerfast"]["lean"]["tokens"] == len(ids) + TOKENS - 1
    assert moved >= len(asked) // 2
