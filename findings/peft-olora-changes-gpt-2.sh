#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0: OLoRA, like PiSSA, takes its first values from the weights of a layer, and takes
# what it has got out of them, so that nothing changes at first. GPT-2 keeps its weights transposed (Conv1D, fan_in_fan_out=True),
# and OLoRA does not look at that: on a square layer, such as attn.c_proj, what is taken out is not what the adapter adds, and the
# untrained model is another one, without a word. On a layer that is not square it ends in an error. PiSSA and "orthogonal" do
# look.
#
# Seen: olora       untrained adapter moves logits by 0.12 of 0.54
#       pissa       untrained adapter moves logits by 0.00 of 0.54
#       orthogonal  untrained adapter moves logits by 0.00 of 0.54
#       olora on the same weights in a Linear moves outputs by 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import copy
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=40, n_positions=16)).eval()
ids = torch.randint(0, 40, (2, 6))
projection = base.transformer.h[0].attn.c_proj
linear = torch.nn.Linear(32, 32)
moved = {}
with torch.no_grad():
    before = base(ids).logits
    for name in ("olora", "pissa", "orthogonal"):
        config = LoraConfig(r=4, init_lora_weights=name, target_modules=["attn.c_proj"], fan_in_fan_out=True)
        moved[name] = float((get_peft_model(copy.deepcopy(base), config).eval()(ids).logits - before).abs().max())
        print(f"{name:<11} untrained adapter moves logits by {moved[name]:.2f} of {float(before.abs().max()):.2f}")
    linear.weight.copy_(projection.weight.T)
    x = torch.randn(5, 32)
    outputs = linear(x)
    plain = get_peft_model(
        torch.nn.Sequential(linear), LoraConfig(r=4, init_lora_weights="olora", target_modules=["0"])
    )
    same = float((plain.eval()(x) - outputs).abs().max())
print(f"olora on the same weights in a Linear moves outputs by {same:.2f}")
sys.exit(0 if moved["olora"] > 0.02 and max(moved["pissa"], moved["orthogonal"], same) < 1e-4 else 1)
PYTHON
