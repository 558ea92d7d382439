"""The models of the suites that need one: SmolLM2-135M where it can be had, a Llama 3.1 8B in shape on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lab.case import Inputs, NotHere
from setting import PLACE, pick
from torch import Tensor

from steerfast.models import demo as demo_model
from steerfast.models.layers import find_layers

LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
}  # fmt: skip
SMALL = {**LLAMA, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def real() -> Any:
    """SmolLM2-135M-Instruct in float32."""
    try:
        return demo_model.load()[0]
    except (OSError, RuntimeError, ImportError) as error:
        raise NotHere(f"the demo model cannot be had here: {error}") from None


def shaped() -> Any:
    """The model of the engines' suite: random weights on a GPU and in the rehearsal, SmolLM2 on a CPU."""
    if PLACE == "cpu":
        return real()
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device(pick("cuda", "cpu", "cpu")):
        torch.set_default_dtype(pick(torch.bfloat16, torch.float32, torch.float32))
        try:
            return LlamaForCausalLM(LlamaConfig(**pick(LLAMA, SMALL, SMALL))).eval()
        finally:
            torch.set_default_dtype(torch.float32)


def one_layer(width: int) -> Any:
    """A model of one layer with random weights, on a CPU: something to run a hook in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SMALL | {"hidden_size": width, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def twin(model: Any) -> Any:
    """The same weights under modules of their own, so that hooks on one do not reach the other."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def vectors(model: Any, layers: list[int]) -> dict[int, Tensor]:
    """A small random vector per layer."""
    weight = next(model.parameters())
    return {i: 0.01 * torch.randn(model.config.hidden_size, device=weight.device).to(weight.dtype) for i in layers}


def bare_hooks(model: Any, vectors: dict[int, Tensor]) -> Callable[[], Any]:
    """The plain way: a forward hook per layer that adds."""
    blocks = find_layers(model).blocks

    def adder(vector: Tensor) -> Callable[..., Any]:
        def add(module: Any, args: Any, output: Any) -> Any:
            return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

        return add

    @contextmanager
    def around() -> Iterator[None]:
        with ExitStack() as stack:
            for layer, vector in vectors.items():
                stack.enter_context(blocks[layer].register_forward_hook(adder(vector)))
            yield

    return around


def generation(model: Any, rows: int, prompt: int, tokens: int, **options: Any) -> Callable[[], Tensor]:
    """A call that generates greedily and returns the logits of every step, (tokens, rows, vocabulary)."""
    same = torch.Generator().manual_seed(0)  # every function gets the same prompt
    ids = torch.randint(5, model.config.vocab_size, (rows, prompt), generator=same).to(next(model.parameters()).device)
    settings: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0,
        "return_dict_in_generate": True, "output_logits": True, **options,
    }  # fmt: skip

    def generate() -> Tensor:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return torch.stack(out.logits).float()

    return generate


def same_logits(true: Callable[[], Tensor], allowed: float) -> Callable[[Inputs], Callable[[Any], float]]:
    """Judge by the logits of the first two steps, to a share of the largest; later ones may follow another near tie."""

    def judge(inputs: Inputs) -> Callable[[Any], float]:
        wanted = true()[:2]
        return lambda got: float(((got[:2] - wanted).abs().max() / (allowed * wanted.abs().max())).item())

    return judge
