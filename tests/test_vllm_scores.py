"""What reads and gates in the vLLM plugin, as far as it needs no vLLM: fields, scores on their way, gates, answers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import steerfast as sf
from steerfast._positions import allowed, parse
from steerfast.place import Place
from steerfast.vllm import plans
from steerfast.vllm.gating import Gates
from steerfast.vllm.probes import PlaceReader, ProbeLibrary, ServedProbe, load_probes
from steerfast.vllm.reading import Here, Reader, Readers, Wanted
from steerfast.vllm.scores import Answer, Desk, Limit, Reading, check_read, read_probes

D, LAYERS = 24, 4


def unit(seed: int) -> torch.Tensor:
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def probes() -> dict[str, sf.probes.Probe]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(16, D, generator=generator)
    relu, top = sf.SAE(rows, rows, threshold=torch.full((16,), 0.2)), sf.SAE(rows, rows, k=3)
    return {
        "barrier": sf.probes.BarrierProbe(sf.Barrier.linear(unit(1)), place=1),
        "feature": sf.probes.FeatureProbe(relu, 4, place=1),
        "linear": sf.probes.LinearProbe(unit(2), 0.5, place=1),
        "logistic": sf.probes.LogisticProbe(unit(3), -0.5, place=1),
        "rows": sf.probes.LinearProbe(torch.stack([unit(4), unit(5)]), torch.tensor([1.0, 2.0]), place=1),
        "similar": sf.probes.SimilarityProbe(torch.stack([unit(6), unit(7)]), place=1),
        "tanh": sf.probes.SimilarityProbe(unit(8), "tanh", place=1),
        "top": sf.probes.TopKProbe(top, place=1),
        "top feature": sf.probes.FeatureProbe(top, [2, 9], place=1),
    }


def served(loaded: dict[str, sf.probes.Probe]) -> dict[str, ServedProbe]:
    found, column = {}, 0
    for name, probe in loaded.items():
        columns = 2 * probe.k if isinstance(probe, sf.probes.TopKProbe) else len(probe.names or (0,))
        found[name] = ServedProbe(name, probe.place, probe.after, column, columns, probe.names or None, probe.pairs)
        column += columns
    return found


@pytest.fixture
def library() -> ProbeLibrary:
    return ProbeLibrary(served(probes()), {"narrow": "it has width 7; this model has 24"})


# --- the directory -----------------------------------------------------------------------------------------------------


def test_probes_are_read_once_and_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    plan = {1: sf.Add(unit(0)), ("resid_pre", 3): sf.Add(unit(1))}
    sf.Plan(plan).save(tmp_path / "plans" / "one")  # type: ignore[arg-type]
    library, _ = plans.load(tmp_path / "plans", D, LAYERS)
    assert library.entered == {3}
    made: dict[str, sf.probes.Probe] = {
        "good": sf.probes.LinearProbe(unit(1), place=-1),
        "enters": sf.probes.LinearProbe(unit(1), place=("resid_pre", 2)),
        "entered": sf.probes.LinearProbe(unit(1), place=("resid_pre", 3), after=True),
        "first": sf.probes.LinearProbe(unit(1), place=("resid_pre", 0)),
        "between": sf.probes.LinearProbe(unit(1), place=("resid_pre", 3)),
        "behind": sf.probes.LinearProbe(unit(1), place=2, after=True),
        "deep": sf.probes.LinearProbe(unit(1), place=4),
        "narrow": sf.probes.LinearProbe(torch.ones(7), place=1),
        "nowhere": sf.probes.LinearProbe(unit(1)),
        "heads": sf.probes.LinearProbe(unit(1), place=("head_out", 1)),
    }
    for name, probe in made.items():
        probe.save(tmp_path / "probes" / name)
    (tmp_path / "probes" / "broken").mkdir()
    (tmp_path / "probes" / "broken" / "probe.json").write_text("{")
    found, loaded = load_probes(tmp_path / "probes", D, LAYERS, library)
    assert {name: (one.place, one.after) for name, one in found.probes.items()} == {
        "good": (Place("resid_post", 3), False),
        "enters": (Place("resid_post", 1), True),
        "entered": (Place("resid_post", 2), True),
        "first": (Place("resid_pre", 0), False),
    }
    assert loaded.keys() == found.probes.keys()
    assert sorted(found.refused) == ["behind", "between", "broken", "deep", "heads", "narrow", "nowhere"]
    assert "lies between the edits of resid_post 2 and of resid_pre 3" in found.refused["between"]
    assert "has width 7; this model has 24" in found.refused["narrow"]
    assert str(tmp_path) not in json.dumps(found.refused)
    with pytest.raises(ValueError, match="is not a directory"):
        load_probes(tmp_path / "none", D, LAYERS, library)
    with pytest.raises(ValueError, match="holds no probe"):
        load_probes(tmp_path / "plans", D, LAYERS, library)


# --- what a client may say ---------------------------------------------------------------------------------------------


def test_a_request_names_probes_positions_and_limits(library: ProbeLibrary) -> None:
    plain = read_probes({"steer_read": "linear"}, library, None)
    assert plain is not None
    assert ([one.name for one in plain.probes], plain.positions, plain.by_token) == (["linear"], "all", False)
    full = read_probes(
        {"steer_read": ["rows"], "steer_abort": ["linear > 2", "logistic<.5"], "steer_read_positions": "generated"},
        library,
        plain,
    )
    assert full is not None
    assert [one.name for one in full.probes] == ["rows", "linear", "logistic"]
    assert full.limits == (Limit("linear", True, 2.0), Limit("logistic", False, 0.5))
    assert (plain.first(9), full.first(9)) == (0, 9)
    assert read_probes({"steer": "plan"}, library, plain) is plain
    assert read_probes({"steer_read": []}, library, plain) is None


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"steer_read": "nobody"}, "there is no probe 'nobody'; this engine has 9 probes"),
        ({"steer_read": "narrow"}, "the probe 'narrow' cannot be read: it has width 7"),
        ({"steer_read": {"name": 1}}, "expected a probe's name or a list of names"),
        ({"steer_read": [3]}, "a probe's name is 3; expected text"),
        ({"steer_read": ["linear"] * 65}, "names 65 probes; at most 64"),
        ({"steer_read_positions": "all"}, "steer_read_positions is given without steer_read"),
        ({"steer_read": "linear", "steer_read_positions": "never"}, "expected all, prompt, generated, last"),
        ({"steer_read": "linear", "steer_read_positions": "x" * 501}, "up to 500 characters"),
        ({"steer_read": "linear", "steer_read_positions": "all & !special"}, "does not say which they are"),
        ({"steer_read": "linear", "steer_read_what": "all"}, "expected 'request' or 'tokens'"),
        ({"steer_read": "top"}, "read it with steer_read_what='tokens'"),
        ({"steer_abort": "linear>1e999"}, "a finite number"),
        ({"steer_abort": "linear>"}, "a finite number"),
        ({"steer_abort": ">3"}, "a finite number"),
        ({"steer_abort": 3}, "steer_abort is 3"),
        ({"steer_abort": "rows>1"}, "gives several numbers per token"),
        ({"steer_abort": "top>1", "steer_read_what": "tokens"}, "gives several numbers per token"),
        ({"steer_abort": ["linear>1"] * 65}, "has 65 limits"),
    ],
)
def test_whatever_cannot_be_read_is_refused_with_the_reason(library: ProbeLibrary, given, reason: str) -> None:
    with pytest.raises(ValueError, match=r"^steer: ") as error:
        read_probes(given, library, None)
    assert reason in str(error.value)
    assert len(str(error.value)) < 300


def test_a_prompt_decides_what_fields_alone_do_not(library: ProbeLibrary) -> None:
    def reading(positions: str) -> Reading:
        found = read_probes({"steer_read": "linear", "steer_read_positions": positions}, library, None)
        assert found is not None
        return found

    check_read(reading("0 | -1"), [1, 2], 2)
    with pytest.raises(ValueError, match="position 2 is out of range; the prompt has 2 tokens"):
        check_read(reading("2"), [1, 2], 2)
    with pytest.raises(ValueError, match="given as embeddings; send tokens"):
        check_read(reading("ids:3"), None, 2)
    assert [reading(text).first(10) for text in ("all", "3:5", "last", "generated", "after:ids:3")] == [0, 3, 9, 10, 0]


# --- on the device -----------------------------------------------------------------------------------------------------


def test_one_product_finds_what_each_probe_finds_alone() -> None:
    loaded = probes()
    columns = served(loaded)
    scores = torch.full((7, sum(one.columns for one in columns.values())), math.nan)
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    x[3] = 0.0
    PlaceReader(loaded, columns, torch.device("cpu")).write(x, scores)
    for name, probe in loaded.items():
        wanted = probe(x)
        one = columns[name]
        got = scores[:, one.column : one.column + one.columns]
        if one.pairs:
            wanted = torch.cat([wanted[0], wanted[1].float()], 1)
        assert torch.allclose(got, wanted.reshape(7, -1), atol=1e-5), name


@pytest.mark.parametrize("tokens", [5, 200])
def test_of_a_place_only_what_is_read_is_computed(tokens: int) -> None:
    """Few tokens or many: an SAE at the place of a row costs nobody who reads the row."""
    loaded = {name: probe.at(2) for name, probe in probes().items()}
    columns = served(loaded)
    readers = Readers(columns, loaded, 256, torch.device("cpu"))
    readers.scores.fill_(math.nan)
    readers.start("a", Wanted((columns["linear"], columns["logistic"]), 0))
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        readers.begin(["a"], torch.tensor([0, tokens]), torch.arange(tokens), tokens)
        readers.write(x / 4, 3 * x / 4, "resid_post.2", False)
        taken = readers.take()
        assert taken is not None
        ((_, _, rows),) = taken.rows()
        wanted = torch.stack([loaded[name](x) for name in ("linear", "logistic")], 1)
        assert torch.allclose(torch.from_numpy(rows), wanted, atol=1e-5)
    others = [
        name
        for name, probe in loaded.items()
        if not isinstance(probe, (sf.probes.LinearProbe, sf.probes.LogisticProbe))
    ]
    assert others
    for one in (columns[name] for name in others):
        assert readers.scores[:, one.column : one.column + one.columns].isnan().all(), one.name


def test_streams_of_two_widths_are_read_in_one_step() -> None:
    """The heads' stream may be wider than the residual one."""
    loaded = {f"{i}": sf.probes.LinearProbe(unit(i), place=i) for i in range(3)}
    wide = torch.randn(2 * D, generator=torch.Generator().manual_seed(9))
    loaded["heads"] = sf.probes.LinearProbe(wide, place=("head_out", 1))
    columns = served(loaded)
    readers = Readers(columns, loaded, 16, torch.device("cpu"))
    readers.start("a", Wanted(tuple(columns.values()), 0))
    readers.begin(["a"], torch.tensor([0, 1]), torch.tensor([5]), 1)
    streams = {name: torch.randn(1, probe.width) for name, probe in loaded.items()}
    for name, probe in loaded.items():
        readers.write(streams[name], None, f"{probe.place.site}.{probe.place.layer}", False)
    taken = readers.take()
    assert taken is not None
    ((_, first, rows),) = taken.rows()
    assert first == 5
    assert np.allclose(rows[0], [float(probe(streams[name])) for name, probe in loaded.items()], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_each_request_gets_the_rows_of_its_own_tokens(seed: int) -> None:
    """Random batches in which requests come, go, stand elsewhere and take several tokens; nobody reads in some of them."""
    draw = random.Random(seed)
    loaded = {name: probe.at(draw.randrange(LAYERS), draw.random() < 0.5) for name, probe in probes().items()}
    columns = served(loaded)
    readers = Readers(columns, loaded, 64, torch.device("cpu"))
    wanted = {}
    for i in range(8):
        if i % 3:
            names = draw.sample([*columns], draw.randint(1, 4))
            wanted[f"{i}"] = Wanted(tuple(columns[name] for name in names), draw.choice([0, 3]))
            readers.start(f"{i}", wanted[f"{i}"])
    reached = dict.fromkeys(map(str, range(8)), 0)
    for step in range(12):
        batch = draw.sample([*reached], draw.randint(1, 6)) if step % 4 else ["0", "3"]
        counts = [1 if step % 3 else draw.randint(1, 8) for _ in batch]  # two steps of three decode
        starts = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
        positions = torch.cat(
            [torch.arange(reached[name], reached[name] + n) for name, n in zip(batch, counts, strict=True)]
        )
        tokens = len(positions)
        readers.begin(batch, starts, torch.cat([positions, torch.zeros(9, dtype=torch.int64)]), tokens)
        assert bool(readers.at) == any(name in wanted for name in batch)
        streams = torch.randn(LAYERS, 2, tokens + 3, D)  # padded, before and after
        before = readers.scores.clone()
        for layer in range(LAYERS):
            for after in (False, True):
                x, hidden = streams[layer, int(after)] / 4, 3 * streams[layer, int(after)] / 4
                untouched = x.clone(), hidden.clone()
                readers.write(x, hidden, f"resid_post.{layer}", after)
                assert torch.equal(x, untouched[0]), "what reads writes nothing"
                assert torch.equal(hidden, untouched[1])
        taken = readers.take()
        assert (taken is None) == (not any(name in wanted for name in batch))
        if taken is None:
            assert torch.equal(readers.scores, before), "nobody reads, so nothing is computed"
        for name, first, rows in () if taken is None else taken.rows():
            at = batch.index(name)
            here = slice(int(starts[at]), int(starts[at + 1]))
            keep = positions[here] >= wanted[name].first
            assert first == max(reached[name], min(wanted[name].first, reached[name] + counts[at]))
            parts = []
            for one in wanted[name].probes:
                found = loaded[one.name](streams[one.place.layer, int(one.after)][here])
                parts.append(torch.cat([found[0], found[1].float()], 1) if one.pairs else found.reshape(counts[at], -1))
            assert torch.allclose(torch.from_numpy(rows), torch.cat(parts, 1)[keep], atol=1e-5)
        for name, count in zip(batch, counts, strict=True):
            reached[name] += count
    for name in wanted:
        readers.end(name)
    assert len(readers) == 0


@pytest.mark.parametrize("seed", range(8))
def test_gates_decide_as_conditions_do_whatever_the_batches(seed: int) -> None:
    """Requests of random length in random chunks, in random order, with neighbours; some begin anew, as after preemption."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    probe = sf.probes.LinearProbe(unit(1), place=1)
    conditions = {
        "when": sf.When(sf.Condition(probe, 0.3), sf.Add(unit(2))),
        "token": sf.WhenToken(sf.Condition(probe, 0.1, above=False), sf.Add(unit(2))),
        "held": sf.WhenToken(sf.Condition(probe, 0.8, release=-0.8), sf.Add(unit(2))),
    }
    chains = {name: {Place("resid_post", 2): {0: edit}} for name, edit in conditions.items()}
    gates = Gates(chains, frozenset(), LAYERS, (4, 96), torch.device("cpu"))
    watched = gates.served(0)
    readers = Readers(watched, gates.probes, 96, torch.device("cpu"))
    slots = dict(zip(conditions, draw.sample(range(4), 3), strict=True))
    for name, slot in slots.items():
        gates.load(name, "resid_post.2", 0, slot)
    texts = {
        f"{name} {i}": torch.randn(draw.randint(4, 30), D, generator=generator) for name in conditions for i in range(3)
    }
    texts["plain"] = torch.randn(20, D, generator=generator)
    prompts = {name: draw.randint(1, len(text)) for name, text in texts.items()}
    reached = dict.fromkeys(texts, 0)
    for name in texts:
        gates.start(name, prompts[name], [name.split()[0]])
    found: dict[str, dict[int, bool]] = {name: {} for name in texts}
    again = {"held 0", "when 0"}
    while any(reached[name] < len(text) for name, text in texts.items()):
        open_ones = [name for name, text in texts.items() if reached[name] < len(text)]
        batch = draw.sample(open_ones, draw.randint(1, min(4, len(open_ones))))
        counts = [draw.randint(1, min(9, len(texts[name]) - reached[name])) for name in batch]
        starts = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
        positions = torch.cat(
            [torch.arange(reached[name], reached[name] + n) for name, n in zip(batch, counts, strict=True)]
        )
        read = gates.begin(batch, starts, positions, len(positions))
        assert bool(read) == any(name != "plain" for name in batch) == gates.active
        readers.begin(batch, starts, positions, len(positions), read)
        assert readers.take() is None
        x = torch.cat([texts[name][reached[name] : reached[name] + n] for name, n in zip(batch, counts, strict=True)])
        readers.write(x, None, "resid_post.1", after=False)
        gates.judge(readers.scores[: len(x)], "resid_post.1", after=False)
        slot = [slots.get(name.split()[0], -1) for name, n in zip(batch, counts, strict=True) for _ in range(n)]
        rows = torch.tensor([[one, -1, -1, -1] for one in slot], dtype=torch.int32)
        closed = gates.close(rows, "resid_post.2")
        assert torch.equal(gates.close(rows, "resid_post.3"), rows)
        for i, name in enumerate(batch):
            for token in range(int(starts[i]), int(starts[i + 1])):
                found[name][int(positions[token])] = bool(closed[token, 0] == rows[token, 0])
            reached[name] += counts[i]
            if name in again and reached[name] > 2:
                again.discard(name)
                reached[name] = 0
    for name, text in texts.items():
        kind = name.split()[0]
        if kind not in conditions:
            assert all(found[name].values())
            continue
        met = conditions[kind].condition(text)
        end = prompts[name] - 1
        wanted = [bool(met[end]) and i >= end for i in range(len(text))] if kind == "when" else met.tolist()
        assert [found[name][i] for i in range(len(text))] == wanted, name
        gates.end(name)
    gates.begin(["plain"], torch.tensor([0, 1]), torch.tensor([0]), 1)
    assert not gates.active


# --- to the client -----------------------------------------------------------------------------------------------------


def test_scores_reach_the_answer_once_each_and_a_missing_one_is_seen(library: ProbeLibrary) -> None:
    reading = read_probes(
        {"steer_read": ["linear", "rows"], "steer_read_what": "tokens", "steer_read_positions": "!0"}, library, None
    )
    assert reading is not None
    scores = np.arange(30, dtype=np.float32).reshape(10, 3)
    scores[4, 0] = np.nan
    desk = Desk()
    desk.note(("a", 0, scores[:4]))
    with desk.open():
        desk.end("b")
        first = desk.message("a", reading)
    assert first is not None
    answer = Answer(json.loads(json.dumps(first["reading"])))
    answer.add(first["rows"])
    assert desk.message("a", reading) is None
    desk.note(("a", 2, scores[2:7] + np.array([[99.0], [99.0], [0], [0], [0]], dtype=np.float32)))  # two of them again
    with desk.open():
        desk.end("a")
        second = desk.message("a", reading)
    assert second is not None
    assert "reading" not in second
    answer.add(second["rows"])
    assert len(desk) == 0
    found, single = answer.finish(range(8), 5)
    assert found["linear"]["positions"] == [1, 2, 3, 4, 5, 6]
    assert found["linear"]["scores"] == [3.0, 6.0, 9.0, None, 15.0, 18.0]
    assert (found["linear"]["max"], found["linear"]["last"]) == (None, 18.0)
    assert found["rows"]["names"] == ["0", "1"]
    assert found["rows"]["max"] == [19.0, 20.0]
    assert list(single) == ["linear"]
    json.dumps(found, allow_nan=False)
    answer.add([(7, scores[7:8].tobytes())])  # a draft that was accepted, and at which a stop text ended
    assert answer.finish(range(8), 5)[0]["linear"] == found["linear"]
    assert answer.finish(range(8), 5, crossed=True)[0]["linear"]["positions"] == [1, 2, 3, 4, 5, 6, 7]
    answer.add([(9, scores[9:10].tobytes())])  # the one before never came
    found, single = answer.finish(range(10), 5)
    assert found["linear"] == {"tokens": 0, "missing": 1}
    assert len(single["linear"]) == 0


@pytest.mark.parametrize("seed", range(6))
def test_what_is_put_aside_step_by_step_reaches_each_answer(seed: int, library: ProbeLibrary) -> None:
    """Requests come, go, are hung up and run again; three hundred steps decode, many of them with the same requests."""
    draw = random.Random(seed)
    readings = {}
    for i in range(12):
        names = draw.sample(["linear", "rows", "logistic"], draw.randint(1, 3))
        given = {
            "steer_read": names,
            "steer_read_what": "tokens",
            "steer_read_positions": draw.choice(["all", "generated"]),
        }
        readings[f"{i}"] = read_probes(given, library, None)
    readers = {
        name: Reader(name, reading.first(3), reading.wanted(3).columns, frozenset())
        for name, reading in readings.items()
    }
    desk, reached, waiting, ran = Desk(), dict.fromkeys(readings, 0), [*readings], dict.fromkeys(readings, 0)
    requests = {name: SimpleNamespace(num_stale_output_tokens=0) for name in readings}
    batch: list[str] = []
    score = lambda name, at: np.arange(16, dtype=np.float32) + 100 * int(name) + 10000 * at  # noqa: E731
    aside = 0
    while waiting or batch:
        while waiting and len(batch) < 4:
            batch.append(waiting.pop(0))
        if draw.random() < 0.02:  # preempted, and run again from its beginning
            reached[draw.choice(batch)] = 0
        for request in requests.values():
            request.num_stale_output_tokens = int(draw.random() < 0.01)
        here = Here(list(enumerate(readers[name] for name in batch)))
        positions = np.array([reached[name] for name in batch])
        table = np.stack([score(name, at) for name, at in zip(batch, positions.tolist(), strict=True)])
        found = here.decoded(table, positions)
        if desk.put_aside(found):
            aside += 1
        else:
            for rows in found:
                desk.note(rows)
                desk.readings[rows[0]] = readings[rows[0]]
            desk.follow(found, {name: requests[name] for name in batch})
        assert set(batch) <= set(desk.readings)
        for name in batch:
            reached[name] += 1
            ran[name] = max(ran[name], reached[name])
        with desk.open() as left:
            for name in [one for one in batch if draw.random() < 0.03]:
                batch.remove(name)
                desk.end(name)
                assert name in left
                if draw.random() < 0.2:  # hung up
                    continue
                message = desk.message(name, readings[name])
                answer = Answer(message["reading"])
                answer.add(message["rows"])
                answered, _ = answer.finish([1] * (ran[name] + 1), 3)
                first, at = readers[name].first, 0
                for probe in readings[name].probes:
                    columns = list(readers[name].columns)[at : at + probe.columns]
                    wanted = [score(name, position)[columns] for position in range(first, ran[name])]
                    got = np.array(answered[probe.name]["scores"]).reshape(-1, probe.columns)
                    assert answered[probe.name]["positions"] == list(range(first, ran[name]))
                    assert np.array_equal(got, np.array(wanted).reshape(-1, probe.columns))
                    at += probe.columns
    assert len(desk) == 0
    assert aside > 20


def test_a_request_that_ended_in_its_prompt_is_told_what_was_read_of_it(library: ProbeLibrary) -> None:
    reading = read_probes({"steer_read": "linear", "steer_read_what": "tokens"}, library, None)
    assert reading is not None
    desk = Desk()
    desk.note(("a", 0, np.arange(4, dtype=np.float32)[:, None]))
    first = desk.message("a", reading)
    assert first is not None
    answer = Answer(first["reading"])
    answer.add(first["rows"])
    found, single = answer.finish(range(9), 9)
    assert found["linear"]["scores"] == [0.0, 1.0, 2.0, 3.0]
    assert found["linear"]["positions"] == [0, 1, 2, 3]
    assert single["linear"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert answer.finish(range(10), 9)[0]["linear"] == {"tokens": 0, "missing": 5}, "with a token, its prompt was read"


@pytest.mark.parametrize("positions", ["all", "3:6", "generated", "last", "ids:7", "after:ids:7"])
def test_a_limit_is_crossed_by_tokens_that_are_read_and_no_others(library: ProbeLibrary, positions: str) -> None:
    draw = random.Random(positions)
    asked = {"steer_read": "rows", "steer_abort": ["linear>2", "linear<-2"], "steer_read_positions": positions}
    reading = read_probes(asked, library, None)
    assert reading is not None
    for _ in range(60):
        prompt, ids = draw.randint(1, 9), [draw.choice([1, 7, 8]) for _ in range(14)]
        first, stop = sorted(draw.sample(range(15), 2))
        scores = np.array([[0, 9, draw.choice([0, 0, 0, 3, -3])] for _ in range(first, stop)], dtype=np.float32)
        read = allowed(parse("", positions), ids, prompt).numpy()[first:stop]
        beyond = (read & (abs(scores[:, 2]) > 2)).nonzero()[0]
        crossed = reading.crossed(first, scores, ids, prompt)
        if not len(beyond):
            assert crossed is None
            continue
        wanted = "linear>2" if scores[beyond[0], 2] > 2 else "linear<-2"
        assert crossed is not None
        assert (str(crossed[0]), crossed[1]) == (wanted, first + beyond[0])
