#!/usr/bin/env bash
# inseq 0.7.1, transformers 5.23.0, torch 2.13.0: the step score "mc_dropout_prob_avg" puts the model into train mode, for its noisy
# passes, and leaves it there. Everything that the same model attributes or scores afterwards is computed with dropout: probabilities
# and attributions are others, and differ from call to call, without a word. (What the score returns is no average of
# probabilities, as its documentation says, but how many standard deviations the probability lies from the noisy ones.)
#
# Seen: before: training False, two calls give [0.003, 0.002, 0.025] and [0.003, 0.002, 0.025], attributions differ by 0
#       mc_dropout_prob_avg: [-0.63, -0.338, 2.218]
#       after:  training True, two calls give [0.009, 0.002, 0.003] and [0.002, 0.0, 0.024], attributions differ by 0.77
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
config = LlamaConfig(vocab_size=41, attention_dropout=0.1, initializer_range=0.3, **sizes)
model = LlamaForCausalLM(config).eval()
explained = inseq.load_model(model, "saliency", tokenizer=tokenizer)


def call(score):
    out = explained.attribute(["w5 w6 w7"], ["w5 w6 w7 w8 w9 w10"], step_scores=[score], show_progress=False)[0]
    return [round(float(value), 3) for value in out.step_scores[score]], out.target_attributions.nan_to_num()


def twice(when):
    (first, ours), (second, others) = call("probability"), call("probability")
    apart = float((ours - others).abs().max())
    print(f"{when:<7} training {model.training}, two calls give {first} and {second}, attributions differ by {apart:.2g}")
    return first == second and apart == 0


same_before = twice("before:")
print(f"mc_dropout_prob_avg: {call('mc_dropout_prob_avg')[0]}")
same_after = twice("after:")
sys.exit(0 if same_before and not same_after and model.training else 1)
PYTHON
