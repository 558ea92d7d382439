#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: with several active adapters, a layer is to add the change of each, as merging does. The forward of
# C3A writes the output of the first adapter over the input of the layer, and the second adapter reads that: its change is that of
# the product of the two. On a layer that is not square this ends in an error about shapes; on a square one nothing is said.
#
# Seen: LoRA  both adapters and their merged weights differ by 0.00, from the sum of the two changes by 0.00
#       C3A   both adapters and their merged weights differ by 0.99, from the sum of the two changes by 0.99
#       C3A's second adapter, given the output of the first in place of the input: off by 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from peft import C3AConfig, LoraConfig, get_peft_model


def look(name, config):
    torch.manual_seed(0)
    linear = torch.nn.Linear(16, 16)
    x = torch.randn(5, 16)
    with torch.no_grad():
        base = linear(x)
        model = get_peft_model(torch.nn.Sequential(linear), config, adapter_name="one").eval()
        model.add_adapter("two", config)
        for key, parameter in model.named_parameters():
            if ".one" in key or ".two" in key:
                parameter.copy_(torch.randn(parameter.shape))
        layer = model.base_model.model[0]
        first, second = (x @ layer.get_delta_weight(adapter).T for adapter in ("one", "two"))
        chained = first @ layer.get_delta_weight("two").T
        model.base_model.set_adapter(["one", "two"])
        model.eval()
        both = model(x)
        model.merge_adapter()
        merged = model(x)
    scale = float((both - base).abs().max())
    from_merged, from_sum = float((both - merged).abs().max()), float((both - base - first - second).abs().max())
    print(f"{name:<5} both adapters and their merged weights differ by {from_merged:.2f}, ", end="")
    print(f"from the sum of the two changes by {from_sum:.2f}")
    return from_merged / scale, from_sum / scale, float((both - base - first - chained).abs().max()) / scale


lora, c3a = (
    look("LoRA", LoraConfig(r=4, target_modules=["0"])),
    look("C3A", C3AConfig(block_size=8, target_modules=["0"])),
)
print(f"C3A's second adapter, given the output of the first in place of the input: off by {c3a[2]:.2f}")
sys.exit(0 if max(lora[:2]) < 1e-4 and min(c3a[:2]) > 0.2 and c3a[2] < 1e-4 else 1)
PYTHON
