#!/usr/bin/env bash
# mergekit 0.1.5, transformers 5.23.0, torch 2.13.0: SCE is documented to weigh each model's task vector by its mean square, over the sum
# of those of all models. Where this sum is below 1e-6, the weights are equal instead, without a word. The changes of a usual
# fine-tuning are that small (1e-6 is a root mean square of 1e-3, where weights have about 0.02): the step of which the method has
# its C is left out. By the formula, smaller task vectors of the same ratio have the same weights.
#
# Seen: task vectors of RMS 0.1 and 0.05:      weight of the larger one 0.80
#       task vectors of RMS 0.001 and 0.0005:  weight of the larger one 0.80
#       task vectors of RMS 0.0005 and 0.00025:  weight of the larger one 0.50
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 mergekit==0.1.5 transformers==5.23.0 2> /dev/null
"$folder/env/bin/python" -W ignore - "$folder" 2> /dev/null << 'PYTHON'
import sys

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
base.save_pretrained(f"{folder}/base")
before = base.model.layers[0].mlp.up_proj.weight.detach().double()
changes = [torch.randn(before.shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
changes = [change / change.square().mean().sqrt() for change in changes]
agree = (changes[0] * changes[1]) > 0  # elsewhere the sign decides, and one model alone is taken


def weight(size):
    """The weight of the first of two task vectors in their merge, read off where both have the same sign."""
    for i, (change, times) in enumerate(zip(changes, (1, 0.5))):
        tuned = LlamaForCausalLM(base.config)
        tuned.load_state_dict(base.state_dict())
        with torch.no_grad():
            tuned.model.layers[0].mlp.up_proj.weight.add_(size * times * change)
        tuned.save_pretrained(f"{folder}/tuned{i}-{size}")
    inputs = [{"model": f"{folder}/tuned{i}-{size}"} for i in range(2)]
    config = {"merge_method": "sce", "base_model": f"{folder}/base", "dtype": "float32", "models": inputs}
    run_merge(MergeConfiguration.model_validate(config), f"{folder}/out{size}", MergeOptions(copy_tokenizer=False))
    out = LlamaForCausalLM.from_pretrained(f"{folder}/out{size}", dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    merged = ((out.detach().double() - before) / size)[agree]
    first, second = changes[0][agree].double(), changes[1][agree].double() / 2
    share = float(((merged - second) @ (first - second)) / (first - second).square().sum())
    print(f"task vectors of RMS {size:.2g} and {size / 2:.2g}:".ljust(42), f"weight of the larger one {share:.2f}")
    return share


shares = [weight(size) for size in (0.1, 0.001, 0.0005)]
sys.exit(0 if abs(shares[0] - 0.8) < 0.02 and abs(shares[1] - 0.8) < 0.02 and abs(shares[2] - 0.5) < 0.02 else 1)
PYTHON
