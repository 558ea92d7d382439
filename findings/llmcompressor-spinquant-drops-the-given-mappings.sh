#!/usr/bin/env bash
# llmcompressor 0.14.0.1, transformers 5.17.0, torch 2.13.0: the layers that SpinQuantModifier turns are to be inferred "if None is
# provided". They are always inferred: mappings= and norm_mappings= are overwritten when the recipe starts, without a word, so that
# turning values and output projections of the first layer alone, say, turns those of all. And whatever is asked for, even R4
# alone, the means are taken off the rows of the embedding first, which a LayerNorm would not see; the RMSNorm of Llama, Qwen
# and Granite does, and the model is another before anything is quantized. With embeddings of mean zero it is the same.
#
# Seen: mappings= of layer 0, R2: values turned in layers [0, 1]
#       llama R1: logits move by 1.551, with embeddings of mean zero by 0.000
#       llama R2: logits move by 1.551, with embeddings of mean zero by 0.000
#       llama R4: logits move by 1.551, with embeddings of mean zero by 0.000
#       qwen3 R1: logits move by 1.815, with embeddings of mean zero by 0.000
#       qwen3 R2: logits move by 1.815, with embeddings of mean zero by 0.000
#       qwen3 R4: logits move by 1.815, with embeddings of mean zero by 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.17.0 llmcompressor==0.14.0.1 2> /dev/null
cd "$folder"
LLM_COMPRESSOR_LOG_DISABLED=true "$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import contextlib
import io
import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.transform import SpinQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantMapping
from loguru import logger
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

logger.remove()
PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained("model")
ids = torch.randint(0, 97, (2, 12), generator=torch.manual_seed(0))
first = SpinQuantMapping(
    embedding="re:.*embed_tokens$",
    attn="re:.*layers.0.self_attn$",
    attn_q="re:.*layers.0.*q_proj$",
    attn_k="re:.*layers.0.*k_proj$",
    attn_v="re:.*layers.0.*v_proj$",
    attn_o="re:.*layers.0.*o_proj$",
    mlp_in=["re:.*layers.0.*up_proj$", "re:.*layers.0.*gate_proj$"],
    mlp_out="re:.*layers.0.*down_proj$",
    lm_head="lm_head",
)


@torch.no_grad()
def turned(kind, centred, **settings):
    """How far a recipe moves the logits of a small model, and in which layers it turns the values."""
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
        tie_word_embeddings=False,
        pad_token_id=0,
        initializer_range=0.15,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
    if centred:
        embedding = model.model.embed_tokens.weight
        embedding -= embedding.mean(-1, keepdim=True)
    before = model(ids).logits
    values = [layer.self_attn.v_proj.weight.clone() for layer in model.model.layers]
    with contextlib.redirect_stdout(io.StringIO()):
        oneshot(model=model, recipe=SpinQuantModifier(**settings), pipeline="datafree")
    by = float((model(ids).logits - before).abs().max() / before.std())
    layers = [i for i, v in enumerate(values) if not torch.allclose(model.model.layers[i].self_attn.v_proj.weight, v)]
    return by, layers


layers = turned("llama", True, rotations=["R2"], mappings=first)[1]
print(f"mappings= of layer 0, R2: values turned in layers {layers}")
wrong, right = [], []
for kind in ("llama", "qwen3"):
    for rotation in ("R1", "R2", "R4"):
        by, with_centred = (turned(kind, centred, rotations=[rotation])[0] for centred in (False, True))
        print(f"{kind} {rotation}: logits move by {by:.3f}, with embeddings of mean zero by {with_centred:.3f}")
        wrong.append(by), right.append(with_centred)
sys.exit(0 if layers == [0, 1] and min(wrong) > 0.1 and max(right) < 1e-3 else 1)
PYTHON
