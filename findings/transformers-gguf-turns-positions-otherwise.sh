#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, torch 2.13.0: a GGUF file holds how positions are turned, and from_pretrained(gguf_file=...)
# reads the base alone, and of Starcoder2 and StableLM not even that. rope.scaling.* (linear, YaRN), the factors that Llama 3.1 and
# 3.2 keep in the tensor rope_freqs.weight, and rope.dimension_count of Phi-3 (Phi-4-mini turns three quarters of a head) are left
# out: a line of the log at level INFO, or nothing. The architectures are documented as supported, the files are read without a
# warning, and the models give other logits, the scaled ones at any length. The files below hold what llama.cpp's converter writes.
#
# Seen: llama, plain                       logits off by 0.00 of their deviation
#       qwen2, plain                       logits off by 0.00 of their deviation
#       starcoder2, plain                  logits off by 0.00 of their deviation
#       stablelm, a quarter of each head   logits off by 0.00 of their deviation
#       llama, factors of Llama 3.1        logits off by 3.90 of their deviation
#       llama, linear scaling by 4         logits off by 3.95 of their deviation
#       qwen2, YaRN by 4                   logits off by 3.30 of their deviation
#       starcoder2, base of a million      logits off by 2.93 of their deviation
#       stablelm, base of a million        logits off by 0.46 of their deviation
#       phi3, three quarters of each head  logits off by 5.60 of their deviation
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


def write(model, kind, rotated, scaling, factors):
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
    writer.add_vocab_size(WORDS)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_epsilon if kind == "starcoder2" else config.layer_norm_eps)
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if scaling:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(16)
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
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(value))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def moved(title, kind, rotated=DIM, scaling=None, **positions):
    positions = {"rope_type": "default", "rope_theta": 10000.0, **positions}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, rope_parameters=positions)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    factors = None
    if positions["rope_type"] == "llama3":
        plain = 10000.0 ** -(np.arange(0, DIM, 2) / DIM)
        factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    write(model, kind, rotated, scaling, factors)
    read = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32).eval()
    expected = model(ids).logits
    by = float((read(ids).logits - expected).abs().max() / expected.std())
    print(f"{title:<34} logits off by {by:.2f} of their deviation")
    return by


right = [moved(f"{kind}, plain", kind) for kind in ("llama", "qwen2", "starcoder2")]
right.append(moved("stablelm, a quarter of each head", "stablelm", DIM // 4, partial_rotary_factor=0.25))
llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
wrong = [
    moved("llama, factors of Llama 3.1", "llama", rope_type="llama3", factor=8.0, **llama3),
    moved("llama, linear scaling by 4", "llama", scaling="linear", rope_type="linear", factor=4.0),
    moved("qwen2, YaRN by 4", "qwen2", scaling="yarn", rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    moved("starcoder2, base of a million", "starcoder2", rope_theta=1e6),
    moved("stablelm, base of a million", "stablelm", DIM // 4, rope_theta=1e6, partial_rotary_factor=0.25),
    moved("phi3, three quarters of each head", "phi3", 3 * DIM // 4, partial_rotary_factor=0.75),
]
sys.exit(0 if max(right) < 1e-3 and min(wrong) > 0.1 else 1)
PYTHON
