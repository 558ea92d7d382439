#!/usr/bin/env bash
# sae-lens 6.54.12, transformer-lens 3.9.0, torch 2.13.0: HookedSAETransformer.add_sae attaches SAEs and transcoders. What it puts
# into the model is decode(encode(x)); the skip connection of a SkipTranscoder or JumpReLUSkipTranscoder (those of Gemma Scope 2)
# stands in forward() alone, so the model runs with the transcoder less W_skip·x, without an error or a warning.
#
# Seen: skip_transcoder           differs from transcoder(x) by 10.2, from its features alone by 0
#       jumprelu_skip_transcoder  differs from transcoder(x) by 10.2, from its features alone by 0
#       transcoder                differs from transcoder(x) by 0, from its features alone by 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from sae_lens import HookedSAETransformer
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformerConfig

torch.manual_seed(0)
sizes = dict(n_layers=2, d_model=16, n_ctx=8, d_head=4, n_heads=4, d_mlp=32, d_vocab=20)
model = HookedSAETransformer(HookedTransformerConfig(act_fn="relu", device="cpu", seed=0, **sizes))
ids = torch.randint(0, 20, (1, 6))
place = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.hook_mlp_out"}
outcome = {}
for name in ("skip_transcoder", "jumprelu_skip_transcoder", "transcoder"):
    kind, config = get_sae_class(name)
    transcoder = kind(config(d_in=16, d_sae=32, d_out=16, apply_b_dec_to_input=False, metadata=SAEMetadata(**place)))
    with torch.no_grad():
        if hasattr(transcoder, "W_skip"):
            transcoder.W_skip.copy_(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))
        x = model.run_with_cache(ids)[1][place["hook_name"]]
        cache = model.run_with_cache_with_saes(ids, saes=[transcoder])[1]
        found = cache[place["hook_name_out"] + ".hook_sae_output"]
        whole = float((found - transcoder(x)).abs().max())
        features = float((found - transcoder.decode(transcoder.encode(x))).abs().max())
    outcome[name] = whole
    print(f"{name:<24}  differs from transcoder(x) by {whole:.3g}, from its features alone by {features:.3g}")
plain = outcome.pop("transcoder")
sys.exit(0 if plain < 1e-5 and min(outcome.values()) > 1 else 1)
PYTHON
