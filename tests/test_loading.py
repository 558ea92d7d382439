"""Models as people load them: spread over devices by accelerate, offloaded to disk, quantised by torchao or bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Counter, build, randomise, token_ids

import steerfast as sf

WIDTH = 64


@cache
def llama() -> Any:
    """The tiny llama in widths that bitsandbytes can pack: of every linear map in a block, 32 divides the outputs and 64,
    a block of weights with one scale, the inputs. The MLP's 192 make a row of three such blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    widths = {"hidden_size": WIDTH, "intermediate_size": 192, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**build("llama").config.to_dict() | widths))
    randomise(model)
    return model.float().eval()


def mapped(folder: Path) -> Any:
    """`device_map="auto"`: on a machine without GPUs all on the CPU, and no hook of accelerate's."""
    pytest.importorskip("accelerate")
    model = _load(folder, device_map="auto")
    assert not hasattr(model.model.layers[1], "_hf_hook") or torch.cuda.is_available()
    return model


def spread(folder: Path) -> Any:
    """accelerate's hooks in every module, as where a model fills several devices."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(_load(folder), {"": "cpu"}, main_device="cpu", force_hooks=True)


def offloaded(folder: Path) -> Any:
    """Two of three blocks on disk: their weights are on the meta device whenever the block does not run."""
    pytest.importorskip("accelerate")
    here = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    model = _load(folder, device_map=places, offload_folder=str(folder / "offload"))
    assert next(model.model.layers[1].parameters()).is_meta
    return model


def on_disk(folder: Path) -> Any:
    """All of it on disk, the embedding that takes the inputs, too."""
    pytest.importorskip("accelerate")
    return _load(folder, device_map={"": "disk"}, offload_folder=str(folder / "offload"))


def brought_by_parts(folder: Path) -> Any:
    """Every weight is brought for the part that holds it, and no block has a hook of its own."""
    accelerate = pytest.importorskip("accelerate")
    model = _load(folder)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert not hasattr(model.model.layers[1], "_hf_hook")
    return model


def torchao_int8(folder: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return _load(folder, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()), device_map="cpu")


def bitsandbytes_int8(folder: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return _load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")


def bitsandbytes_nf4(folder: Path) -> Any:
    """Weights as they were loaded, which every processor multiplies by in the dtype that was asked for."""
    return _nf4(folder, packed=False)


def bitsandbytes_nf4_packed(folder: Path) -> Any:
    """Weights that the first pass lays out anew and that processors with AVX512-BF16 multiply by in bfloat16.

    On any other processor the layout is the same, but bitsandbytes has only the general formula there, which reads it as
    if it were the old one: a model of other weights, to be steered and compared with itself like the rest."""
    return _nf4(folder, packed=True)


def _nf4(folder: Path, packed: bool) -> Any:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:  # a layer asks when it is made, and keeps the answer
        patch.setattr(modules, "has_avx512bf16", lambda: packed)
        return _load(folder, quantization_config=config, device_map="cpu")


def _load(folder: Path, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()


PACKED = {bitsandbytes_nf4: {False}, bitsandbytes_nf4_packed: {True}}  # what `packed` says after a pass
HOOKED = (spread, offloaded, on_disk, brought_by_parts)  # by accelerate; its hooks break graphs
CHANGED = {torchao_int8, bitsandbytes_int8, *PACKED}  # other weights than those that were saved
WAYS = [mapped, spread, offloaded, on_disk, brought_by_parts, torchao_int8, bitsandbytes_int8, *PACKED]

# Packed layers round to bfloat16, whose values lie 2**-8 apart. Where two sums in another order fall on either side of an
# edge, the next layers carry that step on: in 5 of 600 comparisons on 300 seeds, by 0.0052 of 1 + |logit| at most.
BFLOAT16 = 2**-6


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def packed(model: Any) -> set[bool]:
    """Whether the four-bit layers' weights are packed: {True} or {False} where all agree, nothing where there are none."""
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    return {getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_steered_as_by_a_hook_of_ones_own_and_comes_back_bit_for_bit(way: Callable, saved: Path) -> None:
    model, ids, v = way(saved), token_ids(2, 6, 0), vector()
    clean = logits(model, ids)
    assert torch.allclose(clean, logits(llama(), ids), atol=1e-5) != (way in CHANGED)

    def add(strengths: torch.Tensor) -> torch.Tensor:
        """What the plain formula gives in a plain hook, each row with its strength."""
        bare = model.model.layers[1].register_forward_hook(
            lambda _module, _args, out: (
                out + strengths[:, None, None] * v
                if isinstance(out, torch.Tensor)
                else (out[0] + strengths[:, None, None] * v, *out[1:])
            )
        )
        try:
            return logits(model, ids)
        finally:
            bare.remove()

    with sf.steer(model, [sf.Plan({1: sf.Add(v)}), sf.Plan({1: sf.Add(v)})], strength=[2.0, -1.0]) as handle:
        got = logits(model, ids)
        handle.strength = [0.5, 0.0]
        less = logits(model, ids)
    torch.testing.assert_close(got, add(torch.tensor([2.0, -1.0])), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(less, add(torch.tensor([0.5, 0.0])), atol=1e-5, rtol=1e-5)
    assert handle.stats() == [12, 6]  # strength 0 edits nothing
    assert (got - clean).abs().amax((1, 2)).min() > 0.1
    assert torch.equal(logits(model, ids), clean)
    assert packed(model) == PACKED.get(way, set())


@pytest.mark.parametrize("way", WAYS)
def test_its_activations_are_collected(way: Callable, saved: Path) -> None:
    model, ids = way(saved), token_ids(2, 6, 0)
    with torch.no_grad():
        wanted = model(ids, use_cache=False, output_hidden_states=True).hidden_states[2].float().flatten(0, 1)
    found = sf.collect(model, layers=[1], inputs=[{"input_ids": ids}], position="all", progress=False)[1]
    allowed = {bitsandbytes_int8: 0.3, bitsandbytes_nf4_packed: BFLOAT16}.get(way, 2e-4)
    torch.testing.assert_close(found, wanted, atol=allowed, rtol=allowed)


@pytest.mark.parametrize("way", WAYS)
def test_every_site_is_where_it_should_be(way: Callable, saved: Path) -> None:
    """What leaves the MLP leaves the block, what leaves a block enters the next, and nothing is said twice."""
    model, ids, v = way(saved), token_ids(2, 6, 0), vector()

    def steered(place: Any) -> torch.Tensor:
        with sf.steer(model, {place: sf.Add(v, 2.0)}):
            return logits(model, ids)

    post, clean = steered(1), logits(model, ids)
    allowed = BFLOAT16 if way is bitsandbytes_nf4_packed else 2e-5
    for same in (("mlp_out", 1), ("resid_pre", 2)):
        torch.testing.assert_close(steered(same), post, atol=allowed, rtol=allowed)
    for other in (("attn_out", 1), ("head_out", 1), ("resid_pre", 1)):
        assert (steered(other) - clean).abs().max() > 0.1
        assert (steered(other) - post).abs().max() > 0.1
    assert packed(model) == PACKED.get(way, set())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_generate_over_a_cache_follows_the_positions(way: Callable, saved: Path, positions: str) -> None:
    """Against the same model without a cache, told which columns to steer."""
    model, ids = way(saved), token_ids(1, 6, 0)
    plan = sf.Plan({1: sf.Add(vector(), 3.0)}, positions)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with sf.steer(model, plan) as handle:
        out = model.generate(ids, **settings, output_logits=True, return_dict_in_generate=True)
    assert handle.stats() == [6 if positions == "prompt" else 3]
    # int8: eight bits for activations, too, whose outliers are chosen by batch: another batch rounds elsewhere
    allowed = {bitsandbytes_int8: 0.3, bitsandbytes_nf4_packed: BFLOAT16}.get(way, 2e-4)
    for step in range(positions == "generated", 4):  # the first new token still comes from an unsteered prompt
        with sf.steer(model, plan, prompt_length=6):
            whole = logits(model, out.sequences[:, : 6 + step])[0, -1]
        torch.testing.assert_close(out.logits[step][0], whole, atol=allowed, rtol=allowed)
    assert packed(model) == PACKED.get(way, set())


@pytest.mark.parametrize("way", [way for way in WAYS if way not in HOOKED])
def test_compiled_once_it_follows_every_plan_row_and_strength(way: Callable, saved: Path) -> None:
    model, eager, ids, count = way(saved), way(saved), token_ids(2, 6, 0), Counter()
    sf.prepare(model, room=sf.Room(batch=2, length=16))
    logits(
        model, ids
    )  # a first pass, in which bitsandbytes lays its weights out, leaves nothing that a graph guards on
    compiled = torch.compile(model, fullgraph=True, backend=count)
    clean = logits(compiled, ids)
    for plan in ({1: sf.Add(vector(), 2.0)}, {0: sf.Ablate(vector(1)), 2: sf.Add(vector(2), keep_norm=True)}):
        for rows in ([plan, None], [None, plan], [plan, plan]):
            with sf.steer(model, rows) as handle, sf.steer(eager, rows) as other:
                for strength in (1.0, 0.3):
                    handle.strength = other.strength = [strength] * 2
                    torch.testing.assert_close(logits(compiled, ids), logits(eager, ids), atol=1e-5, rtol=1e-5)
                    assert not torch.equal(logits(compiled, ids), clean)
    assert torch.equal(logits(compiled, ids), clean)
    assert count.graphs == 1
    assert packed(model) == packed(eager) == PACKED.get(way, set())
