#!/usr/bin/env bash
# tuned-lens 0.2.0, transformers 5.23.0, torch 2.13.0: Unembed maps hidden states to logits through the final norm and the unembedding, and its
# invert is to find the hidden state whose logits come nearest to given ones. It finds that state and returns, as the preimage, what the
# final norm makes of it. Put through Unembed again, this is normed a second time, with the weights and the bias of the norm, and gives other
# logits than those whose divergence is reported. (bias=False, an argument of TunedLens.from_model, is refused with an AttributeError.)
#
# Seen: GPTNeoXForCausalLM  divergence reported 0.073, of Unembed(preimage) 1.609, without the norm 0.073
#       LlamaForCausalLM    divergence reported 0.006, of Unembed(preimage) 0.449, without the norm 0.006
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 transformers==5.23.0 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps tuned-lens==0.2.0 2> /dev/null
"$folder/env/bin/python" -W ignore - 2> /dev/null << 'PYTHON'
import sys

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM
from tuned_lens.nn import Unembed

sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def divergence(target, logits):
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


as_stated = True
for kind, config in ((GPTNeoXForCausalLM, GPTNeoXConfig), (LlamaForCausalLM, LlamaConfig)):
    torch.manual_seed(0)
    model = kind(config(**sizes)).eval()
    norm = model.gpt_neox.final_layer_norm if config is GPTNeoXConfig else model.model.norm
    with torch.no_grad():
        for parameter in norm.parameters():  # a trained norm has weights of its own
            parameter.uniform_(0.5, 3)
        model.get_output_embeddings().weight.normal_()
    unembed = Unembed(model)
    target = unembed(torch.randn(4, 16))
    found = unembed.invert(target)
    again = divergence(target, unembed(found.preimage))
    without = divergence(target, unembed.unembedding(found.preimage))
    said = float(found.kl)
    print(f"{kind.__name__:<19} divergence reported {said:.3f}, of Unembed(preimage) {again:.3f}, without the norm {without:.3f}")
    as_stated &= abs(without - said) < 0.02 and again > said + 0.1
sys.exit(0 if as_stated else 1)
PYTHON
