#!/usr/bin/env bash
# torchmetrics 1.9.0, sacrebleu 2.6.0, torch 2.13.0: the brevity penalty of BLEU compares with the reference whose length is the
# closest. Where a shorter and a longer one are equally close, SacreBLEU (and NLTK) take the shorter, bleu_score and
# sacre_bleu_score of torchmetrics that which comes first in the list. The score depends on the order of the references, and
# sacre_bleu_score, which is to agree with SacreBLEU, is a tenth too low here.
#
# Seen: references of 9 and 11 words: sacre_bleu_score 0.760, bleu_score 0.760, SacreBLEU 0.760
#       references of 11 and 9 words: sacre_bleu_score 0.688, bleu_score 0.688, SacreBLEU 0.760
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 torchmetrics==1.9.0 sacrebleu==2.6.0 \
    numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import sacrebleu
from torchmetrics.functional.text import bleu_score, sacre_bleu_score

prediction = "we went down to the river to swim at noon"
short = "we went down to the river to swim today"
long = "we all went down to the cold river to swim today"
assert [len(text.split()) for text in (short, prediction, long)] == [9, 10, 11]
found = []
for references in ([short, long], [long, short]):
    lengths = " and ".join(str(len(text.split())) for text in references)
    scores = [
        float(sacre_bleu_score([prediction], [references])),
        float(bleu_score([prediction], [references])),
        sacrebleu.corpus_bleu([prediction], [[text] for text in references], smooth_method="none").score / 100,
    ]
    print(f"references of {lengths} words: sacre_bleu_score {scores[0]:.3f}, bleu_score {scores[1]:.3f}, SacreBLEU {scores[2]:.3f}")
    found.append(scores)
(first, plain, right), (swapped, plain_swapped, same) = found
agree = abs(first - right) < 1e-4 and abs(right - same) < 1e-4 and abs(plain - first) < 1e-4
sys.exit(0 if agree and right - swapped > 0.05 and right - plain_swapped > 0.05 else 1)
PYTHON
