#!/usr/bin/env bash
# llmcompressor 0.14.0.1, transformers 5.17.0, torch 2.13.0: SmoothQuant moves scales from the norm in front of linear layers into
# their weights, and the model stays the same. SmoothQuantModifier lists Gemma 2 and 3 with the layers of Llama, where
# post_attention_layernorm is in front of the MLP. In Gemma 2 and 3 the norm of that name is behind attention, and the MLP has
# one of its own: a norm and weights that do not belong together are scaled against each other, nothing warns, and the model is
# another before anything is quantized. AWQModifier of the same package lists other norms for both.
#
# Seen: llama       logits move by 0.000
#       qwen2       logits move by 0.000
#       gemma       logits move by 0.000
#       gemma2      logits move by 3.944
#       gemma3_text logits move by 3.847
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1 2> /dev/null
cd "$folder"
export LLM_COMPRESSOR_LOG_DISABLED=true TOKENIZERS_PARALLELISM=false
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import contextlib
import io
import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from loguru import logger
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

logger.remove()
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained("model")
ids = torch.randint(0, 97, (16, 12), generator=torch.manual_seed(0))
rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})


def moved(kind):
    """How far SmoothQuant moves the logits of a small model of a kind, in their deviations."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        pad_token_id=0,
        initializer_range=0.15,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        before = model(ids).logits
        recipe = SmoothQuantModifier(smoothing_strength=0.8)
        oneshot(model=model, dataset=rows, recipe=recipe, pipeline="basic", num_calibration_samples=16, max_seq_length=12)
        after = model(ids).logits
    return float((after - before).abs().max() / before.std())


found = {}
for kind in ("llama", "qwen2", "gemma", "gemma2", "gemma3_text"):
    found[kind] = moved(kind)
    print(f"{kind:<11} logits move by {found[kind]:.3f}")
right = [found[kind] for kind in ("llama", "qwen2", "gemma")]
sys.exit(0 if max(right) < 1e-3 and min(found["gemma2"], found["gemma3_text"]) > 0.5 else 1)
PYTHON
