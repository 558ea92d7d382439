#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: of a convolution with padding_mode="circular" (or "reflect", "replicate"), which wraps around, PEFT
# takes over the width of the padding and not its mode. LoRA, DoRA, LoHa, LoKr and HiRA see zeros around the input, and compute at
# the edges something else than their merged weights; BOFT and HRA run the whole convolution with zeros, and change the model
# untrained. Nothing is said, and a convolution that pads with zeros is right in all of them.
#
# Seen: LoRA  untrained adapter moves outputs by 0.00, trained and merged differ by 6.19 of 8.72; padded by zeros by 0.00
#       DoRA  untrained adapter moves outputs by 0.00, trained and merged differ by 1.45 of 2.43; padded by zeros by 0.00
#       LoHa  untrained adapter moves outputs by 0.00, trained and merged differ by 1.90 of 2.27; padded by zeros by 0.00
#       LoKr  untrained adapter moves outputs by 0.00, trained and merged differ by 3.10 of 4.37; padded by zeros by 0.00
#       HiRA  untrained adapter moves outputs by 0.00, trained and merged differ by 0.23 of 0.34; padded by zeros by 0.00
#       BOFT  untrained adapter moves outputs by 1.25, trained and merged differ by 1.45 of 1.54; padded by zeros by 0.00
#       HRA   untrained adapter moves outputs by 1.25, trained and merged differ by 1.16 of 1.42; padded by zeros by 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from peft import BOFTConfig, HiraConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model

target = {"target_modules": ["0"]}
kinds = {
    "LoRA": LoraConfig(r=4, **target),
    "DoRA": LoraConfig(r=4, use_dora=True, **target),
    "LoHa": LoHaConfig(r=4, **target),
    "LoKr": LoKrConfig(r=4, **target),
    "HiRA": HiraConfig(r=4, **target),
    "BOFT": BOFTConfig(boft_block_size=4, **target),
    "HRA": HRAConfig(r=4, **target),
}


def look(config, mode):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        before = convolution(x)
        model = get_peft_model(torch.nn.Sequential(convolution), config).eval()
        moved = float((model(x) - before).abs().max())
        for key, parameter in model.named_parameters():
            if ".default" in key:
                parameter.add_(0.25 * torch.randn(parameter.shape))
        trained = model(x)
        model.merge_adapter()
        return moved, float((model(x) - trained).abs().max()), float((trained - before).abs().max())


as_stated = []
for name, config in kinds.items():
    moved, differ, scale = look(config, "circular")
    right = look(config, "zeros")
    print(
        f"{name:<5} untrained adapter moves outputs by {moved:.2f}, trained and merged differ by {differ:.2f} ", end=""
    )
    print(f"of {scale:.2f}; padded by zeros by {right[1]:.2f}")
    as_stated.append((moved > 0.1) == (name in ("BOFT", "HRA")) and differ > 0.2 * scale and max(right[:2]) < 1e-3)
sys.exit(0 if all(as_stated) else 1)
PYTHON
