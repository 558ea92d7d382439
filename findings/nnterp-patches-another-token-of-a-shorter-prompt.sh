#!/usr/bin/env bash
# nnterp 1.3.0, nnsight 0.6.3, transformers 5.23.0, torch 2.13.0: patchscope_lens takes for each target prompt the index of the token to
# replace. It indexes the padded batch, and nnterp pads on the left: beside a longer prompt an index from the start means an earlier
# token of a shorter one, or a padding. Its other functions refuse such an index ("only supported with right padding"), this one
# does not. The same prompt alone, or with the index counted from the end, gets another answer.
#
# Seen: index 1 of three tokens:   alone [0.787, 0.556, 0.391], beside a prompt of five tokens [0.391, 0.391, 0.391]
#       index -2 of three tokens:  alone [0.787, 0.556, 0.391], beside a prompt of five tokens [0.787, 0.556, 0.391]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 nnsight==0.6.3 nnterp==1.3.0 2> /dev/null
cat > "$folder/script.py" << 'PYTHON'
import sys

import torch
from nnterp import StandardizedTransformer
from nnterp.interventions import TargetPromptBatch, patchscope_lens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(40))])}, unk_token="?"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?", padding_side="left")
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
model = StandardizedTransformer(LlamaForCausalLM(LlamaConfig(vocab_size=41, initializer_range=0.5, **sizes)), tokenizer=tokenizer)
latents = torch.randn(3, 2, 32)  # layers, prompts, width
short, long = "w5 w6 w7", "w5 w6 w7 w8 w9"
worst = {}
for index, other in ((1, 1), (-2, -4)):  # the second token, w6, of both prompts
    alone = patchscope_lens(model, target_patch_prompts=TargetPromptBatch.from_prompts([short], [index]), latents=latents[:, :1])
    both = patchscope_lens(model, target_patch_prompts=TargetPromptBatch.from_prompts([short, long], [index, other]), latents=latents)
    worst[index] = float((alone[0] - both[0]).abs().max())
    word = alone[0, 0].argmax()
    first, second = ([round(float(p), 3) for p in answer[0, :, word]] for answer in (alone, both))
    print(f"index {index} of three tokens:".ljust(26), f"alone {first}, beside a prompt of five tokens {second}")
sys.exit(0 if worst[1] > 0.05 and worst[-2] < 1e-4 else 1)
PYTHON
"$folder/env/bin/python" -W ignore "$folder/script.py" 2> /dev/null
