#!/usr/bin/env bash
# optimum-quanto 0.2.7, transformers 5.24.0, torch 2.13.0: to read a quantized model, the README makes an empty one on the device
# "meta" and hands it to requantize. What a model computes when it is made and does not save, as the frequencies of the rotary
# embedding of a Llama, stays whatever memory held: requantize gives each such buffer empty memory and loads with strict=False. The
# model that is read gives other logits, without a word. An empty model on the CPU is read rightly.
#
# Seen: empty model on meta: frequencies others, logits off by nan of 4.5 (or another number: it is what memory held)
#       empty model on cpu : frequencies the same, logits off by 0.00 of 4.5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 optimum-quanto==0.2.7 transformers==5.24.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import torch
from optimum.quanto import freeze, qint8, quantization_map, quantize, requantize
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    vocab_size=64,
    initializer_range=0.15,
)
model, ids = LlamaForCausalLM(config).eval(), torch.randint(0, 64, (1, 64))
quantize(model, weights=qint8)
freeze(model)
state = {name: value.clone() for name, value in model.state_dict().items()}
found = {}
for device in ("meta", "cpu"):
    with torch.device(device):
        empty = LlamaForCausalLM(config).eval()
    requantize(empty, dict(state), quantization_map(model), device=torch.device("cpu"))
    with torch.no_grad():
        found[device] = float((empty(ids).logits - model(ids).logits).abs().max())
        frequencies = torch.equal(empty.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
        print(
            f"empty model on {device:<4}: frequencies {'the same' if frequencies else 'others'}, "
            f"logits off by {found[device]:.2f} of {float(model(ids).logits.abs().max()):.1f}"
        )
sys.exit(0 if not found["meta"] <= 1e-3 and found["cpu"] < 1e-6 else 1)
PYTHON
