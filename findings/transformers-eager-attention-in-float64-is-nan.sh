#!/usr/bin/env bash
# transformers 5.24.0: with eager attention (also what `output_attentions=True` needs), a model in float64 gives NaN for every token of a row
# that is padded on the left, as batches for `generate` are. The mask holds the least float64, which is minus infinity as soon as the
# softmax casts the scores to float32; a padding token, which may look at nothing, then has NaN for weights, and NaN times zero reaches
# all tokens behind it. The same row alone, or in float32 or bfloat16, or by "sdpa", is right, so a float64 reference computed in
# batches is not.
#
# Seen: Llama, eager, float32: share of NaN 0.00, largest difference from the row without padding 3.0e-08
#       Llama, eager, bfloat16: share of NaN 0.00, largest difference from the row without padding 0.0e+00
#       Llama, eager, float64: share of NaN 1.00
#       Llama, sdpa, float64: share of NaN 0.00, largest difference from the row without padding 2.8e-17
#       Qwen2, eager, float64: share of NaN 1.00
#       Qwen2, sdpa, float64: share of NaN 0.00, largest difference from the row without padding 1.6e-09
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.24.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
ids = torch.tensor([[0, 0, 0, 5, 6, 7, 8]])
mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])


def share(config, attention, dtype):
    """The share of NaN among the logits of the real tokens, and how far they are from those of the row without padding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().to(dtype)
    with torch.no_grad():
        padded, alone = model(ids, attention_mask=mask).logits[0, 3:], model(ids[:, 3:]).logits[0]
    nan = float(padded.isnan().double().mean())
    far = float((padded - alone).abs().max())
    kind = type(config).__name__.removesuffix("Config")
    end = "" if nan else f", largest difference from the row without padding {far:.1e}"
    print(f"{kind}, {attention}, {str(dtype).removeprefix('torch.')}: share of NaN {nan:.2f}{end}")
    return nan, far


right = [share(LlamaConfig(**SIZES), "eager", dtype) for dtype in (torch.float32, torch.bfloat16)]
wrong = []
for config in (LlamaConfig(**SIZES), Qwen2Config(**SIZES)):
    wrong.append(share(config, "eager", torch.float64))
    right.append(share(config, "sdpa", torch.float64))
sys.exit(0 if all(nan == 1 for nan, _ in wrong) and all(nan == 0 and far < 1e-2 for nan, far in right) else 1)
PYTHON
