#!/usr/bin/env bash
# mergekit 0.1.5, transformers 5.23.0, torch 2.13.0: run_merge keeps the files that it has opened in the process, by the name of the
# model. A model that is trained on, saved into the same folder and merged again, in one session, goes into the merge as it was the
# first time, without a word, though the folder holds other weights: transformers reads the new ones.
#
# Seen: the model in the folder, its mean weight: 1.0 at first, 2.0 after the second save
#       merged (passthrough):                    1.0 at first, 1.0 after the second save, 2.0 from another folder
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
model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))


def save(value, name):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(value)
    model.save_pretrained(f"{folder}/{name}")


def mean(name):
    read = LlamaForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32)
    return float(read.model.layers[0].mlp.up_proj.weight.mean())


def merged(name, out):
    config = {"merge_method": "passthrough", "dtype": "float32", "models": [{"model": f"{folder}/{name}"}]}
    run_merge(MergeConfiguration.model_validate(config), f"{folder}/{out}", MergeOptions(copy_tokenizer=False))
    return mean(out)


save(1.0, "tuned")
first, first_merged = mean("tuned"), merged("tuned", "out1")
save(2.0, "tuned")
second, second_merged = mean("tuned"), merged("tuned", "out2")
save(2.0, "elsewhere")
elsewhere = merged("elsewhere", "out3")
print(f"the model in the folder, its mean weight: {first} at first, {second} after the second save")
print(f"merged (passthrough):                    {first_merged} at first, {second_merged} after the second save, ", end="")
print(f"{elsewhere} from another folder")
sys.exit(0 if (first, second) == (1, 2) and (first_merged, second_merged, elsewhere) == (1, 1, 2) else 1)
PYTHON
