"""The hook against an oracle: a full forward pass without cache, edited by a bare hook with an explicit token mask."""

from __future__ import annotations

import gc
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch
from families import CORE, VOCAB, build, token_ids

import steerfast as sf
from steerfast.models.layers import find_layers
from steerfast.plan import ModelCard

NEW = 6
EOS = VOCAB - 1
PROMPT = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 10_000}


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """Every test, whatever happens in it, must leave the shared models without a trace."""
    yield
    for name in CORE:
        model = build(name)
        assert "generate" not in vars(model), name
        assert "_steerfast" not in vars(model), name
        for module in model.modules():
            assert not module._forward_pre_hooks, name
            assert not [
                hook for hook in module._forward_hooks.values() if "steerfast" in getattr(hook, "__module__", "")
            ]


@pytest.fixture
def llama():
    return build("llama")


def vector(width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def width_of(model) -> int:
    return find_layers(model).d


@contextmanager
def edited(model, layer: int, delta: torch.Tensor):
    """The oracle: add delta (batch, tokens, d) to the block's output with a bare hook."""

    def hook(module, args, output):
        if isinstance(output, tuple):
            return (output[0] + delta, *output[1:])
        return output + delta

    handle = find_layers(model).blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def oracle_logits(model, layer, v, sequence, where, mask=None) -> torch.Tensor:
    """Logits of one uncached pass over `sequence` with v added where `where` (batch, tokens) is true."""
    with torch.no_grad(), edited(model, layer, where[..., None] * v):
        positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        return model(sequence, attention_mask=mask, use_cache=False, **positions).logits


def expected_where(positions, batch, prompt, total) -> torch.Tensor:
    here = torch.arange(total).expand(batch, total)
    rules = {
        "all": here >= 0,
        "prompt": here < prompt,
        "generated": here >= prompt,
        "last": here >= prompt - 1,
        "indices": (here == 1) | (here == prompt - 2),
        "mask": (here < prompt) & (here % 2 == 0),
    }
    return rules[positions]


def plan_positions(positions, prompt):
    special = {"indices": [1, -2], "mask": torch.arange(prompt) % 2 == 0}
    return special.get(positions, positions)


def check_generation(model, plan_for, where, v, layer, inputs, **kwargs) -> None:
    """Generate under the plan and compare every step's logits with the oracle on the sequence that came out."""
    with sf.steer(model, plan_for) as handle:
        out = model.generate(**inputs, **PROMPT, **kwargs, output_logits=True, return_dict_in_generate=True)
    prompt = inputs["input_ids"].shape[1]
    sequence = out.sequences[:, :-1]
    mask = inputs.get("attention_mask")
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, sequence.shape[1] - prompt), value=1)
    expected = oracle_logits(model, layer, v, sequence, where[:, : sequence.shape[1]], mask)[:, prompt - 1 :]
    got = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    unsteered = model.generate(**inputs, **PROMPT, output_logits=True, return_dict_in_generate=True)
    assert (torch.stack(unsteered.logits, 1) - got).abs().max() > 1e-3  # the plan did something
    assert sum(handle.stats()) > 0


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", "indices", "mask"])
def test_positions_under_a_growing_cache(name, positions):
    model = build(name)
    v, ids = vector(width_of(model)), token_ids(2, 7, 0)
    plan = sf.Plan({1: sf.Add(v, 2.0)}, positions=plan_positions(positions, 7))
    check_generation(model, plan, expected_where(positions, 2, 7, 7 + NEW), 2 * v, 1, {"input_ids": ids})


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", "indices", "mask"])
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=["static", "chunked-prefill", "no-cache", "assisted"],
)
def test_positions_under_every_cache(llama, positions, options):
    assisted = "prompt_lookup_num_tokens" in options
    v, ids = vector(48), token_ids(1 if assisted else 2, 7, 1)
    if assisted:
        ids = torch.cat([ids, ids], dim=1)  # a repeated prompt gives the look-up something to propose
    batch, length = ids.shape
    plan = sf.Plan({1: sf.Add(v, 2.0)}, positions=plan_positions(positions, length))
    where = expected_where(positions, batch, length, length + NEW)
    check_generation(llama, plan, where, 2 * v, 1, {"input_ids": ids}, **options)


def test_an_assistant_model_proposes_and_the_steered_model_decides(llama):
    v, ids = vector(48), token_ids(1, 7, 1)
    plan = sf.Plan({1: sf.Add(v, 2.0)}, positions="generated")
    where = expected_where("generated", 1, 7, 7 + NEW)
    check_generation(llama, plan, where, 2 * v, 1, {"input_ids": ids}, assistant_model=build("qwen2"))


@pytest.mark.parametrize("name", CORE)
def test_left_padding_is_never_steered(name):
    model = build(name)
    v, ids = vector(width_of(model)), token_ids(2, 7, 2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 0
    where = expected_where("all", 2, 7, 7 + NEW) & torch.nn.functional.pad(mask, (0, NEW), value=1).bool()
    with sf.steer(model, {1: sf.Add(v, 2.0)}) as handle:
        out = model.generate(
            input_ids=ids, attention_mask=mask, **PROMPT, output_logits=True, return_dict_in_generate=True
        )
    alone = {"input_ids": ids[1:, 3:]}
    with sf.steer(model, {1: sf.Add(v, 2.0)}):
        single = model.generate(**alone, **PROMPT, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(torch.stack(out.logits, 1)[1:], torch.stack(single.logits, 1), atol=2e-4, rtol=2e-4)
    assert handle.stats() == [int(where[:, :-1].sum())]


def test_right_padding_of_a_bare_forward_is_never_steered(llama):
    v, ids = vector(48), token_ids(2, 7, 3)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    for positions, rows in (("all", [7, 5]), ("last", [1, 1]), ("prompt", [7, 5])):
        with sf.steer(llama, sf.Plan({1: sf.Add(v, 2.0)}, positions=positions)) as handle, torch.no_grad():
            logits = llama(ids, attention_mask=mask).logits
        assert handle.stats() == [sum(rows)]
        where = mask.bool() if positions != "last" else torch.zeros(2, 7, dtype=torch.bool)
        if positions == "last":
            where[0, 6] = where[1, 4] = True
        with torch.no_grad(), edited(llama, 1, where[..., None] * 2 * v):
            torch.testing.assert_close(logits, llama(ids, attention_mask=mask).logits)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 4, "num_return_sequences": 2}],
)
def test_a_plan_per_row_follows_its_prompt(llama, options):
    """Each row of a mixed batch must come out as it does in a batch where all rows have its plan."""
    a, b = (
        sf.Plan({1: sf.Add(vector(48), 3.0)}),
        sf.Plan({0: sf.Add(vector(48, 1), 3.0), 2: sf.Ablate(vector(48, 2))}, positions="last"),
    )
    ids = token_ids(3, 6, 4)
    sequences = {}
    for key, plan in (("mixed", [a, None, b]), ("a", [a, a, a]), ("b", [b, b, b]), ("none", None)):
        torch.manual_seed(5)
        settings = {**PROMPT, **options}
        if plan is None:
            sequences[key] = llama.generate(input_ids=ids, **settings)
        else:
            with sf.steer(llama, plan) as handle:
                sequences[key] = llama.generate(input_ids=ids, **settings)
            if key == "mixed":
                assert handle.stats()[1] == 0
                assert handle.stats()[0] > handle.stats()[2] > 0
    per = sequences["mixed"].shape[0] // 3
    if not options.get("do_sample"):
        for row, source in enumerate(("a", "none", "b")):
            part = slice(row * per, (row + 1) * per)
            assert torch.equal(sequences["mixed"][part], sequences[source][part])
    else:
        assert sequences["mixed"].shape[0] == 6


def test_per_row_logits_are_exact(llama):
    a, b, ids = sf.Plan({1: sf.Add(vector(48), 3.0)}), sf.Plan({1: sf.Amplify(vector(48, 1), 2.0)}), token_ids(3, 6, 4)
    with torch.no_grad():
        plain = llama(ids).logits
        with sf.steer(llama, [a, None, b]):
            mixed = llama(ids).logits
        with sf.steer(llama, b):
            only_b = llama(ids).logits
        with sf.steer(llama, a):
            only_a = llama(ids).logits
    assert torch.equal(mixed[1], plain[1])  # an unsteered row keeps its bits
    torch.testing.assert_close(mixed[0], only_a[0])
    torch.testing.assert_close(mixed[2], only_b[2])


@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_every_layer_and_site_acts_and_is_undone(name, site):
    model, ids = build(name), token_ids(2, 5, 6)
    layers = find_layers(model)
    with torch.no_grad():
        before = model(ids).logits
        for layer in range(layers.count):
            width = layers.point(layer, site).width
            with sf.steer(model, {(site, layer): sf.Add(vector(width), 2.0)}):
                assert (model(ids).logits - before).abs().max() > 1e-4
            assert torch.equal(model(ids).logits, before)


def test_head_out_has_its_own_width():
    model, ids = build("qwen3"), token_ids(1, 5, 6)
    point = find_layers(model).point(1, "head_out")
    assert point.width == 64 != width_of(model)
    with torch.no_grad():
        before = model(ids).logits
        with sf.steer(model, {("head_out", 1): sf.Add(vector(64), 2.0)}):
            assert not torch.equal(model(ids).logits, before)


def test_a_list_acts_in_order(llama):
    u, v, ids = vector(48), vector(48, 1), token_ids(1, 5, 6)
    with torch.no_grad():
        with sf.steer(llama, {1: [sf.Add(v, 2.0), sf.Ablate(u)]}):
            ablated_last = llama(ids, output_hidden_states=True).hidden_states
        with sf.steer(llama, {1: [sf.Ablate(u), sf.Add(v, 2.0)]}):
            added_last = llama(ids, output_hidden_states=True).hidden_states
        seen = _capture(llama, 1, ids, {1: [sf.Add(v, 2.0), sf.Ablate(u)]})
    unit = u / u.norm()
    assert (seen @ unit).abs().max() < 1e-5
    assert len(ablated_last) == len(added_last)
    other = _capture(llama, 1, ids, {1: [sf.Ablate(u), sf.Add(v, 2.0)]})
    torch.testing.assert_close(other @ unit, (2 * v @ unit).expand(1, 5))


def _capture(model, layer, ids, plan) -> torch.Tensor:
    """The stream after a block as a hook of the user, registered before ours, sees it."""
    seen = []
    hook = (
        find_layers(model)
        .blocks[layer]
        .register_forward_hook(
            lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    with hook, torch.no_grad(), sf.steer(model, plan):
        model(ids)
    return seen[0]


def test_hooks_of_others_see_the_steered_stream(llama):
    v, ids = vector(48), token_ids(1, 5, 6)
    with torch.no_grad():
        clean = llama(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(_capture(llama, 1, ids, {1: sf.Add(v, 2.0)}), clean + 2 * v)


def test_more_than_four_edits_on_one_layer(llama):
    ids = token_ids(2, 5, 6)
    vectors = [vector(48, seed) for seed in range(6)]
    plan = {1: [sf.Add(v, 1.0) for v in vectors]}
    with torch.no_grad():
        clean = llama(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(_capture(llama, 1, ids, plan), clean + sum(vectors))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with sf.steer(llama, plan), torch.no_grad():
        by_table = llama(ids, attention_mask=mask).logits
    where = mask.bool()[..., None] * sum(vectors)
    with torch.no_grad(), edited(llama, 1, where):
        torch.testing.assert_close(by_table, llama(ids, attention_mask=mask).logits, atol=1e-5, rtol=1e-5)


def test_nested_handles_stack_and_come_off_in_any_order(llama):
    u, v, ids = vector(48), vector(48, 1), token_ids(1, 5, 6)
    with torch.no_grad():
        clean = llama(ids).logits
        first = sf.steer(llama, {1: sf.Add(u)})
        only_first = llama(ids).logits
        second = sf.steer(llama, sf.Plan({1: sf.Add(v), 2: sf.Ablate(v)}))
        both = llama(ids).logits
        assert not torch.equal(both, only_first)
        first.remove()
        only_second = llama(ids).logits
        third = sf.steer(llama, {1: sf.Add(u)})
        torch.testing.assert_close(llama(ids).logits, both)
        third.remove()
        assert torch.equal(llama(ids).logits, only_second)
        second.remove()
        second.remove()
        assert torch.equal(llama(ids).logits, clean)


def test_strength_changes_at_once(llama):
    v, ids = vector(48), token_ids(2, 5, 6)
    with torch.no_grad():
        clean = llama(ids).logits
        with sf.steer(llama, {1: sf.Add(v, 2.0)}) as handle:
            two = llama(ids).logits
            handle.strength = 0.5
            half = llama(ids).logits
            handle.strength = 0.0
            assert torch.equal(llama(ids).logits, clean)
        with sf.steer(llama, {1: sf.Add(v, 1.0)}):
            torch.testing.assert_close(llama(ids).logits, half)
        with sf.steer(llama, [sf.Plan({1: sf.Add(v, 1.0)})] * 2, strength=[2.0, 1.0]):
            rows = llama(ids).logits
    torch.testing.assert_close(rows[0], two[0])
    torch.testing.assert_close(rows[1], half[1])


def test_an_exception_inside_with_restores_everything(llama):
    ids = token_ids(1, 5, 6)
    with torch.no_grad():
        clean = llama(ids).logits
        with pytest.raises(KeyError, match="boom"), warnings.catch_warnings():
            warnings.simplefilter("error")
            with sf.steer(llama, {1: sf.Add(vector(48))}):
                raise KeyError("boom")
        assert torch.equal(llama(ids).logits, clean)
        with pytest.raises(RuntimeError), sf.steer(llama, {1: sf.Add(vector(48))}):
            llama.generate(input_ids=ids, **PROMPT, logits_processor=[_explode])
        assert torch.equal(llama(ids).logits, clean)


def _explode(ids, scores):
    raise RuntimeError("inside generate")


def test_no_token_edited_warns(llama):
    with pytest.warns(RuntimeWarning, match="no token was edited"), sf.steer(llama, {1: sf.Add(vector(48))}):
        pass


def test_a_reused_cache_keeps_the_meaning_of_positions(llama):
    """A second turn over a cache: the prompt is the whole conversation, its first part is not run again."""
    v, ids = vector(48), token_ids(1, 12, 8)
    with torch.no_grad():
        cache = llama(ids[:, :7], use_cache=True).past_key_values
        with sf.steer(llama, sf.Plan({1: sf.Add(v, 2.0)}, positions="prompt")) as handle:
            llama.generate(input_ids=ids, past_key_values=cache, **PROMPT)
    assert handle.stats() == [5]  # 12 prompt tokens, 7 of them cached before


def test_bare_decoding_over_a_cache(llama):
    v, ids = vector(48), token_ids(1, 8, 8)
    with torch.no_grad():
        for positions, count in (("all", 8), ("prompt", 5), ("generated", 3), ("last", 4)):
            with sf.steer(llama, sf.Plan({1: sf.Add(v, 2.0)}, positions=positions)) as handle:
                out = llama(ids[:, :5], use_cache=True)
                for i in range(5, 8):
                    out = llama(ids[:, i : i + 1], past_key_values=out.past_key_values)
            assert handle.stats() == [count]
            where = expected_where(positions, 1, 5, 8)
            expected = oracle_logits(llama, 1, 2 * v, ids, where)[:, -1:]
            torch.testing.assert_close(out.logits, expected, atol=2e-5, rtol=2e-5)
        with sf.steer(llama, sf.Plan({1: sf.Add(v, 2.0)}, positions="generated"), prompt_length=5) as handle:
            full = llama(ids, use_cache=False).logits
        assert handle.stats() == [3]
        torch.testing.assert_close(full, oracle_logits(llama, 1, 2 * v, ids, expected_where("generated", 1, 5, 8)))


def test_chunks_of_a_bare_prompt_need_its_length(llama):
    v, ids = vector(48), token_ids(1, 8, 8)
    with torch.no_grad(), sf.steer(llama, sf.Plan({1: sf.Add(v)}, positions="last"), prompt_length=6) as handle:
        out = llama(ids[:, :3], use_cache=True)
        out = llama(ids[:, 3:6], past_key_values=out.past_key_values)
        llama(ids[:, 6:], past_key_values=out.past_key_values)
    assert handle.stats() == [3]


def test_what_cannot_be_known_is_an_error(llama):
    v, ids = vector(48), token_ids(1, 8, 8)
    with torch.no_grad():
        cache = llama(ids[:, :5], use_cache=True).past_key_values
        for positions in ("prompt", "generated", "last", [0], torch.ones(5, dtype=torch.bool)):
            with (
                pytest.raises(ValueError, match="prompt's length"),
                sf.steer(llama, sf.Plan({1: sf.Add(v)}, positions=positions)),
            ):
                llama(ids[:, 5:6], past_key_values=cache)
        with sf.steer(llama, {1: sf.Add(v)}) as handle:  # "all" needs no prompt
            llama(ids[:, 5:6], past_key_values=cache)
        assert handle.stats() == [1]
        four = torch.zeros(1, 1, 8, 8)
        with pytest.raises(ValueError, match="prepared attention mask"), sf.steer(llama, {1: sf.Add(v)}):
            llama(ids, attention_mask=four)


def test_inputs_embeds_count_as_the_prompt(llama):
    v, ids = vector(48), token_ids(2, 5, 6)
    embeds = llama.get_input_embeddings()(ids).detach()
    with sf.steer(llama, sf.Plan({1: sf.Add(v)}, positions="prompt")) as handle:
        llama.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **PROMPT)
    assert handle.stats() == [10]


def test_a_missing_mask_is_inferred_as_generate_does(llama):
    v, ids = vector(48), token_ids(2, 5, 6).clamp(min=3)
    ids[0, :2] = 0
    with sf.steer(llama, sf.Plan({1: sf.Add(v)}, positions="prompt")) as handle:
        llama.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=EOS)
    assert handle.stats() == [8]


def test_a_strength_that_was_read_can_be_given_back(llama):
    ids = token_ids(1, 5, 0)
    with sf.steer(llama, {1: sf.Add(vector(48))}, strength=[2.0]) as handle, torch.no_grad():
        wanted, before = llama(ids).logits, handle.strength
        handle.strength = 0.0
        assert not torch.equal(llama(ids).logits, wanted)
        handle.strength = before
        assert torch.equal(llama(ids).logits, wanted)
        with pytest.raises(ValueError, match="2 strengths for 1 plan"):
            handle.strength = [1.0, 2.0]


@pytest.mark.parametrize("eos", [0, [0, 7], torch.tensor(0), torch.tensor([7, 0])])
@pytest.mark.parametrize("pad", [0, torch.tensor(0)])
def test_a_token_that_pads_and_ends_is_no_padding_however_it_is_given(llama, pad, eos):
    ids = token_ids(2, 5, 6).clamp(min=3)
    ids[0, :2] = 0
    with sf.steer(llama, sf.Plan({1: sf.Add(vector(48))}, positions="prompt")) as handle:
        llama.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=pad, eos_token_id=eos)
    assert handle.stats() == [10]


def test_gradients_flow_through_a_steered_model(llama):
    v, ids = vector(48), token_ids(1, 5, 6)
    embeds = llama.get_input_embeddings()(ids).detach().requires_grad_()
    with sf.steer(llama, {1: sf.Amplify(vector(48, 1), 1.0), 2: sf.Add(v)}):
        llama(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


def test_a_removed_handle_keeps_no_model_alive():
    model = build("llama").__class__(build("llama").config).eval()
    with sf.steer(model, {1: sf.Add(vector(48))}), torch.no_grad():
        model(token_ids(1, 3, 0))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({40: "add"}, r"steer: layer 40 is out of range; this model \(LlamaForCausalLM\) has 3 layers, 0 to 2"),
        ({1: "wide"}, r"width 50; this model's resid_post has 48"),
        ([{1: "add"}, None, None], r"3 plans were given for a batch of 2 prompts"),
        ([None, None], r"no plan is given"),
        ("nonsense", r"expected a Plan or a dict"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_and_leaves_nothing(llama, plan, message):
    def real(value):
        if isinstance(value, dict):
            return {k: sf.Add(vector(50 if v == "wide" else 48)) for k, v in value.items()}
        return [real(v) for v in value] if isinstance(value, list) else value

    with pytest.raises((ValueError, TypeError), match=message), sf.steer(llama, real(plan)), torch.no_grad():
        llama(token_ids(2, 4, 0))


def test_positions_out_of_range_are_refused(llama):
    ids = token_ids(2, 5, 6)
    for positions, message in (
        ([7], "position 7 is out of range"),
        ([-6], "position -6"),
        (torch.ones(3, dtype=torch.bool), "mask covers 3"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            sf.steer(llama, sf.Plan({1: sf.Add(vector(48))}, positions=positions)),
        ):
            llama.generate(input_ids=ids, **PROMPT)


def test_an_empty_prompt_is_refused(llama):
    with pytest.raises(ValueError, match="no tokens"), sf.steer(llama, {1: sf.Add(vector(48))}):
        llama.generate(input_ids=torch.zeros(1, 0, dtype=torch.long), **PROMPT)


def test_a_plan_for_another_model_is_refused(llama):
    made_for_gpt2 = sf.Plan({1: sf.Add(vector(48))}, model=ModelCard("GPT2LMHeadModel:", 48, 12))
    with pytest.raises(ValueError, match="12 layers"):
        sf.steer(llama, made_for_gpt2)
    renamed = sf.Plan({1: sf.Add(vector(48))}, model=ModelCard("OtherForCausalLM:", 48, 3))
    with pytest.warns(UserWarning, match="was made for OtherForCausalLM"):
        sf.steer(llama, renamed).__exit__(KeyError, KeyError(), None)
