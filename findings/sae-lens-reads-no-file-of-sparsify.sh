#!/usr/bin/env bash
# sae-lens 6.54.12, eai-sparsify 1.3.3, torch 2.13.0: SAELens has a loader for the files of sparsify, sparsify_disk_loader, and no
# file that sparsify writes gets through it. sparsify keeps W_dec as (features, width), as SAELens does; the loader transposes it.
# Whoever turns it back finds other features, too: sparsify subtracts b_dec before the encoder, and the loader says not to, for
# every file with normalize_decoder, which is the default.
#
# Seen: size mismatch for W_dec: copying a param with shape torch.Size([8, 20]) from checkpoint, the shape in current model is torch.Size([20, 8]).
#       with W_dec turned back: features differ by 2.2 where they reach 3.37
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 eai-sparsify==1.3.3 2> /dev/null
SPARSIFY_DISABLE_TRITON=1 "$folder/env/bin/python" -W ignore - "$folder/layers.5" << 'PYTHON'
import sys

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig

torch.manual_seed(0)
made = SparseCoder(8, SparseCoderConfig(num_latents=20, k=3))
made.b_dec.data.normal_()
made.encoder.bias.data.normal_()
made.save_to_disk(sys.argv[1])
x = torch.randn(50, 8)
with torch.no_grad():
    found = made.encode(x)
    expected = torch.zeros(50, 20).scatter(1, found.top_indices, found.top_acts)
try:
    SAE.load_from_disk(sys.argv[1], converter=sparsify_disk_loader, dtype="float32")
    refused = False
except RuntimeError as error:
    refused = "size mismatch for W_dec" in str(error)
    print(str(error).split("\n\t")[-1])


def turned_back(*args, **kwargs):
    config, state = sparsify_disk_loader(*args, **kwargs)
    return config, {**state, "W_dec": state["W_dec"].T.contiguous()}


with torch.no_grad():
    features = SAE.load_from_disk(sys.argv[1], converter=turned_back, dtype="float32").encode(x)
difference = float((features - expected).abs().max())
print(f"with W_dec turned back: features differ by {difference:.3g} where they reach {float(expected.max()):.3g}")
sys.exit(0 if refused and difference > 0.1 else 1)
PYTHON
