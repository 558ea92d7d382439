#!/usr/bin/env bash
# eai-sparsify 1.3.3, torch 2.13.0: the AuxK loss is there to bring back latents that no longer fire, by having them explain what is
# left over. Its gradient is to reach their encoders, too, since a latent that never fires needs another encoder row to do so. The
# coder's own backward pass (FusedEncoder.backward) returns what comes through the chosen activations and drops what comes through
# the activations before the choice, of which AuxK is made: only the decoder rows learn. The Multi-TopK loss is cut off alike.
#
# Seen: of the AuxK loss, at dead latents: decoder rows get 0.2, encoder rows 0 (autograd of the same formula: 0.288)
#       of the Multi-TopK loss: decoder rows get 0.349, encoder rows 0 (autograd of the same formula: 0.39)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 eai-sparsify==1.3.3 transformers==5.23.0 2> /dev/null
SPARSIFY_DISABLE_TRITON=1 "$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from sparsify import SparseCoder, SparseCoderConfig

torch.manual_seed(0)
x = torch.randn(128, 16)
dead = torch.zeros(64, dtype=torch.bool)
dead[:20] = True


def norms(coder, rows):
    encoder = coder.encoder.weight.grad
    encoder = torch.zeros_like(coder.W_dec) if encoder is None else encoder
    return float(coder.W_dec.grad[rows].norm()), float(encoder[rows].norm())


def by_autograd(coder, rows, k, centre, target, total):
    """The same loss of relu(W(x - b_dec) + b), the k largest of `rows`, and W_dec, by plain operations."""
    coder.zero_grad()
    before = torch.relu((x - coder.b_dec.detach()) @ coder.encoder.weight.T + coder.encoder.bias)
    values, places = before.masked_fill(~rows, -torch.inf).topk(k)
    made = torch.zeros_like(before).scatter(-1, places, values) @ coder.W_dec + centre
    ((made - target).square().sum() / total).backward()
    return norms(coder, rows)[1]


total = (x - x.mean(0)).square().sum()
coder = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4, multi_topk=False), dtype=torch.float32)
out = coder(x, dead_mask=dead)
out.auxk_loss.backward()
decoder, encoder = norms(coder, dead)
expected = by_autograd(coder, dead, 8, 0.0, (x - out.sae_out).detach(), total)
print(f"of the AuxK loss, at dead latents: decoder rows get {decoder:.3g}, encoder rows {encoder:.3g} ", end="")
print(f"(autograd of the same formula: {expected:.3g})")

every = torch.ones_like(dead)
coder = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4, multi_topk=True), dtype=torch.float32)
coder(x).multi_topk_fvu.backward()
multi_decoder, multi_encoder = norms(coder, every)
multi = by_autograd(coder, every, 16, coder.b_dec.detach(), x, total)
print(f"of the Multi-TopK loss: decoder rows get {multi_decoder:.3g}, encoder rows {multi_encoder:.3g} ", end="")
print(f"(autograd of the same formula: {multi:.3g})")
as_stated = encoder == multi_encoder == 0 and min(decoder, expected, multi_decoder, multi) > 1e-3
sys.exit(0 if as_stated else 1)
PYTHON
