"""Reading and gates of prepared models: inside of compiled graphs, as an unprepared model does it; nothing recompiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import Counter, build, token_ids

import steerfast as sf

ACT, READ = 2, 0
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": 300, "cache_implementation": "static",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def row(seed: int) -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


def copy_of(name: str = "llama") -> Any:
    """A model of its own: a compiled forward stays."""
    model = build(name)
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def sae() -> sf.SAE:
    rows = [torch.stack([row(one) for one in range(seed, seed + 64)]) for seed in (20, 120)]
    return sf.SAE(*rows, torch.zeros(64), torch.zeros(48), k=4)


def probes() -> dict[str, Any]:
    return {
        "linear": sf.probes.LinearProbe(row(1), 0.5, place=READ),
        "logistic": sf.probes.LogisticProbe(row(2) / 10, place=1),
        "after": sf.probes.LinearProbe(row(1), 0.5, place=ACT, after=True),
        "several": sf.probes.LinearProbe(torch.stack([row(3), row(4)]), place=("attn_out", 1)),
        "feature": sf.probes.FeatureProbe(sae(), 7, place=1),
        "top": sf.probes.TopKProbe(sae(), place=READ),
        "similarity": sf.probes.SimilarityProbe(row(5), place=READ),
    }


def same(got: Any, want: Any) -> None:
    for name, found in want.scores().items():
        assert torch.equal(got[name].read, found.read), name
        torch.testing.assert_close(got[name].values, found.values, atol=1e-4, rtol=1e-4, equal_nan=True)
        assert got[name].names == found.names
        assert (got[name].indices is None) == (found.indices is None)
        if found.indices is not None:
            assert torch.equal(got[name].indices, found.indices)
        assert torch.equal(got[name].unseen, found.unseen)


def prepared(count: Counter, **settings: Any) -> Any:
    model = copy_of()
    sf.prepare(model, layers=[READ, ACT], room=sf.Room(batch=4, length=32), **settings)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=count)
    return model


@pytest.mark.parametrize("positions", ["all", "0:2 | generated"])
def test_scores_of_a_compiled_graph_are_those_of_hooks(positions: str) -> None:
    ids, v, count = token_ids(3, 6), row(9), Counter()
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    ids = torch.where(mask.bool(), ids, 0)
    eager, model = build("llama"), prepared(count, probes=probes())
    graphs = []
    for plan in ({ACT: sf.Add(v)}, {READ: sf.Ablate(v)}):
        with sf.steer(eager, plan), sf.read(eager, probes(), positions) as want:
            expected = eager.generate(ids, attention_mask=mask, **SETTINGS)
        with sf.steer(model, plan), sf.read(model, probes(), positions) as got:
            assert torch.equal(model.generate(ids, attention_mask=mask, **SETTINGS), expected)
        same(got, want)
        graphs.append(count.graphs)
    if transformers.__version__ >= "5":
        assert graphs[0] == graphs[1] <= 2
    assert model.generate(ids, attention_mask=mask, **SETTINGS).shape[0] == 3


@pytest.mark.parametrize("compiled", [True, False])
def test_a_bare_pass_of_a_prepared_model_is_read(compiled: bool) -> None:
    ids, model, eager = token_ids(2, 6), copy_of(), build("llama")
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    sf.prepare(model, layers=[ACT], probes=probes(), room=sf.Room(batch=4, length=8))
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with torch.no_grad():
        for given in ({}, {"prompt_length": 6}):
            with sf.read(model, probes(), **given) as got, sf.read(eager, probes(), **given) as want:
                for text in (token_ids(3, 8, 5), ids):  # a longer text before leaves nothing behind
                    run(text, attention_mask=mask if text is ids else None, use_cache=False)
                    eager(text, attention_mask=mask if text is ids else None, use_cache=False)
                same(got, want)
        with sf.read(model, probes()["linear"]) as got:
            run(token_ids(2, 9), use_cache=False)
        with pytest.raises(ValueError, match="made room for length=8"):
            got["probe"].max()
        with sf.read(model, probes()["linear"], positions="prompt") as got:
            run(ids, use_cache=False)
        if compiled:  # a graph does not show where a bare prompt ends
            with pytest.raises(ValueError, match="needs the prompt's length"):
                got["probe"].max()


def test_a_text_in_parts_and_one_that_began_elsewhere() -> None:
    ids, model = token_ids(2, 7), copy_of()
    sf.prepare(model, layers=[ACT], probes=probes(), room=sf.Room(batch=2, length=16))
    run = torch.compile(model, backend="eager")
    with torch.no_grad(), sf.read(model, probes()["linear"]) as reading:
        run(ids, use_cache=False)
        whole = reading["probe"].values
        cache = run(ids[:, :4]).past_key_values
        run(ids[:, 4:], past_key_values=cache)
        torch.testing.assert_close(reading["probe"].values, whole, atol=1e-4, rtol=1e-4)
        cache = run(ids[:, :4]).past_key_values
        run(token_ids(2, 3))
        run(ids[:, 4:], past_key_values=cache)
        assert reading["probe"].read.sum(1).tolist() == [3, 3]
        with pytest.raises(ValueError, match="lie in the cache"):
            reading["probe"].max()


@pytest.mark.parametrize(("name", "each"), [("linear", True), ("feature", True), ("similarity", False)])
def test_gates_of_a_compiled_graph_decide_as_hooks_do(name: str, each: bool) -> None:
    ids, v, count = token_ids(4, 6), 3 * row(9), Counter()
    eager, model = build("llama"), prepared(count, probes=probes())
    probe = probes()[name]
    with sf.read(eager, {name: probe}) as reading:
        eager.generate(ids, **SETTINGS)
    values = reading[name].values if each else reading[name].values[:, 5]
    ordered = values.flatten().unique()
    high, low = (float(ordered[int(share * len(ordered))] - 1e-5) for share in (0.6, 0.3))
    graphs = []
    for condition in (sf.Condition(probe, high), sf.Condition(probe, low, False)):
        gate = (sf.WhenToken if each else sf.When)(condition, sf.Add(v))
        with sf.steer(eager, {ACT: gate}) as want:
            expected = eager.generate(ids, **SETTINGS, output_logits=True, return_dict_in_generate=True)
        with sf.steer(model, {ACT: gate}) as got:
            found = model.generate(ids, **SETTINGS, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=5e-5, rtol=5e-5)
        if not each:
            assert torch.equal(got.decisions()[0][0], want.decisions()[0][0])
        graphs.append(count.graphs)
    if transformers.__version__ >= "5":
        assert graphs[0] == graphs[1] <= 2


def test_a_gate_of_a_compiled_graph_stays_open_until_its_score_falls_back() -> None:
    ids, v, count = token_ids(3, 8), 3 * row(9), Counter()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids = torch.where(mask.bool(), ids, 0)
    eager, model = build("llama"), prepared(count, probes=probes())
    probe = probes()["linear"]
    with sf.read(eager, {"p": probe}) as reading:
        eager.generate(ids, attention_mask=mask, **SETTINGS)
    ordered = reading["p"].values[reading["p"].read].sort().values
    high, low = float(ordered[int(0.8 * len(ordered))]) - 1e-4, float(ordered[int(0.3 * len(ordered))]) + 1e-4
    outputs = []
    for release in (low, None):
        gate = sf.WhenToken(sf.Condition(probe, high, release=release), sf.Add(v))
        with sf.steer(eager, {ACT: gate}):
            expected = eager.generate(
                ids, attention_mask=mask, **SETTINGS, output_logits=True, return_dict_in_generate=True
            )
        with sf.steer(model, {ACT: gate}):
            found = model.generate(
                ids, attention_mask=mask, **SETTINGS, output_logits=True, return_dict_in_generate=True
            )
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=5e-5, rtol=5e-5)
        outputs.append(torch.stack(found.logits))
    assert not torch.equal(*outputs)


def test_a_criterion_ends_rows_of_a_compiled_generate() -> None:
    ids, count = token_ids(3, 5), Counter()
    eager, model = build("llama"), prepared(count, probes=probes())
    with sf.read(eager, {"linear": probes()["linear"]}, "generated") as reading:
        eager.generate(ids, **SETTINGS)
    limit = float(reading["linear"].max().sort().values[:2].mean())
    outputs = []
    for one in (eager, model):
        with sf.read(one, {"linear": probes()["linear"]}, "generated") as reading:
            outputs.append(one.generate(ids, stopping_criteria=[reading.criterion("linear", limit)], **SETTINGS))
    assert torch.equal(*outputs)
    assert bool((outputs[0] == 0).any())


def test_two_conditions_on_one_prepared_probe_need_two_names() -> None:
    model, probe, v = copy_of(), probes()["linear"], row(9)
    sf.prepare(model, layers=[ACT], probes={"one": probe})
    low, high = (sf.WhenToken(sf.Condition(probe, level), sf.Add(v)) for level in (0.0, 1.0))
    with sf.steer(model, {ACT: low}) as first:
        with pytest.raises(ValueError, match="one gate: prepare it under a second name"):
            sf.steer(model, {ACT: high})
        with sf.steer(model, {ACT: low}) as second:  # the same condition shares it
            model(token_ids(1, 3))
    assert first.stats() == second.stats() == [3]
    with sf.steer(model, {ACT: high}):
        model(token_ids(1, 3))


def test_bad_input_is_refused() -> None:
    model, v = copy_of(), row(9)
    with pytest.raises(TypeError, match="probes must be a dict"):
        sf.prepare(model, probes=probes()["linear"])
    with pytest.raises(TypeError, match="room must be a Room"):
        sf.prepare(model, room={"batch": 3})
    with pytest.raises(ValueError, match="Room: batch"):
        sf.Room(batch=0)
    with pytest.raises(ValueError, match="does not say where it is read"):
        sf.prepare(model, probes={"p": sf.probes.LinearProbe(v)})
    with pytest.raises(ValueError, match="has width 47"):
        sf.prepare(model, probes={"p": sf.probes.LinearProbe(v[:47], place=1)})
    assert "_steerfast" not in vars(model)
    sf.prepare(model, layers=[ACT], probes={"p": probes()["linear"]})
    with pytest.raises(ValueError, match=r"no part of the prepared model; .*'p' at resid_post 0"):
        sf.read(model, probes()["logistic"])
    with pytest.raises(RuntimeError, match="was not prepared"):
        sf.steer(model, {READ: sf.Add(v)})  # it is read there, and has no room for edits
    with pytest.raises(ValueError, match="is no part of the prepared model"):
        sf.steer(model, {ACT: sf.WhenToken(sf.Condition(probes()["logistic"], 0.5), sf.Add(v))})
    sf.unprepare(model)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_prepared_model_runs_where_nobody_reads_and_a_handle_has_seen_what_it_was_there_for(compiled: bool) -> None:
    one, model, ids = probes()["linear"], copy_of(), token_ids(2, 6)
    sf.prepare(model, layers=[ACT], probes={"one": one}, room=sf.Room(batch=4, length=16))
    run = torch.compile(model, backend="eager") if compiled else model
    with torch.no_grad():
        run(token_ids(3, 9))
        with sf.read(model, one) as reading:
            with pytest.raises(RuntimeError, match="has not run while"):
                reading["probe"]
            whole = run(ids) and reading["probe"].values
        assert whole.shape == (2, 6)
        cache = run(ids[:, :4]).past_key_values
        with sf.read(model, one) as late:
            run(ids[:, 4:], past_key_values=cache)
    torch.testing.assert_close(late["probe"].values[:, 4:], whole[:, 4:], atol=1e-4, rtol=1e-4)
    assert late["probe"].read.sum(1).tolist() == [2, 2]
    with pytest.raises(ValueError, match="lie in the cache"):
        late["probe"].max()


def test_drafts_of_a_prepared_model_are_not_read() -> None:
    one, model = probes()["linear"], copy_of()
    sf.prepare(model, layers=[ACT], probes={"one": one})
    with sf.read(model, one), pytest.raises(ValueError, match="assisted generation takes tokens back"):
        model.generate(token_ids(1, 6), prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)


def test_a_row_that_a_criterion_ends_is_read_as_alone_where_the_end_token_fills_up_rows() -> None:
    ids, model, one = token_ids(3, 5, 1), copy_of(), probes()["linear"]
    options = SETTINGS | {"pad_token_id": 2, "eos_token_id": 2, "attention_mask": torch.ones_like(ids)}
    sf.prepare(model, layers=[ACT], probes={"one": one})
    with sf.read(model, one, "generated") as reading:
        model.generate(ids, **options)
    limit, ends = float(reading["probe"].max().sort().values[:2].mean()), []
    for rows in (ids, *ids[:, None]):
        with sf.read(model, one, "last") as reading:
            mask = {"attention_mask": torch.ones_like(rows)}
            model.generate(rows, stopping_criteria=[reading.criterion("probe", limit)], **options | mask)
        ends += reading["probe"].last_token().tolist()
    assert ends[:3] == ends[3:]
