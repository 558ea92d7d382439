"""A tiny random model of every transformers type that has a text decoder: width 48, 4 blocks, a vocabulary of 128.

`pairs()` lists the (mapping, type, class) of the installed transformers, `build(kind, class_name)` makes one of them, float32
and in eval mode, `inputs(model, ids)` returns what its forward needs beside the ids. No type has code of its own: the default
config is made small field by field, by the field's name (`SIZES`), and `CHANGES` says what the names cannot.

    python tests/zoo.py                  try every pair, print the outcomes (minutes)
    python tests/zoo.py llama mamba2     these types only
    python tests/zoo.py --write          every pair; writes tests/data/zoo.json and docs/models.md
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a config that names a model on the hub must not fetch it

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, BLOCKS, VOCABULARY, CONTEXT = 48, 4, 128, 128
TOWER = 2  # blocks of a vision or audio tower: fewer, so that the decoder's list is the only one of its length
LARGEST = 20_000_000  # parameters; a model above it was not made small
PAD, BOS, EOS, IMAGE = 0, 1, 2, 120

# --- sizes by the name of the field ------------------------------------------------------------------------------------

_BY_VALUE: tuple[tuple[int, str], ...] = (
    (
        VOCABULARY,
        "vocab_size text_vocab_size encoder_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size n_words",
    ),
    (VOCABULARY, "vocab_size_per_layer_input audio_vocab_size unpadded_vocab_size"),
    (WIDTH, "hidden_size d_model n_embd n_embed dim dim_model model_dim hidden_dim emb_dim embed_dim embedding_size"),
    (WIDTH, "text_hidden_size text_dim text_embed_dim lm_hidden_size language_hidden_size backbone_hidden_size"),
    (WIDTH, "encoder_hidden_size decoder_hidden_size cross_attention_hidden_size token_hidden_size mm_hidden_size"),
    (
        WIDTH,
        "projection_dim projection_size proj_dim projector_hidden_size out_hidden_size output_dim word_embed_proj_dim",
    ),
    (WIDTH, "attention_hidden_size lru_width adapter_in_dim adapter_out_dim adapter_input_size hidden_size_global"),
    (BLOCKS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers decoder_num_layers"),
    (BLOCKS, "n_decoder_layers encoder_layers"),  # as many on both sides, as in BART: the harder case
    (TOWER, "num_encoder_layers encoder_num_hidden_layers num_hidden_layers_encoder depth"),
    (4, "num_attention_heads num_attn_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
    (2, "num_key_value_heads num_kv_heads n_kv_heads kv_n_heads multi_query_group_num swa_num_key_value_heads"),
    (16, "head_dim attention_head_dim d_head kv_channels global_head_dim swa_head_dim"),
    (40, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff dim_ff dff mlp_dim n_inner d_inner inner_dim"),
    (
        40,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size",
    ),
    (40, "moe_shared_expert_intermediate_size expert_ffn_hidden_size ffn_hidden_size ffn_intermediate_size"),
    (
        40,
        "intermediate_size_mlp dense_intermediate_size feed_forward_size feedforward_size mlp_hidden_size block_ff_dim",
    ),
    (40, "feed_forward_proj_dim prefix_ffn_dim"),
    (4, "num_experts n_experts num_local_experts n_routed_experts num_routed_experts moe_num_experts num_moe_experts"),
    (
        2,
        "num_experts_per_tok num_experts_per_token top_k_experts router_top_k moe_router_topk moe_topk moe_top_k moe_k",
    ),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts"),
    (1, "n_group topk_group num_expert_group num_expert_groups expert_group_num"),
    (16, "q_lora_rank kv_lora_rank o_lora_rank qk_lora_rank"),
    (8, "qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim index_head_dim indexer_head_dim"),
    (2, "index_n_heads index_num_heads indexer_n_heads"),
    (CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length max_length seq_length"),
    (CONTEXT, "max_source_positions max_target_positions"),
    (16, "sliding_window sliding_window_size window_size attention_window_size local_attention"),
    (16, "image_size img_size num_mel_bins"),
    (8, "patch_size spatial_patch_size"),
    (8, "ssm_state_size state_size d_state mamba_d_state time_step_rank"),
    (4, "mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size"),
    (24, "mamba_d_head mamba_head_dim"),
    (1, "mamba_n_groups mamba_ngroups"),
    (8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (2, "linear_num_key_heads linear_num_value_heads"),
    (1, "first_k_dense_replace moe_layer_start_index num_dense_layers"),  # both kinds of block in four
    (0, "num_nextn_predict_layers num_kv_shared_layers"),
    (8, "hidden_size_per_layer_input laurel_rank"),
)
SIZES = {name: value for value, names in _BY_VALUE for name in names.split()}

_LABELS = {
    "transformers_version",
    "model_type",
    "architectures",
    "id2label",
    "label2id",
    "_name_or_path",
    "dtype",
    "torch_dtype",
}
_LABELS |= {"num_labels", "per_layer_config"}
_TOWER = re.compile(r"vision|vit|image|vq|audio|speech|qformer|encoder_config|conv")
_TOKEN = re.compile(r"(token_id|token_index|_token|_id)$")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers")

# --- what the names do not say -----------------------------------------------------------------------------------------

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_DECODER = {"is_decoder": True}  # encoders by default


def _sections(*sizes: int, **more: Any) -> dict[str, Any]:
    """Rotary embeddings in three (four) dimensions; the sections share half the head."""
    return {"text_config.rope_parameters": {**_ROPE, "mrope_section": list(sizes), **more}}


def _each(types: str, changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The same changes for several types."""
    return dict.fromkeys(types.split(), changes)


_NGRAMS = {  # qwen4_exp: its indexer and its table of n-grams
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 200,
}
_COMPASS = {"full_attention": _ROPE, "sliding_attention": _ROPE}  # a rotary embedding for each kind of layer
_VQ = {"vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1], "vq_config.num_res_blocks": 1}
_TWO_QUERIES = {"num_query_tokens": 2, "image_token_index": IMAGE}  # the image fills the first two tokens
_NO_KERNELS = {"use_mamba_kernels": False}

CHANGES: dict[str, dict[str, Any]] = {
    # decoders that are encoders unless told
    **_each("bert bert-generation camembert data2vec-text electra ernie megatron-bert rembert roberta", _DECODER),
    **_each("roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl", _DECODER),
    "big_bird": {**_DECODER, "attention_type": "original_full"},  # block-sparse wants hundreds of tokens
    "roc_bert": {**_DECODER, "shape_vocab_size": 50, "pronunciation_vocab_size": 50},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    # which block is of which kind, so that four hold every kind
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": _COMPASS, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"] * 2, "text_config.num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "idefics": {"cross_layer_interval": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, **_NO_KERNELS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    # head widths that must fit each other
    "falcon_h1": {"mamba_d_ssm": 96},
    "helium": {"head_dim": 12},
    "mamba2": {"num_heads": 4, "head_dim": 24, "n_groups": 1},
    **_each("hunyuan_v1_dense hunyuan_v1_moe ministral", {"head_dim": 16}),
    "nemotron": {"num_key_value_heads": 2, "head_dim": 12},
    "nemotron_h": {"n_groups": 1},
    "xlnet": {"d_head": 12, "d_inner": 40},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "dots3_note_text": {"head_dim": 16, "v_head_dim": 16, "per_layer_config": {}},
    "dots3_note": {"text_config.head_dim": 16, "text_config.v_head_dim": 16, "text_config.per_layer_config": {}},
    "kosmos-2": {"text_config.attention_heads": 4, "text_config.layers": 4, "latent_query_num": 2},
    "pix2struct": {"text_config.d_kv": 12, "text_config.num_heads": 4},
    "longcat_flash": {"head_dim": 8},  # the rotary part of a head, here by another name
    # configs inside configs that are plain dicts
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
    },
    # sizes of tables, patches and chunks
    "blt": {  # bytes; the rotary embeddings have heads of d / heads, whatever head_dim says
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
        "vocab_size": 260,
        **{f"{part}_config.vocab_size": 260 for part in ("encoder", "decoder", "patcher")},
        **{f"{part}_config.head_dim": 12 for part in ("decoder", "global", "patcher")},
    },
    "qwen4_exp_text": _NGRAMS,
    "qwen4_exp": {f"text_config.{name}": value for name, value in _NGRAMS.items()},
    "reformer": {
        **_DECODER,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 32],
        "attn_layers": ["local"] * 4,  # hashing attention draws random numbers
        "attention_head_size": 12,
        "local_attn_chunk_length": 4,
    },
    "xlstm": {
        "hidden_size": 64,  # head widths are rounded up to multiples of 64
        "embedding_dim": 64,
        "num_blocks": 4,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 1.0,
        "autocast_kernel_dtype": "float32",
    },
    "zamba": {
        "attention_hidden_size": 96,  # attends to the stream beside the embeddings
        "attention_head_dim": 24,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 8,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "hybrid"],
        **_NO_KERNELS,
    },
    "zamba2": {
        "attention_hidden_size": 96,
        "kv_channels": None,
        "num_query_groups": None,
        "attention_head_dim": 24,
        "num_key_value_heads": 4,
        "n_mamba_heads": 4,
        "mamba_headdim": 24,
        "adapter_rank": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        **_NO_KERNELS,
    },
    # no number of experts by default
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    # rotary embeddings
    "stablelm": {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "cohere_compass": {"text_config.rope_parameters": _COMPASS},
    "ernie4_5_vl_moe": _sections(2, 2, 2),
    **_each("qwen2_vl qwen2_5_vl", _sections(2, 2, 2)),
    "qwen2_5_omni_thinker": {"vision_start_token_id": 125, **_sections(2, 2, 2)},  # in the files, not in the class
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 125},
    **_each("glm4v glm46v glm_ocr glmga", _sections(2, 2, 2, partial_rotary_factor=1.0)),
    "glm4v_moe": _sections(1, 1, 1, partial_rotary_factor=0.5),
    "hunyuan_vl": {"text_config.head_dim": 16, **_sections(2, 2, 2, 2)},
    "paddleocr_vl": _sections(2, 3, 3),
    "glm5_next": {"text_config.qk_rope_head_dim": 0},  # its own rotary part is added to this
    "cosmos3_edge": {  # what its own defaults say elsewhere contradicts the small sizes: a text config of its own
        "text_config": {
            "hidden_size": WIDTH,
            "intermediate_size": 40,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": VOCABULARY,
            "rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]},
        }
    },
    # towers and the tokens that stand for an image
    **_each("blip-2 instructblip", _TWO_QUERIES),
    "instructblipvideo": {"num_query_tokens": 2, "video_token_index": IMAGE},
    "chameleon": {**_VQ, "vocabulary_map": {"<image>": IMAGE, "IMGIMGBAZ": 119, "IMGIMGBBZ": 118}},
    "emu3:Emu3ForConditionalGeneration": {
        **_VQ,
        "vocabulary_map": {
            "<|extra_200|>": 110,
            "<image>": IMAGE,
            **{f"<|visual token {number:06d}|>": 100 + number for number in range(8)},
        },
    },
    "florence2": {
        "vision_config.depths": [1, 1, 1, 1],
        "vision_config.embed_dim": [16, 16, 32, 32],
        "vision_config.num_heads": [2, 2, 2, 2],
        "vision_config.num_groups": [2, 2, 2, 2],
        "vision_config.projection_dim": WIDTH,
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,  # its Q-former has a head for every 64
        "deepstack_layer_map": [],
        "spatial_target_layers": [],
        "spatial_vision_layer": 1,
    },
    "janus": _VQ,
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "nemotron_h_omni": {"text_config.n_groups": 1, "vision_config.video_temporal_patch_size": 2},
    "muse_spark": {"audio_config.out_hidden_size": WIDTH},
    "hy_v4_vl": _sections(2, 1, 1),
    "step3p7": {"text_config.sliding_window": 16},
    "prophetnet": {"num_encoder_layers": BLOCKS, "ngram": 2},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 40,
    },
}


def tiny_config(config_class: type, changes: dict[str, Any] | None = None, path: str = "") -> Any:
    """The default config of a class, made small.

    `changes` replace fields; "text_config.head_dim" is one inside, and a dict for a nested config is all of that config.
    """
    changes = changes or {}
    default = config_class()
    fields = {name: _field(default, name, value) for name, value in default.to_dict().items() if name not in _LABELS}
    depth = next((fields[name] for name in _DEPTHS if isinstance(fields.get(name), int)), None)
    tower = _TOWER.search(path) is not None
    nested: dict[str, type] = getattr(config_class, "sub_configs", None) or {}
    arguments: dict[str, Any] = {}
    for name, value in fields.items():
        if name in changes:
            continue
        if name in nested or hasattr(value, "to_dict"):
            inner = type(value) if hasattr(value, "to_dict") else nested[name]
            if inner.__name__ in ("AutoConfig", "PreTrainedConfig", "PretrainedConfig"):
                continue
            below = {key.partition(".")[2]: new for key, new in changes.items() if key.startswith(f"{name}.")}
            arguments[name] = tiny_config(inner, below, f"{path}.{name}")
        elif isinstance(value, (list, tuple)) and depth and len(value) == depth and name != "conv_dim":
            arguments[name] = _per_block(list(value), TOWER if tower else BLOCKS)
        else:
            small = _small(name, value, tower)
            if small is not None:
                arguments[name] = small
    if (
        "qk_rope_head_dim" in fields
    ):  # latent attention: a head's width is the sum of its parts, and all heads have keys
        arguments.pop("head_dim", None)
        arguments["num_key_value_heads"] = 4
    for name, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
        if name in fields:
            arguments[name] = token
    arguments |= {name: new for name, new in changes.items() if "." not in name}
    return config_class(**arguments)


def _field(config: Any, name: str, value: Any) -> Any:
    """A field as the config's own object; as stored, where it differs between layers and has no one value."""
    try:
        return getattr(config, name, value)
    except RuntimeError:
        return value


def _small(name: str, value: Any, tower: bool) -> Any:
    """The tiny value of one field, None to leave the default."""
    if isinstance(value, float):
        return 0.0 if "drop" in name or "jitter" in name else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name in SIZES:
        return TOWER if tower and SIZES[name] == BLOCKS and "layer" in name else SIZES[name]
    if name in ("decoder_start_token_id",):
        return BOS
    if _TOKEN.search(name) and value >= VOCABULARY:  # image, audio and other placeholders, each another token
        return VOCABULARY - 1 - sum(map(ord, name)) % 20
    return None


def _per_block(values: list[Any], count: int) -> list[Any]:
    """A list with one entry a block: every kind that occurs, in turn."""
    if all(isinstance(value, int) and not isinstance(value, bool) and value >= 64 for value in values):
        return [40] * count
    kinds = [value for place, value in enumerate(values) if value not in values[:place]]
    return [kinds[place % len(kinds)] for place in range(count)]


# --- models --------------------------------------------------------------------------------------------------------------

MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}


def pairs() -> Iterator[tuple[str, str, str]]:
    """(mapping, type, class name) of the installed transformers, each (type, class) once."""
    seen = set()
    for mapping, attribute in MAPPINGS.items():
        for kind, names in getattr(modeling_auto, attribute).items():
            for name in (names,) if isinstance(names, str) else names:
                if (kind, name) not in seen:
                    seen.add((kind, name))
                    yield mapping, kind, name


def config_of(kind: str, class_name: str) -> Any:
    """The tiny config that a class wants; where it is the text half of a type, the text config."""
    changes = CHANGES.get(f"{kind}:{class_name}", CHANGES.get(kind))
    config = tiny_config(CONFIG_MAPPING[kind], changes)
    wanted = getattr(getattr(transformers, class_name), "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        halves = [getattr(config, name, None) for name in ("text_config", "decoder")]
        config = next((half for half in halves if isinstance(half, wanted)), config)
    return config


def build(kind: str, class_name: str) -> nn.Module:
    """The tiny model of one pair: float32, eval mode, random weights, the same at every call.

    Raises:
        Exception: whatever transformers raises; ValueError where the model did not become small.
    """
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):  # weighed before it is made
        shadow = model_class(config_of(kind, class_name))
    size = sum(parameter.numel() for parameter in shadow.parameters())
    if size > LARGEST:
        name, largest = max(shadow.named_parameters(), key=lambda item: item[1].numel())
        raise ValueError(f"{size / 1e6:.0f} million parameters; the largest is {name}, {tuple(largest.shape)}")
    torch.manual_seed(0)
    config = config_of(kind, class_name)
    make: Callable[[Any], nn.Module] = getattr(model_class, "_from_config", model_class)
    model = make(config).float().eval()
    randomise(model)
    return model


_DYNAMICS = re.compile(r"A_log|dt_bias|time_decay|time_first|lambda|igate|fgate|a_param")


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Draw every parameter anew, so that a layer's output is of the size of its input; norms and biases off their defaults.

    The constants of a recurrence keep their start values: drawn at random, a state would explode. What transformers
    leaves uninitialised is set to 0.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if not parameter.isfinite().all():
                parameter.zero_()
            if _DYNAMICS.search(name):
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if id(parameter) in embeddings:
                parameter.copy_(0.7 * noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(_inputs_of(parameter)))
            else:
                parameter.add_(0.1 * noise)
        for name, buffer in model.named_buffers():
            real = buffer is not None and buffer.is_floating_point() and buffer.device.type != "meta"
            if real and not buffer.isfinite().all() and "mask" not in name:
                buffer.zero_()


def _inputs_of(weight: Tensor) -> int:
    """How many numbers each output of a weight sums over."""
    if weight.ndim == 2:
        return weight.shape[1]
    return max(weight.shape[1:]) if weight.ndim == 3 else weight[0].numel()  # a stack of experts; a convolution


# --- what a forward needs beside the ids -----------------------------------------------------------------------------------


def _picture(rows: int, *shape: int) -> Tensor:
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0))


def _queries(model: Any, ids: Tensor) -> dict[str, Any]:
    """BLIP-2 and its kin: the image's features replace the first tokens."""
    config, name, rows = model.config, type(model).__name__, ids.shape[0]
    ids = ids.clone()
    token = next(
        getattr(config, field) for field in ("video_token_index", "image_token_index") if hasattr(config, field)
    )
    ids[:, : config.num_query_tokens] = token
    picture = _picture(rows, 3, 16, 16)
    given: dict[str, Any] = {"input_ids": ids, "pixel_values": picture[:, None] if "Video" in name else picture}
    if "Instruct" in name:
        given["qformer_input_ids"] = torch.full((rows, 3), 5)
    return given


def _encoder(model: Any, ids: Tensor) -> dict[str, Any]:
    return {"input_ids": torch.full_like(ids, 7), "decoder_input_ids": ids}


INPUTS: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "blip": lambda model, ids: {"pixel_values": _picture(ids.shape[0], 3, 16, 16)},
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _queries),
    "idefics": lambda model, ids: {
        "pixel_values": _picture(ids.shape[0], 1, 3, 16, 16),
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
    },
    "kosmos-2": lambda model, ids: {
        "pixel_values": _picture(ids.shape[0], 3, 16, 16),
        "image_embeds_position_mask": (torch.arange(ids.shape[1]) < 2).expand(ids.shape),
    },
    # one row a codebook
    **dict.fromkeys(
        ("musicgen:MusicgenForCausalLM", "musicgen_melody:MusicgenMelodyForCausalLM"),
        lambda model, ids: {"input_ids": ids.repeat_interleave(model.config.num_codebooks, 0)},
    ),
    "udop": lambda model, ids: _encoder(model, ids) | {"bbox": torch.zeros(*ids.shape, 4)},
    "pix2struct": lambda model, ids: {
        "flattened_patches": torch.ones(ids.shape[0], 4, model.config.vision_config.patch_embed_hidden_size + 2),
        "decoder_input_ids": ids,
    },
    "vision-encoder-decoder": lambda model, ids: {
        "pixel_values": _picture(ids.shape[0], 3, 16, 16),
        "decoder_input_ids": ids,
    },
}


def inputs(kind: str, model: Any, ids: Tensor) -> dict[str, Any]:
    """The arguments of a forward on ids (rows, tokens), input_ids included."""
    make = INPUTS.get(f"{kind}:{type(model).__name__}", INPUTS.get(kind))
    if make is not None:
        return {"input_ids": ids} | make(model, ids)
    if (
        getattr(model.config, "is_encoder_decoder", False)
        and "decoder_input_ids" in signature(model.forward).parameters
    ):
        return _encoder(model, ids)
    return {"input_ids": ids}


def main(words: list[str]) -> None:
    """The command: see the docstring of this file."""
    import zoo_checks
    import zoo_runner
    import zoo_table

    names = {word for word in words if not word.startswith("-")}
    if names and "--write" in words:
        raise SystemExit("--write needs every pair: name no types")
    mappings = {f"{kind} {name}": mapping for mapping, kind, name in pairs() if not names or {kind, name} & names}
    jobs = next((int(word.partition("=")[2]) for word in words if word.startswith("--jobs=")), 1)
    results = zoo_runner.run_all([tuple(pair.split()) for pair in mappings], jobs, progress=zoo_runner.say)
    for check, counts in zoo_table.totals(
        {name: one["outcomes"] for name, one in results.items()}, zoo_checks.CHECKS
    ).items():
        told = ", ".join(f"{outcome} {count}" for outcome, count in counts.most_common())
        zoo_runner.say(f"{check:20}{told}")
    if "--write" in words:
        zoo_table.write(results, mappings, transformers.__version__)


if __name__ == "__main__":
    main(sys.argv[1:])
