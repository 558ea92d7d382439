#!/usr/bin/env bash
# interpreto 0.5.2, torch 2.13.0: lda_shared_var_bias is documented as the Bayes-optimal threshold of two Gaussians of one (pooled)
# variance, with the classes' shares. What it puts in for the variance is that of all scores together, which holds the distance
# between the classes, too. The farther they lie apart, the farther the threshold moves off towards the rare class.
#
# Seen: means 0 and 4, variance 1, 10 % positive: threshold 3.34 (97.4% right), by the formula 2.55 (98.7% right)
#       means 0 and 8, variance 1, 10 % positive: threshold 5.85 (99.8% right), by the formula 4.27 (100.0% right)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 interpreto==0.5.2 transformers==5.23.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import math
import sys

import torch
from interpreto.concepts.probes.bias_calibrators import lda_shared_var_bias

torch.manual_seed(0)
y = (torch.arange(100_000) % 10 == 0).float()[:, None]
noise = torch.randn(100_000, 1)
as_stated = True
for apart in (4.0, 8.0):
    scores = noise + apart * y
    found, right = -float(lda_shared_var_bias(scores, y)), apart / 2 + math.log(9) / apart
    hits = [float(((scores > threshold).float() == y).float().mean()) for threshold in (found, right)]
    print(f"means 0 and {apart:.0f}, variance 1, 10 % positive: threshold {found:.3g} ({hits[0]:.1%} right), ", end="")
    print(f"by the formula {right:.3g} ({hits[1]:.1%} right)")
    total = apart / 2 + math.log(9) / apart * (1 + 0.09 * apart**2)
    as_stated &= found - right > 0.5 and abs(found - total) < 0.05 and hits[0] < hits[1]
sys.exit(0 if as_stated else 1)
PYTHON
