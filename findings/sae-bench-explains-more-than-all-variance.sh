#!/usr/bin/env bash
# sae-bench 0.6.0, sae-lens 6.54.12, transformer-lens 3.9.0, torch 2.13.0: the core evaluation's explained_variance divides the error by
# E‖x‖² minus the square of E‖x‖² / d, where the variance is E‖x‖² minus the square of the mean of x. The result moves with the unit of
# the activations: an SAE that returns 0.9·x gets 1.00017, more than all of it, where they are large. Its mse is divided by the
# number of tokens of a batch and then averaged over the same tokens again: it is half as large with batches twice as large.
#
# Seen: activations × 1:    explained_variance 0.98927, by the definition 0.98971; mse 0.00068 (8 texts a batch), 0.00034 (16), right 0.174
#       activations × 30:   explained_variance 1.00017, by the definition 0.98972; mse 0.59 (8 texts a batch), 0.29 (16), right 150
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 sae-lens==6.54.12 \
    transformer-lens==3.9.0 tabulate==0.9.0 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps sae-bench==0.6.0 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import sys
import types

import torch
from sae_bench.custom_saes.identity_sae import IdentitySAE
from sae_bench.evals.core.main import get_sparsity_and_variance_metrics
from transformer_lens import HookedTransformer, HookedTransformerConfig


class Shrinks(IdentitySAE):
    """Returns 0.9 of what it gets: an error of 0.1·x."""

    def decode(self, features):
        return 0.9 * super().decode(features)


hook = "blocks.0.hook_resid_pre"
sizes = dict(n_layers=1, d_model=16, n_ctx=32, d_head=4, n_heads=4, d_mlp=32, d_vocab=50, act_fn="gelu")
model = HookedTransformer(HookedTransformerConfig(**sizes, seed=0, device="cpu"))
sae = Shrinks(model_name="tiny", d_in=16, hook_layer=0, hook_name=hook, device=torch.device("cpu"), dtype=torch.float32)
torch.manual_seed(0)
embedding, tokens = torch.randn(50, 16), torch.randint(0, 50, (32, 32))


def measured(texts):
    """What sae-bench gives with so many texts a batch."""
    batches = iter(tokens.split(texts))
    store = types.SimpleNamespace(get_batch_tokens=lambda count: next(batches))
    return get_sparsity_and_variance_metrics(sae, model, store, 32 // texts, True, True, True, True, texts, {})[0]


found = []
with torch.no_grad():
    for scale in (1, 30):
        model.embed.W_E.copy_(scale * embedding)
        x = model.run_with_cache(tokens)[1][hook].flatten(0, 1)
        error = (0.1 * x).square().sum(-1)
        right = 1 - float(error.sum() / (x - x.mean(0)).square().sum())
        small, large = measured(8), measured(16)
        found.append((small["explained_variance"], right, small["mse"] / large["mse"]))
        print(f"activations × {scale}:".ljust(19), end=" ")
        print(f"explained_variance {small['explained_variance']:.5f}, by the definition {right:.5f}; ", end="")
        print(f"mse {small['mse']:.2g} (8 texts a batch), {large['mse']:.2g} (16), right {float(error.mean()):.3g}")
as_stated = found[1][0] > 1 and all(right < 0.99 and abs(ratio - 2) < 0.01 for _, right, ratio in found)
sys.exit(0 if as_stated else 1)
PYTHON
