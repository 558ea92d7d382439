#!/usr/bin/env bash
# steering-vectors 0.12.2, transformers 4.57.6, torch 2.13.0: min_token_index, documented as the first token to steer, is counted within
# each forward pass. generate with its key-value cache reads one token a pass, number 0: with min_token_index=4 behind a prompt of
# four tokens, which means the answer, no token is steered, and the text is that of the bare model. Without a cache tokens 4, 5, …
# are steered, as the word says; token_indices are counted alike.
#
# Seen: min_token_index=4, without a cache: tokens steered [4, 5, 6]
#       min_token_index=4, with a cache:    tokens steered []
#       min_token_index=0, with a cache:    tokens steered [0, 1, 2, 3, 4, 5, 6]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 steering-vectors==0.12.2 transformers==4.57.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from steering_vectors import SteeringVector
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=41, **sizes)).eval()
vector = SteeringVector({0: torch.full((32,), 5.0)})
before, after = [], []
model.model.layers[0].register_forward_hook(lambda block, args, out: before.append(out.clone()))
model.model.layers[1].register_forward_pre_hook(lambda block, args: after.append(args[0].clone()))
prompt = torch.tensor([[1, 2, 3, 4]])


def steered(first, use_cache):
    """Which of the seven tokens that are read (the last one made is not) are steered when they are read first."""
    before.clear(), after.clear()
    with vector.apply(model, min_token_index=first):
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0,
            use_cache=use_cache,
        )
    found, read = [], 0
    for plain, changed in zip(before, after):
        moved = (changed - plain).abs().amax(-1)[0] > 1
        start = 0 if use_cache else read
        found += [read + i for i, yes in enumerate(moved[start:].tolist()) if yes]
        read += len(moved) - start
    assert read == 7
    return found


answers = {}
for first, use_cache in ((4, False), (4, True), (0, True)):
    answers[first, use_cache] = steered(first, use_cache)
    how = "with a cache:" if use_cache else "without a cache:"
    print(f"min_token_index={first}, {how:<16} tokens steered {answers[first, use_cache]}")
as_stated = answers == {(4, False): [4, 5, 6], (4, True): [], (0, True): list(range(7))}
sys.exit(0 if as_stated else 1)
PYTHON
