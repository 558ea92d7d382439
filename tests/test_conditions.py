"""Conditional steering: decided per request where the prompt ends, or per token; against an oracle of one uncached pass."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from families import VOCAB, build, token_ids
from places import PLACES, backend

import steerfast as sf
from steerfast.models.layers import find_layers

NEW, READ, ACT = 5, 0, 1
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 10_000}


@pytest.fixture
def llama():
    model = build("llama")
    yield model
    assert "generate" not in vars(model)
    assert "_steerfast" not in vars(model)


def stream(model, ids, layer, mask=None) -> torch.Tensor:
    """resid_post of one layer, unsteered."""
    kept = []

    def keep(module, args, output):
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = find_layers(model).blocks[layer].register_forward_hook(keep)
    with torch.no_grad():
        positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        model(ids, attention_mask=mask, use_cache=False, **positions)
    handle.remove()
    return kept[0]


def split_by(similarities: torch.Tensor) -> float:
    """A threshold between two of the numbers, as far from both as can be."""
    ordered = similarities.sort().values
    gap = int((ordered[1:] - ordered[:-1]).argmax())
    return float((ordered[gap] + ordered[gap + 1]) / 2)


def oracle(model, ids, where, v, mask=None) -> torch.Tensor:
    """Logits of one uncached pass with v added after layer ACT where `where` (batch, tokens) is true."""

    def add(module, args, output):
        delta = where[..., None] * v
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = find_layers(model).blocks[ACT].register_forward_hook(add)
    try:
        with torch.no_grad():
            positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            return model(ids, attention_mask=mask, use_cache=False, **positions).logits
    finally:
        handle.remove()


def setup(model, batch=4, tokens=6, similarity="projection"):
    d = find_layers(model).d
    ids = token_ids(batch, tokens)
    w = torch.nn.functional.normalize(torch.randn(d, generator=torch.Generator().manual_seed(1)), dim=0)
    x = stream(model, ids, READ)[:, -1]
    threshold = split_by(sf.ops.similarity(x, w, similarity))
    v = 3 * torch.randn(d, generator=torch.Generator().manual_seed(2))
    return ids, sf.Condition(w, threshold, similarity=similarity), v


@pytest.mark.parametrize("similarity", ["projection", "tanh"])
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_a_request_is_steered_from_its_last_prompt_token_if_it_meets_the_condition(llama, similarity, above, options):
    ids, condition, v = setup(llama, similarity=similarity)
    condition = sf.Condition(condition.probe.direction, condition.threshold, above, similarity)
    meets = condition(stream(llama, ids, READ)[:, -1])
    assert 0 < int(meets.sum()) < 4
    with sf.steer(llama, {ACT: sf.When(condition, sf.Add(v), layer=READ)}) as handle:
        out = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            output_logits=True,
            return_dict_in_generate=True,
            **GREEDY,
            **options,
        )
        assert torch.equal(handle.decisions()[0][0], meets)
    assert torch.equal(handle.decisions()[0][0], meets)  # still to be read after removal
    where = torch.zeros(out.sequences.shape, dtype=torch.bool)
    where[:, ids.shape[1] - 1 :] = meets[:, None]
    expected = oracle(llama, out.sequences, where, v)[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)
    plain = llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(out.sequences[~meets], plain[~meets])


@pytest.mark.parametrize("place", PLACES)
def test_exactly_at_its_threshold_a_condition_is_off_on_both_sides(place):
    """By similarities that are exact in float32: 1/2, 0 of a zero row, and 1; and by one that is rounded, 3/5."""
    with backend(place) as device:
        w, one = torch.eye(4)[0], torch.tensor(1.0)
        half, fifths = torch.ones(4), torch.tensor([3.0, 4.0, 0.0, 0.0])
        for kind, x, theta in (
            ("projection", half, 0.5),
            ("projection", 0 * half, 0.0),
            ("projection", w, 1.0),
            ("projection", fifths, 0.6),
            ("tanh", 2 * w, 1.0),
        ):
            x = x.to(device).expand(3, 4)
            lower, upper = (float(torch.nextafter(torch.tensor(theta), to)) for to in (-one, 2 * one))
            for above in (True, False):
                assert not sf.Condition(w, theta, above, kind)(x).any(), (kind, theta, above)
            if theta > 0:
                assert sf.Condition(w, lower, True, kind)(x).all(), (kind, theta)
            if theta < 1:
                assert sf.Condition(w, upper, False, kind)(x).all(), (kind, theta)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gate", [sf.When, sf.WhenToken])
def test_exactly_at_its_threshold_nothing_is_steered(llama, place, gate):
    """The threshold is the similarity that the last token of one request has, to the bit."""
    with backend(place) as device:
        ids, condition, v = setup(llama)
        model, ids = deepcopy(llama).to(device), ids.to(device)
        x = stream(model, ids, READ)
        seen = sf.ops.similarity(x if gate.per_token else x[:, -1], condition.probe.direction.to(device))
        theta = (seen[1, -1] if gate.per_token else seen[1]).cpu()
        assert 0 < theta < 1
        with torch.no_grad():
            plain = model(ids).logits[1, -1]
            for threshold, above, acts in (
                (theta, True, False),
                (theta, False, False),
                (torch.nextafter(theta, 0 * theta), True, True),
                (torch.nextafter(theta, 1 + theta), False, True),
            ):
                when = gate(sf.Condition(condition.probe.direction, float(threshold), above), sf.Add(v), layer=READ)
                plan = sf.Plan({ACT: [when, sf.Add(1e-30 * v)]}, positions=[-1])
                with sf.steer(model, plan, prompt_length=ids.shape[1]):
                    moved = not torch.allclose(model(ids).logits[1, -1], plain, atol=1e-5)
                assert moved == acts, (threshold, above)


def test_left_padding_and_repeated_rows(llama):
    ids, condition, v = setup(llama)
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, :3] = 0
    meets = condition(stream(llama, ids, READ, mask)[:, -1])
    with sf.steer(llama, {ACT: sf.When(condition, sf.Add(v), layer=READ)}) as handle:
        out = llama.generate(ids, attention_mask=mask, num_beams=2, num_return_sequences=2, **GREEDY)
        assert torch.equal(handle.decisions()[0][0], meets.repeat_interleave(2))
    assert out.shape[0] == 8


def test_a_chunked_prompt_is_decided_at_its_end(llama):
    ids, condition, v = setup(llama)
    plan = sf.Plan({ACT: sf.When(condition, sf.Add(v), layer=READ)})
    meets = condition(stream(llama, ids, READ)[:, -1])
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, -1] = meets
    expected = oracle(llama, ids, where, v)
    with torch.no_grad(), sf.steer(llama, plan, prompt_length=ids.shape[1]):
        first = llama(ids[:, :4], use_cache=True)
        second = llama(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, atol=1e-4, rtol=1e-4)


def test_per_token_at_the_same_place_reads_the_stream_before_the_edits_there(llama):
    ids, condition, v = setup(llama)
    here = stream(llama, ids, ACT)
    condition = sf.Condition(
        condition.probe.direction, split_by(sf.ops.similarity(here, condition.probe.direction).flatten())
    )
    with sf.steer(llama, {ACT: [sf.Add(v), sf.WhenToken(condition, sf.Add(v))]}), torch.no_grad():
        got = llama(ids).logits
    torch.testing.assert_close(got, oracle(llama, ids, 1 + condition(here).float(), v), atol=1e-4, rtol=1e-4)


def test_one_condition_serves_many_layers_and_plans_per_row_keep_theirs(llama):
    ids, condition, v = setup(llama)
    one = sf.Plan({layer: sf.When(condition, sf.Add(v * 0.1), layer=0) for layer in (0, 1)})
    never = sf.Plan({ACT: sf.When(sf.Condition(condition.probe.direction, 1.0), sf.Add(v), layer=READ)})
    always = sf.Plan({ACT: sf.When(sf.Condition(condition.probe.direction, 0.0), sf.Add(v), layer=READ)})
    alone = []
    for plan, i in ((one, 0), (never, 1), (always, 2), (None, 3)):
        row = ids[i : i + 1]
        if plan is None:
            alone.append(llama.generate(row, attention_mask=torch.ones_like(row), **GREEDY))
            continue
        with sf.steer(llama, plan):
            alone.append(llama.generate(row, attention_mask=torch.ones_like(row), **GREEDY))
    with sf.steer(llama, [one, never, always, None]) as handle:
        together = llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        decided = handle.decisions()
        assert [len(d) for d in decided] == [1, 1, 1, 0]  # one latch for both layers of the first plan
        assert not decided[1][0].item()
        assert decided[2][0].item()
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[1], llama.generate(ids[1:2], attention_mask=torch.ones_like(ids[:1]), **GREEDY)[0])


def test_a_condition_beside_plain_edits_holds_back_only_its_own(llama):
    ids, condition, v = setup(llama)
    never = sf.Condition(condition.probe.direction, 1.0)
    plan = {READ: sf.Add(v), ACT: [sf.When(never, sf.Ablate(v), layer=READ), sf.Add(2 * v)]}
    with torch.no_grad():
        with sf.steer(llama, plan):
            got = llama(ids).logits
        with sf.steer(llama, {READ: sf.Add(v), ACT: sf.Add(2 * v)}):
            assert torch.equal(llama(ids).logits, got)


def test_what_cannot_be_followed_is_refused(llama):
    ids, condition, v = setup(llama)
    when = sf.When(condition, sf.Add(v), layer=ACT)
    with pytest.raises(ValueError, match="before layer 1 where its condition is read"):
        sf.steer(llama, {READ: when})
    with pytest.raises(ValueError, match="before layer 1 where its condition is read"):
        sf.steer(llama, {("resid_pre", ACT): when})
    with pytest.raises(ValueError, match="out of range"):
        sf.steer(llama, {ACT: sf.When(condition, sf.Add(v), layer=40)})
    with torch.no_grad(), sf.steer(llama, {ACT: sf.When(condition, sf.Add(v), layer=READ)}, prompt_length=3):
        cache = None
        with sf.steer(llama, {READ: sf.Add(v)}, strength=0.0):
            pass
        out = llama(ids[:, :4], use_cache=True)
        cache = out.past_key_values
        llama(ids[:, 4:5], past_key_values=cache)
    cache = llama(ids, use_cache=True).past_key_values
    with torch.no_grad(), sf.steer(llama, {ACT: sf.When(condition, sf.Add(v), layer=READ)}, prompt_length=3) as handle:
        with pytest.raises(ValueError, match="lies before this forward pass"):
            llama(ids[:, -1:], past_key_values=cache)
        handle._counts = [1]  # nothing was edited, which is what is tested


def test_a_prepared_model_refuses_conditions():
    model = deepcopy(build("llama"))
    sf.prepare(model)
    ids, condition, v = (
        token_ids(1, 4),
        sf.Condition(torch.ones(find_layers(model).d), 0.5),
        torch.ones(find_layers(model).d),
    )
    with pytest.raises(ValueError, match="is no part of the prepared model"):
        sf.steer(model, {ACT: sf.When(condition, sf.Add(v))})
    assert ids.max() < VOCAB


def test_a_plan_with_conditions_comes_back_and_steers_the_same(llama, tmp_path):
    ids, condition, v = setup(llama)
    plan = sf.Plan({ACT: [sf.When(condition, sf.Amplify(torch.stack([v, v.flip(0)]), 0.5), layer=READ)]})
    plan.save(tmp_path / "plan")
    with torch.no_grad():
        with sf.steer(llama, plan):
            one = llama(ids).logits
        with sf.steer(llama, sf.Plan.load(tmp_path / "plan")):
            assert torch.equal(llama(ids).logits, one)
        assert not torch.equal(llama(ids).logits, one)
