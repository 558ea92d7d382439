#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0: SpinQuant turns the weights of a model by rotations that cancel, so that before quantisation the
# model is the same. Before R1, apply_spinquant takes the mean off each row of the embedding, which a LayerNorm would not see; the
# RMSNorm of the models it is for does, and they become other models. R2 turns the weights of the values and not their biases,
# which is another model where there are any (as in Qwen2). R4 is right, and so are R1 with embeddings of mean zero and R2 without
# biases.
#
# Seen: R1                                moves logits by 0.36 of 1.7
#       R1, embeddings of mean zero       moves logits by 0.00 of 1.7
#       R2                                moves logits by 0.00 of 1.7
#       R2, biases of queries and values  moves logits by 1.35 of 1.7
#       R4                                moves logits by 0.00 of 1.7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 torchao==0.18.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torchao.prototype.spinquant import apply_spinquant

DIM, HIDDEN, HEADS, WORDS = 32, 64, 4, 40


class Attention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.wqkv, self.wo = nn.Linear(DIM, 3 * DIM, bias=bias), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x):
        q, k, v = self.wqkv(x).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.attention, self.feed_forward = Attention(bias), FeedForward()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(DIM, eps=1e-5), nn.RMSNorm(DIM, eps=1e-5)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    """A small Llama, with the names that apply_spinquant looks for."""

    def __init__(self, bias):
        super().__init__()
        self.config = SimpleNamespace(dim=DIM, head_dim=DIM // HEADS, n_local_heads=HEADS, intermediate_size=HIDDEN)
        self.tok_embeddings, self.output = nn.Embedding(WORDS, DIM), nn.Linear(DIM, WORDS, bias=False)
        self.layers, self.norm = nn.ModuleList([Block(bias) for _ in range(2)]), nn.RMSNorm(DIM, eps=1e-5)

    def forward(self, ids):
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def moved(name, bias=False, centred=False, **rotations):
    torch.manual_seed(0)
    model, ids = Model(bias).eval(), torch.randint(0, WORDS, (2, 9))
    with torch.no_grad():
        if bias:
            for layer in model.layers:
                layer.attention.wqkv.bias.normal_()
        if centred:
            model.tok_embeddings.weight -= model.tok_embeddings.weight.mean(-1, keepdim=True)
        before = model(ids)
        apply_spinquant(model, **{"use_r4": False, **rotations})
        by = float((model(ids) - before).abs().max())
    print(f"{name:<33} moves logits by {by:.2f} of {float(before.abs().max()):.1f}")
    return by


wrong = [moved("R1", use_r1=True)]
right = [moved("R1, embeddings of mean zero", centred=True, use_r1=True), moved("R2", use_r2=True)]
wrong.append(moved("R2, biases of queries and values", bias=True, use_r2=True))
right.append(moved("R4", use_r4=True))
sys.exit(0 if min(wrong) > 0.1 and max(right) < 1e-2 else 1)
PYTHON
