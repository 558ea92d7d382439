#!/usr/bin/env bash
# sae-dashboard 0.8.0, sae-lens 6.54.12, torch 2.13.0: FeatureStatistics keeps quantiles of the activations of each feature, ever finer towards
# the largest (0.99, 0.99001, ...), to say at which quantile an activation lies. The levels are first rounded to the dtype of the
# activations. In bfloat16, with dtype="bfloat16", all levels above 0.998 become 1: the last two hundred quantiles are all the largest
# activation. A feature that is on for less than one word in five hundred, as most are, has no other activations: whatever its
# value, each is said to lie at 99.805 percent, with three decimals.
#
# Seen: on for a tenth, float32         0.91100 0.95000 0.98980 0.99894, counted 0.91009 0.94950 0.98976 0.99893
#       on for a tenth, bfloat16        0.90900 0.95120 0.99024 0.99805, counted 0.91007 0.94943 0.98949 0.99852
#       on for a thousandth, float32    0.99930 0.99959 0.99993 1.00000, counted 0.99929 0.99958 0.99992 0.99999
#       on for a thousandth, bfloat16   0.99805 0.99805 0.99805 0.99805, counted 0.99929 0.99958 0.99991 0.99999
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 \
  dataclasses-json==0.6.7 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps sae-dashboard==0.8.0 eindex-callum==0.1.2 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from sae_dashboard.utils_fns import FeatureStatistics

torch.manual_seed(0)
VALUES = torch.tensor([[0.1, 0.5, 0.9, 0.99]])
off = {}
for name, share in (("a tenth", 0.1), ("a thousandth", 0.001)):
    strengths = torch.rand(1, 100_000) * (torch.rand(1, 100_000) < share)
    for dtype in (torch.float32, torch.bfloat16):
        activations, values = strengths.to(dtype), VALUES.to(dtype).float()
        said = FeatureStatistics.create(activations).get_quantile(values)[0][0]
        counted = (activations.float() < values.T).float().mean(1)
        kind = f"on for {name}, {str(dtype).removeprefix('torch.')}"
        off[kind] = said
        print(f"{kind:<31}", *(f"{x:.5f}" for x in said), end=", counted ")
        print(*(f"{x:.5f}" for x in counted))
        if dtype == torch.float32 and float((said - counted).abs().max()) > 0.002:
            sys.exit(1)
same = off["on for a thousandth, bfloat16"]
sys.exit(0 if len(set(same.tolist())) == 1 and float(same[0]) < 0.9981 and len(set(off["on for a thousandth, float32"].tolist())) > 2 else 1)
PYTHON
