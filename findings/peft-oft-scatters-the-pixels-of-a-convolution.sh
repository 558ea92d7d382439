#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: OFT multiplies the weights of a layer by a rotation, and one that has not been trained is the
# identity. For a convolution it cuts its input into patches, rotates them, and puts them back; the axes of the patches and of
# their places are then in the wrong order, and patches that overlap are added up. An inner pixel of an image comes back as 9,
# here and there. So an untrained adapter gives another model, which merging takes back, and a trained one computes something else
# than its merged weights, without a word. BOFT and kernels of 1 x 1 are right.
#
# Seen: OFT   1x1  untrained adapter moves outputs by 0.00, trained and merged differ by 0.00
#       OFT   3x3  untrained adapter moves outputs by 5.51, trained and merged differ by 5.17
#       BOFT  3x3  untrained adapter moves outputs by 0.00, trained and merged differ by 0.00
#       the pixel (2, 3) after the untrained 3x3 rotation: 9 pixels, [(0, 2), (0, 3), (1, 2), (1, 3), (1, 5), (2, 2), (2, 3), (3, 2), (3, 5)]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from peft import BOFTConfig, OFTConfig, get_peft_model

torch.manual_seed(0)
x = torch.randn(2, 8, 6, 6)
oft = OFTConfig(target_modules=["0"], oft_block_size=4, use_cayley_neumann=False)
boft = BOFTConfig(target_modules=["0"], boft_block_size=4)


def look(name, config, size):
    convolution = torch.nn.Conv2d(8, 16, size, padding=size // 2)
    image = torch.zeros(1, 8, 6, 6)
    image[0, 0, 2, 3] = 1
    with torch.no_grad():
        before = convolution(x)
        model = get_peft_model(torch.nn.Sequential(convolution), config).eval()
        fresh = model(x)
        if name == "OFT":
            image = model.base_model.model[0].oft_R["default"](image)
        for key, parameter in model.named_parameters():
            if "oft_R" in key:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        trained = model(x)
        model.merge_adapter()
        merged = model(x)
    moved, differ = float((fresh - before).abs().max()), float((trained - merged).abs().max())
    print(
        f"{name:<5} {size}x{size}  untrained adapter moves outputs by {moved:.2f}, trained and merged differ by {differ:.2f}"
    )
    return moved, differ, [tuple(place) for place in image[0, 0].nonzero().tolist()]


small, wide, other = look("OFT", oft, 1), look("OFT", oft, 3), look("BOFT", boft, 3)
print("the pixel (2, 3) after the untrained 3x3 rotation:", len(wide[2]), "pixels,", wide[2])
right = max(*small[:2], *other[:2]) < 1e-3 and small[2] == [(2, 3)]
sys.exit(0 if right and min(wide[:2]) > 1 and len(wide[2]) == 9 else 1)
PYTHON
