#!/usr/bin/env bash
# llamascopium 2.0.0b34, torch 2.13.0: an SAE that was trained on rows scaled to the length sqrt(d) can be folded, so that it takes
# them as they are (save_pretrained or from_pretrained with fold_activation_scale=True). The documentation says that this changes
# the scale of the features alone. It scales W_D and b_E and leaves the threshold of JumpReLU, which h·|W_D| is compared with, so
# other features are on, and the reconstruction is another. ReLU and Top-K are folded exactly.
#
# Seen: jumprelu  1237 of 2560 features are on before, 1321 after, 84 of them differ; reconstruction differs by 9.25
#       relu      1353 of 2560 features are on before, 1353 after, 0 of them differ; reconstruction differs by 9.16e-05
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 llamascopium==2.0.0b34 transformer-lens==3.9.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from llamascopium import SAEConfig, SparseAutoEncoder

hook, d, length = "blocks.4.hook_resid_post", 16, 20.0
outcome = {}
for name in ("jumprelu", "relu"):
    torch.manual_seed(0)
    config = SAEConfig(
        hook_point_in=hook, hook_point_out=hook, d_model=d, expansion_factor=2.5, act_fn=name, dtype=torch.float32, device="cpu"
    )
    sae = SparseAutoEncoder.from_config(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if name == "jumprelu":
            sae.activation_function.log_jumprelu_threshold.copy_(torch.rand(40))
        x = length / d**0.5 * torch.randn(64, d)
        sae.set_dataset_average_activation_norm({hook: length})
        scaled = sae.normalize_activations({hook: x})[hook]
        before, rebuilt = sae.encode(scaled), sae(scaled) * length / d**0.5
        sae.standardize_parameters_of_dataset_norm()
        after, again = sae.encode(x), sae(x)
    differ = int(((before > 0) != (after > 0)).sum())
    error = float((again - rebuilt).abs().max())
    outcome[name] = differ
    print(
        f"{name:<9} {int((before > 0).sum())} of {before.numel()} features are on before, {int((after > 0).sum())} after, "
        f"{differ} of them differ; reconstruction differs by {error:.3g}"
    )
sys.exit(0 if outcome["jumprelu"] > 20 and outcome["relu"] == 0 else 1)
PYTHON
