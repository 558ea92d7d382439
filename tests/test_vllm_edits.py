"""What fits no slot, and what is longer than four columns, inside vLLM: against `Intervention.apply`, and on a real engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_engines import ENVIRONMENT, Transformers, environment, fields, needs_vllm, tiny, unit

import steerfast as sf
from steerfast import ops
from steerfast.barriers.barrier import Ridge
from steerfast.place import Origin, Place
from steerfast.vllm import plans, wire
from steerfast.vllm.edits import EditedPlace, Places
from steerfast.vllm.probes import ServedProbe
from steerfast.vllm.reading import Readers, Wanted
from steerfast.vllm.table import Owner, RowTable

D, F, LAYERS, HEADS = 128, 96, 3, 256  # the heads are wider than the stream
TOKENS = 6
CLOSE = 5e-3  # in log-probability: float32 in another order of summation
CPU = torch.device("cpu")


def sae(seed: int, k: int | None = 4, normalisation: str = "none", d: int = D) -> sf.SAE:
    """Random weights; without k it has thresholds."""
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = (torch.randn(F, d, generator=generator) / d**0.5 for _ in range(2))
    bias, threshold = (0.1 * torch.rand(F, generator=generator) for _ in range(2))
    return sf.SAE(
        encoder, decoder, b_enc=bias, k=k, threshold=None if k else 2 * threshold, normalisation=normalisation
    )


def every_kind(d: int) -> list[sf.Intervention]:
    """Edits of two Top-K SAEs and of two that normalise a row, up to more features than are counted, among others."""
    top, wide = sae(1, d=d), sae(2, normalisation="layer_norm", d=d)
    rescaled = sae(3, None, "constant_norm_rescale", d)
    return [
        sf.EditFeatures(top, {3: 8.0}),
        sf.EditFeatures(top, {5: 2.0, 7: 1.0}, mode="add", keep_norm=True),
        sf.EditFeatures(wide, {1: 3.0, 90: 1.0}),
        sf.EditFeatures(rescaled, {i: 0.1 * i for i in range(10)}, mode="add"),
        sf.Add(unit(4, d), 2.0),
        sf.EditFeatures(rescaled, {20: 4.0}),
        sf.Ablate(unit(5, d)),
        sf.EditFeatures(sae(6, d=d), dict.fromkeys(range(12), 0.5), mode="scale"),
    ]


# --- one place -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("road", ["host", "device"])
def test_every_row_gets_its_own_edits_one_after_the_other(
    road: str, dtype: torch.dtype, split: bool, monkeypatch
) -> None:
    """Random owners of up to six columns, slots that change hands between steps, rows without an edit to the bit."""
    edits, rng = every_kind(D), random.Random(0)
    if road == "device":
        monkeypatch.setattr("steerfast.vllm.edits.backend_of", lambda x: "a device's")
    place = EditedPlace(edits, len(edits), D, dtype, CPU)
    table = RowTable(64, CPU, width=6)
    places = Places({"resid_post.0": place}, table)
    n, names = 40, [f"r{i}" for i in range(40)]
    where = list(range(len(edits)))  # slot -> edit
    for slot, number in enumerate(where):
        place.load(slot, edits[number])
    for _ in range(3):
        owners = {
            name: [(slot, rng.uniform(0.3, 1.5)) for slot in rng.sample(where, rng.choice([0, 1, 2, 6]))]
            for name in names
        }
        for name, chosen in owners.items():
            table.put(name, [Owner(slot, weight, 0, 9) for slot, weight in chosen])
        table.fill(names, torch.arange(n + 1), torch.zeros(n).long(), n)
        stream, hidden = (torch.randn(n + 3, D, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2))
        got = stream.clone()
        with torch.inference_mode():
            places.edit_(got, hidden if split else None, "resid_post.0")
        other = hidden.float() if split else 0
        wanted, found = stream.float() + other, got.float() + other
        for i, name in enumerate(names):
            for slot, weight in owners[name]:
                wanted[i : i + 1] = edits[where[slot]].apply(wanted[i : i + 1], weight)
        untouched = torch.tensor([not owners[name] for name in names] + [True] * 3)
        assert torch.equal(got[untouched], stream[untouched])
        if dtype == torch.float32:
            assert (found - wanted).abs().max() < 1e-4
        else:  # a device rounds between columns, and a feature near the k-th may fall on its other side
            assert ((found - wanted).abs().amax(1) < 0.1).sum() >= n - 4
        first, second = rng.sample(range(len(edits)), 2)
        place.unload(first), place.unload(second)
        where[first], where[second] = where[second], where[first]
        place.load(first, edits[where[first]]), place.load(second, edits[where[second]])


@pytest.mark.parametrize("columns", [1, 2])
def test_whoever_reads_and_edits_one_sae_shares_one_encode(columns: int, monkeypatch) -> None:
    """Two probes, and edits of two plans; who has another edit before it is encoded anew, and alone."""
    one, encodes = sae(1), []
    counted = ops.sae_encode
    monkeypatch.setattr("steerfast.ops.sae_encode", lambda x, *rest: (encodes.append(len(x)), counted(x, *rest))[1])
    edits = [sf.EditFeatures(one, {3: 8.0}), sf.EditFeatures(one, {5: 1.0}, mode="add"), sf.Add(unit(7, D))]
    place, table = EditedPlace(edits, 3, D, torch.float32, CPU), RowTable(8, CPU)
    for slot, edit in enumerate(edits):
        place.load(slot, edit)
    at = plans.engine_place("resid_post", 0)
    served = {"top": ServedProbe("top", at, False, 0, 8, pairs=True), "one": ServedProbe("one", at, False, 8, 1)}
    readers = Readers(served, {"top": sf.probes.TopKProbe(one), "one": sf.probes.FeatureProbe(one, 3)}, 8, CPU)
    readers.start("r0", Wanted(tuple(served.values()), 0))
    table.put("r0", [Owner(0, 1.0, 0, 9)])
    table.put("r1", [Owner(1, 1.0, 0, 9)] if columns == 1 else [Owner(2, 1.0, 0, 9), Owner(1, 1.0, 0, 9)])
    starts, positions = torch.arange(4), torch.zeros(3).long()
    table.fill(["r0", "r1", "r2"], starts, positions, 3)
    readers.begin(["r0", "r1", "r2"], starts, positions, 3)
    stream = torch.randn(3, D)
    got = stream.clone()
    with torch.inference_mode():
        Places({"resid_post.0": place}, table, readers).edit_(got, None, "resid_post.0")
    assert encodes == [3], "one encode for two probes and all edits; what has changed since is counted"
    wanted = stream.clone()
    wanted[:1] = edits[0].apply(stream[:1])
    wanted[1:2] = edits[1].apply(stream[1:2] if columns == 1 else edits[2].apply(stream[1:2]))
    assert torch.allclose(got, wanted, atol=1e-5)
    values, indices = one.topk(stream)
    assert torch.allclose(readers.scores[:3, :4], values)
    assert torch.equal(readers.scores[:3, 4:8].int(), indices)


def whole_numbers(k: int = 5) -> sf.SAE:
    """All sums with it are exact in float32, and each activation of the first half is there once more: one of k is a tie."""
    some = torch.Generator().manual_seed(8)
    half, decoder = (torch.randint(-1, 2, (rows, D), generator=some).float() for rows in (F // 2, F))
    return sf.SAE(half.repeat(2, 1), decoder, k=k)


def step_of(
    edits: list[sf.Intervention], owners: dict[str, list[tuple[int, float]]], read: sf.SAE | None = None
) -> Places:
    """One place of a batch that decodes: request -> (edit, strength) of its columns; what the SAE selects is read of all rows."""
    place, table = EditedPlace(edits, len(edits), D, torch.float32, CPU), RowTable(16, CPU)
    for slot, edit in enumerate(edits):
        place.load(slot, edit)
    for name, chosen in owners.items():
        table.put(name, [Owner(slot, weight, 0, 9) for slot, weight in chosen])
    served, readers = {}, None
    starts, positions, n = torch.arange(len(owners) + 1), torch.zeros(len(owners)).long(), len(owners)
    if read is not None:
        served = {
            "top": ServedProbe("top", plans.engine_place("resid_post", 0), False, 0, 2 * (read.k or 0), pairs=True)
        }
        readers = Readers(served, {"top": sf.probes.TopKProbe(read)}, 16, CPU)
        readers.start(next(iter(owners)), Wanted(tuple(served.values()), 0))
        readers.begin([*owners], starts, positions, n)
    table.fill([*owners], starts, positions, n)
    return Places({"resid_post.0": place}, table, readers)


@pytest.mark.parametrize("who", ["all alike", "each its own", "some", "one"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_ties_and_rows_of_nan_are_what_the_edit_itself_makes_of_them(read: bool, split: bool, who: str) -> None:
    """Bit for bit, where every sum is exact: of an encode that a probe has made, and counted; rows without an edit, too."""
    one = whole_numbers()
    stream, hidden = (torch.randint(-3, 4, (11, D), generator=torch.Generator().manual_seed(i)).float() for i in (1, 2))
    stream[4, 3], stream[5] = torch.nan, 0.0
    x = stream + hidden if split else stream
    values, indices = one.topk(x)
    tied = (one.w_enc @ x[0] == values[0, -1]).nonzero().flatten().tolist()
    assert indices[0].tolist().count(tied[0]) == 1
    assert tied[-1] not in indices[0].tolist(), "the last of those that equal the k-th is not selected"
    edits = [
        sf.EditFeatures(one, {tied[-1]: 8.0, 90: 2.0}),
        sf.EditFeatures(one, {int(indices[0, -1]): 4.0}, mode="add"),
        sf.EditFeatures(one, {int(indices[1, 0]): 2.0, 2: 3.0, 40: 0.5}, mode="scale"),
        sf.EditFeatures(one, {int(indices[2, 0]): 4.0}, mode="min"),
        sf.EditFeatures(one, {7: 4.0, 50: 8.0}, mode="max"),
    ]
    for number in range(len(edits)):
        chosen = {
            "all alike": [[(number, 0.5 * (1 + i % 3))] for i in range(11)],
            "each its own": [[((number + i) % 5, 0.5 * (1 + i % 3))] for i in range(11)],
            "some": [[((number + i) % 5, 2.0)] if i % 3 else [] for i in range(11)],
            "one": [[(number, 1.0)]],
        }[who]
        n = len(chosen)
        places = step_of(edits, {f"r{i}": mine for i, mine in enumerate(chosen)}, one if read else None)
        for _ in range(2):  # what is kept of the batch, too
            got = stream[:n].clone()
            with torch.inference_mode():
                places.edit_(got, hidden[:n] if split else None, "resid_post.0")
            for i, mine in enumerate(chosen):
                row = stream[i : i + 1].clone()
                for slot, weight in mine:
                    moved = edits[slot].apply(x[i : i + 1], weight)
                    row = row + (moved - x[i : i + 1]) if split else moved
                assert torch.equal(got[i].view(torch.int32), row[0].view(torch.int32)) or (
                    i == 4 and mine and torch.equal(got[i].isnan(), row[0].isnan())
                ), (number, i)


@pytest.mark.parametrize("k", [4, None])
def test_a_row_of_zeros_has_no_length_to_scale_and_stays(k: int | None) -> None:
    """Of an SAE that divides a row by its length; the rows beside it are edited."""
    edits: list[sf.Intervention] = [sf.EditFeatures(sae(3, k, "constant_norm_rescale"), {5: 8.0, 0: 1.0}, mode="add")]
    stream = torch.randn(3, D)
    stream[1] = 0
    got, places = stream.clone(), step_of(edits, {f"r{i}": [(0, 1.0)] for i in range(3)})
    with torch.inference_mode():
        places.edit_(got, None, "resid_post.0")
    assert torch.equal(got[1], stream[1])
    assert torch.allclose(got, edits[0].apply(stream), atol=1e-5)
    assert not torch.equal(got[0], stream[0])


def test_an_edit_beside_a_reading_is_a_handful_of_calls() -> None:
    """One plan in all rows, and another one in each: what can be kept of a batch is kept, only what is added is written."""
    one = sae(1)
    edits = [sf.EditFeatures(one, {3: 8.0}), sf.EditFeatures(one, {5: 2.0}, mode="add")]
    stream, hidden = (torch.randn(8, D, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (1, 2))

    def calls(slots: list[int]) -> int:
        places = step_of(edits, {f"r{i}": [(slot, 1.0)] if slot >= 0 else [] for i, slot in enumerate(slots)}, one)
        with torch.inference_mode():
            places.edit_(stream.clone(), hidden, "resid_post.0")
            got = stream.clone()
            with Counted() as counted:
                places.edit_(got, hidden, "resid_post.0")
        assert torch.equal(got, stream) == (slots[0] < 0)
        return counted.calls

    reading = calls([-1] * 8)
    assert calls([0] * 8) - reading <= 6
    assert calls([0, 1] * 4) - reading <= 8


class Counted(TorchDispatchMode):
    """Calls of PyTorch's operators."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_rows_run_in_what_edits_them_alone(monkeypatch) -> None:
    """Edits of two SAEs and an addition at one place: an encode sees its own rows."""
    rows: list[int] = []
    one, other = sae(1, normalisation="layer_norm"), sae(2, normalisation="layer_norm")
    counted = ops.sae_encode
    monkeypatch.setattr("steerfast.ops.sae_encode", lambda x, *rest: (rows.append(len(x)), counted(x, *rest))[1])
    edits = [sf.EditFeatures(one, {3: 8.0}), sf.EditFeatures(other, {5: 2.0}), sf.Add(unit(7, D))]
    stream = torch.randn(7, D, generator=torch.Generator().manual_seed(3))
    slots = [0, 1, 1, 2, 0, 0, 0]
    got = stream.clone()
    places = step_of(edits, {f"r{i}": [(slot, 1.0)] for i, slot in enumerate(slots)})
    with torch.inference_mode():
        places.edit_(got, None, "resid_post.0")
    assert sorted(rows) == [2, 4]
    wanted = torch.cat([edits[slot].apply(stream[i : i + 1]) for i, slot in enumerate(slots)])
    assert torch.allclose(got, wanted, atol=1e-5)


# --- plans and requests --------------------------------------------------------------------------------------------------


def test_the_row_table_is_as_wide_as_the_longest_plan_where_a_column_costs_something(tmp_path: Path) -> None:
    """Four while an empty column is free; a plan longer than that is served; what stacks beyond it is refused."""
    sf.Plan({0: sf.Add(unit(1))}).save(tmp_path / "a" / "short")
    sf.Plan({0: [sf.Add(unit(i)) for i in range(2)]}).save(tmp_path / "a" / "two")
    assert plans.load(tmp_path / "a", 576, LAYERS)[0].width == 4
    wide = torch.linalg.qr(torch.randn(576, 16, generator=torch.Generator().manual_seed(1)))[0].T
    sf.Plan({layer: sf.Ablate(wide) for layer in range(LAYERS)}).save(tmp_path / "a" / "wide")
    library, _ = plans.load(tmp_path / "a", 576, LAYERS)
    assert (library.width, library.least) == (2, 2)
    assert len(wire.read({"steer": ["short", "wide"]}, library)) == 2
    with pytest.raises(ValueError, match="apply 3 interventions to a token; at most 2 are possible"):
        wire.read({"steer": ["two", "wide"]}, library)
    sf.Plan({0: [sf.Add(unit(i)) for i in range(7)]}).save(tmp_path / "a" / "seven")
    library, _ = plans.load(tmp_path / "a", 576, LAYERS)
    assert (library.width, library.least) == (7, 7)
    assert not library.refused
    assert len(wire.read({"steer": ["two", "wide", "two"]}, library)) == 3
    assert len(wire.read({"steer": ["two"] * 4}, plans.with_columns(library, "8"))) == 4
    for given in ("6", "65", "-1", "many", ""):
        with pytest.raises(ValueError, match=r"STEERFAST_COLUMNS is .*; expected a whole number from 7, .* to 64"):
            plans.with_columns(library, given)


def test_what_heads_there_are_is_said_before_traffic(tmp_path: Path) -> None:
    """Of the width of their own on one device; on several they are split."""
    sf.Plan({("head_out", 1): sf.Add(unit(1, HEADS))}).save(tmp_path / "heads")
    lean = sf.Condition(sf.probes.LinearProbe(unit(2, HEADS), place=("head_out", 0)), 0.0)
    sf.Plan({1: sf.WhenToken(lean, sf.Add(unit(1, D)))}).save(tmp_path / "gated")
    library, _ = plans.load(tmp_path, D, LAYERS, heads=HEADS)
    assert not library.refused
    library, _ = plans.load(tmp_path, D, LAYERS, heads=D)
    assert ["width 256; this model has 128" in reason for reason in library.refused.values()] == [True] * 2
    library, _ = plans.load(tmp_path, D, LAYERS)
    assert ["over which the heads are split; use attn_out" in reason for reason in library.refused.values()] == [
        True
    ] * 2


# --- a real engine -------------------------------------------------------------------------------------------------------


def barriers() -> dict[str, sf.Barrier]:
    """One of every kind whose flow needs more than a few directions and eight numbers for each."""
    generator = torch.Generator().manual_seed(8)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    basis, whole = (torch.linalg.qr(drawn(D, rank))[0].T.contiguous() for rank in (6, D))
    made = {}
    for name, activation in (("rff", "cos"), ("mlp", "tanh")):
        ridge = Ridge(2 * drawn(20, 6), drawn(20), drawn(20), activation)
        made[name] = sf.Barrier(basis, torch.zeros(6), drawn(6), ridge=ridge)
    return made | {"full": sf.Barrier(whole, drawn(D), drawn(D), 0.3)}


def save(folder: Path) -> dict[str, sf.Plan]:
    """Plans of everything that the engine's own banks do not hold, and of what they hold beyond Euler."""
    top, other, normal = sae(1), sae(6), sae(2, normalisation="layer_norm")
    rescaled = sae(3, None, "constant_norm_rescale")
    for name, one in {"top": top, "other": other, "normal": normal}.items():
        one.save(folder / "saes" / name)
    made_by_hand = barriers()
    gate = sf.Condition(sf.probes.FeatureProbe(top, 3, place=0), 0.05)
    weights = sae(7)
    transcoder = sf.sae.Transcoder(
        weights.w_enc,
        weights.w_dec,
        k=4,
        origin=Origin(place=Place("mlp_out", 1)),
        reads=Origin(place=Place("resid_post", 0)),
    )
    transcoder.save(folder / "saes" / "transcoder")
    transcoded = sf.Condition(sf.probes.FeatureProbe(transcoder, 3), 0.0)
    over = sf.Condition(sf.probes.BarrierProbe(made_by_hand["full"], place=1), 0.0)
    made = {
        "top": sf.Plan({1: sf.EditFeatures(top, {3: 6.0})}),
        "norm": sf.Plan(
            {0: sf.EditFeatures(top, {3: 6.0, 8: 4.0}, keep_norm=True), 2: sf.EditFeatures(top, {2: 3.0}, mode="add")}
        ),
        "many": sf.Plan({1: sf.EditFeatures(other, dict.fromkeys(range(0, 40, 3), 2.0), mode="max")}),
        "normal": sf.Plan({1: sf.EditFeatures(normal, {5: 8.0})}, positions="last"),
        "rescaled": sf.Plan({1: sf.EditFeatures(rescaled, {5: 8.0, 6: 2.0}, mode="add")}, positions="generated"),
        "both": sf.Plan({1: [sf.EditFeatures(top, {3: 6.0}), sf.EditFeatures(other, {4: 5.0})]}),
        "long": sf.Plan({1: [sf.Add(unit(20 + i, D), 0.7) if i % 2 else sf.Ablate(unit(20 + i, D)) for i in range(6)]}),
        "gated": sf.Plan({1: sf.WhenToken(gate, sf.EditFeatures(top, {9: 5.0}))}),
        "barred": sf.Plan({2: sf.When(over, sf.EditFeatures(other, {9: 5.0}))}),
        "ridge": sf.Plan({1: sf.Flow(made_by_hand["rff"], angle=0.6, steps=4)}),
        "mlp": sf.Plan({1: sf.Flow(made_by_hand["mlp"], angle=0.6, steps=4, method="rk4")}),
        "full": sf.Plan({1: sf.Flow(made_by_hand["full"], angle=0.5, steps=3)}),
    }
    over_heads = sf.Condition(sf.probes.LinearProbe(unit(30, HEADS), place=("head_out", 1)), 0.0)
    made |= {
        "heads": sf.Plan({("head_out", 1): [sf.Add(unit(31, HEADS), 5.0), sf.Ablate(unit(32, HEADS))]}),
        "of heads": sf.Plan({("attn_out", 2): sf.WhenToken(over_heads, sf.Add(unit(33, D), 5.0))}),
        "transcoder": sf.Plan({transcoder.place: sf.Add(transcoder.w_dec[3], 3.0)}),
        "by transcoder": sf.Plan({2: sf.WhenToken(transcoded, sf.Add(unit(34, D), 4.0))}),
    }
    for name, plan in made.items():
        plan.save(folder / "plans" / name)
    sf.probes.LinearProbe(unit(30, HEADS), place=("head_out", 1)).save(folder / "probes" / "heads")
    sf.probes.TopKProbe(top, place=1).save(folder / "probes" / "tops")
    return made


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("eager", [False, True])
def test_an_engine_does_what_transformers_does(eager: bool, tmp_path: Path) -> None:
    """Every plan alone, two of them stacked, and whoever reads the SAE that is edited, in one batch in chunks of 16 tokens."""
    model = tiny(tmp_path / "model", HEADS // 4)
    made = save(tmp_path)
    settings = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    with environment(**ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", **settings, STEERFAST_COLUMNS="8"):
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=16,
            gpu_memory_utilization=0.2,
            enforce_eager=eager,
        )
        try:
            _everything_alone_stacked_and_read(llm, SamplingParams, Transformers(model), made)
            _whatever_a_text_has_said(llm, SamplingParams, Transformers(model), made)
        finally:
            llm.llm_engine.engine_core.shutdown()


def _run(llm: Any, params: Any, asked: list[tuple[list[int], dict[str, Any] | None]]) -> list[Any]:
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
    each = [params(**common, logprobs=0, extra_args=extra) for _, extra in asked]
    inputs: list[Any] = [{"prompt_token_ids": ids} for ids, _ in asked]
    return llm.generate(inputs, each, use_tqdm=False)


def _assert_like(output: Any, wanted: list[int], likely: torch.Tensor, what: Any) -> None:
    chosen = output.outputs[0]
    assert list(chosen.token_ids) == wanted, what
    found = torch.tensor([step[token].logprob for step, token in zip(chosen.logprobs, wanted, strict=True)])
    assert (found - likely).abs().max() < CLOSE, what


def _prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 120) for _ in range(length)] for length in (3, 23)]


def _everything_alone_stacked_and_read(llm: Any, params: Any, truth: Transformers, made: dict[str, sf.Plan]) -> None:
    stacked = [("top", 0.5), ("long", 1.0), ("many", 0.7)]
    asked = [(ids, steered) for ids in _prompts(0) for steered in ([], *([(name, 1.0)] for name in made), stacked)]
    reads = {"steer_read": ["tops", "heads"], "steer_read_what": "tokens"}
    extra = [fields(*steered) | (reads if i % 2 else {}) for i, (_, steered) in enumerate(asked)]
    outputs = _run(llm, params, [(ids, one) for (ids, _), one in zip(asked, extra, strict=True)])
    plain = torch.zeros(0)
    for (ids, steered), output in zip(asked, outputs, strict=True):
        wanted, likely = truth.generate(ids, [(made[name], weight, None) for name, weight in steered], TOKENS)
        _assert_like(output, wanted, likely, (len(ids), steered))
        plain = plain if steered else likely
        if steered and steered[0][0] not in ("gated", "barred", "of heads", "by transcoder"):
            assert not torch.allclose(likely, plain, atol=1e-2), f"{steered} does nothing"
    assert all(output.kv_transfer_params["steerfast"]["tops"]["tokens"] for output in outputs[1::2])


def _whatever_a_text_has_said(llm: Any, params: Any, truth: Transformers, made: dict[str, sf.Plan]) -> None:
    """A plan behind a token that is generated, between two of the prompt, and where neither is."""
    plans = "top", "both"
    for ids in _prompts(1):
        (plain,) = _run(llm, params, [(ids, None)])
        said = list(plain.outputs[0].token_ids)
        selectors = [
            f"after:ids:{said[1]}",
            f"!after:ids:{said[1]} & generated",
            f"between:ids:{ids[1]}..{said[2]}",
            f"between:ids:{said[0]}..{said[3]} & !ids:{said[2]} | after:ids:{said[3]} & last",
        ]
        asked = [(ids, {**fields((name, 1.0)), "steer_positions": where}) for where in selectors for name in plans]
        outputs, differ = _run(llm, params, asked), 0
        for (_, extra), output in zip(asked, outputs, strict=True):
            (name,), where = extra["steer"], extra["steer_positions"]
            wanted, likely = truth.generate(ids, [(made[name], 1.0, where)], TOKENS)
            _assert_like(output, wanted, likely, (name, where))
            everywhere = truth.generate(ids, [(made[name], 1.0, "all")], TOKENS)[1]
            differ += not torch.allclose(likely, everywhere, atol=1e-3)
        assert differ >= 6
