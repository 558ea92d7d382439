"""Conditions on any probe, and those that stay open: against an oracle that decides token by token over one uncached pass."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from families import VOCAB, build, token_ids

import steerfast as sf
from steerfast.models.layers import find_layers

ACT, READ = 2, 0
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": VOCAB + 5}


@pytest.fixture
def llama():
    model = deepcopy(build("llama"))
    yield model
    assert "_steerfast" not in vars(model)


def row(seed: int) -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


def oracle(
    model: Any, ids: torch.Tensor, where: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> Any:
    """(stream at READ, logits) of one uncached pass with v added after layer ACT where `where` (batch, tokens) is true."""
    kept: list[torch.Tensor] = []

    def add(module: Any, args: Any, output: Any) -> Any:
        delta = where[..., None] * v
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).clone())

    blocks = find_layers(model).blocks
    handles = [blocks[ACT].register_forward_hook(add), blocks[READ].register_forward_hook(keep)]
    try:
        with torch.no_grad():
            positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            logits = model(ids, attention_mask=mask, use_cache=False, **positions).logits
    finally:
        for handle in handles:
            handle.remove()
    return kept[0], logits


def held(score: torch.Tensor, on: float, off: float, real: torch.Tensor, above: bool = True) -> torch.Tensor:
    """Token by token: shut at first, open beyond `on`, shut again beyond `off`; padding changes nothing."""
    sign = 1 if above else -1
    out = torch.zeros_like(score, dtype=torch.bool)
    for one in range(len(score)):
        state = False
        for at in range(score.shape[1]):
            if real[one, at]:
                if sign * (score[one, at] - on) > 0:
                    state = True
                elif sign * (score[one, at] - off) < 0:
                    state = False
            out[one, at] = state
    return out


def levels(score: torch.Tensor) -> tuple[float, float]:
    """θ and release that numbers cross often: midway between neighbours."""
    ordered = score.flatten().sort().values
    high, low = int(0.7 * len(ordered)), int(0.35 * len(ordered))
    return float(ordered[high : high + 2].mean()), float(ordered[low : low + 2].mean())


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 3}, {"use_cache": False}],
)
def test_a_gate_with_a_release_follows_each_text(llama: Any, options: dict[str, Any], above: bool) -> None:
    ids, v, w = token_ids(3, 8), 2 * row(2), row(1)
    mask = torch.ones_like(ids)
    if "prefill_chunk_size" not in options or transformers.__version__ >= "5":  # before 5 its positions count padding
        mask[1, :3] = 0
    ids = torch.where(mask.bool(), ids, 0)
    clean = oracle(llama, ids, torch.zeros(3, 8), v, mask)[0] @ w
    on, off = levels(clean)
    on, off = (on, off) if above else (off, on)
    probe = sf.probes.LinearProbe(w, place=READ)
    plan = {ACT: sf.WhenToken(sf.Condition(probe, on, above, release=off), sf.Add(v))}
    with sf.steer(llama, plan):
        out = llama.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY | options
        )
    whole = torch.cat([mask, torch.ones_like(out.sequences[:, 8:])], 1)
    score = oracle(llama, out.sequences, torch.zeros(whole.shape), v, whole)[0] @ w  # READ lies before ACT
    where = held(score, on, off, whole.bool(), above) & whole.bool()
    plain = ((score > on) if above else (score < on)) & whole.bool()
    assert bool((where != plain).any()), "the release decides nothing here"
    want = oracle(llama, out.sequences, where.float(), v, whole)[1][:, 7:-1]
    assert torch.allclose(torch.stack(out.logits, 1), want, atol=1e-4)


def test_a_gate_that_remembers_refuses_beams_and_texts_that_it_has_not_seen(llama: Any) -> None:
    ids = token_ids(2, 6)
    probe = sf.probes.LinearProbe(row(1), place=READ)
    plan = {ACT: sf.WhenToken(sf.Condition(probe, 1.0, release=0.0), sf.Add(row(2)))}
    with sf.steer(llama, plan), pytest.raises(ValueError, match="beam search hands rows"):
        llama.generate(ids, num_beams=2, **GREEDY)
    cache = llama(ids[:, :4]).past_key_values
    with sf.steer(llama, plan), pytest.raises(ValueError, match="must know the 4 tokens"):
        llama(ids[:, 4:], past_key_values=cache)


def test_a_gate_follows_the_whole_text_where_only_a_part_is_edited(llama: Any) -> None:
    ids, v, w = token_ids(2, 9), 2 * row(2), row(1)
    score = oracle(llama, ids, torch.zeros(2, 9), v)[0] @ w
    on, off = levels(score)
    probe = sf.probes.LinearProbe(w, place=READ)
    plan = sf.Plan({ACT: sf.WhenToken(sf.Condition(probe, on, release=off), sf.Add(v))}, positions="5:9")
    with torch.no_grad(), sf.steer(llama, plan, prompt_length=9):
        cache = llama(ids[:, :4]).past_key_values  # nothing is edited here
        logits = llama(ids[:, 4:], past_key_values=cache).logits
    where = held(score, on, off, torch.ones_like(ids).bool())
    where[:, :5] = False
    assert torch.allclose(logits, oracle(llama, ids, where.float(), v)[1][:, 4:], atol=1e-4)


def rows(seed: int) -> torch.Tensor:
    return torch.stack([row(one) for one in range(seed, seed + 64)])


def dictionary() -> sf.SAE:
    return sf.SAE(rows(20), rows(120), torch.zeros(64), torch.zeros(48), k=4)


def kinds(x: torch.Tensor, sae: sf.SAE) -> dict[str, Any]:
    """A probe of each kind that gives one number."""
    basis = torch.linalg.qr(torch.stack([row(5), row(6)]).T).Q.T.contiguous()
    feature = int(sae.topk(x)[1][0, -1, 0])  # of the last token of row 0
    return {
        "linear": sf.probes.LinearProbe(row(3), -0.5, place=READ),
        "logistic": sf.probes.LogisticProbe(row(3) / 10, 0.1, place=READ),
        "similarity": sf.probes.SimilarityProbe(row(3), place=READ),
        "barrier": sf.probes.BarrierProbe(
            sf.Barrier(basis, torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.1]), 0.05), place=READ
        ),
        "feature": sf.probes.FeatureProbe(sae, feature, place=READ),
    }


@pytest.mark.parametrize("kind", ["linear", "logistic", "similarity", "barrier", "feature"])
@pytest.mark.parametrize("each", [True, False])
def test_a_gate_looks_at_any_probe(llama: Any, kind: str, each: bool) -> None:
    ids, v = token_ids(4, 7), 2 * row(2)
    x = oracle(llama, ids, torch.zeros(4, 7), v)[0]
    probe = kinds(x, dictionary())[kind]
    score = probe(x)
    decides = score if each else score[:, -1]
    ordered = decides.flatten().unique()
    threshold = float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())
    gate = (sf.WhenToken if each else sf.When)(sf.Condition(probe, threshold), sf.Add(v))
    with torch.no_grad(), sf.steer(llama, {ACT: gate}):
        logits = llama(ids).logits
    if each:
        where = score > threshold
    else:
        where = torch.zeros(4, 7, dtype=torch.bool)
        where[:, -1] = score[:, -1] > threshold
    assert 0 < int(where.sum()) < (28 if each else 4)
    assert torch.allclose(logits, oracle(llama, ids, where.float(), v)[1], atol=1e-4)


def test_a_gate_sees_the_stream_after_the_edits_of_an_earlier_place(llama: Any) -> None:
    ids, v, w = token_ids(3, 6), 2 * row(2), row(1)
    x = oracle(llama, ids, torch.zeros(3, 6), v)[0]
    before, after = x @ w, (x + row(9)) @ w
    threshold = float(torch.cat([before, after]).median())
    probe = sf.probes.LinearProbe(w, place=READ, after=True)
    plan = {READ: sf.Add(row(9)), ACT: sf.WhenToken(sf.Condition(probe, threshold), sf.Add(v))}
    with torch.no_grad():
        with sf.steer(llama, plan):
            got = llama(ids).logits
        with sf.steer(llama, {READ: sf.Add(row(9))}):
            want = oracle(llama, ids, (after > threshold).float(), v)[1]
    assert bool(((before > threshold) != (after > threshold)).any())
    assert torch.allclose(got, want, atol=1e-4)
    with pytest.raises(ValueError, match="of which it is one"):
        sf.steer(llama, {READ: sf.WhenToken(sf.Condition(probe, threshold), sf.Add(v))})


def test_probes_of_every_kind_are_read(llama: Any) -> None:
    ids = token_ids(2, 6)
    x = oracle(llama, ids, torch.zeros(2, 6), row(2))[0]
    sae = dictionary()
    probes = kinds(x, sae)
    probes |= {
        "features": sf.probes.FeatureProbe(sae, [3, 9, 11], place=READ),
        "top": sf.probes.TopKProbe(sae, place=READ),
        "directions": sf.probes.LinearProbe(torch.stack([row(3), row(4)]), place=READ),
    }
    with torch.no_grad(), sf.read(llama, probes) as reading:
        llama(ids)
    for name, probe in probes.items():
        found, want = reading[name], probe(x)
        if name == "top":
            assert torch.equal(found.indices, want[1])
            assert torch.allclose(found.values, want[0], atol=1e-4)
            assert found.last().shape == (2, sae.k)
            with pytest.raises(ValueError, match="other features for every token"):
                found.max()
            continue
        assert torch.allclose(found.values, want, atol=1e-4), name
        assert torch.allclose(found.max(), want.amax(1), atol=1e-4)
        assert found.names == probe.names


def encodes(monkeypatch: Any) -> list[int]:
    """How often a whole dictionary is looked at."""
    ran: list[int] = []
    for name in ("sae_encode", "sae_edit_topk"):
        op = getattr(sf.ops, name)
        monkeypatch.setattr(sf.ops, name, lambda *args, op=op: (ran.append(1), op(*args))[1])
    return ran


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
@pytest.mark.parametrize("count", [1, 12])
def test_one_encode_reads_gates_and_edits(llama: Any, monkeypatch: Any, count: int, normalisation: str) -> None:
    ids, sae = token_ids(2, 6), dataclasses.replace(dictionary(), normalisation=normalisation)
    edit = sf.EditFeatures(sae, dict.fromkeys(range(count), 3.0))
    gate = sf.WhenToken(sf.Condition(sf.probes.FeatureProbe(sae, 5, place=ACT), -1.0), edit)
    probes = {"top": sf.probes.TopKProbe(sae, place=ACT), "some": sf.probes.FeatureProbe(sae, [3, 4], place=ACT)}
    with torch.no_grad():
        with sf.steer(llama, {ACT: edit}):
            alone = llama(ids).logits
        ran = encodes(monkeypatch)
        with sf.steer(llama, {ACT: gate}), sf.read(llama, probes):
            assert torch.equal(llama(ids).logits, alone)
    assert len(ran) == (
        2 if count <= sf.ops.MOST_EDITS and normalisation == "none" else 1
    )  # a few are edited by counting


def test_a_dictionary_or_rows_that_changed_are_encoded_anew() -> None:
    sae, x = dictionary(), torch.randn(5, 48)
    probe, edit = sf.probes.TopKProbe(sae), sf.EditFeatures(sae, {2: 3.0})
    for change in (lambda: x.mul_(-1), lambda: sae.w_enc.mul_(-1), lambda: sae.b_enc.add_(torch.randn(64))):
        before = probe(x)[1]
        change()
        fresh = sf.SAE(sae.w_enc.clone(), sae.w_dec.clone(), sae.b_enc.clone(), sae.b_dec.clone(), k=4)
        assert not torch.equal(probe(x)[1], before)
        assert torch.equal(probe(x)[1], sf.probes.TopKProbe(fresh)(x.clone())[1])
        assert torch.equal(edit.apply(x), sf.EditFeatures(fresh, {2: 3.0}).apply(x.clone()))
