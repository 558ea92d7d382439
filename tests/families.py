"""Tiny models of real architectures with random weights: two or three layers, odd widths, norms that are not the
identity.

`build(name)` returns the model of `FAMILIES[name]`, or of `MULTIMODAL[name]`, in eval mode, float32, built once per
process and shared: a test that changes one must restore it. `CORE` names the families that every feature is tested on;
the rest is breadth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from steerfast.models.layers import find_layers

VOCAB = 101
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
_LLAMA = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_NEOX = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_FALCON = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": True}
_GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
}  # 4 heads of 16 in a stream of 48: the head width differs
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name -> (config class, its arguments)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen3": ("Qwen3Config", _LLAMA | {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", _LLAMA | _GEMMA),
    "gpt2": ("GPT2Config", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", _NEOX | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", _NEOX | {"use_parallel_residual": False}),
    "falcon": ("FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_parallel": ("FalconConfig", _FALCON | {"new_decoder_architecture": False, "parallel_attn": True}),
    "falcon_sequential": (
        "FalconConfig",
        _FALCON | {"new_decoder_architecture": False, "parallel_attn": False, "alibi": True, "multi_query": False},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 48, "n_layer": 3, "n_head": 4}),
    "olmo2": ("Olmo2Config", _LLAMA),
    "mistral": ("MistralConfig", _LLAMA | {"head_dim": 12, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", _LLAMA),
    "gemma2": ("Gemma2Config", _LLAMA | _GEMMA),
    "phi": ("PhiConfig", _NEOX),
    "phi3": ("Phi3Config", _LLAMA),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": 48,
            "ffn_dim": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 48,
        },
    ),
    "gptj": ("GPTJConfig", {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 8}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 128,
        },
    ),
    "mpt": ("MptConfig", {"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    "cohere": ("CohereConfig", _LLAMA),
    "granite": ("GraniteConfig", _LLAMA | {"residual_multiplier": 0.22}),
    "glm4": ("Glm4Config", _LLAMA | {"head_dim": 12}),
    "mixtral": ("MixtralConfig", _LLAMA | _MOE),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _LLAMA
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
    ),
    "gpt_oss": ("GptOssConfig", _LLAMA | _MOE | {"head_dim": 16, "sliding_window": 8}),
    "bamba": ("BambaConfig", _LLAMA | _MAMBA | {"attn_layer_indices": [1]}),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        _LLAMA
        | _MAMBA
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "shared_intermediate_size": 40,
            "residual_multiplier": 0.22,
        },
    ),
    "lfm2": ("Lfm2Config", _LLAMA | {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}),
}

# Vision-language models: name -> (config class, its arguments, text config class, the text config's arguments)
IMAGE_TOKEN = 100
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
MULTIMODAL: dict[str, tuple[str, dict, str, dict]] = {
    "llava": (
        "LlavaConfig",
        {"vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": IMAGE_TOKEN},
        "LlamaConfig",
        _LLAMA,
    ),
    "gemma3_vl": (
        "Gemma3Config",
        {
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 99,
            "eoi_token_index": 98,
        },
        "Gemma3TextConfig",
        _LLAMA | _GEMMA,
    ),
    "qwen2_vl": (
        "Qwen2VLConfig",
        {
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 48,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 99,
            "vision_start_token_id": 98,
            "vision_end_token_id": 97,
        },
        "Qwen2VLTextConfig",
        _LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}},
    ),
}

# The experts of these multiply the tokens of all rows together, so a row's last bits depend on its batch-mates.
MIXTURES = ("mixtral", "qwen2_moe", "gpt_oss")

CORE = (
    "llama",
    "qwen3",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gpt_neox_sequential",
    "falcon",
    "falcon_parallel",
    "falcon_sequential",
    "bloom",
    "olmo2",
)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draw every parameter anew: matrices so that a layer's output is of the size of its input, norms and biases off
    their defaults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.15 * noise)
            else:
                parameter.add_(0.2 * noise)


@cache
def build(name: str) -> PreTrainedModel:
    """The tiny model of one family; always the same object, always the same weights."""
    if name in MULTIMODAL:
        config_class, arguments, text_class, text = MULTIMODAL[name]
        inner = getattr(transformers, text_class)(**_TOKENS | text).to_dict()
        config = getattr(transformers, config_class)(**arguments, text_config=inner, tie_word_embeddings=False)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    else:
        config_class, arguments = FAMILIES[name]
        config = getattr(transformers, config_class)(**_TOKENS | arguments)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model)
    return model.float().eval()


def token_ids(batch: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Random token ids, (batch, length), none of them a special token."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


class Counter:
    """A backend of torch.compile that counts what it compiles and otherwise runs the traced graph."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


@contextmanager
def edited(model: Any, layer: int = 1) -> Iterator[list[list[str]]]:
    """Of each pass and row, the columns where what leaves a block is not what the block has made."""
    block, own, found = find_layers(model).blocks[layer], [], []  # type: ignore[var-annotated]
    forward = block.forward

    def first(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    def note(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        own.append(first(output).detach().clone())
        return output

    def compare(module: Any, args: Any, output: Any) -> None:
        differs = (first(output) != own.pop()).any(-1)
        found.append(["".join(str(int(bit)) for bit in row) for row in differs])

    block.forward = note
    hook = block.register_forward_hook(compare)
    try:
        yield found
    finally:
        hook.remove()
        del block.forward
