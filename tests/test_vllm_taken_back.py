"""Drafts that are not accepted: what a row table and conditions remember is what the text has, whatever has run beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

import steerfast as sf
from steerfast._positions import allowed, parse
from steerfast.place import Place
from steerfast.vllm.gating import Gates
from steerfast.vllm.pieces import pieces
from steerfast.vllm.reading import Readers
from steerfast.vllm.table import Owner, RowTable

DRAFTS, D = 3, 8
Batch = tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor, dict[str, tuple[int, int]]]


def steps(draw: random.Random, texts: dict[str, list[int]], prompts: dict[str, int]) -> Iterator[Batch]:
    """Steps over these texts: prompts in chunks, then a token with up to three drafts, of which the text has the first few.

    Yields:
        A batch: requests, where each begins, positions, ids, and of each request from which position on how many tokens count.
    """
    reached = dict.fromkeys(texts, 0)
    while unfinished := [name for name, ids in texts.items() if reached[name] < len(ids)]:
        batch = draw.sample(unfinished, draw.randint(1, len(unfinished)))
        starts, positions, tokens, counted = [0], [], [], {}
        for name in batch:
            at, ids = reached[name], texts[name]
            if at < prompts[name]:
                run = right = min(draw.randint(1, 6), prompts[name] - at)
            else:
                run = 1 + draw.randint(0, DRAFTS)
                right = min(draw.randint(1, run), len(ids) - at)
            wrong = [draw.choice([t for t in range(6) if [t] != ids[i : i + 1]]) for i in range(at + right, at + run)]
            positions += range(at, at + run)
            tokens += ids[at : at + right] + wrong
            starts.append(len(tokens))
            counted[name] = at, right
            reached[name] = at + right
        yield batch, torch.tensor(starts, dtype=torch.int32), torch.tensor(positions), torch.tensor(tokens), counted


def some_texts(draw: random.Random) -> tuple[dict[str, list[int]], dict[str, int]]:
    texts = {f"request {i}": draw.choices(range(6), k=draw.randint(6, 40)) for i in range(5)}
    return texts, {name: draw.randint(1, len(ids) - 1) for name, ids in texts.items()}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("write", ["_on_host", "_on_device"])
def test_a_span_that_a_wrong_draft_opened_or_closed_is_as_before(seed: int, write: str) -> None:
    draw = random.Random(seed)
    texts, prompts = some_texts(draw)
    table = RowTable(64, torch.device("cpu"), (8, 0), 2)
    table._write = getattr(table, write)
    table.remember(DRAFTS + 1)
    selectors = {}
    for slot, name in enumerate(texts):
        opens, closes = draw.sample(range(6), 2)
        text = draw.choice(
            [f"after:ids:{opens}", f"between:ids:{opens}..{closes}", f"between:ids:{opens}..{closes} & generated"]
        )
        selectors[name] = parse("", text)
        table.put(name, [Owner(slot, 1.0, *piece) for piece in pieces(selectors[name], prompts[name])])
    for batch, starts, positions, ids, counted in steps(draw, texts, prompts):
        table.fill(batch, starts, positions, len(ids), ids)
        for number, name in enumerate(batch):
            first, right = counted[name]
            rows = table.rows[int(starts[number]) :][:right]
            wanted = allowed(selectors[name], texts[name], prompts[name])[first : first + right]
            assert (rows >= 0).any(1).tolist() == wanted.tolist(), (name, first)


@pytest.mark.parametrize("seed", range(6))
def test_a_condition_holds_what_the_text_has_decided(seed: int) -> None:
    draw = random.Random(seed)
    texts, prompts = some_texts(draw)
    probe = sf.probes.LinearProbe(torch.eye(D)[0], place=2)
    edit = sf.WhenToken(sf.Condition(probe, 3.5, release=1.5), sf.Add(torch.eye(D)[1]))
    gates = Gates({"held": {Place("resid_post", 2): {0: edit}}}, frozenset(), 3, (1, 64), torch.device("cpu"))
    watched = gates.served(0)
    readers = Readers(watched, gates.probes, 64, torch.device("cpu"))
    gates.remember(DRAFTS + 1)
    gates.load("held", "resid_post.2", 0, 0)
    for name in texts:
        gates.start(name, prompts[name], ["held"])
    seen = 0
    for batch, starts, positions, ids, counted in steps(draw, texts, prompts):
        readers.begin(batch, starts, positions, len(ids), gates.begin(batch, starts, positions, len(ids)))
        x = torch.zeros(len(ids), D)
        x[:, 0] = ids  # what a token is, its probe finds: 4 and 5 open, 0 and 1 shut, 2 and 3 leave it
        readers.write(x, None, "resid_post.2", False)
        gates.judge(readers.scores[: len(ids)], "resid_post.2", False)
        for number, name in enumerate(batch):
            first, right = counted[name]
            open_now = [gates.decided(["held"], int(starts[number]) + i)["held/resid_post.2/0"] for i in range(right)]
            state, wanted = False, []
            for token in texts[name][: first + right]:
                state = token > 3.5 or (state and token >= 1.5)
                wanted.append(state)
            assert open_now == wanted[first:], (name, first)
            seen += right
    assert seen == sum(map(len, texts.values()))


def test_stages_hand_on_what_was_read_and_decided() -> None:
    """Two stages, of which the first reads and the second acts, find and close what one that does both does."""
    device = torch.device("cpu")
    probes = {
        "early": sf.probes.LinearProbe(torch.eye(D)[0], place=0),
        "late": sf.probes.LinearProbe(torch.eye(D)[1], place=2),
    }
    edit = sf.WhenToken(sf.Condition(probes["early"], 0.0), sf.Add(torch.eye(D)[1]))
    chains = {"plan": {Place("resid_post", 2): {0: edit}}}
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    starts, positions = torch.tensor([0, 7]), torch.arange(7)
    found = {}
    decided: torch.Tensor | None = None
    for stage, layers in {"whole": (0, 2), "first": (0,), "second": (2,)}.items():
        here = [Place("resid_post", layer) for layer in layers]
        gates = Gates(chains, frozenset(), 3, (1, 64), device)
        watched = gates.served(0)
        readers = Readers(watched, gates.probes, 64, device, here)
        gates.keep(here)
        gates.load("plan", "resid_post.2", 0, 0)
        gates.start("one", 7, ["plan"])
        if stage == "second":
            assert decided is not None
            gates.receive(decided)
        readers.begin(["one"], starts, positions, 7, gates.begin(["one"], starts, positions, 7))
        if 0 in layers:
            readers.write(x, None, "resid_post.0", False)
            gates.judge(readers.scores[:7], "resid_post.0", False)
        if 2 in layers:
            found[stage] = gates.close(torch.zeros(7, 1, dtype=torch.int32), "resid_post.2").flatten().tolist()
        decided = gates.hand_on()
    assert found["whole"] == found["second"] == [0 if score > 0 else -1 for score in x[:, 0].tolist()]
    assert len(set(found["whole"])) == 2
