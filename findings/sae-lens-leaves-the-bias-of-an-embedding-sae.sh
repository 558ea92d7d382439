#!/usr/bin/env bash
# sae-lens 6.54.12, torch 2.13.0: the SAEs of the embedding in Gemma Scope were trained on embeddings e, and the stream of Gemma
# begins with sqrt(d)·e. The loader makes up for that in W_enc and W_dec, and leaves b_dec: the features of sqrt(d)·e are those of
# e, the reconstruction is not sqrt(d) times that of e, but too short by (sqrt(d) - 1)·b_dec. The file here has the layout of
# google/gemma-scope-2b-pt-res, embedding/width_4k, with a smaller width.
#
# Seen: features differ by 0
#       reconstruction differs by 5.81, and by 1.53e-05 with sqrt(d)·b_dec
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 2> /dev/null
HF_HUB_CACHE="$folder/hub" HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - "$folder/hub" << 'PYTHON'
import sys
from pathlib import Path

import numpy as np
import torch

d, features = 16, 40
rng = np.random.default_rng(0)
shapes = {"W_enc": (d, features), "W_dec": (features, d), "b_enc": (features,), "b_dec": (d,), "threshold": (features,)}
arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
arrays["threshold"] = abs(arrays["threshold"])
root = Path(sys.argv[1], "models--google--gemma-scope-2b-pt-res")
place = root / "snapshots" / ("0" * 40) / "embedding" / "width_4k" / "average_l0_6"
place.mkdir(parents=True)
(root / "refs").mkdir()
(root / "refs" / "main").write_text("0" * 40)
np.savez(place / "params.npz", **arrays)

from sae_lens import SAE  # noqa: E402
from sae_lens.loading.pretrained_sae_loaders import gemma_2_sae_huggingface_loader  # noqa: E402

config, state, _ = gemma_2_sae_huggingface_loader(
    "google/gemma-scope-2b-pt-res",
    "embedding/width_4k/average_l0_6",
    cfg_overrides={"d_in": d, "d_sae": features, "normalize_activations": "none"},
)
sae = SAE.from_dict(config)
sae.load_state_dict(state)
t = {name: torch.from_numpy(value) for name, value in arrays.items()}
e = torch.randn(20, d)
h = e @ t["W_enc"] + t["b_enc"]
f = torch.relu(h) * (h > t["threshold"])
expected = d**0.5 * (f @ t["W_dec"] + t["b_dec"])
with torch.no_grad():
    found, rebuilt = sae.encode(d**0.5 * e), sae(d**0.5 * e)
same = float((found - f).abs().max())
apart = float((rebuilt - expected).abs().max())
mended = float((rebuilt + (d**0.5 - 1) * t["b_dec"] - expected).abs().max())
print(f"features differ by {same:.3g}")
print(f"reconstruction differs by {apart:.3g}, and by {mended:.3g} with sqrt(d)·b_dec")
sys.exit(0 if same < 1e-4 and apart > 0.1 and mended < 1e-4 else 1)
PYTHON
