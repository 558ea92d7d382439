"""A row for each of a prompt's first tokens inside vLLM: plans, the row table, what a request may ask, and one real engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import ENVIRONMENT, Transformers, environment, fields, needs_vllm, tiny, unit

import steerfast as sf
from steerfast.vllm import plans, wire
from steerfast.vllm.plans import Library, ServedPlan
from steerfast.vllm.slots import Residents
from steerfast.vllm.table import EVER, Owner, RowTable

D = 128
TOKENS = 5


def rows(tokens: int, seed: int = 0) -> torch.Tensor:
    """V (T, d); its second row is zero."""
    found = torch.stack([unit(10 * seed + i, D) for i in range(tokens)])
    found[1] = 0
    return found


def save(folder: Path) -> dict[str, sf.Plan]:
    made = {
        "rows": sf.Plan({1: sf.Add(rows(4), 3.0)}),
        "long": sf.Plan({0: sf.Add(rows(7, 1), 2.0), 2: sf.Add(rows(3, 2), 4.0, keep_norm=True)}),
        "mixed": sf.Plan(
            {1: [sf.Ablate(unit(90, D)), sf.Add(rows(3, 3), 3.0), sf.Add(unit(91, D))], 2: sf.Add(rows(5, 4))}
        ),
        "add": sf.Plan({1: sf.Add(unit(92, D), 3.0)}),
    }
    for name, plan in made.items():
        plan.save(folder / name)
    return made


def test_a_plan_takes_a_slot_for_each_row_and_one_column_for_all(tmp_path: Path) -> None:
    save(tmp_path)
    library, chains = plans.load(tmp_path, D, 3)
    assert not library.refused
    assert {name: served.columns for name, served in library.plans.items()} == {
        "rows": (4,), "long": (7,), "mixed": (0, 5, 0), "add": (0,),
    }  # fmt: skip
    assert (library.slots, library.by_token) == (4 + 7 + 7 + 1, 7)
    assert library.least == 7 + 5 + 4 + 1, "whatever four columns a request names"
    numbered = {place: list(edits) for place, edits in chains["mixed"].items()}
    assert numbered == {("resid_post", 1): [0, 1, 3, 6], ("resid_post", 2): [1, 3, 4, 5]}, "no slot for a row of zeros"
    assert torch.equal(chains["mixed"]["resid_post", 1][3].vector, rows(3, 3)[2])
    assert library.plans["mixed"].runs("abcdefg") == ["a", "bcdef", "g"]
    sf.Plan({0: [sf.Add(rows(2))] * 5}).save(tmp_path / "five")
    library, _ = plans.load(tmp_path, D, 3)
    assert (library.plans["five"].columns, library.width) == ((2,) * 5, 5)


def test_a_request_cannot_say_other_positions_for_rows(tmp_path: Path) -> None:
    save(tmp_path)
    library, _ = plans.load(tmp_path, D, 3)
    for positions in ("last", "0:2", "prompt"):
        with pytest.raises(
            ValueError, match=f"the plan 'rows' adds a row .* so steer_positions='{positions}' cannot be"
        ):
            wire.read({"steer": "rows", "steer_positions": positions}, library)
    with pytest.raises(ValueError, match="the plan 'rows' adds a row of its own"):
        wire.read({"steer": ["add", "rows"], "steer_positions": "0:2"}, library)
    (part,) = wire.read({"steer": "rows"}, library)
    assert [part.pieces(prompt) for prompt in (2, 9)] == [((0, 2, (), False, ()),), ((0, 4, (), False, ()),)]
    assert [part.count([], computed, 9) for computed in (0, 3, 9, 12)] == [0, 3, 4, 4]
    (part,) = wire.read({"steer": "mixed"}, library)
    assert part.pieces(9) == ((0, EVER, (), False, ()),)
    with pytest.raises(ValueError, match="these plans apply 5 interventions to a token; at most 4"):
        wire.read({"steer": ["mixed", "rows", "long"]}, library)
    parts = wire.read({"steer": ["mixed", "rows"]}, library)
    salts = [wire.salt(None, parts, prompt) for prompt in range(9)]
    assert len(set(salts)) == 6, "a prompt that is shorter than the rows leaves other keys behind than a longer one"
    assert len({wire.salt(None, wire.read({"steer": "add"}, library), prompt) for prompt in range(9)}) == 1


@pytest.mark.parametrize("where_it_runs", ["host", "device"])
@pytest.mark.parametrize("seed", range(5))
def test_the_table_names_each_rows_slot_at_its_position(seed: int, where_it_runs: str) -> None:
    """Slots that lie anywhere and change hands, chunks that begin anywhere, beside slots for all tokens."""
    rng, slots, longest = random.Random(seed), 20, 6
    table = RowTable(64, torch.device("cpu"), (slots, longest))
    table._write = table._on_host if where_it_runs == "host" else table._on_device
    for _ in range(12):
        free = rng.sample(range(slots), slots)
        runs = [[free.pop() for _ in range(rng.choice([1, 1, 2, 4, 6]))] for _ in range(4)]
        asked: dict[str, list[Owner]] = {}
        for run in runs:
            table.spread(run)
        for i in range(6):
            prompt, chosen = rng.randint(1, 9), rng.sample(runs, rng.randint(0, 4))
            ends = [min(len(run), prompt) if len(run) > 1 else EVER for run in chosen]
            asked[f"r{i}"] = [Owner(run[0], 0.5 + run[0], 0, stop) for run, stop in zip(chosen, ends, strict=True)]
            table.put(f"r{i}", asked[f"r{i}"])
        of = {run[0]: run for run in runs}
        for _ in range(6):
            batch = rng.sample(sorted(asked), rng.randint(1, 6))
            counts = [rng.choice([1, 1, 3, 5]) for _ in batch]
            begins = [rng.randint(0, 8) for _ in batch]
            starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
            positions = torch.cat([torch.arange(b, b + c) for b, c in zip(begins, counts, strict=True)])
            table.fill(batch, starts, positions, len(positions))
            for i, name in enumerate(batch):
                for token in range(int(starts[i]), int(starts[i + 1])):
                    p = int(positions[token])
                    expected = [
                        (of[owner.slot][p] if len(of[owner.slot]) > 1 else owner.slot, owner.strength)
                        for owner in asked[name]
                        if p < owner.stop
                    ]
                    pairs = zip(table.rows[token].tolist(), table.scale[token].tolist(), strict=True)
                    assert [(slot, weight) for slot, weight in pairs if slot >= 0] == expected


def test_slots_of_a_plan_need_not_be_neighbours() -> None:
    """What comes between plans that stay gets the slots that are left, wherever they lie."""
    one, two = (ServedPlan(name, name, (0,), "all") for name in ("one", "two"))
    wide = ServedPlan("wide", "wide", (3, 0), "all")
    bank = Residents(6)
    filler = ServedPlan("filler", "filler", (2,), "all")
    for served in (one, filler, two):
        bank.hold(served)
    bank.release(filler)
    numbers, emptied, _ = bank.hold(wide)
    assert (sorted(numbers), sorted(emptied)) == ([1, 2, 4, 5], [1, 2])
    assert [list(run) for run in wide.runs(numbers)] == [[1, 2, 4], [5]]
    assert Library({"wide": wide, "one": one}).least == 5


# --- a real engine -----------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.vllm
def test_an_engine_adds_each_row_at_its_token_as_transformers_does(tmp_path: Path) -> None:
    """Mixed plans, prompts from 2 to 40 tokens in chunks of 16, slots that plans must share, prefixes from the cache."""
    model = tiny(tmp_path / "model")
    made = save(tmp_path / "plans")
    least = plans.load(tmp_path / "plans", D, 3)[0].least
    settings = {"STEERFAST_PLANS": str(tmp_path / "plans"), "STEERFAST_SLOTS": str(least)}
    with environment(**ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", **settings):
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=16,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
        )
        truth, rng = Transformers(model), random.Random(0)

        def prompt(length: int) -> list[int]:
            return [rng.randrange(3, 120) for _ in range(length)]

        shared = prompt(40)
        asked: list[tuple[list[int], list[tuple[str, float]]]] = [
            (prompt(length), steered)
            for length in (2, 5, 23)
            for steered in ([("rows", 1.0)], [("long", 1.5)], [("mixed", 0.5)], [], [("rows", -1.0), ("add", 0.5)])
        ]
        asked += [(shared, [("long", 1.0)]), (shared, [("rows", 1.0)]), (shared, [("long", 1.0)])]
        for _ in range(2):  # the second time prefixes come from the cache
            common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
            params = [
                SamplingParams(**common, extra_args=fields(*steered) if steered else None) for _, steered in asked
            ]
            inputs: list[Any] = [{"prompt_token_ids": ids} for ids, _ in asked]
            outputs = llm.generate(inputs, params, use_tqdm=False)
            for (ids, steered), output in zip(asked, outputs, strict=True):
                wanted, _ = truth.generate(ids, [(made[name], weight, None) for name, weight in steered], TOKENS)
                assert list(output.outputs[0].token_ids) == wanted, (len(ids), steered)
        plain, _ = truth.generate(asked[1][0], [], TOKENS)
        assert truth.generate(asked[1][0], [(made["long"], 1.5, None)], TOKENS)[0] != plain, "the rows do something"
        llm.llm_engine.engine_core.shutdown()
