#!/usr/bin/env bash
# adapters 1.3.0 with the transformers that it asks for, 4.57.6: adapters.init() is to leave what a model computes as it is until
# there is an adapter. Its attention of Llama takes the cache by the argument's old name (past_key_value), transformers hands it
# over by the new one, and the cache stays empty: with the key-value cache, which is the default of generate(), each new token
# sees itself alone. The text is another one, without an error or a warning; with use_cache=False it is right, and so is GPT-2.
#
# Seen: GPT2LMHeadModel   generated tokens that are another one after init(): cache 0 of 36, no cache 0 of 36; tokens in the cache 12
#       LlamaForCausalLM  generated tokens that are another one after init(): cache 32 of 36, no cache 0 of 36; tokens in the cache 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 adapters==1.3.0 transformers==4.57.6 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import copy
import sys

import adapters
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

common = {"vocab_size": 40, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
kinds = {
    GPT2LMHeadModel: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **common),
    LlamaForCausalLM: LlamaConfig(num_key_value_heads=4, **sizes, **common),
}
found = {}
for kind, config in kinds.items():
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(0, 40, (3, 7))
    how = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**how)
    changed = copy.deepcopy(model)
    adapters.init(changed)
    changed.eval()
    others = [int((changed.generate(use_cache=cache, **how) != expected).sum()) for cache in (True, False)]
    with torch.no_grad():
        length = changed(input_ids=torch.randint(0, 40, (1, 12)), use_cache=True).past_key_values.get_seq_length()
    print(f"{kind.__name__:<17} generated tokens that are another one after init(): cache {others[0]} of 36, ", end="")
    print(f"no cache {others[1]} of 36; tokens in the cache {length}")
    found[kind] = (*others, length)
as_stated = found[GPT2LMHeadModel] == (0, 0, 12) and found[LlamaForCausalLM][1:] == (0, 0)
sys.exit(0 if as_stated and found[LlamaForCausalLM][0] > 5 else 1)
PYTHON
