#!/usr/bin/env bash
# lm-polygraph 0.7.0: FisherRao and RenyiNeg say that higher values mean more uncertain samples, as all estimators there do. What they return
# is how far the distribution of each word lies from the uniform one, and nothing turns the sign: a model that does not know at all
# has the lowest value, a model that is sure the highest, so texts are ranked the wrong way round. SelfCertainty, the same idea,
# has its minus. The divergence of RenyiNeg, besides, is too low by twice the logarithm of the vocabulary, unless alpha is exactly 1.
#
# Seen: entropy of the words 6.91  FisherRao 0.000  RenyiNeg -13.82, at alpha 0.999 -13.82, at 1 0.00  SelfCertainty -0.00
#       entropy of the words 6.43  FisherRao 0.157  RenyiNeg -13.75, at alpha 0.999 -13.69, at 1 0.12  SelfCertainty -0.49
#       entropy of the words 3.99  FisherRao 0.443  RenyiNeg -13.29, at alpha 0.999 -12.81, at 1 1.01  SelfCertainty -3.92
#       entropy of the words 0.56  FisherRao 0.882  RenyiNeg -10.43, at alpha 0.999 -9.01, at 1 4.80  SelfCertainty -23.73
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile numpy==2.4.6 scipy==1.17.1 transformers==5.23.0 pillow==12.0.0 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps lm-polygraph==0.7.0 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import importlib.util
import sys
import types

import numpy as np

for name in ("lm_polygraph", "lm_polygraph.estimators", "lm_polygraph.utils"):  # without their __init__, which loads everything there is
    package = types.ModuleType(name)
    package.__path__ = list(importlib.util.find_spec(name).submodule_search_locations)
    sys.modules[name] = package
from lm_polygraph.estimators.fisher_rao import FisherRao
from lm_polygraph.estimators.renyi_neg import RenyiNeg
from lm_polygraph.estimators.self_certainty import SelfCertainty

rows = []
for sharpness in (0, 1, 3, 10):
    logits = sharpness * np.random.default_rng(0).normal(size=(5, 1000))
    words = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    stats = {"greedy_log_probs": [words]}
    entropy = -float((np.exp(words) * words).sum(-1).mean())
    estimators = FisherRao(), RenyiNeg(), RenyiNeg(alpha=0.999), RenyiNeg(alpha=1), SelfCertainty()
    fisher, renyi, near, limit, certainty = (float(estimator(stats)[0]) for estimator in estimators)
    print(f"entropy of the words {entropy:.2f}  FisherRao {fisher:.3f}  RenyiNeg {renyi:.2f}, at alpha 0.999 {near:.2f}, ", end="")
    print(f"at 1 {abs(limit):.2f}  SelfCertainty {certainty:.2f}")
    rows.append((entropy, fisher, renyi, -certainty, limit - near))
entropy, *growing, gaps = np.array(rows).T
as_stated = (np.diff(entropy) < 0).all() and all((np.diff(values) > 0).all() for values in growing)
sys.exit(0 if as_stated and np.allclose(gaps, 2 * np.log(1000), atol=0.01) else 1)
PYTHON
