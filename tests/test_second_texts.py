"""Texts that generate does not announce, and what a pass says of itself: told from the pass, never believed."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import build, edited, token_ids
from transformers import LlamaForCausalLM, LogitsProcessorList, StaticCache

import steerfast as sf
from steerfast.hooks import passes as hooks_passes
from steerfast.models.caches import cache_in
from steerfast.models.layers import find_layers

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
IDS, NEGATIVE = token_ids(1, 6, 0), token_ids(1, 10, 7)
SELECTORS = ("prompt", "generated", "last", "-1", "all")
V5 = int(transformers.__version__.split(".")[0]) >= 5


def v(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(48, generator=torch.Generator().manual_seed(seed))


def plan(positions: Any = "all") -> sf.Plan:
    return sf.Plan({1: sf.Add(v())}, positions)


@pytest.fixture
def llama() -> Any:
    return copy.deepcopy(build("llama"))


def run(model: Any, positions: Any, what: Callable[[], Any]) -> tuple[list[str], int]:
    """The columns of row 0 in each pass, and what was counted."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", RuntimeWarning)
        with sf.steer(model, plan(positions)) as handle, edited(model) as found:
            what()
    return [rows[0] for rows in found], handle.stats()[0]


def expected(length: int, steps: int, positions: str) -> list[str]:
    """The columns of a prompt and of the tokens that follow it one by one."""
    marks = {
        "prompt": ("1" * length, "0"),
        "generated": ("0" * length, "1"),
        "last": ("0" * (length - 1) + "1", "1"),
        "-1": ("0" * (length - 1) + "1", "0"),
        "all": ("1" * length, "1"),
    }
    return [marks[positions][0], *[marks[positions][1]] * steps]


def ones(texts: list[str]) -> int:
    return "".join(texts).count("1")


def beside(what: Callable[[], Any]) -> LogitsProcessorList:
    """A logits processor that runs something in each step."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        what()
        return scores

    return LogitsProcessorList([process])


# --- a second text inside generate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SELECTORS)
def test_a_negative_prompt_is_a_text_of_its_own(llama: Any, positions: str) -> None:
    found, count = run(
        llama,
        positions,
        lambda: llama.generate(IDS, guidance_scale=1.5, negative_prompt_ids=NEGATIVE, **GREEDY),
    )
    assert found[0::2] == expected(6, 3, positions)
    assert found[1::2] == expected(10, 3, positions)
    assert count == ones(found)


@pytest.mark.parametrize("positions", SELECTORS)
def test_a_negative_prompt_without_a_cache_keeps_its_length(llama: Any, positions: str) -> None:
    def generate() -> None:
        llama.generate(IDS, guidance_scale=1.5, negative_prompt_ids=NEGATIVE, use_cache=False, **GREEDY)

    found, count = run(llama, positions, generate)
    for length, texts in ((6, found[0::2]), (10, found[1::2])):
        whole = expected(length, 3, positions)
        assert texts == ["".join(whole[: step + 1]) for step in range(4)]
    assert count == ones(found[-2:])  # a text that runs again is counted once


def test_the_unconditional_text_has_no_padding_of_the_prompt(llama: Any) -> None:
    ids, mask = token_ids(2, 6, 0), torch.ones(2, 6, dtype=torch.long)
    ids[0, :3], mask[0, :3] = 0, 0
    with sf.steer(llama, plan()) as handle, edited(llama) as found:
        llama.generate(ids, attention_mask=mask, guidance_scale=1.5, **GREEDY)
    assert found[0] == ["000111", "111111"]
    assert all(rows == ["1", "1"] for rows in found[1:])
    assert handle.stats() == [9 + 6 + 8]


@pytest.mark.parametrize("positions", SELECTORS)
def test_a_pass_of_a_logits_processor_is_a_text_of_its_own(llama: Any, positions: str) -> None:
    found, count = run(
        llama, positions, lambda: llama.generate(IDS, logits_processor=beside(lambda: llama(NEGATIVE)), **GREEDY)
    )
    assert found[0::2] == expected(6, 3, positions)
    assert found[1::2] == [expected(10, 0, positions)[0]] * 4
    assert count == ones(found)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
@pytest.mark.parametrize("positions", SELECTORS)
def test_generate_inside_generate_announces_its_own_prompt(llama: Any, positions: str, options: dict) -> None:
    def inside() -> None:
        llama.generate(NEGATIVE, **options, **GREEDY | {"max_new_tokens": 2})

    found, count = run(llama, positions, lambda: llama.generate(IDS, logits_processor=beside(inside), **GREEDY))
    each = expected(10, 1, positions)
    chunks = [each[0][:4], each[0][4:8], each[0][8:], each[1]] if "prefill_chunk_size" in options else each
    outer = expected(6, 3, positions)
    assert found == [text for step in outer for text in (step, *chunks)]
    assert count == ones(found)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("positions", SELECTORS)
def test_a_loop_of_ones_own_that_lets_the_model_make_its_caches_runs_the_batch(
    llama: Any, positions: str, goes_on: bool
) -> None:
    def loop(model: Any, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        given: dict[str, Any] = {}
        for _ in range(4):
            out = model(input_ids[:, -1:] if given else input_ids, **given)
            given = dict([cache_in(out)]) if goes_on else {}  # type: ignore[list-item]
            input_ids = torch.cat([input_ids, out.logits[:, -1:].argmax(-1)], 1)
        return input_ids

    found, count = run(llama, positions, lambda: llama.generate(IDS, custom_generate=loop, **GREEDY))
    whole = expected(6, 3, positions)
    assert found == (whole if goes_on else ["".join(whole[: step + 1]) for step in range(4)])
    assert count == ones(whole)


def test_a_condition_of_the_batch_is_not_that_of_a_second_text(llama: Any) -> None:
    with torch.no_grad():
        states = llama(IDS, output_hidden_states=True, use_cache=False).hidden_states[2]
    when = sf.When(sf.Condition(states[0, -1], 0.99), sf.Add(v(), 0.0), layer=1)
    with sf.steer(llama, {2: when}) as handle:
        llama.generate(IDS, guidance_scale=1.5, negative_prompt_ids=NEGATIVE, **GREEDY)
        assert handle.decisions()[0][0].tolist() == [True]
        sf.active(llama)[0].strength = 1.0
        llama.generate(NEGATIVE, guidance_scale=1.5, negative_prompt_ids=IDS, **GREEDY)
        assert handle.decisions()[0][0].tolist() == [False]


@pytest.mark.parametrize("positions", SELECTORS)
def test_a_model_that_is_its_own_assistant_runs_the_announced_text(llama: Any, positions: str) -> None:
    llama.generation_config.assistant_confidence_threshold = 0.0
    with sf.steer(llama, plan(positions)):
        alone = llama.generate(IDS, **GREEDY | {"max_new_tokens": 6})
    with sf.steer(llama, plan(positions)) as handle, edited(llama) as found:
        assert torch.equal(llama.generate(IDS, assistant_model=llama, **GREEDY | {"max_new_tokens": 6}), alone)
    assert handle.stats()[0] > 0
    for text in (rows[0] for rows in found):  # the prompt, or all of it and what was proposed
        if len(text) >= 6:
            assert text == "".join(expected(6, len(text) - 6, positions))
    assert sum(len(rows[0]) >= 6 for rows in found) == 2  # two caches


@pytest.mark.parametrize("positions", ["after:ids:5", "ids:5"])
def test_a_second_text_remembers_its_own_tokens(llama: Any, positions: str) -> None:
    negative, ids = NEGATIVE.clone(), IDS.clone()
    ids[ids == 5], negative[negative == 5] = 6, 6
    ids[0, 1], negative[0, 7] = 5, 5
    found, _ = run(
        llama,
        positions,
        lambda: llama.generate(ids, guidance_scale=1.5, negative_prompt_ids=negative, suppress_tokens=[5], **GREEDY),
    )
    if positions == "ids:5":
        assert (found[0], found[1]) == ("010000", "0000000100")
        assert set(found[2:]) == {"0"}
    else:
        assert (found[0], found[1]) == ("001111", "0000000011")
        assert set(found[2:]) == {"1"}


def test_a_prepared_model_refuses_guidance(llama: Any) -> None:
    sf.prepare(llama, room=sf.Room(batch=2, length=16))
    with sf.steer(llama, plan("last")):
        llama.generate(IDS, **GREEDY)
        with pytest.raises(ValueError, match="guidance_scale runs a second text"):
            llama.generate(IDS, guidance_scale=1.5, **GREEDY)


# --- a prompt that the arguments do not name -----------------------------------------------------------------------------


class Renamed(LlamaForCausalLM):
    """A generate with a name of its own for its prompt."""

    def generate(self, prompt: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().generate(input_ids=prompt, **kwargs)


class Spoken(LlamaForCausalLM):
    """A generate that makes its prompt itself."""

    def generate(self, text: str, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().generate(input_ids=torch.tensor([[int(word) for word in text.split()]]), **kwargs)


class Longer(LlamaForCausalLM):
    """A generate that puts a token in front of its prompt."""

    def generate(self, prompt: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().generate(input_ids=torch.cat([torch.full_like(prompt[:, :1], 1), prompt], 1), **kwargs)


@pytest.mark.parametrize("positions", SELECTORS)
@pytest.mark.parametrize(
    ("kind", "given", "length"),
    [(Renamed, IDS, 6), (Spoken, " ".join(map(str, IDS[0].tolist())), 6), (Longer, IDS, 7)],
)
@pytest.mark.parametrize("cached", [True, False])
def test_a_prompt_under_another_name(kind: Any, given: Any, length: int, positions: str, cached: bool) -> None:
    model = kind(build("llama").config).eval()
    found, count = run(model, positions, lambda: model.generate(given, use_cache=cached, **GREEDY))
    steps = expected(length, 3, positions)
    assert found == (steps if cached else ["".join(steps[: i + 1]) for i in range(4)])
    assert count == ones(steps)


def test_padding_of_a_prompt_under_another_name() -> None:
    class Masked(LlamaForCausalLM):
        def generate(self, prompt: torch.Tensor, real: torch.Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().generate(input_ids=prompt, attention_mask=real.long(), **kwargs)

    model = Masked(build("llama").config).eval()
    ids, real = token_ids(2, 6, 0), torch.ones(2, 6, dtype=torch.bool)
    real[0, :2] = False  # not by the padding token
    with sf.steer(model, plan("prompt")) as handle, edited(model) as found:
        model.generate(ids, real=real, **GREEDY)
    assert found[0] == ["001111", "111111"]
    assert handle.stats() == [10]


def test_a_prompt_that_is_not_shown_is_not_run_in_parts() -> None:
    model = Spoken(build("llama").config).eval()
    with sf.steer(model, plan("last")), pytest.raises(ValueError, match="pass it as input_ids"):
        model.generate("5 6 7 8", prefill_chunk_size=2, **GREEDY)
    sf.reset(model)
    sf.prepare(model, room=sf.Room(batch=2, length=16))
    with (
        pytest.raises(ValueError, match="which a prepared model must be told"),
        sf.steer(model, plan("last")),
    ):
        model.generate("5 6 7 8", **GREEDY)


@pytest.mark.parametrize("positions", SELECTORS)
def test_an_image_without_a_text_is_the_prompt(positions: str) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        qformer_config=vision | {"encoder_hidden_size": 32, "vocab_size": 30},
        text_config=build("llama").config.to_dict(),
        num_query_tokens=3,
        image_token_index=100,
    )
    model = transformers.Blip2ForConditionalGeneration._from_config(config).eval()
    pixels = torch.randn(1, 3, 16, 16)
    found, count = run(model, positions, lambda: model.generate(pixel_values=pixels, **GREEDY))
    assert found == expected(4, 3, positions)  # three queries and the beginning-of-text token
    assert count == ones(found)


# --- what a bare pass says of itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "count"), [("prompt", 6), ("generated", 3), ("last", 4), ("-1", 1)])
def test_a_mask_of_the_whole_cache_says_nothing_of_what_has_not_come(llama: Any, positions: str, count: int) -> None:
    cache, x = StaticCache(config=llama.config, max_cache_len=16), IDS
    with torch.no_grad(), sf.steer(llama, plan(positions)) as handle:
        for _ in range(4):
            logits = llama(
                x, attention_mask=torch.ones(1, 16, dtype=torch.long), past_key_values=cache, use_cache=True
            ).logits
            x = logits[:, -1:].argmax(-1)
    assert handle.stats() == [count]


def test_a_mask_that_does_not_cover_the_text_is_refused(llama: Any) -> None:
    refused = pytest.raises(ValueError, match=r"attention mask is \(1, 4\) for 1 rows of 6 tokens")
    with refused, torch.no_grad(), sf.steer(llama, plan("last")), edited(llama) as found:
        llama(IDS, attention_mask=torch.ones(1, 4, dtype=torch.long))
    assert not found


def test_ids_of_one_call_are_not_those_of_the_next(llama: Any) -> None:
    embeddings = llama.get_input_embeddings()(token_ids(1, 6, 5))
    with torch.no_grad(), sf.steer(llama, plan(f"ids:{int(IDS[0, 2])}")):
        llama(IDS)
        with pytest.raises(ValueError, match="does not show"):
            llama.model(inputs_embeds=embeddings)
    with torch.no_grad(), sf.steer(llama, plan()) as handle:
        llama(IDS[:, :3])
        llama.model(IDS)
        with pytest.raises(RuntimeError, match=r"size|shape"):  # the call breaks off before its decoder runs
            llama(inputs_embeds=embeddings[..., :5])
        llama.model(inputs_embeds=embeddings)
    assert handle.stats() == [3 + 6 + 6]


@pytest.mark.parametrize(
    ("given", "shape"), [(torch.tensor([5, 6]), r"\(2,\)"), (torch.zeros(1, 0).long(), r"\(1, 0\)")]
)
def test_a_pass_that_is_no_batch_of_tokens_is_refused(llama: Any, given: torch.Tensor, shape: str) -> None:
    with (
        pytest.raises(ValueError, match=rf"steer: this forward pass is given a tensor of shape {shape}"),
        torch.no_grad(),
        sf.steer(llama, plan()),
    ):
        llama(given)


# --- a static cache on a GPU, whose counter the host does not read --------------------------------------------------------


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's own counter as the position of a pass, as on a GPU."""

    def position(inputs: Any) -> Any:
        found = cache_in(inputs)
        return 0 if found is None else found[1].get_seq_length()

    monkeypatch.setattr(hooks_passes, "past_length", position)


@pytest.mark.skipif(not V5, reason="transformers 4 counts a static cache from its keys")
@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_a_static_cache_that_was_reset_holds_another_text(llama: Any, live: None, grad: Any) -> None:
    with grad(), sf.steer(llama, plan("last")) as handle, edited(llama) as found:
        cache = StaticCache(config=llama.config, max_cache_len=16)
        for ids in (IDS, IDS[:, :1], IDS[:, :1]):
            llama(ids, past_key_values=cache, use_cache=True)
        assert isinstance(cache.get_seq_length(), torch.Tensor)
        cache.reset()
        llama(token_ids(1, 9, 3), past_key_values=cache, use_cache=True)
        llama(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert [rows[0] for rows in found] == ["000001", "1", "1", "000000001", "1"]
    assert handle.stats() == [5]


@pytest.mark.skipif(not V5, reason="transformers 4 counts a static cache from its keys")
def test_a_gate_at_a_later_layer_knows_where_the_pass_began(llama: Any, live: None) -> None:
    with torch.no_grad():
        states = llama(IDS, output_hidden_states=True, use_cache=False).hidden_states[2]
    condition = sf.Condition(states[0, -1], 0.99)
    with sf.steer(llama, {2: sf.When(condition, sf.Add(v()), layer=1)}) as handle:
        llama.generate(IDS, cache_implementation="static", prefill_chunk_size=2, **GREEDY)
        assert handle.decisions()[0][0].tolist() == [True]


# --- modules that are replaced, and warnings that are errors --------------------------------------------------------------


@pytest.mark.parametrize("site", ["head_out", "mlp_out"])
def test_a_module_that_is_replaced_while_it_is_steered_is_refused(llama: Any, site: str) -> None:
    peft = pytest.importorskip("peft")
    target = {"head_out": "o_proj", "mlp_out": "mlp"}[site]
    parent = find_layers(llama).blocks[1].self_attn if site == "head_out" else find_layers(llama).blocks[1]
    with torch.no_grad(), sf.steer(llama, {(site, 1): sf.Add(v())}) as handle:
        llama(IDS)
        if site == "head_out":
            config = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, llama)
        else:
            parent.mlp = copy.deepcopy(parent.mlp)
        with pytest.raises(RuntimeError, match=rf"layers\.1\..*{target} was a .* when the model was steered"):
            llama(IDS)
    assert handle.stats() == [6]
    with torch.no_grad(), sf.steer(llama, {(site, 1): sf.Add(v())}) as handle:
        assert torch.isfinite(llama(IDS).logits).all()
    assert handle.stats() == [6]


def test_a_decoder_that_is_replaced_while_it_is_steered_is_refused(llama: Any) -> None:
    with torch.no_grad(), sf.steer(llama, plan()) as handle:
        llama(IDS)
        llama.model = copy.deepcopy(build("llama")).model
        with pytest.raises(RuntimeError, match="model was a LlamaModel when the model was steered"):
            llama(IDS)
        with pytest.raises(RuntimeError, match="model was a LlamaModel when the model was steered"):
            llama.generate(IDS, **GREEDY)
    assert handle.stats() == [6]


def test_an_adapter_that_is_taken_out_while_steered_is_refused(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).eval()
    handle = sf.steer(model, {("head_out", 1): sf.Add(v())})
    with torch.no_grad():
        model(IDS)
        model.merge_and_unload()
        with pytest.raises(RuntimeError, match=r"o_proj was a Linear when the model was steered and is a Linear now"):
            llama(IDS)
    handle.remove()


def test_an_adapter_elsewhere_changes_nothing(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    with torch.no_grad(), sf.steer(llama, plan()) as handle:
        llama(IDS)
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False), llama)
        llama(IDS)
    assert handle.stats() == [12]


def hooks_of(model: Any) -> list[list[int]]:
    """The ids of the hooks on each module."""
    return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]


def test_a_warning_that_is_an_error_leaves_nothing_behind(llama: Any) -> None:
    begun, left = threading.Event(), threading.Event()
    before = hooks_of(llama)  # transformers may have left some of its own

    class Slow:
        def put(self, value: Any) -> None:
            begun.set()
            left.wait(120)

        def end(self) -> None:
            pass

    handle = sf.steer(llama, plan())
    thread = threading.Thread(target=lambda: llama.generate(IDS, streamer=Slow(), **GREEDY))
    thread.start()
    assert begun.wait(120)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="still running in another thread"):
            handle.remove()
    left.set()
    thread.join()
    assert sf.active(llama) == []
    assert hooks_of(llama) == before
    sf.steer(llama, plan())
    sf.steer(llama, plan())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="no token was edited"):
            sf.reset(llama)
    assert sf.active(llama) == []


# --- soft prompts that come again in every step ---------------------------------------------------------------------------


@pytest.mark.parametrize("positions", SELECTORS)
@pytest.mark.parametrize("cached", [True, False])
def test_soft_prompts_in_front_of_every_step_are_no_generated_tokens(llama: Any, positions: str, cached: bool) -> None:
    """peft 0.21.2 beside transformers 5.24 puts them there, in spite of the cache; other releases do not."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(llama, config).eval()
    found, count = run(model, positions, lambda: model.generate(input_ids=IDS, use_cache=cached, **GREEDY))
    front = "111" if positions == "all" else "000"
    steps = expected(6, 3, positions)
    if cached:
        assert found[0] == front + steps[0]
        for text, step in zip(found[1:], steps[1:], strict=True):
            assert text == (front if len(text) > 1 else "") + step
        assert count == ones(found)
    else:
        assert found == [front + "".join(steps[: i + 1]) for i in range(4)]
