#!/usr/bin/env bash
# dictionary-learning 0.1.0, torch 2.13.0: trainSAE(normalize_activations=True) trains on rows divided by their root mean square norm, and
# multiplies the biases of what it saves, so that the SAE takes rows as they are. It divides in place: float32 rows that the
# caller holds (a list of batches, say) are left divided. A second SAE trained on them finds a norm of 1 and is saved with biases
# for rows of that norm. Rows of another dtype are copied first and stay. (nnsight and wandb, which it imports, are not needed here.)
#
# Seen: rows' norm 201 before the first call, 1 after it; the second SAE's b_dec is 1/201 of the first one's
#       with rows in float64: 201 before, 201 after
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 einops==0.8.2 tqdm==4.67.1 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps dictionary-learning==0.1.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import contextlib
import os
import sys
import tempfile
import types

import torch

sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=None)  # for reading models, which is not done here
sys.modules["wandb"] = types.SimpleNamespace()
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402
from dictionary_learning.training import trainSAE  # noqa: E402

torch.manual_seed(0)


def norm(rows):
    return float(torch.cat(rows).square().sum(-1).mean().sqrt())


def saved(rows):
    """An SAE trained on these rows, as it is saved."""
    trainer = dict(trainer=TopKTrainer, activation_dim=16, dict_size=32, k=4, layer=0, lm_name="none", seed=0, device="cpu")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
            trainSAE(
                rows, [trainer | {"steps": 20, "warmup_steps": 2}], 20, normalize_activations=True, device="cpu", save_dir=folder
            )
        return torch.load(f"{folder}/trainer_0/ae.pt")


rows = [50 * torch.randn(64, 16) for _ in range(20)]
wide = [part.double() for part in rows]
before = norm(rows)
first = saved(rows)
after = norm(rows)
second = saved(rows)
ratio = float(first["b_dec"].norm() / second["b_dec"].norm())
print(f"rows' norm {before:.3g} before the first call, {after:.3g} after it; ", end="")
print(f"the second SAE's b_dec is 1/{ratio:.3g} of the first one's")
before_wide = norm(wide)
saved(wide)
after_wide = norm(wide)
print(f"with rows in float64: {before_wide:.3g} before, {after_wide:.3g} after")
as_stated = before > 100 and abs(after - 1) < 0.01 and abs(ratio / before - 1) < 0.05 and after_wide == before_wide
sys.exit(0 if as_stated else 1)
PYTHON
