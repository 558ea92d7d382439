#!/usr/bin/env bash
# llamascopium 2.0.0b34, sae-lens 6.54.12, torch 2.13.0: SparseAutoEncoder.to_saelens refuses every SAE with "Not support transcoder
# yet", and takes a transcoder, which it writes as an SAE of the place that is read. The condition is the wrong way round.
#
# Seen: an SAE: AssertionError: Not support transcoder yet.
#       a transcoder: StandardSAE of blocks.4.hook_resid_pre
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 llamascopium==2.0.0b34 sae-lens==6.54.12 transformer-lens==3.9.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from llamascopium import SAEConfig, SparseAutoEncoder


def made(out):
    config = SAEConfig(
        hook_point_in="blocks.4.hook_resid_pre", hook_point_out=out, d_model=16, expansion_factor=2, dtype=torch.float32,
        device="cpu",
    )
    sae = SparseAutoEncoder.from_config(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
    return sae


try:
    made("blocks.4.hook_resid_pre").to_saelens()
    refused = False
except AssertionError as error:
    refused = "transcoder" in str(error)
    print(f"an SAE: AssertionError: {error}")
theirs = made("blocks.4.hook_mlp_out").to_saelens()
print(f"a transcoder: {type(theirs).__name__} of {theirs.cfg.metadata.hook_name}")
sys.exit(0 if refused and type(theirs).__name__ == "StandardSAE" else 1)
PYTHON
