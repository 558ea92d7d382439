"""Control vectors in llama.cpp itself: its logits, with a file of ours, equal those of the hooked model.

llama-cpp-python comes as source alone and compiles for ten minutes, so nothing installs it for these tests; see docs/tools.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, token_ids

import steerfast as sf
from steerfast.directions.direction import Direction
from steerfast.integrations import gguf
from steerfast.place import Origin
from steerfast.tools.convert import convert

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: docs/tools.md says how")
library = pytest.importorskip("gguf")

CLOSE = 1e-4
"""Of logits up to 25: float32 on both sides, in another order of summation, through 30 layers."""


class LlamaCpp:
    """A model in llama.cpp, float32 throughout: weights, cache, attention."""

    def __init__(self, path: Path) -> None:
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        assert self.model
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch = 64, 2, 2
        context.type_k = context.type_v = llama_cpp.GGML_TYPE_F32
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        assert self.context
        self.layers = llama_cpp.llama_model_n_layer(self.model)
        self.width = llama_cpp.llama_model_n_embd(self.model)

    def control(self, path: Path) -> None:
        """What `common_control_vector_load` and llama-cli make of a file: every layer from 1, float32."""
        rows: dict[int, Any] = {}
        for tensor in library.GGUFReader(path).tensors:
            assert tensor.tensor_type == library.GGMLQuantizationType.F32
            rows[int(tensor.name.removeprefix("direction."))] = np.asarray(tensor.data)
        data = np.zeros((max(rows), self.width), np.float32)
        for layer, row in rows.items():
            data[layer - 1] = row
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert not llama_cpp.llama_set_adapter_cvec(self.context, pointer, data.size, self.width, 1, self.layers)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.flatten().tolist()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        assert llama_cpp.llama_decode(self.context, batch) == 0
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        flat = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (len(tokens) * vocabulary,))
        found = torch.from_numpy(flat.copy()).view(1, len(tokens), vocabulary)
        llama_cpp.llama_batch_free(batch)
        return found

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def write_model(path: Path, model: Any) -> Path:
    """A Llama as a float32 GGUF without a tokenizer."""
    config, state = model.config, model.state_dict()
    writer = library.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")

    def put(name: str, key: str, heads: int = 0) -> None:
        weight = state[key].float().numpy()
        if heads:  # transformers turns halves of a head, llama.cpp neighbours
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight))

    put("token_embd", "model.embed_tokens.weight")
    put("output_norm", "model.norm.weight")
    if not config.tie_word_embeddings:
        put("output", "lm_head.weight")
    for i in range(config.num_hidden_layers):
        block = f"model.layers.{i}."
        put(f"blk.{i}.attn_norm", f"{block}input_layernorm.weight")
        put(f"blk.{i}.ffn_norm", f"{block}post_attention_layernorm.weight")
        put(f"blk.{i}.attn_q", f"{block}self_attn.q_proj.weight", config.num_attention_heads)
        put(f"blk.{i}.attn_k", f"{block}self_attn.k_proj.weight", config.num_key_value_heads)
        put(f"blk.{i}.attn_v", f"{block}self_attn.v_proj.weight")
        put(f"blk.{i}.attn_output", f"{block}self_attn.o_proj.weight")
        for name in ("gate", "up", "down"):
            put(f"blk.{i}.ffn_{name}", f"{block}mlp.{name}_proj.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hooked(model: Any, ids: torch.Tensor, plan: Any) -> torch.Tensor:
    with torch.no_grad(), sf.steer(model, plan):
        return model(ids).logits


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCpp]:
    engine = LlamaCpp(write_model(tmp_path_factory.mktemp("gguf") / "tiny.gguf", build("llama")))
    yield engine
    engine.close()


def test_a_plan_converted_to_gguf_is_what_llama_cpp_adds(tiny: LlamaCpp, tmp_path: Path) -> None:
    """Several additions at one layer, one of them before the next block."""
    model, ids = build("llama"), token_ids(1, 9)
    u, v, w = torch.randn(3, 48)
    plan = sf.Plan({1: [sf.Add(u, 2.0), sf.Add(v, -0.5)], ("resid_pre", 2): sf.Add(w), 2: sf.Add(v)}, model=model)
    tiny.control(convert(plan.save(tmp_path / "plan"), tmp_path / "plan.gguf", "gguf", strength=1.5))
    with torch.no_grad():
        clean = model(ids).logits
        with sf.steer(model, plan, strength=1.5):
            expected = model(ids).logits
    assert (clean - expected).abs().max() > 1.0
    torch.testing.assert_close(tiny.logits(ids), expected, rtol=0, atol=CLOSE)


def test_a_vector_set_before_leaves_nothing_behind(tiny: LlamaCpp, tmp_path: Path) -> None:
    """llama.cpp keeps the layers of a longer vector that a shorter one does not name: ours name every one."""
    model, ids, v = build("llama"), token_ids(1, 9), torch.randn(48)
    first, second = sf.Plan({2: sf.Add(v, 5.0)}, model=model), sf.Plan({1: sf.Add(v)}, model=model)
    for plan, name in ((first, "first"), (second, "second")):
        tiny.control(convert(plan.save(tmp_path / name), tmp_path / f"{name}.gguf", "gguf"))
        torch.testing.assert_close(tiny.logits(ids), hooked(model, ids, plan), rtol=0, atol=CLOSE)


@pytest.mark.model
def test_a_real_model_at_every_layer(smollm: Any, tmp_path: Path) -> None:
    """SmolLM2: a vector of 20 % of a row at each layer from 1 to the last, a file each, in one context.

    Against the hooked model in float64: in float32 transformers itself is up to 1.2e-4 away from that, llama.cpp 6.2e-5.
    """
    model, tokenizer = smollm
    exact = deepcopy(model).double()
    engine = LlamaCpp(write_model(tmp_path / "smollm.gguf", model))
    ids = tokenizer("I hate you because", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    worst = {}
    for layer in range(1, engine.layers):
        v = torch.randn(engine.width)
        v *= 0.2 * float(out.hidden_states[layer].norm(dim=-1).median()) / float(v.norm())
        given = Direction(v, "random", 1.0, Origin(place=layer))
        engine.control(gguf.write(tmp_path / "vector.gguf", given, layers=engine.layers))
        expected = hooked(exact, ids, {layer: sf.Add(v)})
        assert (expected - out.logits).abs().max() > 0.1
        worst[layer] = float((engine.logits(ids) - expected).abs().max())
    engine.close()
    print(worst)  # noqa: T201 (pytest -s shows it)
    assert set(worst) == set(range(1, 30))
    assert max(worst.values()) <= CLOSE, worst
