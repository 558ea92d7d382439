#!/usr/bin/env bash
# lighteval 0.13.0, sacrebleu 2.5.1: the corpus metrics chrf, chrf++ and ter give sacrebleu the references by example, where it expects
# them by set (one list with the first reference of every example). It takes the first answer alone, with the golds of all
# examples as its references, and reads no other answer. bleu, beside them, is turned as it has to be.
#
# Seen: chrf:   100.00, by sacrebleu 38.56, with the last answer first 0.00
#       chrf++: 100.00, by sacrebleu 39.47, with the last answer first 0.00
#       ter:      0.00, by sacrebleu 62.50, with the last answer first 75.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 sacrebleu==2.5.1 nltk==3.9.2 \
    pytablewriter==1.2.1 scikit-learn==1.9.1 requests==2.34.2 pydantic==2.14.4 pandas==3.1.1 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps lighteval==0.13.0 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import sys

import sacrebleu
from lighteval.metrics.metrics_corpus import CorpusLevelTranslationMetric
from lighteval.metrics.sample_preparator import GenerativePreparator
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc

golds = ["the cat sat on the mat", "a dog ran over the field", "it rained all day"]
answers = ["the cat sat on the mat", "zzz qqq", "xx"]
examples = [
    GenerativePreparator.prepare(Doc(query="Translate.", choices=[gold], gold_index=0), ModelResponse(text=[answer]))
    for gold, answer in zip(golds, answers)
]
metrics = {"chrf": sacrebleu.CHRF(), "chrf++": sacrebleu.CHRF(word_order=2), "ter": sacrebleu.TER()}
as_stated = True
for name, metric in metrics.items():
    found, turned = (CorpusLevelTranslationMetric(name).compute_corpus(rows) for rows in (examples, examples[::-1]))
    right = metric.corpus_score(answers, [golds]).score
    first = metric.corpus_score(answers[:1], [[gold] for gold in golds]).score
    print(f"{name}:".ljust(7), f"{found:6.2f}, by sacrebleu {right:.2f}, with the last answer first {turned:.2f}")
    as_stated &= abs(found - first) < 1e-6 and abs(found - right) > 10 and abs(found - turned) > 10
sys.exit(0 if as_stated else 1)
PYTHON
