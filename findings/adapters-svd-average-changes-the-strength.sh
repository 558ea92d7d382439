#!/usr/bin/env bash
# adapters 1.3.0, transformers 4.57.6, torch 2.13.0: average_adapter(combine_strategy="lora_delta_w_svd") averages the changes of
# LoRAs and splits them up by a singular value decomposition of rank svd_rank. The new LoRA has the alpha of the old ones over
# svd_rank, not over their rank, and nobody makes up for it: a copy of one LoRA of rank 4 at svd_rank=8, which can hold it
# exactly, is half as strong.
#
# Seen: svd_rank 4  off from the LoRA by 0.00; scale 2
#       svd_rank 8  off from the LoRA by 2.74, after its scale is set to 2 by 0.00; scale 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 adapters==1.3.0 transformers==4.57.6 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import adapters
import torch
from adapters import LoRAConfig
from transformers import BertConfig, BertModel

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
model = BertModel(BertConfig(vocab_size=40, initializer_range=0.2, **sizes), add_pooling_layer=False)
adapters.init(model)
model.eval().add_adapter("one", config=LoRAConfig(r=4, alpha=8))
for key, parameter in model.named_parameters():
    if ".one." in key:
        parameter.data.copy_(0.3 * torch.randn(parameter.shape))
ids = torch.randint(0, 40, (3, 7))


def run(name):
    model.set_active_adapters(name)
    with torch.no_grad():
        return model(input_ids=ids)[0]


def copies(name):
    return [module for key, module in model.named_modules() if key.endswith(f"loras.{name}")]


expected, found = run("one"), {}
for rank in (4, 8):
    name = f"copy{rank}"
    model.average_adapter(name, ["one"], combine_strategy="lora_delta_w_svd", svd_rank=rank)
    scale, off = copies(name)[0].scaling, float((run(name) - expected).abs().max())
    for module in copies(name):
        module.scaling = 2.0
    found[rank] = (scale, off, float((run(name) - expected).abs().max()))
print(f"svd_rank 4  off from the LoRA by {found[4][1]:.2f}; scale {found[4][0]:.0f}")
print(f"svd_rank 8  off from the LoRA by {found[8][1]:.2f}, after its scale is set to 2 by {found[8][2]:.2f}; ", end="")
print(f"scale {found[8][0]:.0f}")
as_stated = found[4][0] == 2 and found[4][1] < 1e-3 and found[8][0] == 1 and found[8][1] > 0.1 and found[8][2] < 1e-3
sys.exit(0 if as_stated else 1)
PYTHON
