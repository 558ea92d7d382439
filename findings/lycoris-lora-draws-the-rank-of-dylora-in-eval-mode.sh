#!/usr/bin/env bash
# lycoris-lora 4.1.3, torch 2.13.0: DyLoRA is trained with ranks drawn at random, so that any of them may be used afterwards. The
# module draws them in eval mode and when it is merged as well: the same input gives one of several outputs, and the merged model
# is one of several models, by the state of Python's random numbers. LoRA is the same each time. And while it is trained with
# alpha over the number of blocks, it is saved as a LoRA with the same alpha over its dim, and read again it is that much weaker.
#
# Seen: lora    different outputs of 32 passes in eval mode: 1; weights of 32 merges: 1
#       dylora  different outputs of 32 passes in eval mode: 4; weights of 32 merges: 4
#       lora    read again its change is 1.00 of what it was
#       dylora  read again its change is 0.25 of what it was
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 lycoris-lora==4.1.3 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import copy
import logging
import random
import sys

import torch
from lycoris import create_lycoris, create_lycoris_from_weights

logging.disable(logging.CRITICAL)


def kinds(found):
    distinct = []
    for value in found:
        if not any(torch.allclose(value, other, atol=1e-3) for other in distinct):
            distinct.append(value)
    return len(distinct)


def look(algo):
    random.seed(0)
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)).eval(), torch.randn(5, 16)
    with torch.no_grad():
        network = create_lycoris(model, 1.0, linear_dim=8, linear_alpha=8.0, algo=algo, block_size=2)
        network.apply_to()
        network.eval()
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        outputs = kinds([model(x) for _ in range(32)])
        network.restore()
        base, weights = copy.deepcopy(model.state_dict()), []
        for _ in range(32):
            model.load_state_dict(base)
            network.merge_to(1.0)
            weights.append(model[0].weight.clone())
    print(f"{algo:<7} different outputs of 32 passes in eval mode: {outputs}; weights of 32 merges: {kinds(weights)}")
    return outputs, kinds(weights)


def read_again(algo):
    """The change of outputs by an adapter of one block that is saved and read, in parts of what it was."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(16, 16)).eval(), torch.randn(5, 16)
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=4.0, algo=algo, block_size=4)
        network.apply_to()
        network.eval()
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        saved = {key: value.clone() for key, value in network.state_dict().items()}
        again, _ = create_lycoris_from_weights(1.0, "", other, weights_sd=saved)
        again.apply_to()
        again.eval()
        change, found = model(x) - before, other(x) - before
    part = float((found * change).sum() / change.pow(2).sum())
    print(f"{algo:<7} read again its change is {part:.2f} of what it was")
    return part


lora, dylora = look("lora"), look("dylora")
parts = [read_again(algo) for algo in ("lora", "dylora")]
as_stated = lora == (1, 1) and min(dylora) > 1 and abs(parts[0] - 1) < 1e-3 and abs(parts[1] - 0.25) < 1e-3
sys.exit(0 if as_stated else 1)
PYTHON
