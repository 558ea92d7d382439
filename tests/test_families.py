"""Every family: steering acts, comes off bit for bit, follows rows, padding and the cache, and survives a compiler.

What hooks see beside ours (capture of hidden states) and continuous batching are tested here, too, since both differ
from one version of transformers to the next.
"""

from __future__ import annotations

import inspect
import threading
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, IMAGE_TOKEN, MIXTURES, MULTIMODAL, Counter, build, token_ids

import steerfast as sf
from steerfast.models.layers import find_layers

V5 = int(transformers.__version__.split(".")[0]) >= 5
EVERY = (*FAMILIES, *MULTIMODAL)
# test_compile.py has the four that are missing here, under more plans.
COMPILED = [name for name in (*FAMILIES, *MULTIMODAL) if name not in ("llama", "gpt2", "gpt_neox", "falcon")]
LAYER = 1
SETTINGS = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
# There the model itself breaks the graph: experts looped over by what the tokens chose, caches of a scan.
NO_FULL_GRAPH = () if V5 else (*MIXTURES, "bamba", "granite_hybrid")


def vector(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def ids_for(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids that are ordinary text in every family: no image, no marker of one."""
    return token_ids(batch, length, seed).clamp(max=90)


@contextmanager
def stream_after(model: Any, layer: int) -> Any:
    """Copies of the stream after a block, one per pass, as a later hook sees it."""
    seen: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = find_layers(model).blocks[layer].register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def edited(model: Any, layer: int, delta: torch.Tensor) -> Any:
    """The oracle: a bare hook that adds delta (batch, tokens, d)."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = find_layers(model).blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def same_row(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """A row that nobody steers keeps its bits; where experts mix rows, up to the summation order of one product."""
    if name in MIXTURES:
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", EVERY)
def test_each_layer_acts_and_comes_off_bit_for_bit(name: str) -> None:
    model, ids = build(name), ids_for(2, 5)
    layers = find_layers(model)
    with torch.no_grad():
        clean = model(ids, use_cache=False).logits
        for layer in range(layers.count):
            with sf.steer(model, {layer: sf.Add(vector(layers.d), 2.0)}) as handle:
                assert (model(ids, use_cache=False).logits - clean).abs().max() > 1e-2
            assert handle.stats() == [10]
        assert torch.equal(model(ids, use_cache=False).logits, clean)
    assert "generate" not in vars(model)
    assert "init_continuous_batching" not in vars(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_per_row_is_exact(name: str) -> None:
    model, ids = build(name), ids_for(3, 6, 1)
    d = find_layers(model).d
    a, b = {0: sf.Add(vector(d), 2.0)}, {LAYER: [sf.Ablate(vector(d, 1)), sf.Add(vector(d, 2), 3.0)]}
    with torch.no_grad():
        clean = model(ids, use_cache=False).logits
        with sf.steer(model, [a, None, b]) as handle:
            mixed = model(ids, use_cache=False).logits
        assert handle.stats() == [6, 0, 6]
        same_row(name, mixed[1], clean[1])
        for row, plan in ((0, a), (2, b)):
            with sf.steer(model, plan):
                torch.testing.assert_close(mixed[row], model(ids, use_cache=False).logits[row], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", EVERY)
def test_left_padding_is_never_steered(name: str) -> None:
    """The stream behind the steered block: moved by exactly v on text, the same bits on padding."""
    model, ids = build(name), ids_for(2, 6, 2)
    v, mask = vector(find_layers(model).d), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = ids[1, :3] = 0
    with torch.no_grad(), stream_after(model, 0) as seen:
        model(ids, attention_mask=mask, use_cache=False)
        with sf.steer(model, {0: sf.Add(v, 2.0)}) as handle:
            model(ids, attention_mask=mask, use_cache=False)
    clean, steered = seen[0], seen[-1]  # the first `steer` of a model runs it once to look at it
    real = mask.bool()
    assert torch.equal(steered[~real], clean[~real])
    torch.testing.assert_close(steered[real], clean[real] + 2 * v)
    assert handle.stats() == [9]


@pytest.mark.parametrize("name", EVERY)
def test_generation_with_a_cache_equals_the_uncached_oracle(name: str) -> None:
    """Left padding, a prompt of its own per row, "last": the last prompt token and every generated one."""
    model, ids = build(name), ids_for(2, 7, 3)
    v, mask = vector(find_layers(model).d), torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = ids[1, :2] = 0
    plan = sf.Plan({LAYER: sf.Add(v, 2.0)}, positions="last")
    with sf.steer(model, plan) as handle:
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,  # MPT's config says no
            **SETTINGS,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert handle.stats() == [8]
    sequence = out.sequences[:, :-1]
    whole = torch.nn.functional.pad(mask, (0, sequence.shape[1] - 7), value=1)
    where = (torch.arange(sequence.shape[1]) >= 6).expand(2, -1)
    inputs = {"attention_mask": whole, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters and name != "qwen2_vl":
        inputs["position_ids"] = (whole.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), edited(model, LAYER, where[..., None] * 2 * v):
        expected = model(sequence, **inputs).logits[:, 6:]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=5e-5, rtol=5e-5)


def shortened(name: str) -> Any:
    """A copy with the first two blocks alone: what is traced is what the test costs."""
    model = deepcopy(build(name))
    layers = find_layers(model)
    del model.get_submodule(layers.path)[2:]
    model.config.get_text_config().num_hidden_layers = 2
    return model


@pytest.mark.parametrize("name", COMPILED)
def test_a_prepared_and_compiled_model_equals_the_eager_one(name: str) -> None:
    torch._dynamo.reset()
    model, ids, count = shortened(name), ids_for(2, 5, 4), Counter()
    d = find_layers(model).d
    plans = [{LAYER: sf.Add(vector(d), 2.0)}, {LAYER: sf.Amplify(vector(d, 1), 0.5)}]
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits]
        for plan in plans:
            with sf.steer(model, plan):
                expected.append(model(ids, use_cache=False).logits)
        sf.prepare(model, layers=[LAYER], room=sf.Room(batch=2, length=8, slots=2, directions=2))
        compiled = torch.compile(model, fullgraph=name not in NO_FULL_GRAPH, backend=count)
        clean = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(clean, expected[0], atol=1e-5, rtol=1e-5)
        for plan, logits in zip(plans, expected[1:], strict=True):
            with sf.steer(model, plan) as handle:
                torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits, atol=1e-5, rtol=1e-5)
            assert handle.stats() == [10]
        assert torch.equal(compiled(ids, use_cache=False).logits, clean)
    torch._dynamo.reset()
    if name not in NO_FULL_GRAPH:
        assert count.graphs == 1


@pytest.mark.parametrize("name", EVERY)
def test_captured_hidden_states_show_the_steered_stream(name: str) -> None:
    """`output_hidden_states` against ours: see docs/hooks.md. transformers 4 wraps the block's forward in some
    families, inside every hook, and there shows the block's own output."""
    model, ids = build(name), ids_for(1, 5, 5)
    layers = find_layers(model)
    v, decoder = vector(layers.d), model.get_submodule(layers.path.rpartition(".")[0])
    records = "hidden_states" in (getattr(decoder, "_can_record_outputs", None) or {})
    wraps_forward = not V5 and records and "gpt_neox" not in name  # GPT-NeoX says so, too, but collects them itself
    with torch.no_grad():
        clean = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        with sf.steer(model, {0: sf.Add(v, 2.0)}), stream_after(model, 0) as seen:
            steered = model(ids, use_cache=False, output_hidden_states=True).hidden_states
        with sf.steer(model, {("resid_pre", 0): sf.Add(v, 2.0)}):
            before = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(steered) == len(clean) == layers.count + 1
    torch.testing.assert_close(seen[0], clean[1] + 2 * v)  # a hook of the user sees the steered stream in every version
    if wraps_forward:
        assert torch.equal(steered[1], clean[1])
    else:
        assert torch.equal(steered[1], seen[0])
    assert not torch.equal(steered[2], clean[2])
    assert not torch.equal(before[1], clean[1])


@pytest.mark.parametrize("name", ["llava", "gemma3_vl"])
def test_images_count_as_prompt(name: str) -> None:
    """Four image tokens among text and left padding: the prompt is all of it, and the oracle agrees."""
    model, ids = build(name), ids_for(2, 9, 6)
    ids[:, 3:7] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, :2] = ids[1, :2] = 0
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    v = vector(48)
    with sf.steer(model, sf.Plan({LAYER: sf.Add(v, 2.0)}, positions="prompt")) as handle:
        out = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, **SETTINGS, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert handle.stats() == [16]
    sequence = out.sequences[:, :-1]
    where = torch.nn.functional.pad(mask, (0, 3))
    whole = torch.nn.functional.pad(mask, (0, 3), value=1)
    positions = {"position_ids": (whole.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), edited(model, LAYER, where[..., None] * 2 * v):
        expected = model(sequence, attention_mask=whole, pixel_values=pixels, use_cache=False, **positions).logits[
            :, 8:
        ]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=5e-5, rtol=5e-5)


# --- continuous batching ----------------------------------------------------------------------------------------------


def batched(model: Any, prompts: list[list[int]], **more: Any) -> list[list[int]]:
    """generate_batch with a cache of a few kilobytes; transformers 4 takes its size from the generation config."""
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=-1)
    if V5:
        config = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
        out = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=config, **more)
    else:
        settings.num_blocks, settings.max_batch_tokens, settings.block_size = 8, 32, 32
        model.set_attn_implementation("eager_paged")
        out = model.generate_batch(prompts, generation_config=settings, progress_bar=False, **more)
        model.set_attn_implementation("eager")
    by_prompt = {tuple(one.prompt_ids): list(one.generated_tokens) for one in out.values()}
    return [by_prompt[tuple(prompt)] for prompt in prompts]


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of its own: continuous batching changes its attention."""
    if not V5:  # it asks for the free memory of a GPU
        from transformers.generation.continuous_batching import cache

        monkeypatch.setattr(cache.PagedAttentionMemoryHandler, "get_available_memory", lambda *_: 1 << 24)
    return deepcopy(build("llama"))


PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [40, 30, 20, 10, 50]]


def test_continuous_batching_with_one_plan_for_all_requests(llama: Any) -> None:
    plan = sf.Plan({LAYER: [sf.Ablate(vector(48, 1)), sf.Add(vector(48), 3.0)]})
    expected = {}
    for key in ("plain", "steered"):
        rows = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            if key == "plain":
                rows.append(llama.generate(ids, **SETTINGS)[0, len(prompt) :].tolist())
            else:
                with sf.steer(llama, plan):
                    rows.append(llama.generate(ids, **SETTINGS)[0, len(prompt) :].tolist())
        expected[key] = rows
    assert expected["plain"] != expected["steered"]
    threads: set[int] = set()
    mark = llama.model.register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    with mark:
        assert batched(llama, PROMPTS) == expected["plain"]
        with sf.steer(llama, plan) as handle:
            assert batched(llama, PROMPTS) == expected["steered"]
        assert batched(llama, PROMPTS) == expected["plain"]
    assert threading.get_ident() not in threads  # it runs in a thread of its own
    runs = 3 if V5 else 4  # transformers 4 runs the last token as well
    assert handle.stats() == [sum(map(len, PROMPTS)) + runs * len(PROMPTS)]
    assert "init_continuous_batching" not in vars(llama)


def test_continuous_batching_refuses_what_it_cannot_follow(llama: Any) -> None:
    add = sf.Add(vector(48))
    with (
        pytest.raises(ValueError, match="a plan per row cannot be followed"),
        sf.steer(llama, [{1: add}, None, {1: add}]),
    ):
        batched(llama, PROMPTS)
    for positions in ("prompt", "generated", "last", [0]):
        with (
            pytest.raises(ValueError, match="needs to know where each prompt ends"),
            sf.steer(llama, sf.Plan({1: add}, positions=positions)),
        ):
            batched(llama, PROMPTS)


@pytest.mark.skipif(not V5, reason="transformers 4 keeps no manager")
def test_a_manager_of_continuous_batching_does_not_carry_a_plan_over(llama: Any) -> None:
    add = {LAYER: sf.Add(vector(48), 3.0)}
    plain = batched(llama, PROMPTS, persistent_manager=True)
    with pytest.raises(RuntimeError, match="destroy_cached_continuous_batching_manager"), sf.steer(llama, add):
        batched(llama, PROMPTS)
    llama.destroy_cached_continuous_batching_manager()
    with sf.steer(llama, add):
        assert batched(llama, PROMPTS, persistent_manager=True) != plain
    assert batched(llama, PROMPTS) == plain


@pytest.mark.skipif(not V5, reason="transformers 4 shares no keys and values between requests")
@pytest.mark.parametrize("sharing", [True, False])
def test_a_manager_of_ones_own_gives_no_request_the_keys_and_values_of_another_plan(llama: Any, sharing: bool) -> None:
    """A prompt of two blocks and more: requests of the same tokens would share the first two."""
    prompt, steps = token_ids(1, 40, 0), {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    plan = {LAYER: sf.Add(vector(48), 3.0)}

    def alone(strength: float) -> list[int]:
        if not strength:
            return llama.generate(prompt, eos_token_id=None, **steps)[0, 40:].tolist()
        with sf.steer(llama, plan, strength=strength):
            return llama.generate(prompt, eos_token_id=None, **steps)[0, 40:].tolist()

    wanted = {strength: alone(strength) for strength in (0.0, 1.0, -1.0)}
    assert len({tuple(text) for text in wanted.values()}) == 3

    def manager() -> Any:
        found = llama.init_continuous_batching(
            generation_config=transformers.GenerationConfig(eos_token_id=-1, **steps),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=16, num_blocks=16, max_batch_tokens=64, allow_block_sharing=sharing
            ),
        )
        found.start()
        return found

    def ask(running: Any, name: str) -> list[int]:
        running.add_request(prompt[0].tolist(), request_id=name, max_new_tokens=6)
        return list(running.get_result(request_id=name, timeout=60).generated_tokens)

    older = manager()
    assert ask(older, "before") == wanted[0.0]
    with sf.steer(llama, plan) as handle:
        newer = manager()
        assert ask(newer, "inside") == wanted[1.0]
        handle.strength = -1.0
        assert ask(newer, "turned") == wanted[-1.0]
        if not sharing:
            assert ask(older, "inside the older") == wanted[-1.0]
    assert ask(newer, "after") == wanted[0.0]
    newer.stop(block=True, timeout=30)
    if sharing:
        with sf.steer(llama, plan):
            assert ask(older, "refused") == []
    older.stop(block=True, timeout=30)
