#!/usr/bin/env bash
# adapters 1.3.0, transformers 4.57.6, torch 2.13.0: the composition Average("a", "b") averages the outputs of adapters, by
# weights that add up to one. It multiplies by the weights and takes the mean of the products, which divides by the number of
# adapters once more: the average of two LoRAs that are the same is half of a LoRA, of four a quarter. Bottleneck adapters and
# (IA)^3 get the whole hidden states too small.
#
# Seen: 1 equal LoRA  off from a LoRA by 0.00, from a LoRA with alpha / 1 by 0.00
#       2 equal LoRAs off from a LoRA by 2.37, from a LoRA with alpha / 2 by 0.00
#       4 equal LoRAs off from a LoRA by 3.47, from a LoRA with alpha / 4 by 0.00
#       2 equal bottleneck adapters off from one by 1.39
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 adapters==1.3.0 transformers==4.57.6 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import adapters
import torch
from adapters import LoRAConfig, SeqBnConfig
from adapters.composition import Average
from transformers import BertConfig, BertModel

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def run(configs, average=True):
    """The outputs of a model with an adapter of each config, all of the same weights, averaged."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=40, initializer_range=0.2, **sizes), add_pooling_layer=False)
    adapters.init(model)
    names = [f"copy{n}" for n in range(len(configs))]
    for name, config in zip(names, configs, strict=True):
        model.add_adapter(name, config=config)
        torch.manual_seed(1)
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.data.copy_(0.3 * torch.randn(parameter.shape))
    model.set_active_adapters(Average(*names) if average else names[0])
    torch.manual_seed(2)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(0, 40, (3, 7)))[0]


def lora(alpha=8.0):
    return LoRAConfig(r=4, alpha=alpha)


def off(one, other):
    return float((one - other).abs().max())


alone, as_stated = run([lora()], average=False), []
for n in (1, 2, 4):
    averaged = run([lora()] * n)
    whole, part = off(averaged, alone), off(averaged, run([lora(8 / n)], average=False))
    name = "LoRA " if n == 1 else "LoRAs"
    print(f"{n} equal {name} off from a LoRA by {whole:.2f}, from a LoRA with alpha / {n} by {part:.2f}")
    as_stated.append((whole > 0.1) == (n > 1) and part < 1e-3)
bottleneck = SeqBnConfig(reduction_factor=4)
small = off(run([bottleneck] * 2), run([bottleneck], average=False))
print(f"2 equal bottleneck adapters off from one by {small:.2f}")
sys.exit(0 if all(as_stated) and small > 0.1 else 1)
PYTHON
