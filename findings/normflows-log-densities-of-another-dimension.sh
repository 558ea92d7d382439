#!/usr/bin/env bash
# normflows 1.7.3, torch 2.13.0: two parts of its variational autoencoders count the wrong dimensions. The encoder Uniform gives every sample the
# log-density of one number, however many it has. NNDiagGaussianDecoder takes the constant of the Gaussian, half of log 2π a
# number, for the numbers of z, not for those of x that it is the density of: beside a latent space of another size the bound on the
# likelihood is off by that, so that models with different latent sizes cannot be compared.
#
# Seen: uniform from 0 to 2 in 1 dimensions: log-density -0.693, true -0.693
#       uniform from 0 to 2 in 3 dimensions: log-density -0.693, true -2.079
#       uniform from 0 to 2 in 10 dimensions: log-density -0.693, true -6.931
#       ten numbers given 2 latent ones: log-density -51.288, true -58.640
#       ten numbers given 10 latent ones: log-density -15.552, true -15.552
#       ten numbers given 20 latent ones: log-density -23.323, true -14.133
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps normflows==1.7.3 tqdm==4.70.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import math
import sys

import torch
from normflows.distributions.decoder import NNDiagGaussianDecoder
from normflows.distributions.encoder import Uniform
from torch.distributions import Normal

torch.manual_seed(0)
uniform = {}
for size in (1, 3, 10):
    uniform[size] = said = float(Uniform(0.0, 2.0)(torch.zeros(1, size))[1])
    print(f"uniform from 0 to 2 in {size} dimensions: log-density {said:.3f}, true {-size * math.log(2):.3f}")
x, gaps = torch.randn(1, 10), {}
for size in (2, 10, 20):
    decoder, z = NNDiagGaussianDecoder(torch.nn.Linear(size, 20)), torch.randn(1, size)
    with torch.no_grad():
        mean, deviation = decoder(z)
        said, true = float(decoder.log_prob(x, z)), float(Normal(mean, deviation).log_prob(x).sum())
    gaps[size] = said - true
    print(f"ten numbers given {size} latent ones: log-density {said:.3f}, true {true:.3f}")
as_stated = all(abs(value + math.log(2)) < 1e-5 for value in uniform.values())
as_stated &= all(abs(gap - 0.5 * math.log(2 * math.pi) * (10 - size)) < 1e-3 for size, gap in gaps.items())
sys.exit(0 if as_stated else 1)
PYTHON
