"""Reading: what probes note while a model runs, against plain hooks and one uncached pass over the finished text."""

from __future__ import annotations

from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from families import VOCAB, build, token_ids

import steerfast as sf
from steerfast.models.layers import find_layers

PAD = 0
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": VOCAB + 5}
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture
def llama():
    model = deepcopy(build("llama"))
    yield model
    assert "generate" not in vars(model)
    assert "_steerfast" not in vars(model)


def row(width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def probe(model: Any, place: Any = 1, seed: int = 1, **settings: Any) -> Any:
    return sf.probes.LinearProbe(row(find_layers(model).d, seed), 0.25, place=place, **settings)


def stream(model: Any, ids: torch.Tensor, layer: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The output of a block in one uncached pass."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handle = find_layers(model).blocks[layer].register_forward_hook(keep)
    positions = {} if mask is None else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False, **positions)
    handle.remove()
    return kept[0]


def left_padded(ids: torch.Tensor, padding: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(ids)
    for one, count in enumerate(padding):
        mask[one, :count] = 0
    return torch.where(mask.bool(), ids, PAD), mask


def expected(
    model: Any, out: torch.Tensor, mask: torch.Tensor | None = None, layer: int = 1, seed: int = 1
) -> torch.Tensor:
    """What `probe` must say of every token that ran: all but the last."""
    mask = torch.ones_like(out) if mask is None else torch.cat([mask, torch.ones_like(out[:, mask.shape[1] :])], 1)
    found = stream(model, out, layer, mask)[:, :-1]
    return (found.double() @ row(find_layers(model).d, seed).double() + 0.25).float()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon"])
def test_a_bare_pass_is_read_and_stays_as_it_is_bit_for_bit(name: str) -> None:
    model, ids = build(name), token_ids(2, 7)
    before = hooks(model)
    with torch.no_grad():
        clean = model(ids).logits
        with sf.read(model, {"one": probe(model), "two": probe(model, 0, seed=2)}) as reading:
            assert torch.equal(model(ids).logits, clean)
    assert torch.allclose(reading["one"].values, stream(model, ids, 1) @ row(find_layers(model).d) + 0.25, atol=1e-4)
    assert torch.allclose(reading["two"].values, stream(model, ids, 0) @ row(find_layers(model).d, 2) + 0.25, atol=1e-4)
    assert bool(reading["one"].read.all())
    assert hooks(model) == before  # transformers leaves some of its own


@pytest.mark.parametrize(
    "options",
    [{}, STATIC, {"prefill_chunk_size": 3}, {"num_return_sequences": 3, "do_sample": True}, {"use_cache": False}],
)
def test_generate_is_read_token_by_token(llama: Any, options: dict[str, Any]) -> None:
    chunked_before_5 = (
        "prefill_chunk_size" in options and transformers.__version__ < "5"
    )  # whose positions count padding
    ids, mask = left_padded(token_ids(3, 7), [0, 0, 0] if chunked_before_5 else [0, 2, 4])
    with sf.read(llama, {"p": probe(llama)}) as reading:
        out = llama.generate(ids, attention_mask=mask, **GREEDY | options)
    mask = mask.repeat_interleave(options.get("num_return_sequences", 1), 0)
    want, found = expected(llama, out, mask), reading["p"]
    real = torch.cat([mask.bool(), torch.ones(len(out), 5, dtype=torch.bool)], 1)
    assert torch.equal(found.read, real)
    assert torch.equal(found.values.isnan(), ~real)
    assert torch.allclose(found.values[real], want[real], atol=1e-4)
    assert torch.allclose(found.max(), torch.where(real, want, -torch.inf).amax(1), atol=1e-4)
    assert torch.allclose(found.mean(), torch.where(real, want, 0).sum(1) / real.sum(1), atol=1e-4)
    assert torch.allclose(found.last(), want[:, -1], atol=1e-4)
    assert found.last_token().tolist() == [11] * len(out)


@pytest.mark.parametrize(
    ("positions", "wanted"),
    [("prompt", "1111000"), ("generated", "0000111"), ("last", "0001111"), ("0:2", "1100000"), ([1, -1], "0101000")],
)
@pytest.mark.parametrize("options", [{}, STATIC])
def test_positions_mean_what_they_mean_in_steer(llama: Any, positions: Any, wanted: str, options: Any) -> None:
    ids = token_ids(2, 4)
    with sf.read(llama, probe(llama), positions=positions) as reading:
        out = llama.generate(ids, **GREEDY | {"max_new_tokens": 4} | options)
    found, read = reading["probe"], torch.tensor([c == "1" for c in wanted])
    assert torch.equal(found.read, read.expand(2, -1))
    assert torch.allclose(found.values[:, read], expected(llama, out)[:, read], atol=1e-4)


def test_selectors_that_look_at_tokens(llama: Any) -> None:
    ids = token_ids(1, 8)
    wanted = sorted({int(ids[0, 2]), int(ids[0, 5])})
    with sf.read(llama, probe(llama), positions=f"ids:{wanted[0]},{wanted[-1]}") as reading:
        llama(ids)
    assert torch.equal(reading["probe"].read, torch.isin(ids, torch.tensor(wanted)))


@pytest.mark.parametrize("first", ["read", "steer"])
def test_a_probe_sees_the_stream_before_the_edits_of_its_place_unless_it_says_after(llama: Any, first: str) -> None:
    ids, v = token_ids(2, 5), 3 * row(find_layers(llama).d, 7)
    probes = {"before": probe(llama), "after": probe(llama, after=True), "behind": probe(llama, 2)}
    clean, behind = stream(llama, ids, 1), stream(llama, ids, 2)
    handles = []
    for what in [first, {"read": "steer", "steer": "read"}[first]]:
        handles.append(sf.read(llama, probes) if what == "read" else sf.steer(llama, {1: sf.Add(v)}))
    with torch.no_grad():
        llama(ids)
    reading = next(one for one in handles if type(one).__name__ == "Reading")
    w = row(find_layers(llama).d)
    assert torch.allclose(reading["before"].values, clean @ w + 0.25, atol=1e-4)
    assert torch.allclose(reading["after"].values, (clean + v) @ w + 0.25, atol=1e-3)
    assert not torch.allclose(reading["behind"].values, behind @ w + 0.25, atol=1e-3)
    for one in handles:
        one.remove()


def test_plans_per_row_beside_reading_are_what_they_are_alone(llama: Any) -> None:
    ids, v = token_ids(3, 5), 3 * row(find_layers(llama).d, 7)
    plans = [{1: sf.Add(v)}, None, {1: [sf.Ablate(v), sf.Add(v, 0.5)]}]
    with torch.no_grad():
        with sf.steer(llama, plans):
            alone = llama(ids).logits
        with sf.steer(llama, plans), sf.read(llama, {"p": probe(llama), "q": probe(llama, after=True)}) as reading:
            assert torch.equal(llama(ids).logits, alone)
    w = row(find_layers(llama).d)
    assert torch.allclose(reading["p"].values, stream(llama, ids, 1) @ w + 0.25, atol=1e-4)
    assert torch.equal(reading["p"].values[1], reading["q"].values[1])
    assert not torch.allclose(reading["p"].values[0], reading["q"].values[0])


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "head_out"])
def test_other_sites_are_read_as_collect_reads_them(llama: Any, site: str) -> None:
    ids = token_ids(2, 6)
    acts = sf.collect(llama, inputs=[{"input_ids": ids}], layers=[1], position="last", site=site)[1]
    w = row(acts.shape[1])
    with torch.no_grad():
        clean = llama(ids).logits
        with sf.read(llama, {"p": sf.probes.LinearProbe(w, place=(site, 1))}) as reading:
            assert torch.equal(llama(ids).logits, clean)
    assert torch.allclose(reading["p"].values[:, -1], acts @ w, atol=1e-4)


def test_what_follows_the_end_of_a_row_is_not_read(llama: Any) -> None:
    ids = token_ids(3, 5)
    with torch.no_grad():
        whole = llama.generate(ids, **GREEDY | {"max_new_tokens": 8})
    eos = int(whole[1, 7])  # row 1 ends at its third token
    options = GREEDY | {"max_new_tokens": 8, "eos_token_id": eos}
    ends = [int((out == eos).nonzero()[0]) + 5 if bool((out == eos).any()) else 12 for out in whole[:, 5:]]
    for pad in {PAD, eos}:
        with sf.read(llama, probe(llama)) as reading:
            out = llama.generate(ids, attention_mask=torch.ones_like(ids), **options | {"pad_token_id": pad})
        found = reading["probe"]
        assert found.read.sum(1).tolist() == [min(end, out.shape[1] - 1) for end in ends]
        for one in range(3):
            with sf.read(llama, probe(llama)) as alone:
                llama.generate(ids[one : one + 1], **options | {"pad_token_id": pad})
            assert torch.allclose(alone["probe"].max(), found.max()[one], atol=1e-4)
            assert torch.equal(alone["probe"].last_token(), found.last_token()[one : one + 1])


def test_a_text_in_parts_is_one_text_and_tokens_in_the_cache_are_never_made_up(llama: Any) -> None:
    ids = token_ids(2, 9)
    want = stream(llama, ids, 1) @ row(find_layers(llama).d) + 0.25
    with torch.no_grad():
        with sf.read(llama, probe(llama)) as reading:
            cache = llama(ids[:, :4]).past_key_values
            assert reading["probe"].read.shape == (2, 4)
            llama(ids[:, 4:], past_key_values=cache)
        assert torch.allclose(reading["probe"].values, want, atol=1e-4)
        cache = llama(ids[:, :4]).past_key_values
        with sf.read(llama, {"all": probe(llama)}) as reading:
            llama(ids[:, 4:], past_key_values=cache)
    found = reading["all"]
    assert found.read.sum(1).tolist() == [5, 5]
    assert torch.allclose(found.values[:, 4:], want[:, 4:], atol=1e-4)
    for reduction in (found.max, found.mean, found.last):
        with pytest.raises(ValueError, match="lie in the cache"):
            reduction()


def test_who_comes_later_has_not_seen_the_prompt(llama: Any) -> None:
    ids = token_ids(1, 6)
    with torch.no_grad(), sf.read(llama, probe(llama)) as early:
        cache = llama(ids[:, :4]).past_key_values
        with sf.read(llama, probe(llama)) as late:
            llama(ids[:, 4:], past_key_values=cache)
            assert early["probe"].read.sum() == 6
    assert late["probe"].read.sum() == 2
    with pytest.raises(ValueError, match="lie in the cache"):
        late["probe"].max()


def test_generate_beside_a_cache_reads_what_is_new(llama: Any) -> None:
    ids = token_ids(1, 8)
    with torch.no_grad():
        cache = llama(ids[:, :5]).past_key_values
        with sf.read(llama, probe(llama), positions="generated") as reading:
            out = llama.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.allclose(reading["probe"].max(), expected(llama, out)[:, 8:].amax(1), atol=1e-4)


def test_the_latest_text_is_shown_and_the_last_one_stays(llama: Any) -> None:
    long, short = token_ids(2, 9), token_ids(1, 3)
    with torch.no_grad(), sf.read(llama, probe(llama)) as reading:
        with pytest.raises(RuntimeError, match="has not run while"):
            reading["probe"]
        llama(long)
        assert reading["probe"].values.shape == (2, 9)
        llama(short)
        llama(short)
        assert reading["probe"].values.shape == (1, 3)
    assert reading.scores()["probe"].values.shape == (1, 3)
    reading.remove()
    with pytest.raises(RuntimeError, match="has been removed"), reading:
        pass


def test_a_criterion_ends_the_rows_that_cross(llama: Any) -> None:
    ids = token_ids(3, 5)
    with sf.read(llama, probe(llama), positions="generated") as reading:
        out = llama.generate(ids, **GREEDY | {"max_new_tokens": 10})
    scores = reading["probe"].values
    highest = scores[:, 5:].amax(1)
    limit = float(highest.sort().values[:2].mean())
    with sf.read(llama, probe(llama), positions="generated") as reading:
        stopped = llama.generate(
            ids, stopping_criteria=[reading.criterion("probe", limit)], **GREEDY | {"max_new_tokens": 10}
        )
    for one in range(3):
        crossing = (scores[one] > limit).nonzero()
        end = int(crossing[0]) + 2 if len(crossing) else out.shape[1]
        end = min(end, stopped.shape[1])
        assert torch.equal(stopped[one, :end], out[one, :end])
        assert bool((stopped[one, end:] == PAD).all())
    assert stopped.shape[1] <= out.shape[1]
    below = sf.read(llama, probe(llama))
    with pytest.raises(TypeError, match="threshold"):
        below.criterion("probe", "high")
    with pytest.raises(ValueError, match="threshold"):
        below.criterion("probe", float("nan"))
    with pytest.raises(KeyError, match="no probe 'other'"):
        below.criterion("other", 0.0)
    below.remove()


def test_beams_are_read_up_to_the_end_of_the_prompt(llama: Any) -> None:
    ids = token_ids(2, 5)
    with sf.read(llama, probe(llama)), pytest.raises(ValueError, match=r"read: positions='all' name generated tokens"):
        llama.generate(ids, num_beams=3, **GREEDY)
    with sf.read(llama, probe(llama), positions="prompt") as reading:
        llama.generate(ids, num_beams=3, **GREEDY)
    want = (stream(llama, ids, 1) @ row(find_layers(llama).d) + 0.25).repeat_interleave(3, 0)
    assert torch.allclose(reading["probe"].values[:, :5], want, atol=1e-4)


def test_checkpointing_reads_once_and_gradients_stay(llama: Any) -> None:
    ids = token_ids(2, 5)
    llama.train()
    llama(ids).logits.sum().backward()
    clean = {name: one.grad.clone() for name, one in llama.named_parameters()}
    llama.zero_grad()
    llama.gradient_checkpointing_enable()
    with sf.read(llama, probe(llama)) as reading:
        out = llama(ids, use_cache=False)
        before = reading["probe"].values
        out.logits.sum().backward()
        assert torch.equal(reading["probe"].values, before)
    assert all(torch.equal(one.grad, clean[name]) for name, one in llama.named_parameters())


def test_a_probe_that_is_read_and_looked_at_by_a_gate_runs_once_a_pass(llama: Any, monkeypatch: Any) -> None:
    one, ran = probe(llama), []
    program = type(one).program

    def counted(self: Any, device: Any) -> Any:
        run = program(self, device)
        return lambda x: (ran.append(1), run(x))[1]

    monkeypatch.setattr(type(one), "program", counted)
    gate = sf.WhenToken(sf.Condition(one, 0.0), sf.Add(row(find_layers(llama).d, 3)))
    with sf.steer(llama, {1: gate}), sf.read(llama, {"a": one}), sf.read(llama, {"b": one}) as reading, torch.no_grad():
        llama(token_ids(2, 5))
    assert len(ran) == 1
    assert reading["b"].read.all()


def hooks(model: Any) -> list[Any]:
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@contextmanager
def nothing_left(model: Any):
    before = hooks(model)
    yield
    assert "_steerfast" not in vars(model)
    assert hooks(model) == before


def test_bad_input_is_refused_and_leaves_nothing(llama: Any) -> None:
    d = find_layers(llama).d
    with nothing_left(llama):
        with pytest.raises(ValueError, match="read: no probe"):
            sf.read(llama, {})
        with pytest.raises(ValueError, match="does not say where it is read"):
            sf.read(llama, {"p": sf.probes.LinearProbe(row(d))})
        with pytest.raises(TypeError):
            sf.read(llama, {"p": row(d)})
        with pytest.raises(TypeError, match="names a probe"):
            sf.read(llama, {3: probe(llama)})
        with pytest.raises(ValueError, match="out of range"):
            sf.read(llama, probe(llama, 9))
        with pytest.raises(ValueError, match="width"):
            sf.read(llama, sf.probes.LinearProbe(row(d + 1), place=1))
        with pytest.raises(ValueError, match="width"):
            sf.read(llama, {"p": probe(llama), "q": sf.probes.LinearProbe(row(d + 1), place=2, after=True)})
        with pytest.raises(ValueError, match="width"):
            sf.read(llama, {"p": probe(llama), "q": sf.probes.LinearProbe(row(d + 1), place=1)})
        with pytest.raises(ValueError, match="prompt_length"):
            sf.read(llama, probe(llama), prompt_length=0)
        with pytest.raises(ValueError, match="positions"):
            sf.read(llama, probe(llama), positions="some")


def test_reset_takes_readers_out_and_active_lists_who_steers(llama: Any) -> None:
    reading, handle = sf.read(llama, probe(llama)), sf.steer(llama, {1: sf.Add(row(find_layers(llama).d))})
    assert sf.active(llama) == [handle]
    with torch.no_grad():
        llama(token_ids(1, 3))
    sf.reset(llama)
    assert "_steerfast" not in vars(llama)
    assert reading["probe"].read.all()
