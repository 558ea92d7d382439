#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4 on a CPU, transformers 5.24.0: what a model of mlx-lm has no field for is dropped from its config without
# a word. GLM turns a part of each head (a half by the default of its partial_rotary_factor), and mlx-lm all of it, as it does not
# for GLM-4-0414. norm_topk_prob of Qwen2-MoE, attention_factor of YaRN and hidden_act of Llama are passed over, too: the models
# load and give other logits.
#
# Seen: glm, all of each head       logits off by 0.00
#       glm, half of each head      logits off by 4.10
#       glm4, half of each head     logits off by 0.00
#       qwen2_moe                   logits off by 0.00
#       qwen2_moe, norm_topk_prob   logits off by 0.99
#       llama, YaRN                 logits off by 0.00
#       llama, attention_factor 1.5 logits off by 2.21
#       llama, hidden_act silu      logits off by 0.00
#       llama, hidden_act gelu      logits off by 0.65
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2 2> /dev/null
cd "$folder"
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "pad_token_id": 0,
}
mx.set_default_device(mx.cpu)
ids = torch.randint(0, 97, (1, 40), generator=torch.manual_seed(0))


def before_5(config):
    """A config with its positions as transformers 4 and the published models write them."""
    positions = config.pop("rope_parameters")
    config["rope_theta"] = positions.pop("rope_theta")
    if "partial_rotary_factor" in positions:
        config["partial_rotary_factor"] = positions.pop("partial_rotary_factor")
    if positions["rope_type"] != "default":
        config["rope_scaling"] = positions
    return config


@torch.no_grad()
def moved(kind, as_before_5, tokens=slice(None), **settings):
    """How far logits of mlx-lm are from those of transformers, in their deviations."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **settings})).eval().float()
    model.save_pretrained("model")
    if as_before_5:
        path = Path("model/config.json")
        path.write_text(json.dumps(before_5(json.loads(path.read_text()))))
    expected = model(ids).logits[0].numpy()
    found = np.array(load_model(Path("model"))[0](mx.array(ids.numpy())))[0]
    return float(np.abs(found - expected)[tokens].max() / expected.std())


plain = {"rope_type": "default", "rope_theta": 10000.0}
yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
cases = {
    "glm, all of each head": ("glm", {"rope_parameters": {**plain, "partial_rotary_factor": 1.0}}),
    "glm, half of each head": ("glm", {"rope_parameters": {**plain, "partial_rotary_factor": 0.5}}),
    "glm4, half of each head": ("glm4", {"rope_parameters": {**plain, "partial_rotary_factor": 0.5}}),
    "qwen2_moe": ("qwen2_moe", experts),
    "qwen2_moe, norm_topk_prob": ("qwen2_moe", {**experts, "norm_topk_prob": True}),
    "llama, YaRN": ("llama", {"rope_parameters": dict(yarn)}),
    "llama, attention_factor 1.5": ("llama", {"rope_parameters": {**yarn, "attention_factor": 1.5}}),
    "llama, hidden_act silu": ("llama", {"hidden_act": "silu"}),
    "llama, hidden_act gelu": ("llama", {"hidden_act": "gelu"}),
}
wrong, right = [], []
for name, (kind, settings) in cases.items():
    by = moved(kind, True, **settings)
    print(f"{name:<27} logits off by {by:.2f}")
    dropped = ("glm, half of each head", "qwen2_moe, norm_topk_prob", "llama, attention_factor 1.5", "llama, hidden_act gelu")
    (wrong if name in dropped else right).append(by)
sys.exit(0 if max(right) < 1e-2 and min(wrong) > 0.1 else 1)
PYTHON
