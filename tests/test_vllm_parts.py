"""The parts of the vLLM plugin that need no vLLM: what a client may say, the plans, the slots, the row table, the edits."""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interventions import EXAMPLES, D
from torch._subclasses.fake_tensor import FakeTensorMode

import steerfast as sf
from steerfast._positions import After, allowed, parse
from steerfast.plan import ModelCard
from steerfast.vllm import edits, plans, routes, wire
from steerfast.vllm.edits import EditedPlace, Places
from steerfast.vllm.plans import Library, ServedPlan
from steerfast.vllm.slots import Admission, Residents
from steerfast.vllm.table import EVER, Owner, RowTable


def unit(seed: int, d: int = D) -> torch.Tensor:
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def top_k_edit() -> sf.EditFeatures:
    sae = sf.SAE(torch.eye(D), torch.eye(D), k=2)
    return sf.EditFeatures(sae, {3: 8.0})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sf.Plan({1: sf.Add(unit(0))}).save(tmp_path / "one")
    sf.Plan({-1: [sf.Ablate(unit(1)), sf.Add(unit(2))], ("resid_pre", 3): sf.Add(unit(3))}, "last").save(
        tmp_path / "two"
    )
    sf.Plan({0: sf.Add(unit(4))}, positions=[0, 1]).save(tmp_path / "single")
    sf.Plan({0: sf.Add(unit(4))}, positions=torch.tensor([True, False])).save(tmp_path / "mask")
    sf.Plan({0: sf.Add(unit(4))}, positions="all & !special", special=[1, 2]).save(tmp_path / "spares")
    sf.Plan({0: sf.Add(unit(4))}, positions="after:ids:9").save(tmp_path / "after")
    return tmp_path


@pytest.fixture
def library(folder: Path) -> Library:
    return plans.load(folder, D, 4)[0]


# --- the directory -----------------------------------------------------------------------------------------------------


def test_a_plan_is_told_apart_by_its_content_and_takes_the_slots_of_its_longest_chain(folder: Path) -> None:
    first, chains = plans.load(folder, D, 4)
    slots = {"after": 1, "mask": 1, "one": 1, "single": 1, "spares": 1, "two": 2}
    assert {name: served.slots for name, served in first.plans.items()} == slots
    assert first.plans["two"].positions == "last"
    assert first.plans["single"].positions == "0 | 1"
    assert first.plans["mask"].positions is None
    assert (first.plans["spares"].positions, first.plans["spares"].special) == ("all & !special", (1, 2))
    # what enters layer 3 is what left layer 2; -1 is layer 3 of 4
    assert {place: len(chain) for place, chain in chains["two"].items()} == {("resid_post", 3): 2, ("resid_post", 2): 1}
    before = first.plans["one"].fingerprint
    sf.Plan({1: sf.Add(unit(0))}).save(folder / "same content")
    sf.Plan({1: sf.Add(unit(9))}).save(folder / "one")
    again = plans.load(folder, D, 4)[0].plans
    assert again["same content"].fingerprint == before != again["one"].fingerprint


def test_edits_of_one_place_keep_their_order(tmp_path: Path) -> None:
    a, b, c = sf.Add(unit(0)), sf.Ablate(unit(1)), sf.Add(unit(2))
    sf.Plan({("resid_pre", 2): c, 1: a, -3: b}).save(tmp_path / "p")
    (edits,) = plans.load(tmp_path, D, 4)[1]["p"].values()
    assert [(number, type(edit)) for number, edit in edits.items()] == [(0, sf.Add), (1, sf.Ablate), (2, sf.Add)]
    assert torch.equal(edits[0].vector, a.vector)
    assert torch.equal(edits[2].vector, c.vector)


def test_plans_of_one_output_are_named_in_the_order_in_which_a_model_comes_to_them(tmp_path: Path) -> None:
    """What enters layer 2 is the output of layer 1 behind its edits; an engine's one hook takes two plans as they are named."""
    enters, leaves = sf.Plan({("resid_pre", 2): sf.Ablate(unit(0))}), sf.Plan({-3: sf.Add(unit(0) + unit(1))})
    enters.save(tmp_path / "enters")
    leaves.save(tmp_path / "leaves")
    sf.Plan({("resid_pre", 2): sf.Add(unit(2))}).save(tmp_path / "adds")
    sf.Plan({("resid_pre", -2): sf.Add(unit(2), keep_norm=True)}).save(tmp_path / "keeps")
    sf.Plan({("resid_pre", 1): sf.Ablate(unit(0)), 2: sf.Ablate(unit(0))}).save(tmp_path / "elsewhere")
    library = plans.load(tmp_path, D, 4)[0]
    for names in (["leaves", "enters"], ["adds", "leaves"], ["elsewhere", "leaves", "enters"], ["leaves", "keeps"]):
        assert [part.served.name for part in wire.read({"steer": names}, library)] == names
    for names in (["enters", "leaves"], ["keeps", "leaves"], ["leaves", "enters", "leaves"]):
        with pytest.raises(ValueError, match=r"edits resid_pre 2, which comes behind resid_post 1 that 'leaves' edits"):
            wire.read({"steer": names}, library)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (lambda: sf.Plan({4: sf.Add(unit(0))}), "layer 4 is out of range; this model has 4 layers, 0 to 3"),
        (lambda: sf.Plan({0: sf.Add(unit(0, 5))}), "has width 5; this model has 12"),
        (
            lambda: sf.Plan({("head_out", 0): sf.Add(unit(0))}),
            "site 'head_out' cannot be steered or read inside vLLM on several",
        ),
        (lambda: sf.Plan({0: sf.Add(unit(0))}, model=ModelCard("M", D, 30)), "made for width 12 and 30 layers"),
        (
            lambda: sf.Plan({0: sf.When(sf.Condition(sf.probes.LinearProbe(unit(0), place=2), 0.1), sf.Add(unit(1)))}),
            "is read at resid_post 2, and it is to act at resid_post 0, which comes first; read an earlier place",
        ),
        (
            lambda: sf.Plan({("resid_pre", 2): sf.When(sf.Condition(unit(0), 0.1), sf.Add(unit(1)))}),
            "stands at resid_pre 2, whose edits join those of resid_post 1 inside vLLM; put it there",
        ),
        (
            lambda: sf.Plan(
                {
                    ("resid_pre", 2): sf.Add(unit(2)),
                    3: sf.When(
                        sf.Condition(sf.probes.LinearProbe(unit(0), place=("resid_pre", 2)), 0.1), sf.Add(unit(1))
                    ),
                }
            ),
            "before resid_pre 2 lies between the edits of resid_post 1 and of resid_pre 2",
        ),
        (lambda: sf.Plan({0: top_k_edit()}), "names SAE.* was not given, and STEERFAST_SAES is not set"),
        (lambda: sf.Plan({0: sf.Add(1e6 * unit(0))}), "resid_post 0: .* does not fit torch.float16: a row overflows"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_name_and_the_others_are_served(folder: Path, plan, reason: str) -> None:
    plan().save(folder / "misfit")
    library, chains = plans.load(folder, D, 4, torch.float16)
    assert set(library.plans) == {"after", "mask", "one", "single", "spares", "two"} == set(chains)
    with pytest.raises(ValueError, match=f"the plan 'misfit' cannot be used: .*{reason}"):
        wire.read({"steer": "misfit"}, library)


def test_saes_are_looked_for_where_the_server_says_and_no_client_learns_where(folder: Path, monkeypatch) -> None:
    edit = top_k_edit()
    sf.Plan({0: edit}).save(folder / "topk")
    saes = folder / "no plan" / "saes"
    sf.SAE(torch.eye(D), torch.eye(D), k=3).save(saes / "another")
    monkeypatch.setenv("STEERFAST_SAES", f"{saes}/")
    reason = plans.load(folder, D, 4)[0].refused["topk"]
    assert "is not among STEERFAST_SAES: another is " in reason
    assert str(folder) not in reason
    sf.SAE(torch.eye(D), torch.eye(D), k=2).save(saes / "the one")
    library, chains = plans.load(folder, D, 4)
    assert not library.refused
    assert chains["topk"]["resid_post", 0][0].sae.sae.k == 2


def test_a_damaged_plan_is_refused_by_name(folder: Path) -> None:
    blob = folder / "one" / "plan.safetensors"
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    library, _ = plans.load(folder, D, 4)
    with pytest.raises(ValueError, match="the plan 'one' cannot be used") as refused:
        wire.read({"steer": "one"}, library)
    assert str(folder) not in str(refused.value)
    assert wire.read({"steer": "two"}, library)


def test_a_directory_without_plans_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a directory"):
        plans.load(tmp_path / "nowhere", D, 4)
    with pytest.raises(ValueError, match="holds no plan; save one"):
        plans.load(tmp_path, D, 4)


# --- what a client may say ---------------------------------------------------------------------------------------------


def test_a_request_names_plans_strengths_and_positions(library: Library) -> None:
    parts = wire.read({"steer": ["two", "one"], "steer_strength": [2, -0.5], "other": object()}, library)
    assert [(p.served.name, p.strength, p.positions) for p in parts] == [("two", 2.0, "last"), ("one", -0.5, "all")]
    (part,) = wire.read({"steer": "single", "steer_positions": "prompt"}, library)
    assert (part.strength, part.positions) == (1.0, "prompt")
    assert [p.strength for p in wire.read({"steer": ["one", "two"], "steer_strength": 3}, library)] == [3.0, 3.0]


def test_a_request_that_says_nothing_takes_the_default_and_can_decline_it(library: Library) -> None:
    default = wire.read({"steer": "one"}, library)
    assert wire.read(None, library, default) == wire.read({"seed": 1}, library, default) == default
    assert wire.read({"steer": []}, library, default) == ()
    assert wire.read(None, library) == ()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"steer": "nobody"}, "there is no plan 'nobody'; this engine has 6 plans"),
        ({"steer": "../one"}, "there is no plan '../one'"),
        ({"steer": "one/../one"}, "there is no plan"),
        ({"steer": ["one"] * 10_000}, "steer names 10000 plans; at most 4"),
        ({"steer": "x" * 100_000}, r"there is no plan 'x+\.\.\.;"),
        ({"steer": ["two", "two", "one"]}, "apply 5 interventions to a token; at most 4"),
        ({"steer": 7}, "steer is 7; expected a plan's name or a list of names"),
        ({"steer": [["one"]]}, "a plan's name is"),
        ({"steer": None}, "steer is None; expected"),
        ({"steer": "one", "steer_strength": math.nan}, "expected a finite number"),
        ({"steer": "one", "steer_strength": math.inf}, "expected a finite number"),
        ({"steer": "one", "steer_strength": 1e30}, "at most 65504"),
        ({"steer": "one", "steer_strength": 10**5000}, "at most 65504"),
        ({"steer": "one", "steer_strength": "2"}, "steer_strength is '2'; expected a number"),
        ({"steer": "one", "steer_strength": True}, "steer_strength is True; expected a number"),
        ({"steer": "one", "steer_strength": None}, "steer_strength is None; expected a number"),
        ({"steer": "one", "steer_strength": [1, 2]}, "has 2 numbers for 1 plans"),
        ({"steer": ["one", "two"], "steer_strength": [1]}, "has 1 numbers for 2 plans"),
        (
            {"steer": "one", "steer_positions": "everywhere"},
            "steer_positions is 'everywhere'; expected all, prompt, generated",
        ),
        ({"steer": "one", "steer_positions": ["all"]}, r"steer_positions is \['all'\]; expected one selector"),
        ({"steer": "one", "steer_positions": "ids:" + "1," * 500 + "1"}, "expected one selector, up to 500 characters"),
        ({"steer": "one", "steer_positions": "|".join(map(str, range(9)))}, "joins 9 selectors; at most 8"),
        (
            {"steer": "one", "steer_positions": "0|2|4|6|8"},
            "may fall into 5 pieces, .* of an intervention: 5 in all, at most 4",
        ),
        ({"steer": ["one", "two"], "steer_positions": "0 | last"}, "2 pieces, .*: 6 in all, at most 4"),
        (
            {"steer": "one", "steer_positions": "all & !special"},
            "the plan 'one': positions='all & !special' names .* special=",
        ),
        (
            {"steer": "one", "steer_positions": "after:ids:9 & !after:ids:8 | between:ids:3..4"},
            "name 3 different after: and between:; at most 2 can be followed in a request",
        ),
        (
            {"steer": ["two", "after"], "steer_positions": "after:ids:9 & 0 | between:ids:9..8 & last"},
            "3 pieces, .*: 9 in all, at most 4",
        ),
        ({"steer": "mask"}, "has a mask as its positions, which a server does not follow; give steer_positions"),
        ({"steering": "one"}, "unknown field 'steering'; the fields are steer, steer_strength, steer_positions"),
        ({"steer": "one", "steer_scale": 2}, "unknown field 'steer_scale'"),
        ({"steer_strength": 2}, "steer_strength is given without steer"),
    ],
)
def test_whatever_cannot_be_followed_is_refused_with_the_reason_in_a_line(library: Library, given, reason: str) -> None:
    with pytest.raises(ValueError, match=f"steer: .*{reason}") as refused:
        wire.read(given, library)
    assert len(str(refused.value)) < 300


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["steer", "steer_strength", "steer_positions", "steerable"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["a", "last"]),
            lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=2),
        ),
    )
)
def test_no_request_does_anything_but_be_read_or_refused(fields) -> None:
    library = Library({"a": ServedPlan("a", "f", (0,), "all")})
    try:
        parts = wire.read(fields, library)
    except ValueError:
        assert fields
        return
    assert not fields or set("".join(fields["steer"])) <= {"a"}
    assert len(parts) <= 4
    assert all(math.isfinite(part.strength) for part in parts)


def test_the_salt_differs_by_all_that_steers_and_by_the_users_own(library: Library) -> None:
    requests = [
        {"steer": "one"},
        {"steer": "two"},
        {"steer": ["one", "two"]},
        {"steer": ["two", "one"]},
        {"steer": "one", "steer_strength": 1.5},
        {"steer": "one", "steer_positions": "last"},
        {"steer": "one", "steer_positions": "last & !ids:5"},
    ]
    salts = {wire.salt(own, wire.read(request, library), 7) for request in requests for own in (None, "", "user")}
    assert len(salts) == 3 * len(requests)
    assert wire.salt(None, wire.read({"steer": ["one"], "steer_strength": [1]}, library), 7) in salts
    assert wire.salt(None, wire.read({"steer": "one", "steer_positions": " last&! ids:5 "}, library), 7) in salts


def _keys(library: Library, fields: dict[str, Any], prompt: int, blocks: int = 4) -> list[str | None]:
    """What acts on each block of 8 positions."""
    parts = wire.read(fields, library)
    made = wire.salt(None, parts, prompt) if parts else wire.SALT + "[null, []]"
    return [wire.key_of(made, 8 * i, 8 * i + 8)[1] for i in range(blocks)]


def test_blocks_are_shared_as_far_as_the_same_acts_on_them(library: Library) -> None:
    everywhere = _keys(library, {"steer": "one", "steer_positions": "all"}, 7)
    assert len({*everywhere}) == 1
    assert everywhere == _keys(library, {"steer": "one", "steer_positions": "all"}, 30)
    # an answer that was generated under it is a part of the next turn's prompt, where it does not act
    first, second = (_keys(library, {"steer": "one", "steer_positions": "generated"}, prompt) for prompt in (10, 25))
    assert first[0] is second[0] is None, "nothing acts on a prompt: shared with those who are not steered"
    assert None not in (first[1], first[2])
    assert second[:3] == [None] * 3
    assert first[1] != everywhere[1], "it acts on a part of this block"
    assert first[2:] == everywhere[2:], "here it does what it does everywhere, behind other blocks"
    only_prompt = _keys(library, {"steer": "one", "steer_positions": "prompt"}, 16)
    assert only_prompt[:2] == everywhere[:2]
    assert only_prompt[2:] == [None, None]
    # words, windows from either end, token ids; strength, plan, and nothing at all
    asked = [{"steer_positions": where} for where in ("last", "-2:", "0:2", "ids:5", "!ids:5", "after:ids:5")]
    asked += [{}, {"steer": "two"}, {"steer_strength": 2.0}, {"steer": ["one", "one"]}, {"steer": ["two", "one"]}]
    found = [tuple(_keys(library, {"steer": "one", **fields}, 12)) for fields in asked]
    assert len({*found}) == len(found)
    assert _keys(library, {"steer": "one", "steer_strength": 0.0}, 12) == [None] * 4


def test_what_a_condition_decides_by_the_prompt_is_known_by_its_length() -> None:
    served = ServedPlan("when", "w", (0,), "all", gated=True)
    library = Library({"when": served})
    assert _keys(library, {"steer": "when"}, 9) != _keys(library, {"steer": "when"}, 10)


def test_a_users_own_salt_is_kept_beside_what_acts(library: Library) -> None:
    parts = wire.read({"steer": "one", "steer_positions": "generated"}, library)
    assert wire.key_of(wire.salt("own", parts, 9), 0, 8) == ("own", None)
    assert wire.key_of(wire.salt(wire.salt(None, parts, 9), (), 0), 0, 8) == (wire.salt(None, parts, 9), None)


def test_a_prompt_decides_what_fields_alone_do_not(library: Library) -> None:
    parts = wire.read({"steer": "one", "steer_positions": "!5 & prompt"}, library)
    wire.check_prompt(parts, [3] * 6, 6)
    with pytest.raises(
        ValueError, match="steer: '!5 & prompt': position 5 is out of range; this prompt has 5 tokens, 0 to 4"
    ):
        wire.check_prompt(parts, [3] * 5, 5)
    parts = wire.read({"steer": "spares"}, library)
    with pytest.raises(ValueError, match="'all & !special' looks at token ids, and this prompt is given as embeddings"):
        wire.check_prompt(parts, None, 5)
    assert parts[0].pieces(5) == ((0, EVER, (1, 2), False, ()),)
    assert parts[0].count([1, 3, 3, 2, 4, 9], 5, 3) == 3
    (part,) = wire.read({"steer": "after"}, library)
    assert part.pieces(5) == ((0, EVER, (), False, ((After((9,)), True),)),)
    assert part.count([1, 9, 3, 9, 4, 9], 6, 3) == 4
    (part,) = wire.read({"steer": "one", "steer_positions": "0 | last"}, library)
    assert [part.count([], computed, 3) for computed in range(6)] == [0, 1, 1, 2, 3, 4]


# --- slots -------------------------------------------------------------------------------------------------------------


def test_requests_wait_in_order_and_strengths_take_no_slot() -> None:
    a, b, c = (ServedPlan(name, name, (0,) * slots, "all") for name, slots in (("a", 1), ("b", 2), ("c", 1)))
    desk = Admission(2)
    assert all(desk.admit(f"a{i}", [a]) for i in range(1000))  # strengths and repetitions are free
    assert not desk.admit("b0", [b])
    assert not desk.admit("c0", [c]), "c would fit, but b came first"
    assert desk.admit("a-late", [a]), "who needs no slot does not wait"
    assert desk.waiting == 2
    for i in range(1000):
        desk.release(f"a{i}")
    assert not desk.admit("b0", [b])
    desk.release("a-late")
    assert desk.admit("b0", [b])
    assert not desk.admit("c0", [c])
    desk.release("b0")
    assert desk.admit("c0", [c])
    desk.release("c0")
    desk.release("never came")
    twin = ServedPlan("another name of a", "a", (0,), "all")
    assert desk.admit("a", [a])
    assert desk.admit("b", [twin, c])
    assert desk.free == 0, "one content, one slot"
    desk.release("a")
    desk.release("b")
    assert (desk.free, desk.waiting, desk.requests) == (2, 0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_scheduler_admits_fits_beside_the_banks(seed: int) -> None:
    """Random traffic with aborts: the two counts agree, nobody is lost, nothing leaks."""
    rng = random.Random(seed)
    offered = [ServedPlan(f"p{i}", f"{i}", (0,) * rng.choice([1, 1, 1, 2, 3, 4]), "all") for i in range(12)]
    desk, bank = Admission(6), Residents(6)
    waiting, running, done, owners = [], {}, 0, {}
    for i in range(300):
        chosen = rng.sample(offered, rng.choice([1, 1, 2]))
        while sum(served.slots for served in chosen) > 4:
            chosen.pop()
        waiting.append((f"r{i}", chosen or [offered[0]]))
    while waiting or running:
        for request, chosen in list(waiting):
            if rng.random() < 0.02:
                desk.release(request)
                waiting.remove((request, chosen))
                done += 1
            elif len(running) < 5 and desk.admit(request, chosen):
                waiting.remove((request, chosen))
                running[request] = chosen
                for served in chosen:
                    numbers, emptied, missing = bank.hold(served)
                    for name in [name for name, held in owners.items() if set(held) & set(emptied)]:
                        del owners[name]
                    if missing:
                        assert not set(numbers) & {n for held in owners.values() for n in held}
                        owners[served.name] = numbers
                    assert owners[served.name] == numbers
                    assert len(numbers) == served.slots
        for request in rng.sample(sorted(running), rng.randint(0, len(running))):
            desk.release(request)
            for served in running.pop(request):
                bank.release(served)
            done += 1
    assert (done, desk.free, desk.waiting, bank.held) == (300, 6, 0, 0)


# --- the row table -----------------------------------------------------------------------------------------------------


WORDS = ["all", "prompt", "generated", "last"]
SELECTORS = [
    *WORDS, "0", "-1 | generated", "!0:2", "-2: & !-1", "all & !ids:1", "ids:1,2", "ids:1 | last", "prompt & !special",
    "generated & !ids:1 & !ids:9 | 0", "ids:80000 | 1",
]  # fmt: skip


def named(where: str, at: int, prompt: int, token: int) -> bool:
    """The positions of the list above, each spelt out."""
    special = token in (1, 9)
    rules = {
        "all": True, "prompt": at < prompt, "generated": at >= prompt, "last": at >= prompt - 1, "0": at == 0,
        "-1 | generated": at >= prompt - 1, "!0:2": at >= 2, "-2: & !-1": at == prompt - 2, "all & !ids:1": token != 1,
        "ids:1,2": token in (1, 2), "ids:1 | last": token == 1 or at >= prompt - 1,
        "prompt & !special": at < prompt and not special,
        "generated & !ids:1 & !ids:9 | 0": (at >= prompt and not special) or at == 0, "ids:80000 | 1": at == 1,
    }  # fmt: skip
    return rules[where]


@pytest.mark.parametrize("where_it_runs", ["host", "device"])
@pytest.mark.parametrize("seed", range(5))
def test_the_table_says_what_each_request_asked_for_at_each_position(seed: int, where_it_runs: str) -> None:
    """Chunked prefill beside decoding, in changing order, against the definition of the positions."""
    rng = random.Random(seed)
    table = RowTable(tokens=64, device=torch.device("cpu"))
    table._write = table._on_host if where_it_runs == "host" else table._on_device
    library = Library({f"p{i}": ServedPlan(f"p{i}", "", (0,), "all", (1, 9)) for i in range(9)})
    asked = {}
    for i in range(70):  # more than the table first has lines for
        names = rng.sample(sorted(library.plans), rng.randint(0, 4))
        where = rng.choice(WORDS if len(names) > 1 else SELECTORS)
        prompt = rng.randint(2, 9)
        parts = wire.read(
            {"steer": names, "steer_positions": where, "steer_strength": [rng.random() for _ in names]}, library
        )
        owners = [Owner(int(p.served.name[1:]), p.strength, *piece) for p in parts for piece in p.pieces(prompt)]
        asked[f"r{i}"] = (owners, where, prompt)
        table.put(f"r{i}", owners)
        if rng.random() < 0.3:
            table.drop(f"r{i}")
            asked[f"r{i}"] = ([], where, prompt)
    for _ in range(20):
        batch = rng.sample(sorted(asked), rng.randint(1, 12))
        goes_on = rng.random() < 0.5  # the same requests for a while, a token each
        counts = [1 if goes_on else rng.choice([1, 1, 1, 5]) for _ in batch]
        begins = [rng.randint(0, 12) for _ in batch]
        starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
        total = int(starts[-1])
        for step in range(4 if goes_on else 1):
            positions = torch.cat([torch.arange(b, b + c) for b, c in zip(begins, counts, strict=True)]) + step
            said = torch.tensor([rng.choice([-1, 1, 2, 3, 9, 90000]) for _ in range(total + 3)], dtype=torch.int32)
            padded = torch.cat([positions, torch.zeros(3).long()])
            table.fill(batch, torch.cat([starts, starts[-1:]]), padded, total, said)
            for i, name in enumerate(batch):
                owners, where, prompt = asked[name]
                for token in range(int(starts[i]), int(starts[i + 1])):
                    p = int(positions[token])
                    acts = named(where, p, prompt, int(said[token]))
                    found = [
                        (s, w)
                        for s, w in zip(*(t[token].tolist() for t in (table.rows, table.scale)), strict=True)
                        if s >= 0
                    ]
                    each = dict.fromkeys((o.slot, float(np.float32(o.strength))) for o in owners)
                    assert found == ([*each] if acts else []), (where, p, prompt, int(said[token]))
            assert (table.rows[total:] == -1).all(), "what a graph is padded with is steered"
        if rng.random() < 0.3:  # one of them asks anew
            again = rng.choice(batch)
            owners = [
                Owner(rng.randrange(9), rng.random(), *wire.Part(library.plans["p0"], 1.0, "prompt").pieces(4)[0])
            ]
            asked[again] = (owners, "prompt", 4)
            table.put(again, owners)


REMEMBERING = [
    "after:ids:3", "!after:ids:3,4", "between:ids:3..4", "generated & !between:ids:3..4", "between:ids:3..4,5 & !ids:6",
    "after:ids:3 & !after:ids:5", "between:ids:3..4 | between:ids:5..6", "last & after:ids:6 | 0", "!between:ids:7..8 & ids:3,5",
]  # fmt: skip


@pytest.mark.parametrize("where_it_runs", ["host", "device"])
@pytest.mark.parametrize("seed", range(5))
def test_the_table_follows_what_a_text_has_said(seed: int, where_it_runs: str, library: Library) -> None:
    """Texts in chunks of any size beside others, some that are run again from their start, lines that change hands."""
    rng, table = random.Random(seed), RowTable(64, torch.device("cpu"))
    table._write = table._on_host if where_it_runs == "host" else table._on_device
    texts: dict[str, tuple[list[int], int, list[bool], str]] = {}
    reached: dict[str, int] = {}
    seen = 0
    for step in range(300):
        while len(texts) < 5:
            name, where, prompt = f"r{step}.{len(texts)}", rng.choice(REMEMBERING), rng.randint(1, 9)
            ids = [rng.randint(2, 8) for _ in range(30)]
            (part,) = wire.read({"steer": "one", "steer_positions": where}, library)
            table.put(name, [Owner(2, 0.5, *piece) for piece in part.pieces(prompt)] if rng.random() < 0.9 else [])
            acts = allowed(parse("", where), ids, prompt).tolist() if name in table else [False] * 30
            texts[name], reached[name] = (ids, prompt, acts, where), 0
        batch = rng.sample(sorted(texts), rng.randint(1, 5))
        if step % 4:
            counts = [1] * len(batch)
        else:
            counts = [min(rng.randint(1, 7), 30 - reached[name]) for name in batch]
        for again in range(rng.choice([1, 1, 6])):
            if any(reached[name] + count > 30 for name, count in zip(batch, counts, strict=True)):
                break
            starts = torch.tensor([0, *np.cumsum(counts)])
            spans = [range(reached[name], reached[name] + count) for name, count in zip(batch, counts, strict=True)]
            positions = torch.tensor([at for span in spans for at in span])
            said = torch.tensor([texts[name][0][at] for name, span in zip(batch, spans, strict=True) for at in span])
            table.fill(batch, starts, positions, len(positions), said)
            expected = [texts[name][2][at] for name, span in zip(batch, spans, strict=True) for at in span]
            assert (table.rows[: len(positions)] >= 0).any(1).tolist() == expected, (batch, again)
            assert (table.rows[: len(positions)] >= 0).sum(1).max() <= 1, "pieces of one selector overlap"
            seen += sum(expected)
            reached |= {name: span.stop for name, span in zip(batch, spans, strict=True)}
        for name in batch:
            if reached[name] == 30 or rng.random() < 0.05:
                table.drop(name)
                del texts[name], reached[name]
            elif rng.random() < 0.05:
                reached[name] = 0  # preempted: what it has said is run again
    assert seen > 300
    for name in texts:
        table.drop(name)
    assert not table._sets
    assert not table._spanned


def test_sets_of_tokens_are_held_once_and_let_go() -> None:
    table = RowTable(8, torch.device("cpu"))
    for i in range(40):  # more than there is room for at first
        table.put(f"r{i}", [Owner(0, 1.0, 0, 9, (i // 2, 7000 + i % 3), True)])
    assert len(table._sets._numbers) == 40
    for i in range(0, 40, 2):
        table.put(f"r{i}", [Owner(0, 1.0, 0, 9)])
    with pytest.raises(RuntimeError, match="looks for tokens, and this engine does not show them"):
        table.fill(["r1"], torch.tensor([0, 1]), torch.zeros(1).long(), 1)
    for i in (1, 39, 21):
        for token in (i // 2, 7000 + i % 3, 3 + i, -1, 100_000):
            table.fill([f"r{i}"], torch.tensor([0, 1]), torch.zeros(1).long(), 1, torch.tensor([token]))
            assert (table.rows[0, 0] == 0) == (token in (i // 2, 7000 + i % 3)), (i, token)
    for i in range(40):
        table.drop(f"r{i}")
    assert not table._sets
    table.put("r", [Owner(0, 1.0, 0, 9)])
    table.fill(["r"], torch.tensor([0, 1]), torch.zeros(1).long(), 1)  # nobody looks: no ids are needed


# --- the edits ---------------------------------------------------------------------------------------------------------


def engine(edits: list[sf.Intervention], slots: int, dtype: torch.dtype = torch.float32) -> tuple[Places, EditedPlace]:
    place = EditedPlace(edits, slots, D, dtype, torch.device("cpu"))
    return Places({"resid_post.0": place}, RowTable(40, torch.device("cpu"))), place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("crowd", ["one column", "stacked", "everybody"])
def test_a_step_edits_what_the_reference_says(dtype: torch.dtype, split: bool, crowd: str) -> None:
    """Every listed intervention among additions, per token, against the formulas on the same bank and table in float64."""
    edits = [sf.Add(unit(i), 1 + i) for i in range(6)]
    edits += [edit for edit, _ in EXAMPLES.values()]
    places, place = engine(edits, len(edits), dtype)
    for slot, edit in enumerate(edits):
        place.load(slot, edit)
    n, rng = 33, random.Random(1)
    for i in range(n):
        count = {"one column": rng.choice([0, 1]), "stacked": rng.randint(0, 4), "everybody": 1}[crowd]
        pool = range(6) if crowd == "everybody" else range(len(edits))
        chosen = rng.sample(pool, count)
        places.table.put(f"r{i}", [Owner(slot, rng.uniform(0.2, 1.5), 0, 9) for slot in chosen])
    places.table.fill([f"r{i}" for i in range(n)], torch.arange(n + 1), torch.zeros(n, dtype=torch.long), n)
    stream, hidden = torch.randn(40, D).to(dtype), torch.randn(40, D).to(dtype)
    rows, scale = places.table.rows[:n], places.table.scale[:n]
    args = (stream[:n], *place.bank.tensors, rows, scale)
    formula = partial(reference.subspace_split, hidden[:n]) if split else reference.subspace
    spec = formula(*args)
    mine = reference.naive(formula, *args)
    got = stream.clone()
    places.edit_(got, hidden if split else None, "resid_post.0")
    allowed = 2 * (mine.double() - spec).abs().amax(1) + torch.finfo(dtype).eps * spec.abs().amax(1)
    assert ((got[:n].double() - spec).abs().amax(1) <= allowed).all()
    untouched = torch.cat([(rows < 0).all(1), torch.ones(7, dtype=torch.bool)])
    assert torch.equal(got[untouched], stream[untouched])
    assert not torch.equal(got, stream)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_op_does_the_same_traced_dispatched_and_called_from_compiled_code(monkeypatch, compiled: bool) -> None:
    """What is traced does nothing; a compiled graph and PyTorch's dispatch both find the engine that runs."""
    places, place = engine([sf.Add(unit(1), 3.0)], 1)
    place.load(0, sf.Add(unit(1), 3.0))
    places.table.put("r", [Owner(0, 1.0, 1, 3)])
    places.table.fill(["r"], torch.tensor([0, 4]), torch.arange(4), 4)
    asked: list[str] = []
    reached = {edits.CONTEXT: places}
    monkeypatch.setattr(edits, "_context", lambda: asked.append("") or reached)
    op = torch.ops.steerfast.engine_edit_

    def layer(x: torch.Tensor) -> torch.Tensor:
        stream = x * 2
        op.default(stream, None, "resid_post.0")
        return stream + 1

    x = torch.randn(4, D)
    wanted = 2 * x + 1
    wanted[1:3] += 3 * unit(1)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    for _ in range(2):
        assert torch.allclose(run(x), wanted, atol=1e-6)
    assert len(asked) == 2, "it is not run where it is traced"
    direct, dispatched = 2 * x, 2 * x
    op.default(direct, None, "resid_post.0")
    torch._ops.OpOverload.__call__(op.default, dispatched, None, "resid_post.0")
    assert torch.equal(direct, dispatched)
    assert torch.allclose(direct + 1, wanted, atol=1e-6)
    with FakeTensorMode() as mode:
        op.default(mode.from_tensor(x), None, "resid_post.0")
    assert len(asked) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_no_device() -> None:
    """Requests come, the table is written, the edits run, requests go: all without a synchronisation."""
    device = torch.device("cuda")
    place = EditedPlace([sf.Add(unit(i)) for i in range(4)], 4, D, torch.bfloat16, device)
    for slot in range(4):
        place.load(slot, sf.Add(unit(slot), 2.0))
    place.bank.commit()
    table = RowTable(64, device)
    places = Places({"resid_post.0": place}, table)
    starts, positions = (
        torch.arange(33, device=device, dtype=torch.int32),
        torch.zeros(64, dtype=torch.long, device=device),
    )
    stream = torch.randn(40, D, device=device).bfloat16()
    before = stream.clone()
    names = [f"r{i}" for i in range(32)]
    torch.cuda.synchronize()
    for mode in ("default", "error"):  # the first compiles the kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for i, name in enumerate(names):
                table.put(name, [Owner(i % 4, 1.0, 0, 9)])
            table.fill(names, starts, positions, 32)
            places.edit_(stream, None, "resid_post.0")
            table.drop(names[0])
            table.fill(names[1:], starts[:32], positions, 31)
            places.edit_(stream, None, "resid_post.0")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not torch.equal(stream[:32], before[:32])
    assert torch.equal(stream[32:], before[32:])


def test_each_place_has_its_own_bank_under_one_table() -> None:
    table = RowTable(8, torch.device("cpu"))
    alike = [EditedPlace([sf.Add(unit(i))], 4, D, torch.float32, torch.device("cpu")) for i in range(2)]
    other = EditedPlace([sf.Ablate(unit(2))], 4, D, torch.float32, torch.device("cpu"))
    places = Places({"a": alike[0], "b": alike[1], "c": other}, table)
    for i, place in enumerate(alike):
        place.load(0, sf.Add(unit(i), 2.0))
    other.load(0, sf.Ablate(unit(2)))
    table.put("r", [Owner(0, 1.0, 0, 9)])
    table.fill(["r"], torch.tensor([0, 1]), torch.zeros(1).long(), 1)
    x = torch.randn(1, D)
    for i, name in enumerate("ab"):
        got = x.clone()
        places.edit_(got, None, name)
        assert torch.allclose(got, x + 2 * unit(i), atol=1e-6)
    got = x.clone()
    places.edit_(got, None, "c")
    assert float(got @ unit(2)) == pytest.approx(0.0, abs=1e-6)


def test_slots_are_filled_again_and_again_where_free_rows_lie_scattered() -> None:
    """A rank-4 edit comes when its rows are free but apart: what is loaded moves together, and nothing changes for it."""
    wide = sf.Amplify(torch.stack([unit(i) for i in range(4)]))
    edits: list[sf.Intervention] = [sf.Add(unit(i)) for i in range(8)] + [wide]
    places, place = engine(edits, 5)  # room for the wide one and four more
    for slot in range(5):
        place.load(slot, edits[slot])
    for slot in (0, 2, 4, 3):
        place.unload(slot)
    place.load(3, edits[5])
    place.load(0, wide)
    place.load(2, edits[6])
    for slot, edit in {1: edits[1], 3: edits[5], 0: wide, 2: edits[6]}.items():
        places.table.put("r", [Owner(slot, 1.0, 0, 9)])
        places.table.fill(["r"], torch.tensor([0, 1]), torch.zeros(1).long(), 1)
        x = torch.randn(1, D)
        got = x.clone()
        places.edit_(got, None, "resid_post.0")
        assert torch.allclose(got, edit.apply(x), atol=1e-6)


def test_more_tokens_than_the_engine_announced_are_an_error() -> None:
    places, place = engine([sf.Add(unit(0))], 4)
    place.load(0, sf.Add(unit(0)))
    places.table.put("r", [Owner(0, 1.0, 0, 9)])
    places.table.fill(["r"], torch.tensor([0, 1]), torch.zeros(1).long(), 1)
    with pytest.raises(RuntimeError, match=r"resid_post\.0 handles 41 tokens; the engine announced 40"):
        places.edit_(torch.zeros(41, D), None, "resid_post.0")


def test_a_bank_takes_what_its_plans_need_and_no_more() -> None:
    """Memory per registered vector: at most twice its size, headers and all, at a real width."""
    edits: list[sf.Intervention] = [sf.Add(unit(i, 576)) for i in range(64)]
    place = EditedPlace(edits, 64, 576, torch.bfloat16, torch.device("cpu"))
    assert sum(t.numel() * t.element_size() for t in place.bank.tensors) <= 2 * 64 * 576 * 2


# --- the server's routes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "refused"),
    [
        ("/v1/messages", {"vllm_xargs": {"steer": "love"}}, False),
        ("/v1/messages", {"messages": [{"content": 'I "steer" a boat'}]}, False),
        ("/v1/messages/count_tokens", {"steer": "love"}, True),
        ("/v1/messages/count_tokens", {"vllm_xargs": {"steer_strength": 2}}, True),
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"steer": "love"}}}, False),
        ("/tokenize", {"steering": 1}, True),
        ("/v1/chat/completions", {"vllm_xargs": {"steer": "love"}}, False),
        ("/prefix/v1/completions/render", {"vllm_xargs": {"steer": "love"}}, False),
        ("/v1/messages", ["steer"], False),
    ],
)
def test_a_route_that_would_drop_the_fields_refuses_them(path: str, fields, refused: bool) -> None:
    """Whatever is let through reaches the application byte for byte, in the pieces in which it came."""
    reason = pass_through(path, fields)
    assert (reason is not None) == refused
    if reason is not None:
        assert f"is not read by {path}; send the request to one of /v1/chat/completions" in reason


@pytest.mark.parametrize("path", ["/v1/messages", "/prefix/v1/messages/render"])
def test_what_stands_beside_vllm_xargs_is_lost_on_the_way_of_a_message_and_refused(path: str) -> None:
    reason = pass_through(path, {"vllm_xargs": {"steer": "love"}, "steer_strength": 2})
    assert reason == "steer: steer_strength stands beside vllm_xargs; put it inside"


def pass_through(path: str, fields: object) -> str | None:
    """Send a request through the middleware: why it is refused, or None if the application has got it whole."""
    body = json.dumps(fields).encode()
    pieces = [
        {"type": "http.request", "body": body[:9], "more_body": True},
        {"type": "http.request", "body": body[9:], "more_body": False},
        {"type": "http.disconnect"},
    ]
    seen: list[dict] = []
    sent: list[dict] = []
    reasons: list[str] = []

    async def app(scope, receive, send) -> None:
        seen.extend([await receive() for _ in pieces])

    async def send(message) -> None:
        sent.append(message)

    incoming = iter(pieces)

    async def receive() -> dict:
        return next(incoming)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-type", b"application/json")]}
    asyncio.run(routes.Strays(app, reasons.append)(scope, receive, send))
    if not reasons:
        assert (seen, sent) == (pieces, [])
        return None
    assert seen == []
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["message"] == reasons[0]
    return reasons[0]


# --- imports -----------------------------------------------------------------------------------------------------------


def test_importing_the_plugin_imports_nothing_of_vllm() -> None:
    import subprocess

    code = (
        "import sys, steerfast.vllm.seams, steerfast.vllm.runner;"
        "print([m for m in ('vllm', 'transformers', 'triton', 'prometheus_client') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "vllm" not in found
    assert json.loads(found.replace("'", '"')) in ([], ["triton"])  # torch itself may look for triton


def test_each_of_the_twelve_traps_has_a_test_by_the_name_that_the_page_gives() -> None:
    here = Path(__file__).parent
    page = (here.parent / "docs" / "vllm.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) [^|]*\|([^|]*)\|$", page, re.MULTILINE))
    assert [*rows] == [str(i) for i in range(1, 13)]
    for trap, named in rows.items():
        tests = re.findall(r"(test_\w+\.py)(?:::(\w+))?", named)
        assert tests, trap
        for file, name in tests:
            assert f"def {name}" in (here / file).read_text(encoding="utf-8"), (trap, file, name)


def test_every_test_that_the_page_names_is_there() -> None:
    here = Path(__file__).parent
    page = (here.parent / "docs" / "vllm.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?", page)
    assert len({file for file, _ in named}) > 15
    for file, name in named:
        assert f"def {name}" in (here / file).read_text(encoding="utf-8"), (file, name)
    table = page.partition("## What works with what")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 12
    assert [row for row in rows if "`test_" not in row] == []


def test_what_the_cost_run_writes_is_what_the_bars_read(monkeypatch, tmp_path: Path) -> None:
    """After every round a whole row, by the names of bars.csv; of two unsteered runs the mean."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import bars
    import results
    import vllm_cost

    args = SimpleNamespace(wall=False, out=tmp_path, dtype="bfloat16", eager=False)
    for name, load in vllm_cost.LOADS.items():
        row = vllm_cost.new_row(name, args)
        for number in range(3):
            seconds = dict.fromkeys((*vllm_cost.TWICE, *map(str, load.arms)), 1.0 + number)
            seconds[vllm_cost.TWICE[1]] *= 1.5
            done: dict[str, dict[str, Any]] = {arm: {"cpu": taken, "wall": 9.0} for arm, taken in seconds.items()}
            for arm in load.arms if name in vllm_cost.CLOCKED else ():
                theirs = 1.6 + 0.3 * arm.adapter + (0.1 if arm.adapter and arm.share else 0.0)
                ours = {"host": 0.1, "op": 0.1 if arm.share or name != "lora-16" else 0.05, "encode": 0.2}
                each = ({**ours, "host": 0.1 + more, "theirs": theirs} for more in (-0.05, 0.0, 0.05))
                done[str(arm)]["steps"] = [*each]
            vllm_cost.keep(row, done, load.arms[-1])
            vllm_cost.keep_steps(row, done)
            vllm_cost.write(row, args)
            assert len(results.newest(results.read([tmp_path]))[row["case"], "cpu"]["times"]["ours"]) == number + 1
    found = results.newest(results.read([tmp_path]))
    judged = [bars.judge(bar, found) for bar in bars.bars() if bar.case in {case for case, _ in found}]
    assert len(judged) >= 3
    stated = {"over": 1.25, "added": 0.25, "over encode": 2.0, "gated over edit": 0.0, "over reading": 1.0}
    stated["over each alone"] = 0.45 / 0.35
    apart = ("over encode", "gated over edit", "over reading", "over each alone")
    for verdict in judged:
        measure = verdict.bar.measure
        kind = next((kind for kind in apart if kind in measure), measure.partition(":")[0])
        assert verdict.value == pytest.approx((stated[kind],) * 3), measure
    assert {verdict.bar.measure.partition(":")[0] for verdict in judged} == {"over", "added"}
    assert found["vllm lora batch=16", "cpu"]["added"]["steering beside LoRA: over alone"] == [1.0] * 3
    batch = vllm_cost.LOADS["decode-256"].batch
    asked = [vllm_cost.LOADS["decode-256"].arms[-1].steer(i, batch) for i in range(batch)]
    assert len({(fields["steer"], fields["steer_strength"]) for fields in asked}) == batch == 256
    assert [vllm_cost.Arm(0.25, "one layer", 1).steer(i, 16) is None for i in (3, 4)] == [False, True]
