#!/usr/bin/env bash
# adapters 1.3.0, transformers 4.57.6, torch 2.13.0: merge_adapter() puts an adapter into the weights, reset_adapter() takes it
# out again. Of DoRA it computes the old weights and drops them: the model stays merged, and with the adapter active again has it
# twice. The merge leaves out alpha / r, and of layers with a bias the scale that the adapter has on that; so does merging (IA)^3.
# LoRA is right.
#
# Seen: LoRA, alpha = 2 r   merged differs by 0.00, after reset_adapter() the model is off by 0.00, and active again by 0.00
#       (IA)^3, biases      merged differs by 0.61, after reset_adapter() the model is off by 0.00, and active again by 0.00
#       DoRA, alpha = r     merged differs by 0.00, after reset_adapter() the model is off by 2.21, and active again by 0.94
#       DoRA, alpha = 2 r   merged differs by 1.34, after reset_adapter() the model is off by 2.21, and active again by 1.13
#       DoRA, biases        merged differs by 0.24, after reset_adapter() the model is off by 1.58, and active again by 0.84
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 adapters==1.3.0 transformers==4.57.6 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import adapters
import torch
from adapters import IA3Config, LoRAConfig
from transformers import BertConfig, BertModel

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(2)
ids = torch.randint(0, 40, (3, 7))


def look(name, config, biases=False):
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=40, initializer_range=0.2, **sizes), add_pooling_layer=False)
    for key, parameter in model.named_parameters():
        if biases and key.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    adapters.init(model)
    model.eval().add_adapter("one", config=config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if ".one." in key:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    with torch.no_grad():
        base = model(input_ids=ids)[0]
        model.set_active_adapters("one")
        active = model(input_ids=ids)[0]
        model.set_active_adapters(None)
        model.merge_adapter("one")
        merged = model(input_ids=ids)[0]
        model.reset_adapter()
        reset = model(input_ids=ids)[0]
        model.set_active_adapters("one")
        again = model(input_ids=ids)[0]
    off = [float((a - b).abs().max()) for a, b in ((merged, active), (reset, base), (again, active))]
    print(
        f"{name:<19} merged differs by {off[0]:.2f}, after reset_adapter() the model is off by {off[1]:.2f}, ", end=""
    )
    print(f"and active again by {off[2]:.2f}")
    return [value > 1e-2 for value in off]


found = [
    look("LoRA, alpha = 2 r", LoRAConfig(r=4, alpha=8)),
    look("(IA)^3, biases", IA3Config(), biases=True),
    look("DoRA, alpha = r", LoRAConfig(r=4, alpha=4, use_dora=True)),
    look("DoRA, alpha = 2 r", LoRAConfig(r=4, alpha=8, use_dora=True)),
    look("DoRA, biases", LoRAConfig(r=4, alpha=4, use_dora=True), biases=True),
]
expected = [[False] * 3, [True, False, False], [False, True, True], [True] * 3, [True] * 3]
sys.exit(0 if found == expected else 1)
PYTHON
