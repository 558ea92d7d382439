"""What once went wrong, or nearly: every test here is a defect that a review found by trying."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from families import build
from families import token_ids as any_ids
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

import steerfast as sf

GREEDY = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model():
    shared = build("llama")
    twin = type(shared)(copy.deepcopy(shared.config)).eval()
    twin.load_state_dict(shared.state_dict())
    return twin


def v(seed: int = 0) -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


def token_ids(batch: int, length: int, seed: int) -> torch.Tensor:
    """Token ids without the special ones: no token looks like padding."""
    return any_ids(batch, length, seed).clamp(min=3)


def untouched(model) -> bool:
    hooked = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
    return not hooked and "generate" not in vars(model) and "_steerfast" not in vars(model)


def padded(batch: int = 2, length: int = 6, pads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = token_ids(batch, length, 1).clamp(min=3), torch.ones(batch, length, dtype=torch.long)
    ids[0, :pads], mask[0, :pads] = 0, 0
    return ids, mask


# --- prepared models ---------------------------------------------------------------------------------------------------


def test_a_bare_pass_after_generate_does_not_keep_the_padding_of_the_last_prompt(model):
    sf.prepare(model, room=sf.Room(batch=4, length=32))
    model.forward = torch.compile(model.forward, backend="eager")
    ids, mask = padded()
    with torch.no_grad(), sf.steer(model, {1: sf.Add(v(), 3.0)}) as handle:
        model.generate(ids, attention_mask=mask, **GREEDY)
        before = handle.stats()[0]
        model(ids, use_cache=False)
        assert handle.stats()[0] - before == 12


def test_a_compiled_pass_that_cannot_know_its_prompt_is_an_error(model):
    sf.prepare(model, room=sf.Room(batch=2, length=32))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = token_ids(1, 6, 0)
    with torch.no_grad():
        compiled(ids, use_cache=False)
        plan = sf.Plan({1: sf.Add(v())}, positions="last")
        with pytest.raises(Exception, match="prompt_length"), sf.steer(model, plan):
            compiled(ids, use_cache=False)
        with sf.steer(model, plan, prompt_length=6) as handle:
            compiled(ids, use_cache=False)
        assert handle.stats() == [1]


@pytest.mark.parametrize("part", ["forward", "decoder", "decoder-wrapped", "layer"])
def test_every_way_of_compiling_is_seen(model, part):
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif part == "decoder":
        model.model.compile(backend="eager")
    elif part == "decoder-wrapped":
        model.model = torch.compile(model.model, backend="eager")
    else:
        model.model.layers[0].compile(backend="eager")
    with pytest.raises(RuntimeError, match="already compiled"):
        sf.steer(model, {1: sf.Add(v())})


def test_prepare_checks_before_it_hooks_and_runs_once(model):
    for arguments in (
        {"batch": -1},
        {"length": 0},
        {"slots": True},
        {"rank": 0},
        {"layers": []},
        {"layers": 5},
        {"layers": [9]},
        {"site": "middle"},
    ):
        with pytest.raises((ValueError, TypeError)):
            sf.prepare(model, **arguments)
        assert untouched(model)
    sf.prepare(model, layers=[1], room=sf.Room(slots=2))
    with pytest.raises(RuntimeError, match="already prepared"):
        sf.prepare(model)


def test_a_refused_plan_gives_its_slots_back(model):
    sf.prepare(model, room=sf.Room(slots=4, columns=4))
    two, three = [sf.Add(v(i)) for i in range(2)], [sf.Add(v(i)) for i in range(3)]
    with pytest.raises(RuntimeError, match="neighbouring slots"):
        sf.steer(model, [sf.Plan({1: two}), sf.Plan({1: three})])
    with sf.steer(model, {1: [*two, *two]}), torch.no_grad():
        model(token_ids(1, 3, 0))


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError])
def test_an_interrupt_in_the_middle_of_attaching_leaves_nothing(model, monkeypatch, error):
    real, calls = sf.Bank.register, []

    def register(self, intervention, slot=None):
        calls.append(slot)
        if len(calls) == 2:
            raise error("injected")
        return real(self, intervention, slot)

    plan = {0: sf.Add(v()), 1: sf.Add(v()), 2: sf.Add(v())}
    for prepared in (False, True):
        calls.clear()
        monkeypatch.setattr(sf.Bank, "register", register)
        if prepared:
            sf.prepare(model, room=sf.Room(slots=2))
        with pytest.raises(error):
            sf.steer(model, plan)
        monkeypatch.undo()
        assert prepared or untouched(model)
        with sf.steer(model, plan), torch.no_grad():
            model(token_ids(1, 3, 0))


# --- what generate says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["keyword", "positional", "model"])
def test_settings_are_resolved_as_generate_does(model, how):
    ids, _ = padded(2, 6, 3)
    settings = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "eos_token_id": 100}
    model.generation_config.pad_token_id = 0 if how == "model" else None
    model.generation_config.eos_token_id = 100
    with sf.steer(model, sf.Plan({1: sf.Add(v())}, positions="prompt")) as handle:
        if how == "keyword":
            model.generate(ids, generation_config=GenerationConfig(**settings))
        elif how == "positional":
            model.generate(ids, GenerationConfig(**settings))
        else:
            model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2, do_sample=False))
    assert handle.stats() == [9]


def test_beams_named_in_a_positional_configuration(model):
    sf.prepare(model, room=sf.Room(batch=8, length=16))
    model.forward = torch.compile(model.forward, backend="eager")
    config = GenerationConfig(max_new_tokens=3, do_sample=False, num_beams=3, pad_token_id=0, eos_token_id=100)
    plan, ids = sf.Plan({1: sf.Add(v(), 3.0)}), token_ids(2, 6, 0)
    with sf.steer(build("llama"), plan):
        expected = build("llama").generate(ids, config)
    with sf.steer(model, plan):
        assert torch.equal(model.generate(ids, config), expected)


def test_two_threads_do_not_share_a_prompt(model):
    started, failures = threading.Event(), []

    def wait(ids, scores):
        started.set()
        second.join(timeout=20)
        return scores

    def other():
        started.wait(20)
        try:
            model.generate(token_ids(1, 4, 0), **GREEDY)
        except RuntimeError as error:
            failures.append(str(error))

    second = threading.Thread(target=other)
    with sf.steer(model, {1: sf.Add(v())}):
        second.start()
        model.generate(token_ids(1, 4, 0), logits_processor=[wait], **{**GREEDY, "max_new_tokens": 1})
        second.join()
    assert failures
    assert "another thread" in failures[0]


def test_a_generate_that_the_user_has_wrapped_is_called_and_restored(model):
    seen, real = [], model.generate
    model.generate = lambda *args, **kwargs: (seen.append(1), real(*args, **kwargs))[1]
    wrapped = model.generate
    with sf.steer(model, sf.Plan({1: sf.Add(v())}, positions="generated")) as handle:
        model.generate(token_ids(1, 7, 0), prefill_chunk_size=3, **GREEDY)
    assert seen == [1]
    assert handle.stats() == [4]
    assert model.generate is wrapped


def test_a_bare_decoder_needs_the_prompts_length(model):
    with pytest.raises(ValueError, match="steer that model instead"):
        sf.steer(model.model, sf.Plan({1: sf.Add(v())}, positions="last"))
    with sf.steer(model.model, sf.Plan({1: sf.Add(v())}, positions="last"), prompt_length=4) as handle, torch.no_grad():
        model.model(token_ids(1, 6, 0))
    assert handle.stats() == [3]
    assert untouched(model)


# --- caches ------------------------------------------------------------------------------------------------------------


def test_each_cache_remembers_its_own_prompt(model):
    with torch.no_grad(), sf.steer(model, sf.Plan({1: sf.Add(v())}, positions="generated")) as handle:
        short = model(token_ids(1, 5, 0), use_cache=True).past_key_values
        long = model(token_ids(1, 9, 0), use_cache=True).past_key_values
        model(token_ids(1, 1, 0), past_key_values=short)
        model(token_ids(1, 1, 0), past_key_values=long)
    assert handle.stats() == [2]


def test_a_cache_that_was_filled_before_steering_is_not_taken_for_the_last_prompt(model):
    with torch.no_grad():
        foreign = model(token_ids(1, 5, 0), use_cache=True).past_key_values
        with (
            pytest.raises(ValueError, match="prompt's length"),
            sf.steer(model, sf.Plan({1: sf.Add(v())}, positions="last")),
        ):
            model(token_ids(1, 5, 1), use_cache=True)
            model(token_ids(1, 1, 0), past_key_values=foreign)


def test_an_encoder_decoder_is_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=101, d_model=48, d_ff=64, num_layers=2, num_heads=4, d_kv=12))
    with pytest.raises(TypeError, match="encoder-decoder"):
        sf.steer(t5, {1: sf.Add(v())})


# --- handles -----------------------------------------------------------------------------------------------------------


def test_counts_are_not_doubled_by_an_exception(model):
    handle = sf.steer(model, [sf.Plan({1: sf.Add(v())}), None])
    with pytest.raises(KeyError), warnings.catch_warnings():
        warnings.simplefilter("error")
        with handle, torch.no_grad():
            model(token_ids(2, 5, 0))
            raise KeyError
    assert handle.stats() == [5, 0]


def test_a_removed_handle_is_of_no_more_use(model):
    with torch.no_grad(), sf.steer(model, {1: sf.Add(v())}) as handle:
        model(token_ids(1, 3, 0))
    with pytest.raises(RuntimeError, match="has been removed"):
        handle.strength = 2.0
    with pytest.raises(RuntimeError, match="has been removed"), handle:
        pass


@pytest.mark.parametrize("reads", [False, True])
def test_a_handle_goes_also_where_what_it_counted_does_not_come(model, reads, monkeypatch):
    def broken_off(*args: object) -> None:
        raise KeyboardInterrupt

    probe = sf.probes.LinearProbe(v(), place=1)
    handle = sf.read(model, probe) if reads else sf.steer(model, {1: sf.Add(v())})
    model(token_ids(1, 4, 0))
    monkeypatch.setattr(handle, "_look" if reads else "stats", broken_off)
    with pytest.raises(KeyboardInterrupt):
        handle.remove()
    assert untouched(model)
    handle.remove()


def test_a_handle_made_in_inference_mode_is_removed_outside(model):
    ids, mask = padded()
    with torch.inference_mode():
        handle = sf.steer(model, {1: sf.Add(v())})
        model(ids, attention_mask=mask)
    model(ids, attention_mask=mask).logits.sum().backward()
    handle.remove()
    assert untouched(model)
    assert handle.stats() == [20]


def test_a_steered_model_is_not_copied_in_part(model):
    with sf.steer(model, {1: sf.Add(v())}), torch.no_grad():
        model(token_ids(1, 3, 0))
        with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
            copy.deepcopy(model)
        with pytest.raises((RuntimeError, AttributeError, pickle.PicklingError)):
            pickle.dumps(model)
    twin = copy.deepcopy(model)
    with sf.steer(twin, {1: sf.Add(v())}), torch.no_grad():
        assert not torch.equal(twin(token_ids(1, 3, 0)).logits, model(token_ids(1, 3, 0)).logits)


def test_one_prompt_has_one_length(model):
    with sf.steer(model, {1: sf.Add(v())}, prompt_length=5) as handle, torch.no_grad():
        model(token_ids(1, 8, 0))
        with pytest.raises(ValueError, match="a prompt has one length"):
            sf.steer(model, {1: sf.Add(v())}, prompt_length=3)
    assert handle.stats() == [8]


@pytest.mark.parametrize("length", [-1, 0, 2.5, True, "x", []])
def test_a_bad_prompt_length_is_refused_at_once(model, length):
    with pytest.raises(ValueError, match="prompt_length is"):
        sf.steer(model, {1: sf.Add(v())}, prompt_length=length)
    assert untouched(model)


def test_lengths_and_masks_of_another_batch(model):
    with (
        pytest.raises(ValueError, match="names 3 rows; this batch has 2"),
        torch.no_grad(),
        sf.steer(model, {1: sf.Add(v())}, prompt_length=[3, 4, 5]),
    ):
        model(token_ids(2, 6, 0))
    for rows in (1, 3):
        plan = sf.Plan({1: sf.Add(v())}, positions=torch.ones(rows, 6, dtype=torch.bool))
        with pytest.raises(ValueError, match=f"the mask has {rows} rows"), torch.no_grad(), sf.steer(model, plan):
            model(token_ids(2, 6, 0))
    assert untouched(model)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda m: sf.steer(None, {1: sf.Add(v())}), TypeError),
        (lambda m: sf.Add(None), TypeError),
        (lambda m: sf.Add("x"), TypeError),
        (lambda m: sf.Barrier([[1.0]], torch.zeros(1), torch.ones(1)), TypeError),
        (lambda m: sf.steer(m.to("meta"), {1: sf.Add(v())}), ValueError),
    ],
)
def test_nonsense_is_named(model, call, error):
    with pytest.raises(error, match=r"^(steer|Add|Barrier)"):
        call(model)
    assert untouched(model)


# --- sixteen bits ------------------------------------------------------------------------------------------------------


def test_what_overflows_sixteen_bits_is_refused(model):
    with pytest.raises(ValueError, match="overflows or vanishes"):
        sf.steer(model.half(), {1: sf.Add(v() * 1e5, 1e-5)})
    with pytest.raises(ValueError, match="overflows or vanishes"):
        sf.steer(model.half(), {1: sf.Add(v() * 1e-12, 1e5)})
    assert untouched(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strengths_are_not_rounded_to_sixteen_bits(model, dtype):
    """257 is no bfloat16: a single plan and a plan per row must agree to the rounding of the stream."""
    model = model.to(dtype)
    x = torch.ones(2, 3, 48, dtype=dtype)
    bank = sf.Bank(48, slots=1, dtype=dtype)
    bank.register(sf.Add(v()))
    direct = sf.Add(v()).apply(x, 257.0)
    per_row = sf.Add(v()).apply(x, torch.full((2, 3), 257.0))
    true = x.double() + 257 * bank.vectors[:1].double()
    assert torch.equal(per_row, direct)
    assert torch.equal(direct, true.to(dtype))


def test_expanded_views_are_not_written(model):
    with pytest.raises(ValueError, match="share memory"):
        sf.ops.add_(torch.zeros(1, 48).expand(4, 48), v())
    with pytest.raises(RuntimeError, match="needs a gradient"):
        sf.ops.add_(torch.zeros(4, 48), v().requires_grad_())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_model_that_is_converted_while_steered_is_edited_in_its_own_dtype(model, dtypes):
    """Rows that had been rounded to 16 bits stayed so in a float32 model, and the other way round."""
    ids = token_ids(2, 6, 0)
    high = sf.When(sf.Condition(v(1), threshold=0.0), sf.Add(v(2)))
    plan = sf.Plan({0: sf.Ablate(v()), 1: [sf.Add(v(), 2.0), high]})
    model.to(dtypes[0])
    with torch.no_grad():
        with sf.steer(model, plan) as handle:
            model(ids, use_cache=False)
            model.to(dtypes[1])
            found = model(ids, use_cache=False).logits
            assert handle.stats() == [24]
        with sf.steer(model, plan), sf.steer(model, [None, plan]) as handle:
            expected = model(ids, use_cache=False).logits
            handle.strength = 0.0
            assert torch.equal(model(ids, use_cache=False).logits, found)
            assert not torch.equal(expected, found)


def parametrized(model):
    """In bfloat16, its weights behind a parametrization, under other names and in another module."""
    for block in model.model.layers:
        weight = block.self_attn.q_proj
        torch.nn.utils.parametrizations.weight_norm(weight)
    model.bfloat16()


def replaced(model):
    model.load_state_dict({name: x.bfloat16() for name, x in model.state_dict().items()}, assign=True)


def exchanged(model):
    """Projections give way to others, and then all are converted."""
    for block in model.model.layers:
        block.self_attn.q_proj = copy.deepcopy(block.self_attn.q_proj)
    model.load_state_dict({name: x.bfloat16() for name, x in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("convert", [replaced, parametrized, exchanged])
def test_weights_that_others_take_the_place_of_are_noticed(convert, model):
    ids = token_ids(2, 6, 0)
    plan = sf.Plan({0: sf.Ablate(v()), 1: [sf.Add(v(), 2.0), sf.Clamp(v(2), high=0.5)]})
    with torch.no_grad():
        with sf.steer(model, plan):
            model(ids, use_cache=False)
            convert(model)
            found = model(ids, use_cache=False).logits
        with sf.steer(model, plan):
            assert torch.equal(model(ids, use_cache=False).logits, found)


def test_weights_of_another_dtype_for_one_call_are_steered_in_it(model):
    ids, plan = token_ids(2, 6, 0), sf.Plan({0: sf.Ablate(v()), 1: sf.Add(v(), 2.0)})
    weights = {name: x.to(torch.bfloat16) for name, x in model.state_dict().items()}
    with torch.no_grad():
        with sf.steer(model, plan):
            before = model(ids, use_cache=False).logits
            found = torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits
            assert torch.equal(model(ids, use_cache=False).logits, before)
        replaced(model)  # unlike `bfloat16()`, leaves the frequencies of the positions as they are
        with sf.steer(model, plan):
            assert torch.equal(model(ids, use_cache=False).logits, found)


def test_a_vector_that_overflows_where_a_model_is_converted_to_is_refused(model):
    with sf.steer(model, {1: sf.Add(v() * 1e5)}), torch.no_grad():
        model(token_ids(1, 4, 0))
        model.half()
        with pytest.raises(ValueError, match=r"does not fit torch\.float16: a row overflows"):
            model(token_ids(1, 4, 0))


def test_a_prepared_model_that_is_converted_is_refused(model):
    sf.prepare(model, room=sf.Room(batch=2, length=8))
    model.to(torch.bfloat16)
    with pytest.raises(
        RuntimeError, match=r"was prepared in torch\.float32 on cpu, and model\.layers\.0 is torch\.bfloat16"
    ):
        sf.steer(model, {1: sf.Add(v())})
    sf.unprepare(model)
    sf.prepare(model, room=sf.Room(batch=2, length=8))
    with sf.steer(model, {1: sf.Add(v())}), torch.no_grad():
        model(token_ids(1, 4, 0))
        model.float()
        with pytest.raises(RuntimeError, match="convert and move a model first, then call prepare"):
            model(token_ids(1, 4, 0))
