"""Every family: what the sites carry, what writing to them does, and that removal leaves no trace."""

from __future__ import annotations

import doctest
import re
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build, token_ids
from test_inputs import blip
from torch import nn

import steerfast as sf
from steerfast.models.layers import find_layers
from steerfast.models.proof import prove, refuse_split
from steerfast.place import SITES

LAYER = 1


def run(model: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(token_ids(), use_cache=False, **kwargs)


def run_once(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@contextmanager
def attached(points_and_functions: Any) -> Any:
    handles = [point.attach(fn) for point, fn in points_and_functions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sites_of(model: Any, layer: Any, write: Any = None) -> Any:
    """Each site's tensor in one forward; `write` = (site, δ) adds δ there. Copied at once: Falcon adds to its MLP's
    output in place."""
    layers, seen = find_layers(model), {}

    def recorder(site: Any) -> Any:
        def record(x: Any) -> Any:
            seen[site] = x.clone().reshape(*token_ids().shape, x.shape[-1])

        return record

    pairs = []
    if write is not None:
        site, delta = write
        pairs.append((layers.point(layer, site), lambda x: x + delta.reshape(x.shape)))
    pairs += [(layers.point(layer, site), recorder(site)) for site in SITES]
    with attached(pairs):
        seen["logits"] = run(model).logits
    return seen


def close(actual: Any, expected: Any, *parts: Any) -> None:
    """Equal up to the rounding of the few float32 additions that lead there: 8 units in the last place of the
    largest term."""
    largest = max(t.abs().max().item() for t in (actual, expected, *parts))
    torch.testing.assert_close(actual, expected, rtol=0, atol=8 * torch.finfo(torch.float32).eps * largest)


@pytest.fixture(params=FAMILIES)
def model(request: Any) -> Any:
    return build(request.param)


def test_blocks_and_sites(model: Any) -> None:
    layers = find_layers(model)
    assert len(layers) == layers.count == model.config.num_hidden_layers
    assert layers.d == model.config.hidden_size
    assert layers.name == type(model).__name__
    assert all(model.get_submodule(f"{layers.path}.{i}") is block for i, block in enumerate(layers.blocks))
    for layer in range(layers.count):
        sites = sites_of(model, layer)
        for site in SITES:
            point = layers.point(layer, site)
            assert model.get_submodule(point.path) is point.module
            assert sites[site].shape[-1] == point.width
        added = sites["attn_out"] + sites["mlp_out"]
        close(added, sites["resid_post"] - sites["resid_pre"], *sites.values())
        assert sites["attn_out"].abs().max() > 0.1
        assert sites["mlp_out"].abs().max() > 0.1


def test_residual_sites_are_the_hidden_states(model: Any) -> None:
    hidden = run(model, output_hidden_states=True).hidden_states
    count = find_layers(model).count
    sites = [sites_of(model, layer) for layer in range(count)]
    for layer in range(count):
        assert torch.equal(sites[layer]["resid_pre"], hidden[layer])
        if layer + 1 < count:  # the last entry of hidden_states is already normed
            assert torch.equal(sites[layer]["resid_post"], hidden[layer + 1])
            assert torch.equal(sites[layer + 1]["resid_pre"], sites[layer]["resid_post"])


@pytest.mark.parametrize("site", SITES)
def test_writing_adds_exactly_the_difference(model: Any, site: Any) -> None:
    layers = find_layers(model)
    before = sites_of(model, LAYER)
    delta = 0.5 * torch.randn(before[site].shape, generator=torch.Generator().manual_seed(1))
    after = sites_of(model, LAYER, write=(site, delta))
    close(after[site], before[site] + delta, *before.values())
    if site in ("mlp_out", "resid_post"):  # nothing in the block comes after them
        close(after["resid_post"], before["resid_post"] + delta, *before.values())
    close(
        after["attn_out"] + after["mlp_out"],
        after["resid_post"] - after["resid_pre"] - (delta if site == "resid_post" else 0),
        *after.values(),
    )
    if (
        site == "head_out"
    ):  # linear from here to attn_out in pre-norm blocks; a post-norm may follow, so only the projection is checked
        projection = layers.point(LAYER, site).module
        with torch.no_grad():
            assert (projection(before[site] + delta) - projection(before[site])).abs().max() > 0.01
        assert not torch.equal(after["attn_out"], before["attn_out"])
    assert not torch.equal(after["logits"], before["logits"])
    assert torch.equal(run(model).logits, before["logits"])  # removed: bit for bit


@pytest.mark.parametrize("site", SITES)
def test_an_unedited_row_keeps_its_bits(model: Any, site: Any) -> None:
    reference = run(model).logits
    delta = torch.zeros(*token_ids().shape, find_layers(model).point(LAYER, site).width)
    assert torch.equal(sites_of(model, LAYER, write=(site, delta))["logits"], reference)
    if model.config.model_type in ("mixtral", "qwen2_moe", "gpt_oss"):
        return  # an expert multiplies all its tokens together: there the model itself lets rows meet
    delta[1] = 1.0
    logits = sites_of(model, LAYER, write=(site, delta))["logits"]
    assert torch.equal(logits[0], reference[0])
    assert not torch.equal(logits[1], reference[1])


def test_negative_layers_and_errors() -> None:
    layers = find_layers(build("llama"))
    assert layers.resolve(-1) == 2
    assert layers.resolve(-3) == 0
    assert layers.resolve(np.int64(1)) == 1
    assert layers.point(-1).module is layers.blocks[2]
    for layer in (3, 40, -4):
        text = f"steer: layer {layer} is out of range; this model (LlamaForCausalLM) has 3 layers, 0 to 2"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            layers.resolve(layer)
    with pytest.raises(ValueError, match=r"^collect: layer 3 is out of range"):
        layers.resolve(3, "collect")
    wrong: Any
    for wrong in (1.0, "1", None, True):
        with pytest.raises(TypeError, match="a layer is an integer, 0 to 2, got"):
            layers.resolve(wrong)
    with pytest.raises(ValueError, match="unknown site 'residual'; the sites are resid_pre, resid_post, attn_out"):
        layers.point(0, "residual")
    with pytest.raises(TypeError, match=r"must be a transformers model .* got Linear"):
        find_layers(nn.Linear(2, 2))


def test_base_model_and_compiled_model_show_the_same_blocks() -> None:
    model = build("llama")
    layers = find_layers(model)
    other: Any
    for other, path in ((model.model, "layers"), (torch.compile(model), "model.layers")):
        found = find_layers(other)
        assert all(a is b for a, b in zip(found.blocks, layers.blocks, strict=True))
        assert found.path == path


def test_a_list_of_experts_as_long_as_the_model_is_not_taken_for_the_blocks() -> None:
    model = build("llama")
    block = model.model.layers[0]
    block.mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(48, 48)) for _ in range(3))
    try:
        assert find_layers(model).path == "model.layers"
    finally:
        del block.mlp.experts


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.add_module("crossattention", nn.Sequential(nn.Linear(48, 48))),
        lambda block: block.add_module("per_layer_gate", nn.PReLU()),
        lambda block: block.register_buffer("layer_scalar", torch.ones(1)),
        lambda block: setattr(block, "attn_alpha_factor", 0.5),
        lambda block: setattr(block, "do_layer_norm_before", False),
        lambda block: block.add_module("post_norm1", nn.LayerNorm(48)),
    ],
    ids=["cross-attention", "unknown child", "own tensor", "scale", "post-norm stream", "unknown post-norm"],
)
def test_what_the_rules_do_not_cover_is_refused(change: Any) -> None:
    model = build("llama").__class__(build("llama").config)
    change(model.model.layers[1])
    layers = find_layers(model)
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(
            ValueError,
            match=f"cannot locate site '{site}' of layer 1 in a LlamaDecoderLayer .*use resid_pre or resid_post",
        ):
            layers.point(1, site)
        layers.point(0, site)
    layers.point(1, "resid_pre"), layers.point(1, "resid_post")


def test_a_norm_on_the_stream_is_refused_where_a_real_config_asks_for_it() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(
        BloomConfig(vocab_size=101, hidden_size=48, n_layer=2, n_head=4, apply_residual_connection_post_layernorm=True)
    )
    with pytest.raises(
        ValueError, match="apply_residual_connection_post_layernorm=True: a norm acts on the stream itself"
    ):
        find_layers(model).point(0, "attn_out")
    assert find_layers(model).point(0, "head_out").width == 48


def test_the_proof_accepts_every_family(model: Any) -> None:
    model.train()
    try:
        found = prove(model, find_layers(model), "check")  # in evaluation: dropout would show as a difference
        assert model.training
    finally:
        model.eval()
    assert (found.refusal, found.virtual, found.idle, dict(found.split)) == ("", 0, frozenset(), {})


def test_the_proof_in_half_precision() -> None:
    for name in ("bloom", "granite", "gemma3"):
        model = deepcopy(build(name)).to(torch.bfloat16)
        assert not prove(model, find_layers(model), "check").split


def test_the_proof_finds_what_no_name_shows() -> None:
    model = first_gpt()
    layers = find_layers(model)
    layers.point(0, "attn_out")  # looks like any other block, but its norms act on the stream
    found = prove(model, layers, "check")
    assert set(found.split) == {0, 1}
    with pytest.raises(
        ValueError, match=r"^check: cannot steer or read attn_out of layer 0 in a Block \(OpenAIGPTLMHeadM"
    ):
        refuse_split(found, layers, 0, "attn_out", "check")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


class Stop(Exception):
    """What a user's hook leaves a pass with."""


def first_gpt() -> Any:
    """A model whose attn_out and mlp_out only its numbers refuse."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=32)).eval()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        Stop("enough"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_proof_that_failed_for_a_reason_that_may_pass_is_not_kept(error: BaseException) -> None:
    """The short forward breaks off once; the next look sees what the model does, and refuses what it refuses."""
    model, v = first_gpt(), torch.ones(48)

    def fail(module: Any, args: Any, output: Any) -> None:
        raise error

    hook = model.transformer.h[1].register_forward_hook(fail)
    with pytest.raises(type(error)):
        sf.steer(model, {("attn_out", 0): sf.Add(v)})
    hook.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    with pytest.raises(ValueError, match=r"attn_out of layer 0 .* is off by"):
        sf.steer(model, {("attn_out", 0): sf.Add(v)})


def test_a_model_that_runs_on_no_ids_is_looked_at_once() -> None:
    model, passes = deepcopy(blip()), []
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    layers = find_layers(model)
    assert prove(model, layers, "check") is prove(model, layers, "check")
    hook.remove()
    assert len(passes) == 1


def test_a_look_that_is_refused_says_so() -> None:
    model, runs = deepcopy(build("llama")), []

    def run(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        if len(runs) == 2:  # again, in the backward pass
            sf.collect(model.model, inputs=[{"input_ids": token_ids(1, 7)}], layers=0, progress=False)
        return x * x

    with sf.steer(model, {1: torch.ones(48)}):
        model(token_ids(1, 7))
        out = torch.utils.checkpoint.checkpoint(run, torch.ones(1, requires_grad=True), use_reentrant=False)
        with pytest.raises(RuntimeError, match=r"^collect: the short forward .* was refused .*recomputed.* remove"):
            out.backward()
    assert prove(model.model, find_layers(model.model), "check").refusal == ""


@pytest.mark.parametrize("positions", ["all", [5]])
def test_a_look_beside_the_handle_of_another_model_is_unsteered_and_not_counted(positions: Any) -> None:
    model, ids = deepcopy(build("llama")), token_ids(1, 7)
    with sf.steer(model, [sf.Plan({1: 3 * torch.randn(48)}, positions)]) as handle:
        wanted, before = run_once(model, ids), handle.stats()
        proof = prove(model.model, find_layers(model.model), "steer")
        assert handle.stats() == before
        assert torch.equal(run_once(model, ids), wanted)
    assert not proof.split
    with sf.steer(model.model, {("attn_out", 1): torch.ones(48)}) as handle:
        model(ids)
    assert handle.stats() == [7]


def test_a_look_inside_a_pass_leaves_the_pass_as_it_was() -> None:
    model, ids, looks = deepcopy(build("llama")), token_ids(2, 7), []

    def look(*_: Any) -> None:
        if armed and armed.pop():
            looks.append(prove(model.model, find_layers(model.model), "steer"))

    armed: list[bool] = []
    with sf.steer(model, [None, sf.Plan({1: 3 * torch.randn(48), 2: torch.ones(48)}, "last")]) as handle:
        wanted = run_once(model, ids)
        armed.append(True)
        with model.model.layers[0].register_forward_hook(look):
            assert torch.equal(run_once(model, ids), wanted)
    assert handle.stats() == [0, 2]
    assert not looks[0].split


class Carrier:
    """Two streams in one object."""

    def __init__(self, hidden: Any, beside: Any) -> None:
        self.hidden, self.beside = hidden, beside


def carrying() -> Any:
    """A Llama whose blocks hand an object on, as PEFT's Shadow does: wrapped before the first, unwrapped after the last."""
    model = deepcopy(build("llama"))

    def carry(block: Any, last: bool) -> None:
        own = block.forward

        def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
            hidden, beside = (x.hidden, x.beside) if isinstance(x, Carrier) else (x, x)
            out = own(hidden, *args, **kwargs)
            new = out[0] if isinstance(out, tuple) else out
            new = new if last else Carrier(new, beside)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        block.forward = forward

    for block in model.model.layers:
        carry(block, block is model.model.layers[-1])
    return model


def shadowed() -> Any:
    peft = pytest.importorskip("peft")
    if not hasattr(peft, "ShadowConfig"):
        pytest.skip("this release of PEFT has no Shadow")
    return peft.get_peft_model(deepcopy(build("llama")), peft.ShadowConfig(task_type="CAUSAL_LM")).eval()


@pytest.mark.parametrize(("make", "kind"), [(carrying, "Carrier"), (shadowed, "ShadowCarrier")])
def test_blocks_that_hand_an_object_on_are_refused_by_its_name(make: Any, kind: str) -> None:
    from test_texts import words

    from steerfast.tools.check import check

    model = make()
    calls = {
        "steer": lambda: sf.steer(model, {1: sf.Add(torch.ones(48))}),
        "prepare": lambda: sf.prepare(model),
        "collect": lambda: sf.collect(model, words(), ["w3 w4"], 1, progress=False),
        "dose": lambda: sf.dose(model, words(), {1: sf.Add(torch.ones(48))}, ["w3 w4"]),
        "check": lambda: list(check(model, words())),
    }
    with torch.no_grad():
        clean = model(input_ids=token_ids()).logits
    for caller, call in calls.items():
        with pytest.raises(
            TypeError, match=f"^{caller}: .* has blocks that return a {kind}; a tensor, or a tuple that"
        ):
            call()
    with torch.no_grad():
        assert torch.equal(model(input_ids=token_ids()).logits, clean)


def test_an_attention_that_returns_an_object_leaves_the_stream_to_be_steered() -> None:
    class Pair:
        def __init__(self, items: Any) -> None:
            self.items = items

        def __iter__(self) -> Any:
            return iter(self.items)

    model, v = deepcopy(build("llama")), torch.ones(48)
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda *args, **kwargs: Pair(own(*args, **kwargs))
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(
            ValueError, match=f"{site} of layer 1 .*: what attn_out shows is a Pair, no tensor; use resid"
        ):
            sf.steer(model, {(site, 1): sf.Add(v)})
    inside = [(find_layers(model).point(1, "attn_out"), lambda x: None)]
    refused = pytest.raises(TypeError, match=r"^model\.layers\.1\.self_attn returns a Pair; a tensor, or a tuple")
    with refused, attached(inside):
        run(model)
    with sf.steer(model, {1: sf.Add(v), ("attn_out", 0): sf.Add(v)}) as handle:
        run(model)
    assert handle.stats() == [14]


def test_weights_that_have_not_been_loaded() -> None:
    with torch.device("meta"):
        model = type(build("llama"))(build("llama").config)
    calls = {
        "steer": lambda: sf.steer(model, {1: sf.Add(torch.ones(48))}),
        "prepare": lambda: sf.prepare(model),
        "collect": lambda: sf.collect(model, inputs=[{"input_ids": token_ids()}], layers=1, progress=False),
    }
    for caller, call in calls.items():
        with pytest.raises(
            ValueError, match=f"^{caller}: LlamaForCausalLM has weights on the meta device; load them first"
        ):
            call()


def test_the_text_decoder_of_a_multimodal_model_is_found() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=LlamaConfig(**sizes, vocab_size=101),
        image_token_index=100,
    )
    layers = find_layers(LlavaForConditionalGeneration(config))
    assert layers.path == "model.language_model.layers"
    assert layers.count == 3


@pytest.mark.model
def test_the_docstrings_examples_run(smollm: Any) -> None:
    model, tokenizer = smollm
    runner = doctest.DocTestRunner()
    for function in (find_layers,):
        names = {"find_layers": find_layers, "model": model, "tokenizer": tokenizer}
        for example in doctest.DocTestFinder().find(function, globs=names):
            assert example.examples
            runner.run(example)
    assert runner.summarize().failed == 0
