#!/usr/bin/env bash
# zuko 1.6.0, torch 2.13.0: GMM.initialize sets a mixture of Gaussians to the clusters of given rows. With diagonal or spherical covariances it
# stores the logarithm of the variances, where the model reads that of standard deviations. Rows that spread by 0.1 get Gaussians that
# spread by 0.01, rows that spread by 10 those of 100, and the likelihood of the start is far below that of the rows' own
# distribution. With full covariances it is right.
#
# Seen: rows that spread by 0.1: full 0.10 (log-likelihood 1.07), diagonal 0.01 (log-likelihood -92.55), spherical 0.01 (log-likelihood -92.46)
#       rows that spread by 1: full 0.99 (log-likelihood -3.51), diagonal 0.98 (log-likelihood -3.51), spherical 0.98 (log-likelihood -3.51)
#       rows that spread by 10: full 10.19 (log-likelihood -8.17), diagonal 103.93 (log-likelihood -11.83), spherical 103.93 (log-likelihood -11.83)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps zuko==1.6.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from zuko.mixtures import GMM

torch.manual_seed(0)
as_stated = True
for spread in (0.1, 1, 10):
    rows = torch.cat([spread * torch.randn(2000, 2) + 20 * spread * side for side in (-1, 1)])
    found = {}
    for kind in ("full", "diagonal", "spherical"):
        model = GMM(2, components=2, covariance_type=kind)
        model.initialize(rows, "kmeans++")
        started = model()
        base = started.base
        scale = base.scale_tril.diagonal(dim1=-2, dim2=-1) if kind == "full" else base.base_dist.scale
        found[kind] = float(scale.mean()), float(started.log_prob(rows).mean())
    print(f"rows that spread by {spread}:", end=" ")
    print(", ".join(f"{kind} {scale:.2f} (log-likelihood {fit:.2f})" for kind, (scale, fit) in found.items()))
    as_stated &= abs(found["full"][0] / spread - 1) < 0.1
    as_stated &= all(abs(found[kind][0] / spread**2 - 1) < 0.1 for kind in ("diagonal", "spherical"))
    as_stated &= spread == 1 or all(found[kind][1] < found["full"][1] - 1 for kind in ("diagonal", "spherical"))
sys.exit(0 if as_stated else 1)
PYTHON
