#!/usr/bin/env bash
# bitsandbytes 0.50.2, torch 2.13.0, on a CPU with AVX512-BF16: a 4-bit layer (nf4, no double quantisation, which is the
# default of transformers) lays its weights out anew in its first pass in eval mode. `state_dict()` is meant to undo that,
# and puts the weights back; the scales of the blocks ("absmax") stay transposed and in bfloat16. Whoever saves a model
# after it has run saves one that computes something else, without an error or a warning. With double quantisation the scales
# are put back.
#
# Seen: before  absmax (192,) float32
#       after   absmax (3, 64) bfloat16
#       the layer loaded from it differs by 12.8 where its outputs reach 47.7
set -euo pipefail
grep -qw avx512_bf16 /proc/cpuinfo 2> /dev/null || { echo "this processor has no AVX512-BF16; nothing is packed here"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy 2> /dev/null
"$folder/env/bin/python" - << 'PYTHON'
import sys

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

torch.manual_seed(0)
layer = Linear4bit(192, 64, bias=False, compute_dtype=torch.float32, compress_statistics=False, quant_type="nf4")
layer.weight.data.copy_(torch.randn(64, 192))
layer = layer.to("cpu").eval()
x = torch.randn(8, 192)


def scales():
    return layer.state_dict()["weight.absmax"]


before = scales().clone()
expected = x @ dequantize_4bit(layer.weight.data, layer.weight.quant_state).T.float()
with torch.no_grad():
    layer(x)
saved = layer.state_dict()
after = saved["weight.absmax"]
print("before ", tuple(before.shape), before.dtype)
print("after  ", tuple(after.shape), after.dtype)
from bitsandbytes.nn import Params4bit  # noqa: E402

parts = {name.removeprefix("weight."): value for name, value in saved.items() if name.startswith("weight.")}
weight = Params4bit.from_prequantized(saved["weight"], {f"weight.{n}": v for n, v in parts.items()}, device="cpu")
found = x @ dequantize_4bit(weight.data, weight.quant_state).T.float()
print(f"differs by {float((found - expected).abs().max()):.3g} where outputs reach {float(expected.abs().max()):.3g}")
as_stated = after.shape != before.shape and after.dtype == torch.bfloat16 and not torch.allclose(found, expected, atol=0.1)
sys.exit(0 if as_stated else 1)
PYTHON
