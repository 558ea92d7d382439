#!/usr/bin/env bash
# dialz 1.1.4, transformers 4.57.6, torch 2.13.0: get_activation_score(text, model, vector) takes the control off the model before it
# looks at its hidden states, and does not put it back: a steered model that is asked for the score of a text, as between two
# answers, is not steered any more, without a word. Also, "median_token" is not the median where the number of tokens is even,
# but the lower of the two in the middle: of two tokens the smaller.
#
# Seen: outputs off from those without control: after set_control 2.674, after get_activation_score 0.000
#       two tokens, dot products -2.861 and 0.099: mean -1.381, "median_token" -2.861
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==4.57.6 numpy==2.4.6 gguf==0.13.0 \
    scikit-learn==1.9.1 python-dotenv==1.2.4 tqdm==4.67.1 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps dialz==1.1.4 2> /dev/null
CUDA_VISIBLE_DEVICES="" FOLDER="$folder/model" "$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import os
import sys
import sysconfig
import types

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# the package asks for IPython when it is imported; its parts are imported here one by one
package = types.ModuleType("dialz")
package.__path__ = [sysconfig.get_path("purelib") + "/dialz"]
sys.modules["dialz"] = package
from dialz.score import get_activation_score  # noqa: E402
from dialz.vector import SteeringModel, SteeringVector  # noqa: E402

torch.manual_seed(0)
folder = os.environ["FOLDER"]
words = "<pad> <unk> the cat sat on a mat and dog ran far".split()
tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(words), initializer_range=0.3, **sizes)).save_pretrained(folder)

model = SteeringModel(folder, [0, 1])
directions = {layer: np.random.default_rng(layer).normal(size=16).astype(np.float32) for layer in (0, 1)}
vector, ids = SteeringVector("llama", directions), torch.tensor([[2, 3, 4, 5]])
with torch.no_grad():
    plain = model(ids).logits
    model.set_control(vector, 1.0)
    steered = float((model(ids).logits - plain).abs().max())
    get_activation_score("the cat sat on", model, vector)
    later = float((model(ids).logits - plain).abs().max())
print(f"outputs off from those without control: after set_control {steered:.3f}, after get_activation_score {later:.3f}")
median, _, (products,) = get_activation_score("the cat", model, vector, scoring_method="median_token")
small, large = sorted(float(value) for value in products)
mean = (small + large) / 2
print(f'two tokens, dot products {small:.3f} and {large:.3f}: mean {mean:.3f}, "median_token" {median:.3f}')
sys.exit(0 if steered > 0.1 and later == 0 and abs(median - small) < 1e-3 and large - small > 0.1 else 1)
PYTHON
