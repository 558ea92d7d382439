#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: add_weighted_adapter makes one adapter of several, and says that "svd" and "cat" are precise. It
# gives the new adapter an alpha equal to its rank, meant as a scale of one, and keeps use_rslora of the first: with rsLoRA the
# scale is the square root of the rank, so the mixture is 2.8 times too strong at rank 8, without a word. A copy of a single
# adapter at weight -0.5 is off in the same way. Biases (lora_bias=True) are left out of the mixture.
#
# Seen: LoRA    svd  the mixture is 1.000 of 0.7 one - 0.4 two, off by 0.000 of its size; scale 1.000
#       LoRA    cat  the mixture is 1.000 of 0.7 one - 0.4 two, off by 0.000 of its size; scale 1.000
#       rsLoRA  svd  the mixture is 2.828 of 0.7 one - 0.4 two, off by 1.828 of its size; scale 2.828
#       rsLoRA  cat  the mixture is 2.828 of 0.7 one - 0.4 two, off by 1.828 of its size; scale 2.828
#       biases  svd  the mixture is 0.994 of 0.7 one - 0.4 two, off by 0.055 of its size; scale 1.000
#       biases  cat  the mixture is 0.994 of 0.7 one - 0.4 two, off by 0.055 of its size; scale 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model


def look(name, how, **options):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(16, 16), torch.randn(5, 16)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **options)
    changes = {}
    with torch.no_grad():
        before = linear(x)
        model = get_peft_model(torch.nn.Sequential(linear), config, adapter_name="one").eval()
        model.add_adapter("two", config)
        for key, parameter in model.named_parameters():
            if ".one" in key or ".two" in key:
                parameter.copy_(torch.randn(parameter.shape))
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "mixture", combination_type=how, svd_rank=8)
        for adapter in ("one", "two", "mixture"):
            model.set_adapter(adapter)
            changes[adapter] = model.eval()(x) - before
    expected, found = 0.7 * changes["one"] - 0.4 * changes["two"], changes["mixture"]
    part, off = (
        float((found * expected).sum() / expected.pow(2).sum()),
        float((found - expected).norm() / expected.norm()),
    )
    scale = model.base_model.model[0].scaling["mixture"]
    print(
        f"{name:<7} {how}  the mixture is {part:.3f} of 0.7 one - 0.4 two, off by {off:.3f} of its size; scale {scale:.3f}"
    )
    return part, off


lora = [look("LoRA", how) for how in ("svd", "cat")]
rslora = [look("rsLoRA", how, use_rslora=True) for how in ("svd", "cat")]
biases = [look("biases", how, lora_bias=True) for how in ("svd", "cat")]
right = all(off < 1e-3 for _, off in lora)
strong = all(abs(part - 8**0.5) < 1e-3 for part, _ in rslora)
sys.exit(0 if right and strong and all(off > 0.02 for _, off in biases) else 1)
PYTHON
