#!/usr/bin/env bash
# auto-round 0.16.1, transformers 5.24.0, torch 2.13.0: QuaRot turns the weights of a model by rotations that cancel;
# "mathematically equivalent to the original", says the preprocessor, which calls the mode fully supported and looks at no model.
# R2, on by default, turns the weights of values and not their biases, which Qwen2 has; where q, k and v are one layer, as in
# Phi-3, it turns the output projection alone. With R1 folded into the weights, the one that can be saved, norms go in as plain
# factors in front of the next layer: the 1 + weight of Gemma, the norms behind attention of Gemma 2 and OLMo 2, and the LayerNorm
# of Cohere, which takes a mean off, give other models. Llama, Mistral and Qwen3 are right. Nothing warns.
#
# Seen: default                  llama    logits move by 0.000
#       default                  mistral  logits move by 0.000
#       default                  qwen3    logits move by 0.000
#       default                  qwen2    logits move by 3.279
#       default                  phi3     logits move by 5.428
#       R1 folded in, without R2 llama    logits move by 0.000
#       R1 folded in, without R2 qwen3    logits move by 0.000
#       R1 folded in, without R2 gemma    logits move by 5.288
#       R1 folded in, without R2 gemma2   logits move by 4.766
#       R1 folded in, without R2 olmo2    logits move by 1.790
#       R1 folded in, without R2 cohere   logits move by 2.617
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.24.0 auto-round==0.16.1 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import contextlib
import copy
import io
import sys

import torch
from auto_round.algorithms.transforms import apply_rotation
from auto_round.algorithms.transforms.spinquant import SpinQuantConfig
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
ids = torch.randint(0, 97, (2, 12), generator=torch.manual_seed(0))


@torch.no_grad()
def moved(kind, **settings):
    """How far the rotations move the logits of a model of a kind, in their standard deviations."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES)).eval().float()
    for value in model.parameters():
        if value.ndim == 1:  # biases and weights of norms, which are all alike at the start
            value += torch.randn_like(value) / 4
    before = model(ids).logits
    with contextlib.redirect_stdout(io.StringIO()):
        rotated = apply_rotation(copy.deepcopy(model), SpinQuantConfig(trainable_rotation=False, **settings))
    return float((rotated(ids).logits - before).abs().max() / before.std())


right, wrong = [], []
for kind in ("llama", "mistral", "qwen3", "qwen2", "phi3"):
    by = moved(kind)
    print(f"default                  {kind:<8} logits move by {by:.3f}")
    (wrong if kind in ("qwen2", "phi3") else right).append(by)
for kind in ("llama", "qwen3", "gemma", "gemma2", "olmo2", "cohere"):
    by = moved(kind, r2=False, online_r1_rotation=False)
    print(f"R1 folded in, without R2 {kind:<8} logits move by {by:.3f}")
    (right if kind in ("llama", "qwen3") else wrong).append(by)
sys.exit(0 if max(right) < 1e-3 and min(wrong) > 0.5 else 1)
PYTHON
