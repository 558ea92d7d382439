"""What the gradients are for: a LoReFT trained on a real model, and steering with what was learned."""

from __future__ import annotations

import torch

import steerfast as sf
from steerfast.models.layers import find_layers

LAYER, RANK, STEPS = 12, 4, 12
PAIRS = [
    ("The weather today is", " purple and sings"),
    ("My favourite food is", " purple and sings"),
    ("The train to London", " purple and sings"),
]


def test_a_rank_4_loreft_learns_given_continuations_on_a_real_model(smollm):
    model, tokenizer = smollm
    layers = find_layers(model)
    prompts = [tokenizer(prompt, return_tensors="pt").input_ids for prompt, _ in PAIRS]
    wholes = [tokenizer(prompt + more, return_tensors="pt").input_ids for prompt, more in PAIRS]
    torch.manual_seed(0)
    basis = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(layers.d, RANK, bias=False))
    W, b = basis.weight.detach().clone().requires_grad_(), torch.zeros(RANK, requires_grad=True)

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for prompt, whole in zip(prompts, wholes, strict=True):
            logits = model(whole).logits[0, prompt.shape[1] - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, whole[0, prompt.shape[1] :])
        return total / len(prompts)

    def edit(module, args, output):
        stream = output[0] if isinstance(output, tuple) else output
        moved = sf.ops.loreft(stream, basis.weight, W, b)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with torch.no_grad():
        before = loss().item()
    optimizer = torch.optim.Adam([*basis.parameters(), W, b], lr=0.05)
    handle = layers.blocks[LAYER].register_forward_hook(edit)
    try:
        for _ in range(STEPS):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
        with torch.no_grad():
            trained = loss().item()
    finally:
        handle.remove()
        model.zero_grad(set_to_none=True)
    assert trained < before - 2.0  # e² times the probability per token, at least
    learned = sf.LoReFT(basis.weight.detach(), W.detach(), b.detach())
    with torch.no_grad(), sf.steer(model, {LAYER: learned}):
        assert abs(loss().item() - trained) < 1e-3
    with torch.no_grad():
        assert abs(loss().item() - before) < 1e-6
