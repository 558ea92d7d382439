#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0: in a mixture of experts whose experts are stacked in one tensor (GLM 4 MoE; also DeepSeek V3, Ernie
# 4.5, Hunyuan), a LoRA on the down projection of the shared expert, or of a dense layer, is put on the routed experts, without a
# word: PEFT renames every target that ends in `down_proj` to the stacked parameter of that name, a whole path or a pattern, too.
#
# Seen: asked for ['layers.1.mlp.shared_experts.down_proj'], adapted ['model.layers.1.mlp.experts']
# Seen: asked for .*layers\.0\.mlp\.down_proj, adapted ['model.layers.1.mlp.experts']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile peft==0.21.2 transformers==5.24.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

from peft import LoraConfig, get_peft_model
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}


def adapted(target):
    """Which modules a LoRA with these targets is put on."""
    model = Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **HEADS, **EXPERTS))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=target))
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_parameters() if ".lora_A." in name]
    return sorted({name.partition(".lora_A.")[0] for name in names})


found = []
for target in (["layers.1.mlp.shared_experts.down_proj"], r".*layers\.0\.mlp\.down_proj"):
    found.append(adapted(target))
    print(f"asked for {target}, adapted {found[-1]}")
sys.exit(0 if found == [["model.layers.1.mlp.experts"]] * 2 else 1)
PYTHON
