#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0: Wanda prunes by the product of the magnitude of a weight and the norm of its input; so say the
# paper and WandaSparsifier. PerChannelNormObserver, "the L2 norm of each channel", holds the square of the norm, and nobody takes
# the root: what is pruned is chosen by weight times squared norm, and loses more of the output than with the root.
#
# Seen: observer [400.0, 25.0] norms [20.0, 5.0]
#       pruned weights of 2048: 2048 as by |w| * norm^2, 1915 as by |w| * norm
#       mean squared error of outputs: pruned by torchao 0.019, by |w| * norm 0.0151
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 torchao==0.18.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import torch
from torchao.sparsity.utils import PerChannelNormObserver
from torchao.sparsity.wanda import WandaSparsifier

observer = PerChannelNormObserver()
observer(torch.tensor([[12.0, 3.0], [16.0, 4.0]]))
seen = observer.norm.tolist()
print("observer", seen, "norms", [20.0, 5.0])

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).eval()
x = torch.randn(512, 64) * torch.logspace(-1, 1, 64)
with torch.no_grad():
    weight, outputs = model[0].weight.clone(), model(x)
    sparsifier = WandaSparsifier(sparsity_level=0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    pruned = model[0].weight == 0


def smallest(norms):
    """Half of the weights of the layer, those with the least magnitude times norm of the input."""
    order = (weight.abs() * norms).flatten().argsort()
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[: weight.numel() // 2]] = True
    return mask.view_as(weight)


def error(mask):
    return float((x @ weight.masked_fill(mask, 0).T - outputs).pow(2).mean())


norms = x.norm(dim=0)
by_square, by_norm = (int((pruned & smallest(n)).sum()) for n in (norms**2, norms))
print(f"pruned weights of {int(pruned.sum())}: {by_square} as by |w| * norm^2, {by_norm} as by |w| * norm")
print(
    f"mean squared error of outputs: pruned by torchao {error(pruned):.3g}, by |w| * norm {error(smallest(norms)):.3g}"
)
as_stated = seen == [400.0, 25.0] and by_square == int(pruned.sum()) and by_norm < 0.97 * by_square
sys.exit(0 if as_stated and error(pruned) > error(smallest(norms)) else 1)
PYTHON
