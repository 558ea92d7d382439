#!/usr/bin/env bash
# ckatorch 1.0.3, torch 2.13.0: calling a CKA object over a data loader is said to be the minibatch version of CKA, which adds up the
# estimates of all batches. Within an epoch each batch writes over the value of the one before, and the mean of the epochs is one
# of last batches, with shuffle=True of random ones. All other batches are run and dropped.
#
# Seen: 16 batches: 0.1332, over all of them 0.4626, of the last batch alone 0.1332
#       the first 15 batches replaced by others: 0.1332, over all of them 1.0000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 tqdm==4.67.1 matplotlib==3.10.7 \
    safetensors==0.6.2 pyyaml==6.0.3 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps seaborn==0.13.2 pandas==2.3.3 python-dateutil==2.9.0.post0 \
    six==1.17.0 pytz==2025.2 tzdata==2025.2 ckatorch==1.0.3 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import sys

import torch
from ckatorch import CKA
from ckatorch.core import cka_batch
from torch import nn


class Model(nn.Module):
    """The first half of the numbers, or all of them."""

    def __init__(self, width):
        super().__init__()
        self.width, self.layer = width, nn.Identity()

    def forward(self, x):
        return self.layer(x[..., : self.width])


class Rows(torch.utils.data.Dataset):
    """Each item is a set of rows, as the tokens of a text."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i]}


def measured(x):
    """What ckatorch gives over batches of four texts, and by its own function over all texts."""
    loader = torch.utils.data.DataLoader(Rows(x), batch_size=4)
    cka = CKA(Model(4), Model(8), layers=["layer"], first_name="half", second_name="all")
    return float(cka(loader, epochs=2)), float(cka_batch(x[..., :4], x))


torch.manual_seed(0)
x = torch.randn(64, 16, 8)
x[:60, :, 4:] *= 0.5
x[60:, :, 4:] *= 3
(found, total), last = measured(x), float(cka_batch(x[60:, :, :4], x[60:]))
print(f"16 batches: {found:.4f}, over all of them {total:.4f}, of the last batch alone {last:.4f}")
x[:60, :, :4] *= 20
again, total_again = measured(x)
print(f"the first 15 batches replaced by others: {again:.4f}, over all of them {total_again:.4f}")
sys.exit(0 if abs(found - last) < 1e-4 and abs(again - found) < 1e-6 and total_again - total > 0.1 and total - found > 0.1 else 1)
PYTHON
