#!/usr/bin/env bash
# inseq 0.7.1, transformers 5.23.0, torch 2.13.0: the step score "kl_divergence" takes top_k or top_p, to look at the most probable words
# alone. The others get a logit of −inf in both distributions, and torch's kl_div then computes 0 · (−inf + inf) for each of them:
# the score is NaN at every step, whatever the model, as soon as one word is left out.
#
# Seen: all words     kl_divergence [2.397, 1.491, 1.556]
#       top_k=5       kl_divergence [nan, nan, nan]
#       top_p=0.9     kl_divergence [nan, nan, nan]
#       by hand, first step: all words 2.397, top_k=5 0.502
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(40))])}, unk_token="?"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?", eos_token="w0", bos_token="w1")
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=41, initializer_range=0.3, **sizes)).eval()
explained = inseq.load_model(model, "saliency", tokenizer=tokenizer)
found = {}
for name, how in {"all words": {}, "top_k=5": {"top_k": 5}, "top_p=0.9": {"top_p": 0.9}}.items():
    out = explained.attribute(
        ["w5 w6 w7"], ["w5 w6 w7 w8 w9 w10"], step_scores=["kl_divergence"], show_progress=False,
        contrast_targets=["w2 w3 w4 w8 w9 w10"], **how,
    )[0]
    found[name] = out.step_scores["kl_divergence"]
    print(f"{name:<12}  kl_divergence {[round(float(value), 3) for value in found[name]]}")
with torch.no_grad():
    ours, theirs = (model(tokenizer(text, return_tensors="pt").input_ids).logits[0, -1] for text in ("w5 w6 w7", "w2 w3 w4"))
kept = (ours + theirs).topk(5).indices  # the words that inseq would keep
hand = []
for words in (slice(None), kept):
    p, q = ours[words].log_softmax(-1), theirs[words].log_softmax(-1)
    hand.append(float((p.exp() * (p - q)).sum()))
print(f"by hand, first step: all words {hand[0]:.3f}, top_k=5 {hand[1]:.3f}")
as_stated = abs(float(found["all words"][0]) - hand[0]) < 1e-3 and hand[1] > 0
as_stated &= all(bool(found[name].isnan().all()) for name in ("top_k=5", "top_p=0.9"))
sys.exit(0 if as_stated else 1)
PYTHON
