#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0: training a few tokens (trainable_token_indices= of LoRA, or
# TrainableTokensConfig) is documented as doing nothing until trained. Where the head of a model is tied to its embedding, PEFT
# takes the head over as well, with the weight alone: the bias of the head is left out. So the untrained adapter changes every
# logit of BERT, RoBERTa and ModernBERT, and what is trained without the bias gets it back as soon as the adapter is merged,
# without an error or a warning.
#
# Seen: BertForMaskedLM        untrained adapter moves logits by 1.8, merged by 0; off from the head without its bias by 0
#       RobertaForMaskedLM     untrained adapter moves logits by 2.34, merged by 0; off from the head without its bias by 0
#       ModernBertForMaskedLM  untrained adapter moves logits by 3.14, merged by 0; off from the head without its bias by 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 peft==0.21.2 transformers==5.24.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

sizes = dict(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
kinds = {
    BertForMaskedLM: BertConfig(**sizes, **special),
    RobertaForMaskedLM: RobertaConfig(**sizes, **special),
    ModernBertForMaskedLM: ModernBertConfig(**sizes, **special, cls_token_id=1, sep_token_id=2),
}
torch.manual_seed(0)
ids = torch.randint(3, 48, (2, 7))
as_stated = []
for kind, config in kinds.items():
    model = kind(config).eval()
    with torch.no_grad():
        bias = model.get_output_embeddings().bias
        bias.normal_()
        before = model(ids).logits.clone()
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", trainable_token_indices=[5, 6])).eval()
        untrained = adapted(ids).logits
        merged = adapted.merge_and_unload()(ids).logits
    moved, back = float((untrained - before).abs().max()), float((merged - before).abs().max())
    without = float((untrained + bias - before).abs().max())
    print(f"{kind.__name__:<22} untrained adapter moves logits by {moved:.3g}, merged by {back:.0f}; ", end="")
    print(f"off from the head without its bias by {without:.0f}")
    as_stated.append(moved > 1 and back < 1e-4 and without < 1e-4)
sys.exit(0 if all(as_stated) else 1)
PYTHON
