#!/usr/bin/env bash
# interpreto 0.5.2, torch 2.13.0: Whitening keeps by default min(n, d) directions and divides each by its spread over the rows. n rows
# have n − 1 directions beside their mean: with no more rows than dimensions, as is usual for a language model, the last direction is
# none of theirs, and its spread is a rounding error. A new row gets a value of millions there, and a probe trained behind it
# guesses. With rank=n − 1 it does not.
#
# Seen: 200 rows of 256 dimensions: largest value of a new row 1.6e+07, a probe ranks 0.55 of new pairs right
#       the same, rank=199:         largest value of a new row 23, a probe ranks 0.85 of new pairs right
#       the same, not whitened:     largest value of a new row 4.8, a probe ranks 0.99 of new pairs right
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 interpreto==0.5.2 transformers==5.23.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from interpreto.concepts.probes import MeansDiffProbe, Whitening

torch.manual_seed(0)
direction = torch.randn(256)
direction /= direction.norm()


def rows(count):
    """Two classes of normal rows, four standard deviations apart."""
    labels = (torch.arange(count) % 2).float()
    return torch.randn(count, 256) + 2 * (2 * labels - 1)[:, None] * direction, labels


(x, y), (new, truth) = rows(200), rows(2000)
largest, right = {}, {}
for name, normalization in {
    "200 rows of 256 dimensions:": Whitening(),
    "the same, rank=199:": Whitening(rank=199),
    "the same, not whitened:": None,
}.items():
    probe = MeansDiffProbe(normalization=normalization)
    probe.fit(x, y[:, None])
    scores = probe.encode(new)[:, 0]
    largest[name] = float((normalization(new) if normalization else new).abs().max())
    right[name] = float((scores[truth == 1][:, None] > scores[truth == 0]).float().mean())
    print(f"{name:<27} largest value of a new row {largest[name]:.2g}, a probe ranks {right[name]:.2f} of new pairs right")
(big, small, _), (guess, better, plain) = largest.values(), right.values()
sys.exit(0 if big > 1e5 > 100 > small and guess < 0.65 and better > 0.8 and plain > 0.95 else 1)
PYTHON
