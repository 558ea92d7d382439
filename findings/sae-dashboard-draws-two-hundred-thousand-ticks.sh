#!/usr/bin/env bash
# sae-dashboard 0.8.0, sae-lens 6.54.12, torch 2.13.0: HistogramData.from_data chooses ticks at multiples of 0.1 so that the longer side has
# three. Where no value reaches 0.3, the multiple is 0 and a millionth is added to it: the other side is then laid out in steps of a
# millionth, and each tick is rounded to one decimal. Effects on logits of that size, usual for SAEs, get a hundred thousand ticks
# and more per feature, nearly all of them 0.0, into the page and its JSON.
#
# Seen: values within 0.05   38450 ticks, of 1 different values
#       values within 0.1    76896 ticks, of 2 different values
#       values within 0.29  222991 ticks, of 3 different values
#       values within 0.31       6 ticks, of 6 different values
#       values within 1          6 ticks, of 6 different values
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
from sae_dashboard.utils_fns import HistogramData

torch.manual_seed(0)
logits = torch.randn(1000)
logits /= logits.abs().max()
found = {}
for largest in (0.05, 0.1, 0.29, 0.31, 1):
    ticks = HistogramData.from_data(largest * logits, n_bins=40, tickmode="5 ticks", title=None).tick_vals
    found[largest] = len(ticks)
    print(f"values within {largest:<5} {len(ticks):>6} ticks, of {len(set(ticks))} different values")
sys.exit(0 if min(found[0.05], found[0.1], found[0.29]) > 10_000 and max(found[0.31], found[1]) < 10 else 1)
PYTHON
