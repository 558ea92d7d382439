#!/usr/bin/env bash
# ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0: the rotary positions of Llama 3.1 and later are scaled ("rope_type":
# "llama3") at every position. The converter knows that type, reads its factors and takes the model, and what runs is the model
# without any scaling, to the last digit, without a word. A linear scaling is right.
#
# Seen: no scaling                     off from the model by 0.00, from the model without scaling by 0.00, of 6.1
#       linear                         off from the model by 0.00, from the model without scaling by 7.08, of 6.7
#       llama3 (as of Llama 3.1)       off from the model by 0.32, from the model without scaling by 0.00, of 6.1
#       llama3 (for 8 tokens at first) off from the model by 9.21, from the model without scaling by 0.00, of 6.1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys
import tempfile

import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 40
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS)}, unk_token="w3"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w3", pad_token="w0"
)
llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
torch.manual_seed(1)
ids = torch.randint(4, WORDS, (1, 64))


def llama(rope):
    torch.manual_seed(0)
    rope = {"rope_theta": 500000.0, **rope}
    config = LlamaConfig(
        vocab_size=WORDS, initializer_range=0.3, max_position_embeddings=131072, rope_parameters=rope, **sizes
    )
    return LlamaForCausalLM(config).eval()


def look(name, rope):
    model = llama(rope)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(f"{place}/model")
        tokenizer.save_pretrained(f"{place}/model")
        ctranslate2.converters.TransformersConverter(f"{place}/model").convert(f"{place}/converted")
        generator = ctranslate2.Generator(f"{place}/converted", device="cpu", intra_threads=1)
        found = np.array(generator.forward_batch([[f"w{n}" for n in ids[0].tolist()]]))
    with torch.no_grad():
        expected, plain = (m(input_ids=ids).logits.numpy() for m in (model, llama({"rope_type": "default"})))
    off = [float(np.abs(found - logits).max()) for logits in (expected, plain)]
    print(f"{name:<30} off from the model by {off[0]:.2f}, from the model without scaling by {off[1]:.2f}, ", end="")
    print(f"of {np.abs(found).max():.1f}")
    return [value > 1e-2 for value in off]


found = [
    look("no scaling", {"rope_type": "default"}),
    look("linear", {"rope_type": "linear", "factor": 4.0}),
    look("llama3 (as of Llama 3.1)", {**llama3, "original_max_position_embeddings": 8192}),
    look("llama3 (for 8 tokens at first)", {**llama3, "original_max_position_embeddings": 8}),
]
sys.exit(0 if found == [[False, False], [False, True], [True, False], [True, False]] else 1)
PYTHON
