#!/usr/bin/env bash
# zuko 1.6.0, torch 2.13.0: Truncated is a distribution cut to what lies between two bounds. To keep off the ends of the inverse cumulative
# function, its samples are drawn after the level u has been moved to (1 - 2e-6) u + 1e-6, towards a half by up to a millionth. That is
# done after the cut, so far in a tail it leaves the bounds: of a normal distribution cut to 5 to 6, where all levels are within a
# millionth, every sample lies below 5, and has by log_prob a density of 0.
#
# Seen: from 1 to 2: samples from 1.000 to 2.000, outside 0.0%, impossible 0.0%
#       from 4 to 5: samples from 3.993 to 4.702, outside 3.2%, impossible 3.2%
#       from 4.5 to 5: samples from 4.445 to 4.702, outside 32.3%, impossible 32.3%
#       from 5 to 6: samples from 4.702 to 4.753, outside 100.0%, impossible 100.0%
#       from -6 to -5: samples from -4.753 to -4.702, outside 100.0%, impossible 100.0%
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps zuko==1.6.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from torch.distributions import Normal
from zuko.distributions import Truncated

torch.manual_seed(0)
standard = Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
outside = {}
for lower, upper in ((1, 2), (4, 5), (4.5, 5), (5, 6), (-6, -5)):
    cut = Truncated(standard, *(torch.tensor(float(bound), dtype=torch.float64) for bound in (lower, upper)))
    samples = cut.sample((100_000,))
    outside[lower] = float(((samples < lower) | (samples > upper)).double().mean())
    least, largest = float(samples.min()), float(samples.max())
    impossible = float(cut.log_prob(samples).isinf().double().mean())
    print(f"from {lower} to {upper}: samples from {least:.3f} to {largest:.3f}, outside {outside[lower]:.1%}, impossible {impossible:.1%}")
sys.exit(0 if outside[5] == outside[-6] == 1 and outside[4.5] > 0.2 and outside[1] == 0 else 1)
PYTHON
