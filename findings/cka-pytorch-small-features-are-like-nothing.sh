#!/usr/bin/env bash
# cka-pytorch 1.1.3, torch 2.13.0: CKA does not depend on the unit of the features. The package adds 1e-4 under the root of the
# denominator, to the product of two HSIC values, which goes with the fourth power of the norms of both layers. Of features as
# small as those of an embedding of standard deviation 0.02, the value falls to nearly 0, a layer's with itself too, in silence. The
# documentation calls it a small number against a division by zero; with epsilon=0 the value is right.
#
# Seen: features × 1:    with itself 1.0000, with the other 0.5325
#       features × 0.2:  with itself 0.9440, with the other 0.5253
#       features × 0.02: with itself 0.0003, with the other 0.0003
#       features × 0.02 and epsilon=0: with itself 1.0000, with the other 0.5325
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 tqdm==4.67.1 matplotlib==3.10.7 \
    torchmetrics==1.9.0 seaborn==0.13.2 pandas==3.1.1 pyyaml==6.0.4 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps lightning==2.6.6 cka-pytorch==1.1.3 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import sys

import torch
from cka_pytorch.cka import CKACalculator
from torch import nn


class Model(nn.Module):
    """Two embeddings of 16 numbers, both in the same unit."""

    def __init__(self, unit):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Embedding(50, 16), nn.Embedding(50, 16)
        with torch.no_grad():
            self.other.weight.add_(self.one.weight)
            self.one.weight.mul_(unit)
            self.other.weight.mul_(unit)

    def forward(self, words):
        return self.one(words) + self.other(words)


words = torch.arange(50)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(words, words), batch_size=50)


def measured(unit, **options):
    model = Model(unit)
    cka = CKACalculator(model, model, model1_layers=["one", "other"], verbose=False)
    return cka.calculate_cka_matrix(data, num_epochs=1, **options)[0].tolist()


found = []
for unit, options in ((1, {}), (0.2, {}), (0.02, {}), (0.02, {"epsilon": 0})):
    found.append(measured(unit, **options))
    name = f"features × {unit}" + (" and epsilon=0:" if options else ":")
    print(name.ljust(16), f"with itself {found[-1][0]:.4f}, with the other {found[-1][1]:.4f}")
as_stated = abs(found[0][0] - 1) < 1e-3 and found[1][0] < 0.97 and found[2][0] < 0.01 and abs(found[3][0] - 1) < 1e-3
sys.exit(0 if as_stated and abs(found[3][1] - found[0][1]) < 1e-3 else 1)
PYTHON
