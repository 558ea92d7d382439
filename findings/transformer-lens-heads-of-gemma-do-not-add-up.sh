#!/usr/bin/env bash
# transformer-lens 4.3.0, transformers 5.23.0, torch 2.13.0: stack_head_results and stack_neuron_results are documented as what each head
# and each neuron adds to the residual stream, and get_full_resid_decomposition as all of its parts. In models that normalise the
# output of attention and of the MLP before it is added (Gemma 2 and 3, OLMo 2, GLM 4, EXAONE 4) the parts are those from before that
# norm: they do not add up to the stream, nor to attn_out and mlp_out, which are right. Nothing warns. In Llama all adds up.
#
# Seen: Llama:    relative error of the sum: parts of the stream 0.00, heads of layer 0 0.00, neurons of layer 0 0.00
#       Gemma 2:  relative error of the sum: parts of the stream 2.71, heads of layer 0 0.86, neurons of layer 0 4.06
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 transformer-lens==4.3.0 2> /dev/null
HF_HUB_OFFLINE=1 "$folder/env/bin/python" -W ignore - "$folder/tokenizer" 2> /dev/null << 'PYTHON'
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig, PreTrainedTokenizerFast

core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(40))])}, unk_token="?"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?", bos_token="w0", eos_token="w1")
made.save_pretrained(sys.argv[1])  # the bridge wants a tokenizer that lies somewhere
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
sizes = dict(
    vocab_size=41, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
    head_dim=8, bos_token_id=1, pad_token_id=0, eos_token_id=2, initializer_range=0.3,
)


def off(parts, whole):
    """How far the sum of the parts lies from the whole, relative to it."""
    return float((parts.sum(0) - whole).norm() / whole.norm())


found = {}
for name, config in {"Llama": LlamaConfig(**sizes), "Gemma 2": Gemma2Config(**sizes)}.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.config.architectures = [type(model).__name__]
    bridge = TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([[1, 5, 6, 7, 8]]))
        assert torch.allclose(cache["resid_pre", 0] + cache["attn_out", 0] + cache["mlp_out", 0], cache["resid_post", 0], atol=1e-4)
        found[name] = (
            off(cache.get_full_resid_decomposition(), cache["resid_post", 2]),
            off(cache.stack_head_results(layer=1), cache["attn_out", 0]),
            off(cache.stack_neuron_results(layer=1), cache["mlp_out", 0]),
        )
    stream, heads, neurons = found[name]
    print(f"{name + ':':<9} relative error of the sum: parts of the stream {stream:.2f}, ", end="")
    print(f"heads of layer 0 {heads:.2f}, neurons of layer 0 {neurons:.2f}")
sys.exit(0 if max(found["Llama"]) < 1e-3 and min(found["Gemma 2"]) > 0.3 else 1)
PYTHON
