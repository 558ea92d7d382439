#!/usr/bin/env bash
# inseq 0.7.1, transformers 5.23.0, torch 2.13.0: the step score "perplexity" is documented as the number of words that the model is as
# confused between as if it had to pick one of them: one over the probability. It is 2 to the power of the cross-entropy, which is in
# nats: a model that gives all of its 40 words the same probability has a perplexity of 12.9. And neither score can be had for one
# text alone, nor for a decoder-only model at all, whose texts go one by one: a tensor of one target loses its dimension.
#
# Seen: 40 words of equal probability: crossentropy 3.689 (nats), perplexity 12.9 (2**3.689), 1/probability 40.0
#       the same text alone: ValueError: Expected input batch_size (1) to match target batch_size (0).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 captum==0.9.0 \
    treescope==0.1.10 rich==15.0.0 jaxtyping==0.3.11 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps typeguard==2.13.3 inseq==0.7.1 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import sys

import inseq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(39))])}, unk_token="?"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?", eos_token="w0")
torch.manual_seed(0)
sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, tie_word_embeddings=False)
config = T5Config(vocab_size=40, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
model = T5ForConditionalGeneration(config).eval()
torch.nn.init.zeros_(model.lm_head.weight)  # every word gets the same probability
explained = inseq.load_model(model, "saliency", tokenizer=tokenizer)
scores = ["probability", "crossentropy", "perplexity"]


def step(copies):
    texts = ["w5 w6 w7"] * copies, ["w8 w9 w10"] * copies
    found = explained.attribute(*texts, step_scores=scores, show_progress=False)[0].step_scores
    return [float(found[name][0]) for name in scores]


probability, nats, perplexity = step(2)
print(f"40 words of equal probability: crossentropy {nats:.3f} (nats), perplexity {perplexity:.1f} (2**{nats:.3f}), ", end="")
print(f"1/probability {1 / probability:.1f}")
try:
    step(1)
    refused = False
except ValueError as error:
    refused = True
    print(f"the same text alone: ValueError: {error}")
sys.exit(0 if refused and abs(perplexity - 2**nats) < 0.1 and abs(1 / probability - 40) < 0.1 and perplexity < 14 else 1)
PYTHON
