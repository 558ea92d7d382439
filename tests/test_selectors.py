"""Selectors that look at tokens, in real models: each way of generating against an uncached pass over what came out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import VOCAB, build, token_ids
from test_hooks import NEW, PROMPT, check_generation, oracle_logits, vector

import steerfast as sf
from steerfast import _positions as language

MARK, STOP, BOS = 7, 11, 5
SELECTORS = [
    f"all & !ids:{BOS},{MARK}",
    f"ids:{MARK}",
    f"generated & !ids:{MARK}",
    f"prompt & after:ids:{MARK}",
    f"after:ids:{MARK}",
    f"!between:ids:{MARK}..{STOP}",
    f"between:ids:{MARK}..{STOP} & generated | 0",
    "!0:4",
    "-2: | generated",
    "all & !special",
]
RUNS = [
    {},
    {"cache_implementation": "static"},
    {"prefill_chunk_size": 3},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 2},
]


@pytest.fixture
def llama():
    return build("llama")


def plan_of(selector: str, strength: float = 2.0) -> sf.Plan:
    return sf.Plan({1: sf.Add(vector(48), strength)}, positions=selector, special=[BOS, MARK, STOP])


def where(selector: str, ids: torch.Tensor, prompt: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """bool (batch, tokens), straight from the definition of a selector, row by row without its padding."""
    tree = language.resolved(language.parse("test", selector), (BOS, MARK, STOP))
    found = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(len(ids)):
        pad = 0 if mask is None else int((mask[row] == 0).sum())
        found[row, pad:] = language.allowed(tree, ids[row, pad:].tolist(), prompt - pad)
    return found


def forced(model, chosen: list[int]):
    """A processor that makes generation say these tokens, so that markers turn up where a test wants them."""

    class Force:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            said = ids.shape[1] - self.prompt
            scores = scores.clone()
            scores[:, chosen[said % len(chosen)]] += 1e4
            return scores

    return Force()


SAID = [MARK, 30, STOP, 31, MARK, 32]


def prompt_ids(batch: int = 2) -> torch.Tensor:
    ids = token_ids(batch, 7, 1).clamp(min=20)
    ids[:, 0] = BOS
    ids[-1, 3] = MARK  # in one row the marker stands in the prompt already
    return ids


def run(model, selector: str, inputs: dict, said: list[int], **options):
    """Generate under the plan while these tokens are said; compare every step's logits and the count with the oracle."""
    ids = inputs["input_ids"]
    batch, prompt = ids.shape
    force = forced(model, said)
    force.prompt = prompt
    with sf.steer(model, plan_of(selector)) as handle:
        out = model.generate(
            **inputs, **PROMPT | options, logits_processor=[force], output_logits=True, return_dict_in_generate=True
        )
    text = out.sequences[:, :-1]
    mask = inputs.get("attention_mask")
    copies = len(text) // batch
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, text.shape[1] - prompt), value=1).repeat_interleave(copies, 0)
    chosen = where(selector, text, prompt, mask)
    expected = oracle_logits(model, 1, 2 * vector(48), text, chosen, mask)[:, prompt - 1 :]
    got = torch.stack(out.logits, 1)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
    return handle.stats()[0], chosen, out


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("options", RUNS[:4], ids=["growing", "static", "chunks", "no-cache"])
def test_a_selector_means_the_same_under_every_cache(llama, selector, options) -> None:
    count, chosen, _ = run(llama, selector, {"input_ids": prompt_ids()}, SAID, **options)
    if options != {"use_cache": False}:
        assert count == int(chosen.sum())


@pytest.mark.parametrize("selector", SELECTORS)
def test_padding_is_neither_steered_nor_looked_at(llama, selector) -> None:
    """A marker under the padding opens nothing; rows of unequal length count their own tokens."""
    ids = prompt_ids()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    ids[0, :2] = torch.tensor([STOP, MARK])
    count, chosen, _ = run(llama, selector, {"input_ids": ids, "attention_mask": mask}, SAID)
    assert count == int(chosen.sum())
    assert not chosen[0, :2].any()


@pytest.mark.parametrize("selector", SELECTORS)
def test_what_is_proposed_and_rejected_leaves_no_trace(llama, selector) -> None:
    ids = prompt_ids(1)
    ids = torch.cat([ids, ids], 1)  # a repeated prompt gives the look-up something to propose
    run(llama, selector, {"input_ids": ids}, [40, MARK, 41], prompt_lookup_num_tokens=2)
    ids[0, 3] = 40
    run(llama, selector, {"input_ids": ids}, SAID, prompt_lookup_num_tokens=3)


def test_samples_of_a_prompt_have_memories_of_their_own(llama) -> None:
    ids = prompt_ids()
    torch.manual_seed(0)
    with sf.steer(llama, plan_of(f"after:ids:{MARK},40,41,42,43,44,45,46,47,48,49")) as handle:
        out = llama.generate(
            input_ids=ids, **PROMPT | {"do_sample": True, "max_new_tokens": 12}, num_return_sequences=5,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    text = out.sequences[:, :-1]
    chosen = where(f"after:ids:{MARK},40,41,42,43,44,45,46,47,48,49", text, 7)
    expected = oracle_logits(llama, 1, 2 * vector(48), text, chosen)[:, 6:]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=2e-4, rtol=2e-4)
    assert len({row.sum().item() for row in chosen[:5]}) > 1, "the samples differ in where the marker is"
    assert handle.stats() == [int(chosen.sum())]


@pytest.mark.parametrize("selector", [f"all & !ids:{MARK}", f"prompt & after:ids:{MARK}", "!0:4"])
def test_beams_that_change_rows(llama, selector) -> None:
    """What is decided token by token follows beams; the scores are those of the uncached oracle's log-probabilities."""
    ids = prompt_ids()
    ids[:, 5] = MARK
    with sf.steer(llama, plan_of(selector)):
        out = llama.generate(
            input_ids=ids, **PROMPT, num_beams=3, length_penalty=0.0, return_dict_in_generate=True, output_scores=True
        )
    text = out.sequences
    logits = oracle_logits(llama, 1, 2 * vector(48), text[:, :-1], where(selector, text[:, :-1], 7))
    said = logits[:, 6:].log_softmax(-1).gather(2, text[:, 7:, None])[..., 0].sum(1)
    torch.testing.assert_close(out.sequences_scores, said, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("selector", [f"after:ids:{MARK}", f"!between:ids:{MARK}..{STOP}"])
def test_beams_are_refused_by_name_where_earlier_tokens_count(llama, selector) -> None:
    with (
        pytest.raises(ValueError, match=r"positions='.*' must know the tokens before each one, and beam search"),
        sf.steer(llama, plan_of(selector)),
    ):
        llama.generate(input_ids=prompt_ids(), **PROMPT, num_beams=2)
    assert "generate" not in vars(llama)


def test_a_selector_per_row(llama) -> None:
    ids = prompt_ids(3)
    rows = [f"all & !ids:{BOS}", None, f"after:ids:{MARK} | 1"]
    with torch.no_grad(), sf.steer(llama, [None if one is None else plan_of(one) for one in rows]) as handle:
        got = llama(ids).logits
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    for row, one in enumerate(rows):
        if one is not None:
            chosen[row] = where(one, ids[row : row + 1], 7)[0]
    torch.testing.assert_close(got, oracle_logits(llama, 1, 2 * vector(48), ids, chosen), atol=2e-5, rtol=2e-5)
    assert handle.stats() == [int(n) for n in chosen.sum(1)]


@pytest.mark.parametrize("selector", SELECTORS)
def test_bare_passes_in_any_pieces(llama, selector) -> None:
    """A user's own loop: two texts of one shape take turns, each with its cache; nothing of one reaches the other."""
    texts = [torch.cat([prompt_ids(), torch.tensor([SAID, SAID[::-1]])], 1)]
    texts.append(texts[0].flip(0))
    with torch.no_grad(), sf.steer(llama, plan_of(selector), prompt_length=7) as handle:
        caches, logits = [None, None], [[], []]
        for start, stop in ((0, 3), (3, 7), (7, 8), (8, 11), (11, 13)):
            for one in (0, 1):
                out = llama(texts[one][:, start:stop], past_key_values=caches[one], use_cache=True)
                caches[one] = out.past_key_values
                logits[one].append(out.logits)
    for one, text in enumerate(texts):
        chosen = where(selector, text, 7)
        expected = oracle_logits(llama, 1, 2 * vector(48), text, chosen)
        torch.testing.assert_close(torch.cat(logits[one], 1), expected, atol=2e-5, rtol=2e-5)
    assert handle.stats() == [2 * int(chosen.sum())]


def test_a_memory_made_in_inference_mode_goes_on_outside_of_it(llama) -> None:
    ids = torch.cat([prompt_ids(), torch.tensor([SAID, SAID])], 1)
    selector = f"!between:ids:{MARK}..{STOP}"
    with sf.steer(llama, plan_of(selector)) as handle:
        with torch.inference_mode():
            cache = llama(ids[:, :7], use_cache=True).past_key_values
        with torch.no_grad():
            for at in range(7, 13):
                cache = llama(ids[:, at : at + 1], past_key_values=cache).past_key_values
    assert handle.stats() == [int(where(selector, ids, 7).sum())]


def test_token_ids_alone_need_no_prompt(llama) -> None:
    """`all & !ids:` is known of any pass; what must know earlier tokens is refused where they ran unseen."""
    ids = prompt_ids()
    with torch.no_grad():
        cache = llama(ids[:, :5], use_cache=True).past_key_values
        with sf.steer(llama, plan_of(f"all & !ids:{int(ids[0, 6])}")) as handle:
            llama(ids[:, 5:], past_key_values=cache)
        assert handle.stats() == [4 - int((ids[:, 5:] == ids[0, 6]).sum())]
        with (
            pytest.raises(ValueError, match="must know the 7 tokens before this forward pass, and only 0 of them ran"),
            sf.steer(llama, plan_of(f"after:ids:{MARK}")),
        ):
            llama(ids[:, 6:], past_key_values=cache)


def test_a_reused_cache_and_a_plan_that_comes_late(llama) -> None:
    """Generate shows the whole text, so that what a cache holds of it counts, too."""
    ids = torch.cat([prompt_ids(1), token_ids(1, 5, 3)], 1)
    with torch.no_grad():
        cache = llama(ids[:, :7], use_cache=True).past_key_values
    with sf.steer(llama, plan_of(f"after:ids:{MARK}")) as handle:
        out = llama.generate(input_ids=ids, past_key_values=cache, **PROMPT)
    assert handle.stats() == [out.shape[1] - 1 - 7]


def test_embeddings_show_no_ids(llama) -> None:
    embeds = llama.get_input_embeddings()(prompt_ids()).detach()
    for selector in (f"all & !ids:{MARK}", f"prompt & after:ids:{MARK}"):
        with (
            pytest.raises(ValueError, match=r"looks at token ids, which this forward pass does not show"),
            sf.steer(llama, plan_of(selector)),
        ):
            llama.generate(inputs_embeds=embeds, **PROMPT)
    with sf.steer(llama, plan_of("!0:4")) as handle:
        llama.generate(inputs_embeds=embeds, **PROMPT)
    assert handle.stats() == [2 * (3 + NEW - 1)]


@pytest.mark.parametrize("name", ["gemma3_vl", "llava"])
def test_a_decoder_that_is_given_embeddings_has_its_ids_from_the_model_around_it(name) -> None:
    model, ids = build(name), token_ids(2, 6, 4).clamp(20, 90)
    ids[0, 2] = MARK
    width = model.config.text_config.hidden_size
    plan = sf.Plan({1: sf.Add(vector(width))}, positions=f"all & !ids:{MARK}")
    with sf.steer(model, plan) as handle, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert handle.stats() == [11]


def test_a_prepared_model_refuses_what_its_graph_cannot_compare_and_follows_the_rest() -> None:
    model = build("llama").__class__(build("llama").config).eval()
    sf.prepare(model, room=sf.Room(batch=2, length=16))
    for selector in (f"all & !ids:{MARK}", f"prompt & after:ids:{MARK}", "special"):
        with pytest.raises(ValueError, match=r"positions='.*' on a prepared model; they look at token ids"):
            sf.steer(model, plan_of(selector))
    ids = prompt_ids()
    with sf.steer(model, plan_of("!0:4")) as handle, torch.no_grad():
        got = model.generate(input_ids=ids, **PROMPT, output_logits=True, return_dict_in_generate=True)
    text = got.sequences[:, :-1]
    expected = oracle_logits(model, 1, 2 * vector(48), text, where("!0:4", text, 7))[:, 6:]
    torch.testing.assert_close(torch.stack(got.logits, 1), expected, atol=2e-4, rtol=2e-4)
    assert handle.stats() == [2 * (3 + NEW - 1)]


def test_a_condition_beside_a_selector(llama) -> None:
    """A condition that is open steers what the selector names, and nothing else."""
    ids = prompt_ids()
    when = sf.When(sf.Condition(vector(48, 1), 0.0), sf.Add(vector(48), 2.0))  # a projection is never below 0
    selector = f"last & !ids:{MARK}"
    force = forced(llama, SAID)
    force.prompt = 7
    with sf.steer(llama, sf.Plan({1: when}, positions=selector)):
        out = llama.generate(
            input_ids=ids, **PROMPT, logits_processor=[force], output_logits=True, return_dict_in_generate=True
        )
    text = out.sequences[:, :-1]
    expected = oracle_logits(llama, 1, 2 * vector(48), text, where(selector, text, 7))[:, 6:]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=2e-4, rtol=2e-4)


def test_an_index_beyond_a_row_is_refused_by_name(llama) -> None:
    ids = prompt_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for selector in ("4 | last", f"4 & ids:{MARK}", "!4"):
        with (
            pytest.raises(ValueError, match="position 4 is out of range; prompt 0 has 4 real tokens, 0 to 3"),
            sf.steer(llama, plan_of(selector)),
        ):
            llama.generate(input_ids=ids, attention_mask=mask, **PROMPT)


def test_a_mask_from_numpy_steers_as_one_from_torch(llama) -> None:
    ids = prompt_ids()
    mask = np.arange(7) % 2 == 0
    chosen = torch.from_numpy(mask).expand(2, 7)
    whole = torch.cat([chosen, torch.zeros(2, NEW, dtype=torch.bool)], 1)
    plan = sf.Plan({1: sf.Add(vector(48), 2.0)}, positions=mask)
    check_generation(llama, plan, whole, 2 * vector(48), 1, {"input_ids": ids})


def test_ids_beyond_the_vocabulary_are_no_tokens(llama) -> None:
    with pytest.warns(RuntimeWarning, match="no token was edited"), sf.steer(llama, plan_of(f"ids:{VOCAB}")):
        llama.generate(input_ids=prompt_ids(), **PROMPT)
