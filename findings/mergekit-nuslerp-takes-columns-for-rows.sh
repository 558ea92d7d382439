#!/usr/bin/env bash
# mergekit 0.1.5, transformers 5.23.0, torch 2.13.0: nuslerp with nuslerp_flatten: false interpolates vector by vector, by its documentation
# column vectors, or row vectors with nuslerp_row_wise: true. It is the other way round: without the option each row of a weight
# is a vector, and with it each column. Half-way between two weights whose rows all have the length 1, row vectors keep that length:
# they do so without the option alone.
#
# Seen: nuslerp_row_wise false: off by 0.00000 from rows, 0.13144 from columns; lengths of rows from 1.000 to 1.000
#       nuslerp_row_wise true: off by 0.13144 from rows, 0.00000 from columns; lengths of rows from 0.773 to 1.217
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
weights = []
for i in range(2):
    torch.manual_seed(i)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    weight = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)  # as in torch: 64 rows, one an output
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.copy_(weight)
    model.save_pretrained(f"{folder}/model{i}")
    weights.append(weight.double())


def by_hand(dim):
    """Half-way between both weights, each vector along dim on its arc."""
    first, second = weights
    angle = torch.acos(torch.nn.functional.cosine_similarity(first, second, dim=dim)).unsqueeze(dim)
    return torch.sin(angle / 2) / torch.sin(angle) * (first + second)


as_stated = True
for row_wise in (False, True):
    models = [{"model": f"{folder}/model{i}", "parameters": {"weight": 0.5}} for i in range(2)]
    parameters = {"nuslerp_flatten": False, "nuslerp_row_wise": row_wise}
    config = {"merge_method": "nuslerp", "models": models, "parameters": parameters, "dtype": "float32"}
    target = f"{folder}/merged{row_wise}"
    run_merge(MergeConfiguration.model_validate(config), target, MergeOptions())
    merged = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).model.layers[0].mlp.up_proj.weight.detach().double()
    rows, columns = (float((merged - by_hand(dim)).abs().max()) for dim in (1, 0))
    lengths = merged.norm(dim=1)
    print(f"nuslerp_row_wise {str(row_wise).lower()}: off by {rows:.5f} from rows, {columns:.5f} from columns; ", end="")
    print(f"lengths of rows from {float(lengths.min()):.3f} to {float(lengths.max()):.3f}")
    right, wrong = (columns, rows) if row_wise else (rows, columns)
    as_stated &= right < 1e-5 and wrong > 0.01
sys.exit(0 if as_stated else 1)
PYTHON
