#!/usr/bin/env bash
# interpreto 0.5.2, torch 2.13.0: SVDDCentroidProbe fits a sphere around the rows that have a concept, and scores a row by the squared
# radius less its squared distance. It starts from the mean squared distance as log(expm1(distance)), which is infinite in float32
# above 88.7. Rows of more than about 90 dimensions of variance 1 are all farther out, also behind its Standardization: the
# radius stays infinite, and every row, whatever it is, scores +inf. Rows of 64 dimensions are judged.
#
# Seen: d =  64  radius² 51.2  rows inside: 44% of those with the concept, 0% of the others, 0% of rows ten times as far
#       d = 128  radius² inf   rows inside: 100% of those with the concept, 100% of the others, 100% of rows ten times as far
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 interpreto==0.5.2 transformers==5.23.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from interpreto.concepts.probes.centroid import SVDDCentroidProbe
from interpreto.concepts.probes.normalizations import Standardization

torch.manual_seed(0)
shares = {}
for d in (64, 128):
    has = torch.arange(400) % 2 == 1
    x = torch.randn(400, d)
    x[has] += 1.0
    probe = SVDDCentroidProbe(normalization=Standardization())
    probe.fit(x, has[:, None].float())
    inside = probe.encode(x)[:, 0] > 0
    far = probe.encode(10 * x)[:, 0] > 0
    shares[d] = tuple(float(part.float().mean()) for part in (inside[has], inside[~has], far))
    print(f"d = {d:3d}  radius² {float(probe.bias):<5.3g} rows inside: {shares[d][0]:.0%} of those with the concept, ", end="")
    print(f"{shares[d][1]:.0%} of the others, {shares[d][2]:.0%} of rows ten times as far")
as_stated = shares[64][0] > shares[64][1] and shares[64][2] == 0 and shares[128] == (1.0, 1.0, 1.0)
sys.exit(0 if as_stated else 1)
PYTHON
