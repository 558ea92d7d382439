"""Reading: whose text the scores are of: taken-back tokens, texts side by side, ends of rows, handles that come and go."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from families import VOCAB, build, token_ids
from test_reading import GREEDY, expected, probe, row, stream
from transformers import MambaConfig, MambaForCausalLM, StoppingCriteria

import steerfast as sf
from steerfast.models.caches import cache_in
from steerfast.models.layers import find_layers


@pytest.fixture
def llama():
    model = deepcopy(build("llama"))
    yield model
    assert "_steerfast" not in vars(model)


def run(model: Any, ids: torch.Tensor, cache: Any = None) -> Any:
    """A pass behind a cache, which has another name in each release; returns the cache."""
    names = {"cache": cache} if transformers.__version__ >= "5.24" else {"past_key_values": cache}
    with torch.no_grad():
        return cache_in(model(ids, use_cache=True, **names))[1]


def scores(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return stream(model, ids, 1) @ row(find_layers(model).d) + 0.25


DRAFTS = [
    {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
    {"assistant_model": "other"},
    {"assistant_model": "self"},
    {"assistant_early_exit": 1},
]


@pytest.mark.parametrize("drafts", DRAFTS)
def test_rejected_drafts_leave_no_scores(llama: Any, drafts: dict[str, Any]) -> None:
    ids = token_ids(1, 3, 1).repeat(1, 4)
    if "assistant_model" in drafts:
        other = deepcopy(llama)
        with torch.no_grad():
            for one in other.parameters():
                one.add_(0.02 * torch.randn(one.shape, generator=torch.Generator().manual_seed(3)))
        drafts = {"assistant_model": llama if drafts["assistant_model"] == "self" else other}
    whole = llama.generate(ids, **GREEDY | {"max_new_tokens": 12})
    for eos in {VOCAB + 5, *whole[0, 13:].tolist()}:
        with sf.read(llama, probe(llama)) as reading:
            out = llama.generate(ids, **GREEDY | {"max_new_tokens": 12, "eos_token_id": eos}, **drafts)
        assert reading["probe"].values.shape == (1, out.shape[1] - 1)
        assert torch.allclose(reading["probe"].values, expected(llama, out), atol=1e-3)


def test_a_rejected_draft_ends_no_row(llama: Any) -> None:
    ids = token_ids(1, 3, 1).repeat(1, 4)
    options = GREEDY | {"max_new_tokens": 12}
    levels = scores(llama, llama.generate(ids, **options))[0, 12:]
    for share in (0.3, 0.5, 0.7, 0.9):
        found = []
        for drafts in ({}, DRAFTS[0]):
            with sf.read(llama, probe(llama), positions="generated") as reading:
                stop = [reading.criterion("probe", float(levels.quantile(share)))]
                found.append(llama.generate(ids, stopping_criteria=stop, **options, **drafts))
        assert found[1].shape[1] >= found[0].shape[1]  # a later accepted draft may stand behind the crossing one


@pytest.mark.parametrize("last", [True, False])
def test_tokens_taken_out_of_the_cache_are_forgotten(llama: Any, last: bool) -> None:
    ids, drafts = token_ids(2, 6, 1), token_ids(2, 4, 2)
    with sf.read(llama, probe(llama)) as reading:
        cache = run(llama, drafts, run(llama, ids))
        cache.crop(-3 if transformers.__version__ >= "5.24" else 7)
        text = torch.cat([ids, drafts[:, :1]], 1)
        if not last:
            run(llama, token_ids(2, 1, 3), cache)
            text = torch.cat([text, token_ids(2, 1, 3)], 1)
    assert reading["probe"].values.shape == text.shape
    assert torch.allclose(reading["probe"].values, scores(llama, text), atol=1e-3)


def test_two_texts_of_one_shape_do_not_meet(llama: Any) -> None:
    one, other, new = token_ids(2, 5, 1), token_ids(2, 5, 2), token_ids(2, 1, 3)
    with sf.read(llama, probe(llama)) as reading:
        cache = run(llama, one)
        run(llama, other)
        run(llama, new, cache)
    assert reading["probe"].read.sum(1).tolist() == [1, 1]
    assert torch.allclose(reading["probe"].values[:, 5:], scores(llama, torch.cat([one, new], 1))[:, 5:], atol=1e-3)
    with pytest.raises(ValueError, match="lie in the cache"):
        reading["probe"].max()


@pytest.mark.parametrize("release", [None, -1e3])
def test_a_gate_never_takes_over_the_state_of_another_text(llama: Any, release: float | None) -> None:
    kind = sf.When if release is None else sf.WhenToken
    plan = {1: kind(sf.Condition(probe(llama), 0.0, release=release), sf.Add(row(48, 9)))}
    with sf.steer(llama, plan):
        cache = run(llama, token_ids(1, 5, 1))
        run(llama, token_ids(1, 5, 2))
        with pytest.raises(ValueError, match="before this forward pass"):
            run(llama, token_ids(1, 1, 3), cache)


def test_who_comes_after_the_prompt_has_not_seen_generated_tokens_either(llama: Any) -> None:
    ids, new = token_ids(1, 5, 1), token_ids(1, 4, 2)
    with sf.read(llama, {"early": probe(llama)}) as early:
        cache = run(llama, new[:, :2], run(llama, ids))
        with sf.read(llama, probe(llama), positions="generated", prompt_length=5) as late:
            with pytest.raises(RuntimeError, match="has not run while"):
                late["probe"]
            run(llama, new[:, 2:], cache)
    assert early["early"].read.sum() == 9
    assert late["probe"].read.sum() == 2
    with pytest.raises(ValueError, match="lie in the cache"):
        late["probe"].max()


def test_a_generate_without_a_prompt_is_read(llama: Any) -> None:
    with sf.read(llama, probe(llama)) as reading:
        out = llama.generate(**GREEDY)
    assert torch.allclose(reading["probe"].values, expected(llama, out), atol=1e-4)


def test_an_end_that_generate_was_told_to_ignore_ends_nothing(llama: Any) -> None:
    ids = token_ids(2, 5)
    llama.generation_config.eos_token_id = int(llama.generate(ids, **GREEDY)[0, 6])
    with sf.read(llama, probe(llama)) as reading:
        out = llama.generate(ids, **GREEDY | {"eos_token_id": None})
    assert out.shape == (2, 11)
    assert reading["probe"].read.all()


def test_the_pad_token_is_read_where_the_model_itself_writes_it(llama: Any) -> None:
    ids = token_ids(2, 5)
    pad = int(llama.generate(ids, **GREEDY)[0, -2])
    with sf.read(llama, probe(llama)) as reading:
        llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | {"pad_token_id": pad})
    assert reading["probe"].read.all()


class Says(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize(("pad", "eos"), [(0, VOCAB + 5), (0, 2), (2, 2), (None, 2)])
@pytest.mark.parametrize("own", [True, False])
def test_a_row_that_a_criterion_ends_is_read_as_alone(llama: Any, own: bool, pad: int | None, eos: int) -> None:
    ids, options = token_ids(3, 5, 1), GREEDY | {"max_new_tokens": 10}
    with sf.read(llama, probe(llama), positions="generated") as reading:
        out = llama.generate(ids, **options)
    limit, token = float(reading["probe"].max().sort().values[:2].mean()), int(out[1, 7])
    if not own and pad != 0:
        return  # the token that fills up a row may have ended it
    options |= {"pad_token_id": pad, "eos_token_id": eos}

    def last(rows: torch.Tensor) -> list[int]:
        with sf.read(llama, probe(llama), positions="last") as reading:
            stop = reading.criterion("probe", limit) if own else Says(token)
            llama.generate(rows, attention_mask=torch.ones_like(rows), stopping_criteria=[stop], **options)
        return reading["probe"].last_token().tolist()

    assert last(ids) == [last(one[None])[0] for one in ids]


def test_scores_do_not_depend_on_default_device_and_dtype(llama: Any) -> None:
    with sf.read(llama, probe(llama)) as reading:
        out = llama.generate(token_ids(2, 5), **GREEDY)
    want = expected(llama, out)
    with torch.device("meta"):
        found = [reading["probe"].max(), reading["probe"].mean(), reading["probe"].last()]
    for got, one in zip(found, (want.amax(1), want.mean(1), want[:, -1]), strict=True):
        assert torch.allclose(got, one, atol=1e-4)


def test_a_state_that_counts_no_tokens_is_read_in_generate_and_refused_in_parts() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "state_size": 8, "eos_token_id": 2}
    model, ids = MambaForCausalLM(MambaConfig(**sizes)).eval(), token_ids(2, 6)
    with sf.read(model, probe(model)) as reading:
        out = model.generate(ids, **GREEDY)
    assert torch.allclose(reading["probe"].values, expected(model, out), atol=1e-3)
    held = {1: sf.WhenToken(sf.Condition(probe(model), 0.0, release=-1.0), sf.Add(row(48)))}
    for attach in (lambda: sf.read(model, probe(model)), lambda: sf.steer(model, held)):
        with torch.no_grad(), attach():
            state = next(value for name, value in model(ids, use_cache=True).items() if name != "logits")
            name = "cache" if transformers.__version__ >= "5.24" else "cache_params"
            with pytest.raises(ValueError, match="goes on from an earlier one"):
                model(ids[:, :1], **{name: state})


def test_soft_prompts_show_no_ids_so_the_ends_of_rows_are_not_guessed() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=4)
    model, ids = peft.get_peft_model(deepcopy(build("llama")), config).eval(), token_ids(2, 6)
    for rows, options in ((ids, GREEDY), (ids, GREEDY | {"eos_token_id": None}), (ids[:1], GREEDY)):
        with sf.read(model, sf.probes.LinearProbe(row(48), place=1), positions="prompt") as reading:
            model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **options)
        if rows is ids and options is GREEDY and transformers.__version__ >= "5.24":
            with pytest.raises(ValueError, match="did not show their ids"):
                reading["probe"]
        else:
            assert reading["probe"].read.sum(1).tolist() == [6] * len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_edits_beside_reading_keep_their_bits_in_every_dtype(llama: Any, dtype: torch.dtype, count: int) -> None:
    model, ids = llama.to(dtype), token_ids(2, 7)
    plan = {1: [sf.Add(row(48, 9 + one)) for one in range(count)]}
    with torch.no_grad():
        with sf.steer(model, plan):
            alone = model(ids).logits
        for place, after in ((0, False), (1, False), (1, True), (2, False)):
            for positions in ("all", "0:2", f"ids:{int(ids[0, 3])}"):
                with sf.steer(model, plan), sf.read(model, probe(model, place, after=after), positions):
                    assert torch.equal(model(ids).logits, alone), (place, after, positions)
