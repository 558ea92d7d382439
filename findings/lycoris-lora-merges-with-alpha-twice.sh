#!/usr/bin/env bash
# lycoris-lora 4.1.3, torch 2.13.0: the change of a layer is multiplied by alpha / dim, and with use_scalar=True by a trained
# number that starts at 0. Merging LoHa or LoKr (merge_to, onfly_merge) multiplies by alpha / dim once more, and leaves the
# trained number out. So the merged model computes something else than the one that was trained; with the usual alpha of 1 and dim
# of 4 LoHa's change is a quarter of what it was. LoRA and the full weights are right, and so is alpha equal to dim without
# use_scalar.
#
# Seen: lora    as it is     the merged change is 1.0000 of the trained one
#       lora    use_scalar   the merged change is 1.0000 of the trained one
#       loha    as it is     the merged change is 0.2500 of the trained one
#       loha    use_scalar   the merged change is 0.8333 of the trained one
#       lokr    as it is     the merged change is 0.2500 of the trained one
#       lokr    use_scalar   the merged change is 0.8333 of the trained one
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 lycoris-lora==4.1.3 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import logging
import sys

import torch
from lycoris import create_lycoris

logging.disable(logging.CRITICAL)
SCALAR = 0.3


def merged_part(algo, **options):
    """The change that merging makes to the outputs, in parts of the change that the adapter makes."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(256, 256)), torch.randn(5, 256)
    with torch.no_grad():
        before = model(x)
        network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=1.0, algo=algo, decompose_both=True, **options)
        network.apply_to()
        network.eval()
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.tensor(SCALAR) if name.endswith("scalar") else torch.randn(parameter.shape))
        trained = model(x) - before
        network.restore()
        network.merge_to(1.0)
        merged = model(x) - before
    part = float((merged * trained).sum() / (trained * trained).sum())
    assert torch.allclose(merged, part * trained, atol=1e-3 * float(merged.abs().max()))
    return part


expected = {"lora": (1, 1), "loha": (1 / 4, 1 / 4 / SCALAR), "lokr": (1 / 4, 1 / 4 / SCALAR)}
as_stated = []
for algo, parts in expected.items():
    for (name, options), part in zip({"as it is": {}, "use_scalar": {"use_scalar": True}}.items(), parts, strict=True):
        found = merged_part(algo, **options)
        print(f"{algo:<7} {name:<12} the merged change is {found:.4f} of the trained one")
        as_stated.append(abs(found - part) < 1e-2)
sys.exit(0 if all(as_stated) else 1)
PYTHON
