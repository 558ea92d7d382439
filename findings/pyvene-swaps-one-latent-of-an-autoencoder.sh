#!/usr/bin/env bash
# pyvene 0.1.8, torch 2.13.0: AutoencoderIntervention exchanges latents between two runs in the latent space of an autoencoder. It
# indexes the latents by interchange_dim, which is a number (the width of the stream, unless it was set), where the other
# interventions take the first interchange_dim of them: one latent, that of this number, is exchanged, and subspaces= is not looked at.
#
# Seen: latents exchanged of 16: by default [8], after set_interchange_dim(12) [12], with subspaces=[[0, 1]] [8]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 numpy==2.4.6 tqdm==4.67.1 matplotlib==3.11.2 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps pyvene==0.1.8 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import pyvene
import torch

torch.manual_seed(0)
base, source = torch.randn(1, 8), torch.randn(1, 8)


def exchanged(intervention, **how):
    """The latents that come from `source` in what is decoded."""
    coder, seen = intervention.autoencoder, []
    decode, coder.decode = coder.decode, lambda latent: seen.append(latent.detach().clone()) or decode(latent)
    mine, other = coder.encode(base), coder.encode(source)
    intervention(base, source, **how)
    return [i for i in range(16) if torch.equal(seen[0][0, i], other[0, i]) and not torch.equal(mine[0, i], other[0, i])]


def made():
    intervention = pyvene.AutoencoderIntervention(embed_dim=8, latent_dim=16)
    with torch.no_grad():
        for parameter in intervention.autoencoder.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        intervention.autoencoder.encoder[0].bias += 100.0  # every latent is on, and differs between the two
    return intervention


narrowed = made()
narrowed.set_interchange_dim(12)
default, set_to, chosen = exchanged(made()), exchanged(narrowed), exchanged(made(), subspaces=[[0, 1]])
print(f"latents exchanged of 16: by default {default}, after set_interchange_dim(12) {set_to}, ", end="")
print(f"with subspaces=[[0, 1]] {chosen}")
sys.exit(0 if default == chosen == [8] and set_to == [12] else 1)
PYTHON
