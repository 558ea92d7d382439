#!/usr/bin/env bash
# adapters 1.3.0, transformers 4.57.6, torch 2.13.0: save_adapter() writes an adapter, load_adapter() reads it. The configuration
# of ReFT is written without subtract_projection: a saved DiReFT, or NoReFT of that kind, is read as one that subtracts, and
# computes something else. The rule that the layers of a Compacter share, which is trained, is not written where the model has no
# head (BertModel). Both without an error or a warning. LoReFT, and a Compacter below a head, are read as they were.
#
# Seen: LoReFT     BertModel        read again differs by 0.00
#       DiReFT     BertModel        read again differs by 6.96
#       Compacter  BertForMaskedLM  read again differs by 0.00
#       Compacter  BertModel        read again differs by 1.38
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 adapters==1.3.0 transformers==4.57.6 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys
import tempfile

import adapters
import torch
from adapters import CompacterConfig, DiReftConfig, LoReftConfig
from transformers import BertConfig, BertForMaskedLM, BertModel

sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(2)
ids = torch.randint(0, 40, (3, 7))


def fresh(kind):
    torch.manual_seed(0)
    model = kind(BertConfig(vocab_size=40, initializer_range=0.2, **sizes))
    adapters.init(model)
    return model.eval()


def look(name, kind, config):
    model, other = fresh(kind), fresh(kind)
    model.add_adapter("one", config=config)
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if ".one." in key or key.startswith("shared_parameters.one."):
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    model.set_active_adapters("one")
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        model.save_adapter(place, "one")
        other.load_adapter(place, load_as="one")
        other.set_active_adapters("one")
        off = float((model(input_ids=ids)[0] - other(input_ids=ids)[0]).abs().max())
    print(f"{name:<10} {kind.__name__:<16} read again differs by {off:.2f}")
    return off > 1e-2


compacter = CompacterConfig(reduction_factor=4, phm_dim=2)
found = [
    look("LoReFT", BertModel, LoReftConfig()),
    look("DiReFT", BertModel, DiReftConfig()),
    look("Compacter", BertForMaskedLM, compacter),
    look("Compacter", BertModel, compacter),
]
sys.exit(0 if found == [False, True, False, True] else 1)
PYTHON
