#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0: adapter_names= names an adapter for each row of a batch. Described with LoRA, it is taken by the forward of
# every PeftModel. Beside LoRA only a few kinds (RoAd, say) act on it; for the others PeftModel removes it from the arguments, and
# all rows get the active adapter, those that ask for another one, for none ("__base__") or for one that does not exist alike,
# without an error or a warning.
#
# Seen: LoRA  rows off by 0, 0, 0; a name that nobody has: ValueError
#       RoAd  rows off by 0, 0, 0; a name that nobody has: ValueError
#       IA3   rows off by 0, 1.65, 1.97; a name that nobody has: accepted
#       LoHa  rows off by 0, 3.47, 3.34; a name that nobody has: accepted
#       OFT   rows off by 0, 4.1, 4.85; a name that nobody has: accepted
#       VeRA  rows off by 0, 1.74, 1.45; a name that nobody has: accepted
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 transformers==5.23.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys
import warnings

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, RoadConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
kinds = {
    "LoRA": LoraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "RoAd": RoadConfig(group_size=8, target_modules=["q_proj", "o_proj"]),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "OFT": OFTConfig(oft_block_size=8, target_modules=["q_proj", "o_proj"]),
    "VeRA": VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
}
torch.manual_seed(0)
ids = torch.randint(3, 48, (3, 7))
right, silent = [], []
for name, config in kinds.items():
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=48, initializer_range=0.2, bos_token_id=1, eos_token_id=2, **sizes))
    model = get_peft_model(base, config, adapter_name="one").eval()
    model.add_adapter("two", config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".one" in key or ".two" in key:
                parameter.add_(0.3 * torch.randn(parameter.shape))
        alone = []
        for adapter in ("one", "two"):
            model.set_adapter(adapter)
            alone.append(model(ids).logits)
        with model.disable_adapter():
            alone.append(model(ids).logits)
        model.set_adapter("one")
        model.eval()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            mixed = model(ids, adapter_names=["one", "two", "__base__"]).logits
            try:
                model(ids, adapter_names=["nobody"] * 3)
                unknown = "accepted"
            except ValueError as error:
                unknown = type(error).__name__
    off = [float((mixed[i] - alone[i][i]).abs().max()) for i in range(3)]
    print(f"{name:<5} rows off by {', '.join(f'{value:.3g}' for value in off)}; a name that nobody has: {unknown}")
    right.append(max(off) < 1e-4 and unknown == "ValueError")
    silent.append(off[0] < 1e-4 and min(off[1:]) > 0.5 and unknown == "accepted" and not said)
sys.exit(0 if all(right[:2]) and all(silent[2:]) else 1)
PYTHON
