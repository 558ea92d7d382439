#!/usr/bin/env bash
# mergekit 0.1.5, transformers 5.23.0, torch 2.13.0: multislerp is documented to project the inputs onto the tangent space at their
# weighted mean, to interpolate there, and to project back. The weighted sum of what it projects is zero by construction, as the mean
# is taken of the same unit vectors with the same weights: nothing is left of the three steps, and the result is the plain
# weighted mean, rescaled. Of two orthogonal task vectors with the weights 0.9 and 0.1, slerp goes 9 degrees, multislerp 6.3.
#
# Seen: angle to the first of two orthogonal task vectors, weights 0.9 and 0.1: nuslerp 9.0, multislerp 6.3, rescaled mean 6.3
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
change = torch.randn(2, before.numel())
change[1] -= (change[0] @ change[1]) / change[0].square().sum() * change[0]
change = 0.01 * change / change.square().mean(1, keepdim=True).sqrt()  # orthogonal, of equal length
for i in range(2):
    tuned = LlamaForCausalLM(base.config)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(change[i].view(before.shape))
    tuned.save_pretrained(f"{folder}/tuned{i}")


def angle(vector):
    """Degrees from the first task vector."""
    return float(torch.rad2deg(torch.acos((vector @ change[0].double()) / vector.norm() / change[0].double().norm())))


found = {}
for method in ("nuslerp", "multislerp"):
    inputs = [{"model": f"{folder}/tuned{i}", "parameters": {"weight": weight}} for i, weight in enumerate((0.9, 0.1))]
    config = {"merge_method": method, "base_model": f"{folder}/base", "dtype": "float32", "models": inputs}
    run_merge(MergeConfiguration.model_validate(config), f"{folder}/{method}", MergeOptions(copy_tokenizer=False))
    out = LlamaForCausalLM.from_pretrained(f"{folder}/{method}", dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    found[method] = angle((out.detach().double() - before).flatten())
found["rescaled mean"] = angle((0.9 * change[0] + 0.1 * change[1]).double())
print("angle to the first of two orthogonal task vectors, weights 0.9 and 0.1: ", end="")
print(", ".join(f"{name} {value:.1f}" for name, value in found.items()))
as_stated = abs(found["nuslerp"] - 9) < 0.1 and abs(found["multislerp"] - found["rescaled mean"]) < 0.05 < abs(found["multislerp"] - 9)
sys.exit(0 if as_stated else 1)
PYTHON
