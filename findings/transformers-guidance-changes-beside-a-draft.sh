#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0: assisted generation gives, without sampling, the very text that generate gives without a draft. With
# guidance_scale= it does not. The processor of the guidance keeps the cache of its own, unconditional text and adds the last token of
# whatever it is called with. Both kinds of draft call it while they draft, the check of a draft calls it for each drafted token, and
# no token is ever taken back. From the first draft on the guidance is against another text. Nothing is said of it.
#
# Seen: no guidance  assistant model: same text, drafts from the prompt: same text
#       guidance 2   assistant model: another text from token 2 on, drafts from the prompt: another text from token 1 on
#       guidance 2   without a draft: that of the definition
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON' 2> /dev/null
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

NEW, SCALE = 24, 2.0
sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, vocab_size=64)


def model(layers):
    torch.manual_seed(0)
    ends = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, initializer_range=0.3, **sizes, **ends)).eval()


main, draft = model(2), model(1)
ids = torch.randint(3, 64, (1, 3)).repeat(1, 3)
other = torch.randint(3, 64, (1, 5))
guided = dict(guidance_scale=SCALE, negative_prompt_ids=other)


def text(**settings):
    found = main.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, **settings)
    return found[0, ids.shape[1] :].tolist()


@torch.no_grad()
def by_definition():
    with_prompt, without = ids, other
    for _ in range(NEW):
        a, b = (main(x).logits[:, -1].log_softmax(-1) for x in (with_prompt, without))
        token = (SCALE * (a - b) + b).argmax(-1, keepdim=True)
        with_prompt, without = torch.cat([with_prompt, token], 1), torch.cat([without, token], 1)
    return with_prompt[0, ids.shape[1] :].tolist()


def beside(settings):
    """The first token, from 1, at which a text with drafts leaves that without, for both kinds of draft."""
    alone, found = text(**settings), []
    for kind in (dict(assistant_model=draft), dict(prompt_lookup_num_tokens=3)):
        tokens = text(**settings, **kind)
        found.append(next((i for i in range(NEW) if tokens[i : i + 1] != alone[i : i + 1]), None))
    return found


def say(at):
    return "same text" if at is None else f"another text from token {at + 1} on"


plain, steered = beside({}), beside(guided)
right = text(**guided) == by_definition()
for name, found in (("no guidance", plain), ("guidance 2", steered)):
    print(f"{name:<12} assistant model: {say(found[0])}, drafts from the prompt: {say(found[1])}")
print("guidance 2   without a draft:", "that of the definition" if right else "not that of the definition")
sys.exit(0 if right and plain == [None, None] and None not in steered else 1)
PYTHON
