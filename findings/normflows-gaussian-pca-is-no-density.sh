#!/usr/bin/env bash
# normflows 1.7.3, torch 2.13.0: GaussianPCA is a Gaussian base distribution with the covariance W'W + sigma². Its log_prob adds half the
# dimension times log 2π where it should be taken off, and takes off half of the determinant instead of half of its logarithm: the
# density integrates to whatever comes out. Samples leave the noise out: they lie in the span of W, which has no volume where there are
# fewer latent numbers than dimensions.
#
# Seen: integral of the density 20.53, of the Gaussian 1.00
#       log-density in the middle 0.8373, of the Gaussian -2.1848
#       samples in three dimensions with one latent number and noise span 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps normflows==1.7.3 tqdm==4.70.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from normflows.distributions import GaussianPCA
from torch.distributions import MultivariateNormal

torch.manual_seed(0)
SIGMA = 0.5
base = GaussianPCA(2, latent_dim=2, sigma=SIGMA).double()
weight = base.W.detach()
covariance = weight.T @ weight + SIGMA**2 * torch.eye(2, dtype=torch.float64)
true = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
line = torch.linspace(-20, 20, 801, dtype=torch.float64)
cells = torch.cartesian_prod(line, line)
area = float(line[1] - line[0]) ** 2
with torch.no_grad():
    mass, whole = (float(one.log_prob(cells).exp().sum()) * area for one in (base, true))
    center, right = (float(one.log_prob(torch.zeros(1, 2, dtype=torch.float64))) for one in (base, true))
    narrow = GaussianPCA(3, latent_dim=1, sigma=SIGMA)
    rank = int(torch.linalg.matrix_rank(torch.cov(narrow(1000)[0].T), rtol=1e-4))
print(f"integral of the density {mass:.2f}, of the Gaussian {whole:.2f}")
print(f"log-density in the middle {center:.4f}, of the Gaussian {right:.4f}")
print(f"samples in three dimensions with one latent number and noise span {rank}")
sys.exit(0 if abs(mass - 1) > 1 and abs(whole - 1) < 1e-3 and abs(center - right) > 1 and rank == 1 else 1)
PYTHON
