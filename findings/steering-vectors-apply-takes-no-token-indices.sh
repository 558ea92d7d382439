#!/usr/bin/env bash
# steering-vectors 0.12.2, transformers 4.57.6, torch 2.13.0: SteeringVector.apply is documented to take min_token_index or
# token_indices. Its min_token_index is 0 where nobody gives one, and what it calls refuses both together, so token_indices= alone
# is refused: an AssertionError, behind an UnboundLocalError of a handle that was never made. patch_activations, which has
# None there, takes it; so does apply with min_token_index=None written out.
#
# Seen: apply(token_indices=[1]): UnboundLocalError, after AssertionError: Can not pass both min_token_index and token_indices
#       apply(token_indices=[1], min_token_index=None): tokens changed [1]
#       patch_activations(token_indices=[1]): tokens changed [1]
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
vector = SteeringVector({0: torch.ones(32)})
seen = []
model.model.layers[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach().clone()))


def run():
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3, 4]]))
    return seen.pop()


plain = run()


def changed(x):
    return (x - plain).abs().amax(-1)[0].nonzero()[:, 0].tolist()


try:
    with vector.apply(model, token_indices=[1]):
        run()
    refused = False
except UnboundLocalError as error:
    before = error.__context__
    refused = isinstance(before, AssertionError) and "both" in str(before)
    print(f"apply(token_indices=[1]): UnboundLocalError, after {type(before).__name__}: {before}")
with vector.apply(model, token_indices=[1], min_token_index=None):
    written = changed(run())
print(f"apply(token_indices=[1], min_token_index=None): tokens changed {written}")
handle = vector.patch_activations(model, token_indices=[1])
patched = changed(run())
handle.remove()
print(f"patch_activations(token_indices=[1]): tokens changed {patched}")
sys.exit(0 if refused and written == patched == [1] else 1)
PYTHON
