#!/usr/bin/env bash
# mlx-lm 0.32.2 (which asks for transformers 5.7 or newer), mlx 0.32.4 on a CPU, transformers 5.24.0: transformers 5 saves how
# positions are turned under rope_parameters. Many models of mlx-lm look for rope_theta, rope_scaling and partial_rotary_factor
# alone, which such a config.json does not have, and take their own defaults: a Llama 3.1, a Qwen2 or a Phi-3 that was fine-tuned
# and saved today is read without a warning and computes something else, at any length. With the same settings in the old places
# it is right.
#
# Seen: llama, plain            as saved off by 0.00, with the old places off by 0.00
#       llama, base of 500000   as saved off by 3.68, with the old places off by 0.00
#       llama, linear scaling   as saved off by 4.01, with the old places off by 0.00
#       llama, as Llama 3.1     as saved off by 4.30, with the old places off by 0.00
#       qwen2, base of 10000    as saved off by 4.30, with the old places off by 0.00
#       phi3, half of each head as saved off by 5.42, with the old places off by 0.00
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


cases = {
    "llama, plain": ("llama", {"rope_type": "default", "rope_theta": 10000.0}),
    "llama, base of 500000": ("llama", {"rope_type": "default", "rope_theta": 500000.0}),
    "llama, linear scaling": ("llama", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama, as Llama 3.1": (
        "llama",
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen2, base of 10000": ("qwen2", {"rope_type": "default", "rope_theta": 10000.0}),
    "phi3, half of each head": ("phi3", {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
}
wrong, right = [], []
for name, (kind, positions) in cases.items():
    by, old = (moved(kind, before, rope_parameters=dict(positions)) for before in (False, True))
    print(f"{name:<23} as saved off by {by:.2f}, with the old places off by {old:.2f}")
    (right if name == "llama, plain" else wrong).append(by)
    right.append(old)
sys.exit(0 if max(right) < 1e-2 and min(wrong) > 0.1 else 1)
PYTHON
