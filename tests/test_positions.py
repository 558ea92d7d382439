"""The language of positions: the parser, what a selector says against a naive oracle, and the row table that follows it."""

from __future__ import annotations

import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import steerfast as sf
from steerfast import _positions as language
from steerfast.hooks.positions import Layer, Table
from steerfast.hooks.prompts import Prompt
from steerfast.plan import rule_of
from steerfast.vllm.pieces import most_pieces, pieces

TOKENS = 6  # ids 0 to 5: every one of them turns up often

# --- an oracle that knows nothing of the parser ---------------------------------------------------------------------

LEAVES = st.one_of(
    st.sampled_from(["all", "prompt", "generated", "last"]).map(lambda word: (word,)),
    st.tuples(st.just("window"), st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9)),
    st.tuples(st.just("index"), st.integers(-2, 1)),
    st.tuples(st.just("ids"), st.lists(st.integers(0, TOKENS), min_size=1, max_size=3)),
    st.tuples(st.just("after"), st.lists(st.integers(0, TOKENS), min_size=1, max_size=2)),
    st.tuples(st.just("between"), st.just([0, 5]), st.lists(st.integers(1, 3), min_size=1, max_size=2)),
)
SELECTORS = st.lists(st.lists(st.tuples(st.booleans(), LEAVES), min_size=1, max_size=3), min_size=1, max_size=3)


def joined(ids) -> str:
    return ",".join(map(str, ids))


def leaf_text(leaf) -> str:
    kind, *rest = leaf
    if kind == "window":
        return ":".join("" if end is None else str(end) for end in rest)
    texts = {
        "index": lambda at: str(at),
        "ids": lambda ids: f"ids:{joined(ids)}",
        "after": lambda ids: f"after:ids:{joined(ids)}",
        "between": lambda opens, closes: f"between:ids:{joined(opens)}..{joined(closes)}",
    }
    return texts[kind](*rest) if kind in texts else kind


def text_of(terms, space: str = " ") -> str:
    return f"{space}|{space}".join(
        f"{space}&{space}".join(f"{'!' if negated else ''}{leaf_text(leaf)}" for negated, leaf in term)
        for term in terms
    )


def leaf_holds(leaf, ids, prompt: int, at: int) -> bool:
    """One position of a text without padding, straight from the table of the language."""
    kind, *rest = leaf
    if kind == "index":
        return at == (rest[0] if rest[0] >= 0 else prompt + rest[0])
    if kind == "window":
        return at in list(range(prompt))[slice(*rest)]
    if kind == "ids":
        return ids[at] in rest[0]
    if kind == "after":
        return any(token in rest[0] for token in ids[:at])
    if kind == "between":
        opens, closes = rest
        return any(
            ids[begin] in opens and not any(token in closes for token in ids[begin:at]) for begin in range(at + 1)
        )
    return {"all": True, "prompt": at < prompt, "generated": at >= prompt, "last": at >= prompt - 1}[kind]


def oracle(terms, ids, prompt: int) -> np.ndarray:
    return np.array(
        [
            any(all(leaf_holds(leaf, ids, prompt, at) != negated for negated, leaf in term) for term in terms)
            for at in range(len(ids))
        ],
        dtype=bool,
    )


TEXTS = st.lists(st.integers(0, TOKENS - 1), min_size=2, max_size=14)


@settings(max_examples=500, deadline=None)
@given(SELECTORS, TEXTS, st.data())
def test_a_selector_names_what_the_table_of_the_language_says(terms, ids, data) -> None:
    prompt = data.draw(st.integers(2, len(ids)))
    selector = language.parse("test", text_of(terms))
    assert language.allowed(selector, ids, prompt).tolist() == oracle(terms, ids, prompt).tolist()


@settings(max_examples=300, deadline=None)
@given(SELECTORS, st.sampled_from(["", " ", "  "]))
def test_a_selector_is_written_in_one_way(terms, space) -> None:
    tree = language.parse("test", text_of(terms, space))
    assert tree == language.parse("test", text_of(terms))
    assert language.parse("test", str(tree)) == tree
    assert str(language.parse("test", str(tree))) == str(tree)


@settings(max_examples=300, deadline=None)
@given(SELECTORS, TEXTS)
def test_what_is_left_beyond_the_prompt_is_what_generated_tokens_see(terms, ids) -> None:
    """`beyond` must agree with the whole selector at every generated position."""
    selector, prompt = language.parse("test", text_of(terms)), 2
    left = language.beyond(selector)
    whole = language.allowed(selector, ids, prompt)[prompt:]
    if isinstance(left, bool):
        assert whole.tolist() == [left] * len(whole)
    else:
        assert whole.tolist() == language.allowed(left, ids, prompt)[prompt:].tolist()


FORGETFUL = st.lists(
    st.lists(
        st.tuples(st.booleans(), LEAVES.filter(lambda leaf: leaf[0] not in ("after", "between"))),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(FORGETFUL, TEXTS, st.data())
def test_pieces_cover_what_a_selector_names_once(terms, ids, data) -> None:
    """For an engine: disjoint, in order, none that could be joined, and never more of them than is promised."""
    prompt = data.draw(st.integers(2, len(ids)))
    selector = language.parse("test", text_of(terms))
    found = pieces(selector, prompt)
    got = [sum(p.first <= at < p.stop and (token in p.ids) == p.among for p in found) for at, token in enumerate(ids)]
    assert got == oracle(terms, ids, prompt).astype(int).tolist()
    for one, other in pairwise(found):
        assert one.stop < other.first or (one.stop == other.first and one[2:] != other[2:])
    assert all(p.first < p.stop for p in found)
    most = max(len(pieces(selector, length)) for length in range(2, 45))
    assert most <= most_pieces(selector)


# --- the row table ----------------------------------------------------------------------------------------------------


def steered(table: Table, start: int, ids: torch.Tensor, device: bool) -> torch.Tensor:
    """bool (batch, tokens): which tokens of a pass slot 7 edits."""
    batch, tokens = ids.shape
    now = table.gather(torch.tensor(start), tokens, batch, ids) if device else table.at(start, tokens, batch, ids)
    if now.rows is None:
        return torch.full((batch, tokens), any(slot == 7 for slot, _ in now.owners))
    return (now.rows == 7).any(1).view(batch, tokens)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_the_table_follows_chunks_padding_steps_back_and_copies(data) -> None:
    """Rows of unequal length, padded left, each under a selector of its own (or none), in passes of any length, some of which
    step back as assisted generation does; each prompt repeated; the start known to the host or to the device alone."""
    batch, copies = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    length, new = data.draw(st.integers(2, 7)), data.draw(st.integers(0, 6))
    pads = [data.draw(st.integers(0, length - 2)) for _ in range(batch)]
    terms = [data.draw(SELECTORS), *(data.draw(st.none() | SELECTORS) for _ in range(batch - 1))]
    announced, device = data.draw(st.booleans()), data.draw(st.booleans())
    drawn = data.draw(st.lists(st.integers(0, TOKENS - 1), min_size=batch * length, max_size=batch * length))
    prompt_ids = torch.tensor(drawn).view(batch, length)
    valid = torch.arange(length) >= torch.tensor(pads)[:, None]
    prompt = Prompt(valid, torch.full((batch,), length), prompt_ids if announced else None)
    rules = [language.parse("test", "all" if one is None else text_of(one)) for one in terms]
    layer = Layer([() if one is None else (7,) for one in terms], [1.0] * batch, rules)
    table = Table(prompt, [layer], torch.device("cpu"))

    def fresh(tokens: int) -> torch.Tensor:
        count = batch * copies * tokens
        drawn = data.draw(st.lists(st.integers(0, TOKENS - 1), min_size=count, max_size=count))
        return torch.tensor(drawn, dtype=torch.int64).view(batch * copies, tokens)

    text = torch.cat([prompt_ids.repeat_interleave(copies, 0), fresh(new)], 1)
    start = data.draw(st.integers(0, length - 1)) if announced else 0  # a cache holds the first part of the prompt
    while start < text.shape[1]:
        tokens = data.draw(st.integers(1, text.shape[1] - start))
        got = steered(table, start, text[:, start : start + tokens], device)
        for row in range(batch * copies):
            pad, one = pads[row // copies], terms[row // copies]
            expected = np.zeros(text.shape[1], dtype=bool)
            if one is not None:
                expected[pad:] = oracle(one, text[row, pad:].tolist(), length - pad)
            assert got[row].tolist() == expected[start : start + tokens].tolist(), (rules[row // copies], text[row])
        start += tokens
        if start > length and data.draw(st.booleans()):  # what was proposed is rejected
            start = data.draw(st.integers(length, start))
            text[:, start:] = fresh(text.shape[1] - start)


def table_of(rule: str, *, width: int = 4, **fields) -> Table:
    prompt = Prompt(torch.ones(1, width, dtype=torch.bool), torch.tensor([width]), **fields)
    return Table(prompt, [Layer([(7,)], [1.0], [language.parse("test", rule)])], torch.device("cpu"))


def test_words_cost_a_decode_step_no_tensor() -> None:
    """Where no generated token has to be looked at, a step over one is the same object each time, and reads no ids."""
    for rule in (
        "all",
        "generated",
        "last",
        "prompt",
        "0:2",
        "-1 | last",
        "prompt & !ids:1",
        "generated | prompt & after:ids:1",
    ):
        table = table_of(rule)
        assert table.at(5, 1, 1) is table.at(6, 1, 1), rule
        assert table.at(5, 1, 1).owners is not None, rule


def test_ids_that_are_not_shown_are_refused() -> None:
    table = table_of("all & !ids:1")
    with pytest.raises(ValueError, match=r"positions='all & !ids:1' looks at token ids, which .* embeddings"):
        table.at(0, 4, 1)


def test_tokens_that_ran_unseen_are_refused() -> None:
    for start in (4, torch.tensor(4)):
        table = table_of("after:ids:1")
        with pytest.raises(ValueError, match="must know the 4 tokens before this forward pass, and only 0 of them"):
            (table.at if isinstance(start, int) else table.gather)(start, 1, 1, torch.tensor([[2]]))


def test_beams_are_refused_only_where_rows_that_move_would_matter() -> None:
    with pytest.raises(ValueError, match=r"positions='all & after:ids:1' must know .* beam search"):
        table_of("all & after:ids:1", reorders=True)
    for rule in ("all & !ids:1", "prompt & after:ids:1", "last"):
        table_of(rule, reorders=True)


# --- what a user passes ---------------------------------------------------------------------------------------------


def plan(positions, special=None) -> sf.Plan:
    return sf.Plan({0: sf.Add(torch.ones(4))}, positions=positions, special=special)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", "all"),
        (" prompt&!0:4 ", "prompt & !0:4"),
        ("!!last", "last"),
        ("! ids: 7, 5,5", "!ids:5,7"),
        (":", ":"),
        (slice(0, 8), "0:8"),
        (slice(-4, None), "-4:"),
        (slice(np.int64(1), torch.tensor(3)), "1:3"),
        (5, (5,)),
        (np.int32(-1), (-1,)),
        (torch.tensor(-1), (-1,)),
        (range(3), (0, 1, 2)),
        ([np.int64(0), torch.tensor(2)], (0, 2)),
        (np.array([1, -2], dtype=np.int16), (1, -2)),
        (torch.tensor([1, -2]), (1, -2)),
    ],
)
def test_positions_of_every_form_become_text_or_indices(given, expected) -> None:
    assert plan(given).positions == expected


def test_masks_of_every_form_become_a_tensor_of_their_own() -> None:
    array = np.array([[True, False]])
    for form in (array, torch.from_numpy(array)):
        made = plan(form)
        assert torch.equal(made.positions, torch.tensor([[True, False]]))
        assert rule_of(made) is made.positions
    mask = torch.tensor([True, False])
    made = plan(mask)
    mask[0] = False
    assert made.positions.tolist() == [True, False]


GRAMMAR = re.escape(language.GRAMMAR)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("everywhere", rf"positions is 'everywhere'; expected {GRAMMAR}"),
        ("", rf"positions is ''; expected {GRAMMAR}"),
        ("prompt & ", rf"positions is 'prompt & ', where one is missing; expected {GRAMMAR}"),
        ("prompt && last", "where one is missing"),
        ("prompt & everywhere", "where 'everywhere' is no selector"),
        ("(prompt)", r"positions is '\(prompt\)'; expected"),
        ("ids:", "positions is 'ids:'; expected"),
        ("ids:-1", "expected all, prompt"),
        ("ids:5,,6", "expected all, prompt"),
        ("after:5", "expected all, prompt"),
        ("between:ids:5", "expected all, prompt"),
        ("between:ids:5,7..7", "where 7 both opens and closes"),
        ("0:8:2", "expected all, prompt"),
        ("1.5", "expected all, prompt"),
        ("\u0665", "expected all, prompt"),
        ("2147483648", "where 2147483648 is beyond any position"),
        ("x" * 1000, r"positions is 'x{76}\.\.\.; expected"),
        (slice(0, 8, 2), "a window has no step: list the positions"),
        (slice(0, 1.5), "whole numbers as its ends"),
        ([], "expected a list of whole numbers, a bool mask, or one of"),
        ([1.0], "expected a list of whole numbers"),
        ([True], "expected a list of whole numbers"),
        (True, "expected a list of whole numbers"),
        (None, "expected a list of whole numbers"),
        (np.array([0.5]), "expected a list of whole numbers"),
        (np.array([], dtype=np.int64), "expected a list of whole numbers"),
        (torch.tensor([0.5]), r"as a mask must be bool, .* got torch.float32 \(1,\)"),
        (torch.ones(2, 2, dtype=torch.int64), "as a mask must be bool"),
        (torch.ones(2, 2, 2, dtype=torch.bool), "as a mask must be bool"),
    ],
)
def test_what_is_no_position_is_refused_in_a_line(given, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"Plan: .*{message}") as refused:
        plan(given)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


# --- special ----------------------------------------------------------------------------------------------------------


def test_special_is_what_the_tokenizer_marks_chat_markers_among_them() -> None:
    token = SimpleNamespace
    tokenizer = token(
        all_special_ids=[2, 1],
        added_tokens_decoder={1: token(special=True), 9: token(special=True), 8: token(special=False)},
    )
    for form in (tokenizer, token(tokenizer=tokenizer), [9, 2, 1, 1], np.array([1, 2, 9]), torch.tensor([1, 2, 9])):
        made = plan("all & !special", special=form)
        assert made.special == (1, 2, 9)
        assert made.positions == "all & !special"
        assert str(rule_of(made)) == "all & !ids:1,2,9"


def test_special_that_nobody_has_named_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Plan: positions='all & !special' names \"special\", and a model .* special="
    ):
        plan("all & !special")
    for wrong in ("</s>", [-1], [0.5], 5, object()):
        with pytest.raises(TypeError, match=r"Plan: special is .*; expected a tokenizer or a list of token ids"):
            plan("all", special=wrong)
    with pytest.raises(ValueError, match="Plan: special names no token"):
        plan("all", special=[])


@pytest.mark.parametrize(
    ("positions", "special"),
    [("prompt & !special | after:ids:5", (1, 2)), ("-4:", None), ("all", (3,)), ((0, -1), None), ("last", None)],
)
def test_a_saved_plan_keeps_its_positions_and_shows_them(tmp_path, positions, special) -> None:
    made = plan(positions, special)
    found = sf.Plan.load(made.save(tmp_path / "plan"))
    assert (found.positions, found.special, rule_of(found)) == (made.positions, special, rule_of(made))
    assert f"positions={positions!r}" in repr(found)


def test_a_plan_that_names_no_special_token_is_saved_as_before(tmp_path) -> None:
    assert '"special"' not in (plan("all").save(tmp_path / "plan") / "plan.json").read_text()
