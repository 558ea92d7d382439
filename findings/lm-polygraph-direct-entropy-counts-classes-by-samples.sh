#!/usr/bin/env bash
# lm-polygraph 0.7.0: SemanticEntropy(entropy_estimation="direct") is to be the entropy of the classes of meaning, minus the sum of p log p
# over the classes. It is summed over the samples instead, so each class counts as often as it has samples. Answers of ten
# different meanings then have less entropy than five pairs, or than two halves, and with more samples the number grows without end.
# The default, "mean", is right for the shares of the classes, which are used here.
#
# Seen: ten of one meaning        entropy 0.000  mean 0.000  direct 0.000
#       nine and one              entropy 0.325  mean 0.325  direct 1.084
#       five and five             entropy 0.693  mean 0.693  direct 3.466
#       five pairs                entropy 1.609  mean 1.609  direct 3.219
#       ten different ones        entropy 2.303  mean 2.303  direct 2.303
#       fifty and fifty           entropy 0.693  mean 0.693  direct 34.657
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile numpy==2.4.6 transformers==5.23.0 pillow==12.0.0 2> /dev/null
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
from lm_polygraph.estimators.semantic_entropy import SemanticEntropy

cases = {
    "ten of one meaning": [10],
    "nine and one": [9, 1],
    "five and five": [5, 5],
    "five pairs": [2] * 5,
    "ten different ones": [1] * 10,
    "fifty and fifty": [50, 50],
}
as_stated, direct_values = True, {}
for name, sizes in cases.items():
    samples = np.arange(sum(sizes))
    classes = [part.tolist() for part in np.split(samples, np.cumsum(sizes)[:-1])]
    owner = {sample: number for number, members in enumerate(classes) for sample in members}
    stats = {
        "sample_texts": [[f"answer {sample}" for sample in samples]],
        "semantic_classes_entail": {"class_to_sample": {0: classes}, "sample_to_class": {0: owner}},
    }
    shares = np.array(sizes) / sum(sizes)
    entropy = abs(float((shares * np.log(shares)).sum()))
    mean, direct = (
        abs(float(SemanticEntropy(class_probability_estimation="frequency", entropy_estimation=kind)(stats)[0]))
        for kind in ("mean", "direct")
    )
    print(f"{name:<25} entropy {entropy:.3f}  mean {mean:.3f}  direct {direct:.3f}")
    by_samples = abs(float((np.array(sizes) * shares * np.log(shares)).sum()))
    as_stated &= abs(mean - entropy) < 1e-9 and abs(direct - by_samples) < 1e-9
    direct_values[name] = direct
sys.exit(0 if as_stated and direct_values["five and five"] > direct_values["ten different ones"] else 1)
PYTHON
