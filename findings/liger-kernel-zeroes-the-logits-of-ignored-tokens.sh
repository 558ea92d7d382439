#!/usr/bin/env bash
# liger-kernel 0.8.5, transformers 5.23.0, torch 2.13.0, triton 3.9.0: its cross entropy is a drop-in for that of torch, in place of which
# apply_liger_kernel_to_llama(cross_entropy=True) puts it. It writes the gradient over the logits that it is given. Where nobody asks for
# a gradient (torch.no_grad) the logits stay, but not those of tokens with the label -100: these are set to 0. The loss is right;
# output.logits of the very same call says, of every token of a prompt that is left out of the loss, that all words are alike. Under
# autograd all of them are replaced. Run here in Triton's interpreter.
#
# Seen: torch                    loss 4.0420  rows of logits that are as before 9 of 9, all zero 0
#       liger-kernel, no_grad    loss 4.0420  rows of logits that are as before 3 of 9, all zero 6
#       liger-kernel, autograd   loss 4.0420  rows of logits that are as before 0 of 9, all zero 6
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 triton==3.9.0 transformers==5.23.0 liger-kernel==0.8.5 \
  numpy==2.4.6 2> /dev/null
TRITON_INTERPRET=1 "$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=48, initializer_range=0.2, **sizes)).eval()
ids = torch.randint(3, 48, (1, 9))
labels = ids.clone()
labels[:, :6] = -100
with torch.no_grad():
    before = model(input_ids=ids).logits[0]


def look(name):
    output = model(input_ids=ids, labels=labels)
    rows = output.logits[0].detach()
    same = int(torch.isclose(rows, before, atol=1e-5).all(-1).sum())
    zero = int((rows == 0).all(-1).sum())
    print(f"{name:<24} loss {output.loss:.4f}  rows of logits that are as before {same} of {len(rows)}, all zero {zero}")
    return float(output.loss.detach()), same, zero


with torch.no_grad():
    torch_loss, *torch_rows = look("torch")
apply_liger_kernel_to_llama(
    rope=False, rms_norm=False, swiglu=False, cross_entropy=True, fused_linear_cross_entropy=False
)
with torch.no_grad():
    loss, *rows = look("liger-kernel, no_grad")
_, *gradient_rows = look("liger-kernel, autograd")
# The label of a token is that of the next one: of the first six, five have a next one that is left out, and the last has none.
as_stated = torch_rows == [9, 0] and rows == [3, 6] and gradient_rows == [0, 6] and abs(loss - torch_loss) < 1e-4
sys.exit(0 if as_stated else 1)
PYTHON
