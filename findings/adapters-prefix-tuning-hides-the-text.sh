#!/usr/bin/env bash
# adapters 1.3.0, transformers 4.57.6, torch 2.13.0: prefix tuning puts trained keys and values before those of a text, and all
# tokens see them. With the attention that transformers takes by default ("sdpa") the mask of a text without padding is left to
# torch, which counts it from the first key: the first tokens of GPT-2 and Llama see the prefix in place of the text, and the last
# keys are seen by none. Where transformers makes a mask of its own, as it does when a text of the batch is padded or there is no
# cache, the prefix is left out of it for all texts. Only "eager" computes what plain transformers does with the same keys and
# values in its cache.
#
# Seen: GPT2LMHeadModel: tokens 5 and 6 see of token 4, in sdpa, 0.00
#         eager                      off from the model with the prefix by 0.00, from that without by 2.75
#         sdpa                       off from the model with the prefix by 2.88, from that without by 4.78
#         sdpa, no cache             off from the model with the prefix by 2.75, from that without by 0.00
#         sdpa, beside a padded text off from the model with the prefix by 2.75, from that without by 0.00
#       LlamaForCausalLM: tokens 5 and 6 see of token 4, in sdpa, 0.00
#         eager                      off from the model with the prefix by 0.00, from that without by 4.16
#         sdpa                       off from the model with the prefix by 3.84, from that without by 3.82
#         sdpa, no cache             off from the model with the prefix by 4.16, from that without by 0.00
#         sdpa, beside a padded text off from the model with the prefix by 4.16, from that without by 0.00
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
from adapters import PrefixTuningConfig
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

PREFIX, TOKENS = 3, 7
common = {"vocab_size": 40, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None}
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
kinds = {
    GPT2LMHeadModel: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, **common),
    LlamaForCausalLM: LlamaConfig(num_key_value_heads=4, **sizes, **common),
}


def look(kind, config):
    torch.manual_seed(0)
    plain = kind(config).eval()
    ids = torch.randint(0, 40, (2, TOKENS))
    model = copy.deepcopy(plain)
    adapters.init(model)
    model.add_adapter("one", config=PrefixTuningConfig(prefix_length=PREFIX, flat=True))
    for key, parameter in model.named_parameters():
        if ".one." in key:
            parameter.data.normal_()
    model.eval().set_active_adapters("one")
    seen = []
    for key, module in model.named_modules():
        if key.endswith(("attn.prefix_tuning", "self_attn.prefix_tuning")):
            module.register_forward_hook(lambda module, args, output: seen.append(output[:2]))
    outputs = []
    with torch.no_grad():
        for attention, cached in (("eager", True), ("sdpa", True), ("sdpa", False)):
            model.set_attn_implementation(attention)
            outputs.append(model(input_ids=ids, use_cache=cached).logits[:1])
        padded = torch.ones(2, TOKENS, dtype=torch.long)
        padded[1, 5:] = 0
        outputs.append(model(input_ids=ids, attention_mask=padded).logits[:1])
        other = ids.clone()
        other[:, 4] = (other[:, 4] + 1) % 40
        unseen = float((model(input_ids=other).logits[:1, 5:] - outputs[1][:, 5:]).abs().max())
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(seen[:2]):
            cache.update(keys[:, :, :PREFIX], values[:, :, :PREFIX], layer)
        places = torch.arange(TOKENS)[None].expand(2, -1)
        mask = torch.ones(2, PREFIX + TOKENS)
        none = plain(input_ids=ids).logits[:1]
        expected = plain(input_ids=ids, past_key_values=cache, position_ids=places, attention_mask=mask).logits[:1]
    off = [[float((output - other).abs().max()) for output in outputs] for other in (expected, none)]
    names = ("eager", "sdpa", "sdpa, no cache", "sdpa, beside a padded text")
    print(f"{kind.__name__}: tokens 5 and 6 see of token 4, in sdpa, {unseen:.2f}")
    for name, with_prefix, without in zip(names, *off, strict=True):
        print(
            f"  {name:<26} off from the model with the prefix by {with_prefix:.2f}, from that without by {without:.2f}"
        )
    right = off[0][0] < 1e-3 and min(off[0][1:]) > 0.1
    return right and unseen < 1e-3 and min(off[1][:2]) > 0.1 and max(off[1][2:]) < 1e-3


sys.exit(0 if all([look(kind, config) for kind, config in kinds.items()]) else 1)
PYTHON
