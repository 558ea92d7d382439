#!/usr/bin/env bash
# quantus 0.6.0, torch 2.13.0: MPRT, the model parameter randomisation test, is to compare the explanations of a model with those of
# the same model with random parameters. It draws anew what has a reset_parameters() and sets the seed before each layer: all layers
# of one shape get the same numbers, and parameters of other modules stay as they were trained. Of a transformer these are all
# queries, keys and values, and positions, so that its "fully randomised" model still looks where the trained one does.
#
# Seen: three layers of one shape, weights of the last model of MPRT (bottom up): layers 1 and 2 differ by 0.00, 2 and 3 by 0.00
#       the same layers before, differ by 4.50 and 4.68
#       transformer, last model of MPRT: parameters that are as before:
#         positions, encoder.self_attn.in_proj_weight, encoder.self_attn.in_proj_bias
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 quantus==0.6.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import numpy as np
import quantus
import torch

torch.manual_seed(0)
random = np.random.default_rng(0)


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = torch.nn.Parameter(torch.randn(6, 8))
        self.encoder = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x[:, 0, :, :8] + self.positions).mean(1))


def last_model(model, order):
    """The parameters of the model that MPRT explains last, with everything random."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # as if trained: nothing is at its initial value
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []

    def explain(model, inputs, targets, **kwargs):
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return random.normal(size=np.shape(inputs))

    x, y = random.normal(size=(4, 1, 6, 8)).astype(np.float32), np.array([0, 1, 2, 0])
    metric = quantus.MPRT(layer_order=order, disable_warnings=True)
    metric(model=model.eval(), x_batch=x, y_batch=y, a_batch=None, explain_func=explain)
    return before, seen[-1]


def off(parameters, one, other):
    return float((parameters[one] - parameters[other]).abs().max())


layers = [torch.nn.Linear(48, 48) for _ in range(3)]
plain = torch.nn.Sequential(torch.nn.Flatten(), layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
before, after = last_model(plain, "bottom_up")
pairs = (("1.weight", "3.weight"), ("3.weight", "5.weight"))
same, others = [off(after, *pair) for pair in pairs], [off(before, *pair) for pair in pairs]
print(
    "three layers of one shape, weights of the last model of MPRT (bottom up): "
    f"layers 1 and 2 differ by {same[0]:.2f}, 2 and 3 by {same[1]:.2f}"
)
print(f"the same layers before, differ by {others[0]:.2f} and {others[1]:.2f}")
before, after = last_model(Transformer(), "bottom_up")
kept = [name for name in before if torch.equal(before[name], after[name])]
print(f"transformer, last model of MPRT: parameters that are as before:\n  {', '.join(kept)}")
expected = ["positions", "encoder.self_attn.in_proj_weight", "encoder.self_attn.in_proj_bias"]
sys.exit(0 if max(same) == 0 and min(others) > 1 and kept == expected else 1)
PYTHON
