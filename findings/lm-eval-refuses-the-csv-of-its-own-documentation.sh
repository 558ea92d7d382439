#!/usr/bin/env bash
# lm-eval 0.4.13, eai-sparsify 1.3.3, torch 2.13.0: the steered model (--model steered) takes a CSV of features; both rows that its
# documentation gives as examples have the action "add". It puts the decoder's bias beside every row that it reads, and then refuses a
# bias for "add": no such row can be used. Of two "clamp" rows for one hookpoint the last one alone acts, without a word, and
# the column head_index is not read.
#
# Seen: add: AssertionError: Bias is not supported for the `add` action.
#       clamp of the features 3 and 7 of layers.0: values afterwards -0.00302 and 5 (asked for: 10 and 5)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 lm-eval==0.4.13 eai-sparsify==1.3.3 transformers==5.23.0 \
    accelerate==1.15.0 pandas==3.1.1 2> /dev/null
SPARSIFY_DISABLE_TRITON=1 "$folder/env/bin/python" -W ignore - "$folder" 2> /dev/null << 'PYTHON'
import sys
from pathlib import Path

import torch
from lm_eval.models.hf_steered import SteeredModel
from sparsify import SparseCoder, SparseCoderConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = Path(sys.argv[1])
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(40))])}, unk_token="?"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?", eos_token="w0")
tokenizer.save_pretrained(folder / "model")
torch.manual_seed(0)
sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
config = LlamaConfig(vocab_size=41, bos_token_id=1, eos_token_id=1, **sizes)
LlamaForCausalLM(config).save_pretrained(folder / "model")
coder = SparseCoder(16, SparseCoderConfig(num_latents=64, k=4), dtype=torch.float32)
with torch.no_grad():
    coder.W_dec[3, :] = torch.eye(16)[0]
    coder.W_dec[7, :] = torch.eye(16)[1]
coder.save_to_disk(folder / "saes/layers.0")
columns = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description,\n"


def steered(*rows):
    lines = (f"sparsify,{action},{folder}/saes,layers.0,{feature},{value},,,,\n" for action, feature, value in rows)
    (folder / "steer.csv").write_text(columns + "".join(lines))
    return SteeredModel(pretrained=str(folder / "model"), steer_path=str(folder / "steer.csv"), device="cpu", dtype="float32")


refused = ""
try:
    steered(("add", 3, 10.0))
except AssertionError as error:
    refused = str(error)
    print(f"add: AssertionError: {error}")
model = steered(("clamp", 3, 10.0), ("clamp", 7, 5.0))
seen = []
model.model.model.layers[1].register_forward_pre_hook(lambda block, args: seen.append(args[0].detach()))
model._model_call(torch.tensor([[1, 2, 3]]))
first, second = seen[0][0, -1, :2].tolist()
print(f"clamp of the features 3 and 7 of layers.0: values afterwards {first:.3g} and {second:.3g} (asked for: 10 and 5)")
sys.exit(0 if "not supported" in refused and abs(second - 5) < 1e-3 and abs(first - 10) > 1 else 1)
PYTHON
