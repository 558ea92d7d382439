#!/usr/bin/env bash
# adapters 1.3.0, transformers 4.57.6, torch 2.13.0: BatchSplit("a", "b", batch_sizes=[1, 2]) gives the first row of a batch to
# one adapter and the others to a second. With DoRA every row is rescaled by the magnitudes and norms of the last adapter, so the
# first row gets neither of the two; with an invertible adapter (SeqBnInv) or ReFT the later rows get the embeddings, or all, of
# the first adapter. Nothing is said. LoRA and bottleneck adapters are right.
#
# Seen: LoRA      rows off from their adapters by 0.00, 0.00, 0.00
#       SeqBn     rows off from their adapters by 0.00, 0.00, 0.00
#       DoRA      rows off from their adapters by 1.13, 0.00, 0.00
#       SeqBnInv  rows off from their adapters by 0.00, 2.49, 2.10
#       LoReFT    rows off from their adapters by 0.00, 1.03, 1.21
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 adapters==1.3.0 transformers==4.57.6 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import adapters
import torch
from adapters import LoRAConfig, LoReftConfig, SeqBnConfig, SeqBnInvConfig
from adapters.composition import BatchSplit
from transformers import BertConfig, BertModel

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def look(name, config):
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=40, initializer_range=0.2, **sizes), add_pooling_layer=False)
    adapters.init(model)
    model.eval()
    ids, outputs = torch.randint(0, 40, (3, 7)), {}
    for adapter in ("a", "b"):
        model.add_adapter(adapter, config=config)
    for key, parameter in model.named_parameters():
        if ".a." in key or ".b." in key:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    with torch.no_grad():
        for adapter in ("a", "b"):
            model.set_active_adapters(adapter)
            outputs[adapter] = model(input_ids=ids)[0]
        model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 2]))
        split = model(input_ids=ids)[0]
    off = [float((split[row] - outputs[adapter][row]).abs().max()) for row, adapter in enumerate("abb")]
    print(f"{name:<9} rows off from their adapters by {', '.join(f'{value:.2f}' for value in off)}")
    return [value > 1e-2 for value in off]


found = [
    look("LoRA", LoRAConfig(r=4, alpha=8)),
    look("SeqBn", SeqBnConfig(reduction_factor=4)),
    look("DoRA", LoRAConfig(r=4, alpha=4, use_dora=True)),
    look("SeqBnInv", SeqBnInvConfig(reduction_factor=4)),
    look("LoReFT", LoReftConfig()),
]
right, later = [False] * 3, [False, True, True]
sys.exit(0 if found == [right, right, [True, False, False], later, later] else 1)
PYTHON
