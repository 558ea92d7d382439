#!/usr/bin/env bash
# mlx-lm 0.32.2, mlx 0.32.4 on a CPU, transformers 5.24.0: of models with a sliding window, mlx-lm keeps the window of some (Cohere 2,
# SmolLM3) and has none in others: Mistral, Mixtral, Phi-3, Gemma 2 (4096 tokens in the published models), StarCoder2 and Qwen2
# are read without a warning and attend to everything. Up to the window the logits are right; behind it they are those of a
# model that was never trained so.
#
# Seen: cohere2    logits off by 0.00 within the window, by 0.00 behind it
#       smollm3    logits off by 0.00 within the window, by 0.00 behind it
#       mistral    logits off by 0.00 within the window, by 4.83 behind it
#       mixtral    logits off by 0.00 within the window, by 4.49 behind it
#       phi3       logits off by 0.00 within the window, by 4.51 behind it
#       gemma2     logits off by 0.00 within the window, by 3.28 behind it
#       starcoder2 logits off by 0.00 within the window, by 3.96 behind it
#       qwen2      logits off by 0.00 within the window, by 1.82 behind it
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


WINDOW = 8
wrong, right = [], []
for kind in ("cohere2", "smollm3", "mistral", "mixtral", "phi3", "gemma2", "starcoder2", "qwen2"):
    settings = {"sliding_window": WINDOW, "num_hidden_layers": 4}
    if kind == "mixtral":
        settings["num_local_experts"] = 4
    if kind == "smollm3":
        settings.update(use_sliding_window=True, layer_types=["sliding_attention"] * 2 + ["full_attention"] * 2)
    if kind == "qwen2":
        settings.update(use_sliding_window=True, max_window_layers=2)
    near, far = (moved(kind, True, part, **settings) for part in (slice(WINDOW), slice(WINDOW, None)))
    print(f"{kind:<10} logits off by {near:.2f} within the window, by {far:.2f} behind it")
    right.append(near)
    (right if kind in ("cohere2", "smollm3") else wrong).append(far)
sys.exit(0 if max(right) < 1e-2 and min(wrong) > 0.1 else 1)
PYTHON
