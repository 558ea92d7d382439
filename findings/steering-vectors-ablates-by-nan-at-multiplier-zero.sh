#!/usr/bin/env bash
# steering-vectors 0.12.2, transformers 4.57.6, torch 2.13.0: ablation_operator is documented to ignore the multiplier and to always erase
# the vector. It is given the multiplied vector and divides it by its norm. At multiplier=0, the middle of a sweep, this is 0/0:
# every hidden state from there on is NaN, and generate returns token 0 without an error. ablation_then_addition_operator, which
# then should erase and add nothing, does the same.
#
# Seen: ablation_operator                multiplier 1: projection 0.0, tokens [8, 39, 25]  multiplier 0: projection nan, tokens [0, 0, 0]
#       ablation_then_addition_operator  multiplier 1: projection 5.7, tokens [8, 39, 25]  multiplier 0: projection nan, tokens [0, 0, 0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 steering-vectors==0.12.2 transformers==4.57.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from steering_vectors import SteeringVector, ablation_operator, ablation_then_addition_operator
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=41, initializer_range=0.3, **sizes)).eval()
direction = torch.randn(32)
vector = SteeringVector({0: direction})
seen = []
model.model.layers[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].clone()))
prompt = torch.tensor([[1, 2, 3, 4]])
as_stated = True
for operator in (ablation_operator, ablation_then_addition_operator):
    print(f"{operator.__name__:<31}", end="")
    for multiplier in (1.0, 0.0):
        with vector.apply(model, operator=operator(), multiplier=multiplier):
            out = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
            )
        projection = float((seen[-1][0, -1] @ direction).abs() / direction.norm())
        seen.clear()
        as_stated &= (projection != projection) == (multiplier == 0)
        print(f"  multiplier {multiplier:.0f}: projection {projection:.1f}, tokens {out[0, 4:].tolist()}", end="")
    print()
sys.exit(0 if as_stated else 1)
PYTHON
