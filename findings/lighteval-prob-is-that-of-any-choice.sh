#!/usr/bin/env bash
# lighteval 0.13.0: the metric Probability ("prob") is documented as the probability of the gold choice that ignores the other choices, the
# largest one if several are gold. It takes the largest of all choices and does not look at which is gold: a model that is sure of the
# wrong answer scores as high as one that is sure of the right one. NormalizedMultiChoiceProbability, beside it, looks.
#
# Seen: gold 0.90: prob 0.90, normalized_mc_prob 0.97
#       gold 0.02: prob 0.90, normalized_mc_prob 0.02
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 sacrebleu==2.5.1 nltk==3.9.2 \
    pytablewriter==1.2.1 scikit-learn==1.9.1 requests==2.34.2 pydantic==2.14.4 pandas==3.1.1 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps lighteval==0.13.0 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import math
import sys

from lighteval.metrics.metrics_sample import NormalizedMultiChoiceProbability, Probability
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

chances = [0.90, 0.02, 0.01]
answer = ModelResponse(text=["", "", ""], logprobs=[math.log(chance) for chance in chances], output_tokens=[[1], [2], [3]])
as_stated = True
for gold in (0, 1):
    question = Doc(query="Is water wet?", choices=[" yes", " no", " perhaps"], gold_index=gold)
    found, shared = (float(metric().compute(question, answer)) for metric in (Probability, NormalizedMultiChoiceProbability))
    print(f"gold {chances[gold]:.2f}: prob {found:.2f}, normalized_mc_prob {shared:.2f}")
    as_stated &= abs(found - 0.90) < 1e-6 and abs(shared - chances[gold] / sum(chances)) < 1e-6
sys.exit(0 if as_stated else 1)
PYTHON
