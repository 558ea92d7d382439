#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, torch 2.13.0: the architecture "llama" of GGUF may hold biases, as the files of Granite code
# models do, and that of Gemma 2 says at what its logits are capped. from_pretrained(gguf_file=...) makes the Llama without
# biases and passes over every tensor that the model has no place for; the caps are always those of Gemma 2 as it was published.
# Nothing warns: tensors that are passed over are not counted as unexpected.
#
# Seen: llama, without biases        logits off by 0.00 of their deviation
#       llama, with biases           logits off by 4.14 of their deviation
#       gemma2, caps of 50 and 30    logits off by 0.00 of their deviation
#       gemma2, caps of 2 and 5      logits off by 2.30 of their deviation
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 2> /dev/null
cd "$folder"
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HEADS, GROUPS, DIM, WORDS = 4, 2, 16, 64
SIZES = {
    "hidden_size": HEADS * DIM,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": DIM,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ids = torch.randint(0, WORDS, (1, 48), generator=torch.manual_seed(0))


def write(model, kind):
    """A model as a GGUF file, named and laid out as llama.cpp's converter does."""
    config, writer = model.config, gguf.GGUFWriter("model.gguf", kind)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_vocab_size(WORDS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if kind == "llama":
        writer.add_rope_dimension_count(DIM)
    else:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"word{i}" for i in range(WORDS)])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = name.rsplit(".", 1)
        value = value.numpy()
        if kind == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = HEADS if "q_proj" in name else GROUPS
            value = value.reshape(heads, 2, DIM // 2, -1).swapaxes(1, 2).reshape(value.shape)
        elif kind == "gemma2" and name.endswith("norm.weight"):
            value = value + 1
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def moved(title, kind, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **settings)).eval().float()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.normal_(std=0.25)
    write(model, kind)
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32).eval()
    expected = model(ids).logits
    by = float((read(ids).logits - expected).abs().max() / expected.std())
    print(f"{title:<28} logits off by {by:.2f} of their deviation")
    return by


right = [moved("llama, without biases", "llama")]
wrong = [moved("llama, with biases", "llama", attention_bias=True, mlp_bias=True)]
right.append(moved("gemma2, caps of 50 and 30", "gemma2"))
wrong.append(moved("gemma2, caps of 2 and 5", "gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=5.0))
sys.exit(0 if max(right) < 1e-3 and min(wrong) > 0.1 else 1)
PYTHON
