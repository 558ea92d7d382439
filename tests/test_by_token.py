"""Activation addition as published: a row for each of the prompt's first tokens, against a plain hook with a table of deltas."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CORE, FAMILIES, Counter, build, token_ids
from test_extract import make_tokenizer
from torch import Tensor

import steerfast as sf
from steerfast.models.layers import find_layers
from steerfast.tools.convert import convert, show

NEW = 5
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": 10_000}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
T = 4


def table(width: int = 48, tokens: int = T, seed: int = 0) -> Tensor:
    """V (T, d), its first row zero as that of a beginning-of-text token is."""
    rows = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    rows[0] = 0
    return rows


def vector(seed: int = 9) -> Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed))


def deltas(rows: Tensor, mask: Tensor, total: int, prompt: int | None = None) -> Tensor:
    """(batch, total, d): row i at the i-th real token of each prompt, by a loop over what the mask says."""
    found = torch.zeros(mask.shape[0], total, rows.shape[1])
    for b in range(mask.shape[0]):
        real = [at for at in range(mask.shape[1] if prompt is None else prompt) if mask[b, at]]
        for i, at in enumerate(real[: rows.shape[0]]):
            found[b, at] = rows[i]
    return found


@contextmanager
def edited(model: Any, layer: int, delta: Tensor) -> Iterator[None]:
    """The oracle: add delta (batch, tokens, d) to the block's output with a bare hook."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta

    handle = find_layers(model).blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def truth(model: Any, layer: int, rows: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a loop of uncached passes over the whole text."""
    prompt, steps = ids.shape[1], []
    for _ in range(NEW):
        whole = torch.nn.functional.pad(mask, (0, ids.shape[1] - prompt), value=1)
        delta = deltas(rows, mask, ids.shape[1])
        with torch.no_grad(), edited(model, layer, delta):
            places = {"position_ids": (whole.cumsum(1) - 1).clamp(min=0)} if not mask.all() else {}
            steps.append(model(ids, attention_mask=whole, use_cache=False, **places).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(1, keepdim=True)], 1)
    return ids, torch.stack(steps, 1)


def padded(batch: int = 3, length: int = 8) -> tuple[Tensor, Tensor]:
    """Prompts of 8, 6 and 2 tokens, padded on the left: the last is shorter than T."""
    ids, mask = token_ids(batch, length, 1), torch.ones(batch, length, dtype=torch.long)
    mask[1, :2] = mask[2, :6] = 0
    return ids * mask, mask


@pytest.mark.parametrize("name", CORE)
def test_cached_generation_equals_an_uncached_loop_of_a_plain_hook(name: str) -> None:
    """Rows counted from each row's first true token, nothing behind them, a short prompt steered as far as it goes."""
    model = build(name)
    (ids, mask), rows = padded(), table(find_layers(model).d)
    if name == "bloom":  # alibi is built from the mask: no position ids
        ids, mask = ids[:1], mask[:1]
    plan = {1: sf.Add(rows, 2.0)}
    with sf.steer(model, plan) as handle:
        out = model.generate(ids, attention_mask=mask, **GREEDY, output_logits=True, return_dict_in_generate=True)
    tokens, logits = truth(model, 1, 2 * rows, ids, mask)
    assert torch.equal(out.sequences, tokens)
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=2e-4, rtol=2e-4)
    assert handle.stats() == [int(mask[:, :].sum(1).clamp(max=T).sum())]
    plain = model.generate(ids, attention_mask=mask, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert (torch.stack(plain.logits, 1) - logits).abs().max() > 1e-3  # the plan did something


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"num_beams": 2},
    ],
    ids=["static", "chunked-prefill", "no-cache", "assisted", "beams"],
)
def test_every_way_to_generate_adds_the_rows_once(options: dict[str, Any]) -> None:
    model, ids, rows = build("llama"), token_ids(1, 7, 1), table()
    ids = torch.cat([ids, ids], 1)
    with sf.steer(model, {1: sf.Add(rows, 2.0)}):
        got = model.generate(ids, **GREEDY, **options)
    if "num_beams" not in options:
        assert torch.equal(got, truth(model, 1, 2 * rows, ids, torch.ones_like(ids))[0])
        return
    delta = deltas(2 * rows, torch.ones_like(ids), 14).expand(2, -1, -1)
    with warnings.catch_warnings(), edited_prefill(model, 1, delta):
        assert torch.equal(got, model.generate(ids, **GREEDY, **options))


@contextmanager
def edited_prefill(model: Any, layer: int, delta: Tensor) -> Iterator[None]:
    """A bare hook that adds delta in passes as long as it is, and nothing to single tokens."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] != delta.shape[1]:
            return None
        hidden = hidden + delta[: hidden.shape[0]]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = find_layers(model).blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_bare_forward_leaves_every_other_token_bit_for_bit(side: str) -> None:
    model, rows = build("llama"), table()
    ids, mask = padded()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
        with sf.steer(model, {1: sf.Add(rows, 2.0)}):
            steered = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[2]
    delta = deltas(2 * rows, mask, 8)
    torch.testing.assert_close(steered, plain + delta)
    still = delta.abs().sum(2) == 0  # behind the rows, padding, and the row of zeros
    assert torch.equal(steered[still], plain[still])
    assert still.sum() == 24 - (T - 1) * 2 - 1


def test_bare_chunks_and_a_second_turn_are_not_steered_again() -> None:
    """A prompt token by token, in chunks, and a turn on top of a cache: position by position what one pass says."""
    model, rows, ids = build("llama"), table(), token_ids(1, 9, 2)
    plan = {1: sf.Add(rows, 2.0)}
    with torch.no_grad(), edited(model, 1, deltas(2 * rows, torch.ones_like(ids), 9)):
        expected = model(ids, use_cache=False).logits
    for cuts in ([0, 5, 6, 9], [0, 3, 6, 9], [*range(10)]):
        with torch.no_grad(), sf.steer(model, plan, prompt_length=6) as handle:
            cache, parts = None, []
            for first, stop in pairwise(cuts):
                out = model(ids[:, first:stop], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)
        assert handle.stats() == [T]
    with torch.no_grad(), sf.steer(model, plan) as handle:
        cache = model(ids[:, :6], use_cache=True).past_key_values
        whole = model.generate(ids, past_key_values=cache, **GREEDY)
    assert handle.stats() == [T], "the second turn begins behind the rows"
    assert torch.equal(whole, truth(model, 1, 2 * rows, ids, torch.ones_like(ids))[0])


def test_a_text_that_begins_inside_the_rows_takes_those_that_are_left() -> None:
    """A cache of two tokens that ran unsteered: tokens 2 and 3 of the conversation get their own rows, not the first ones."""
    model, rows, ids = build("llama"), table(), token_ids(1, 9, 2)
    with torch.no_grad():
        cache = model(ids[:, :2], use_cache=True).past_key_values
        with sf.steer(model, {1: sf.Add(rows, 2.0)}) as handle:
            got = model.generate(ids, past_key_values=cache, **GREEDY)
    late = rows.clone()
    late[:2] = 0
    assert handle.stats() == [2]
    assert torch.equal(got, truth(model, 1, 2 * late, ids, torch.ones_like(ids))[0])
    with torch.no_grad():
        cache = model(ids[:, :2], use_cache=True).past_key_values
        with (
            sf.steer(model, {1: sf.Add(rows)}),
            pytest.raises(
                ValueError, match="a row for each of a prompt's first tokens needs the prompt's length, which"
            ),
        ):
            model(ids[:, 2:3], past_key_values=cache)


def test_a_plan_per_row_with_strengths_of_its_own() -> None:
    model, (ids, mask) = build("gpt2"), padded()
    long, short = table(tokens=6, seed=3), table(tokens=2, seed=4)
    plans = [sf.Plan({1: sf.Add(long, 2.0)}), None, sf.Plan({1: sf.Add(short), 2: sf.Add(long, -1.0)})]
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), sf.steer(model, plans, strength=[0.5, 1.0, 3.0]) as handle:
        got = model(ids, attention_mask=mask, **places).logits
    first = torch.cat([deltas(long, mask[:1], 8), torch.zeros(1, 8, 48), deltas(3 * short, mask[2:], 8)])
    second = torch.cat([torch.zeros(2, 8, 48), deltas(-3 * long, mask[2:], 8)])
    with torch.no_grad(), edited(model, 1, first), edited(model, 2, second):
        torch.testing.assert_close(got, model(ids, attention_mask=mask, **places).logits, **CLOSE)
    assert handle.stats() == [6, 0, 2]


def test_rows_stand_in_a_chain_in_its_order_and_beside_other_edits() -> None:
    """Ablate, rows, rows with the norm kept, a vector for all tokens: token by token as if each were applied alone."""
    model, ids, rows = build("llama"), token_ids(2, 7, 5), table()
    chain = [
        sf.Ablate(vector()),
        sf.Add(rows, 2.0),
        sf.Add(rows[:3].flip(0), 4.0, keep_norm=True),
        sf.Add(vector(), 0.5),
    ]
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[2]
        with sf.steer(model, {1: chain, 2: sf.Add(vector(8))}) as handle:
            got = model(ids, output_hidden_states=True).hidden_states[2]
    unit = vector() / vector().norm()
    y = x - (x @ unit)[..., None] * unit
    y = y + deltas(2 * rows, torch.ones_like(ids), 7)
    pushed = y + deltas(4 * rows[:3].flip(0), torch.ones_like(ids), 7)
    y = pushed * (y.norm(dim=-1, keepdim=True) / pushed.norm(dim=-1, keepdim=True)) + 0.5 * vector()
    torch.testing.assert_close(got, y, **CLOSE)
    assert handle.stats() == [14]


def test_more_rows_cost_no_further_launch_and_no_further_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the kernel's op for each layer and prompt pass, whatever T; none for a decoding step."""
    model, ids, calls = build("llama"), token_ids(2, 12, 5), []
    from steerfast.hooks import dispatcher

    real = dispatcher.ops.subspace

    def counted(x: Tensor, *args: Any) -> Tensor:
        calls.append(tuple(args[3].shape))
        return real(x, *args)

    monkeypatch.setattr(dispatcher.ops, "subspace", counted)
    for tokens in (2, 11):
        calls.clear()
        with sf.steer(model, {0: sf.Add(table(tokens=tokens)), 2: sf.Add(table(tokens=3))}):
            model.generate(ids, **GREEDY)
        assert calls == [(24, 1), (24, 1)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_prepared_model_eager_and_compiled(name: str) -> None:
    """In generate with padding, and in a bare pass whose prompt's length is given."""
    torch._dynamo.reset()
    like = build(name)
    model = type(like)(like.config).eval()
    model.load_state_dict(like.state_dict())
    (ids, mask), rows = padded(), table()
    plan = {1: sf.Add(rows, 2.0), 2: [sf.Ablate(vector()), sf.Add(rows[:2], 3.0)]}
    sf.prepare(model, room=sf.Room(batch=4, length=16, slots=16, columns=3))
    with sf.steer(like, plan) as handle:
        expected = like.generate(ids, attention_mask=mask, **GREEDY, output_logits=True, return_dict_in_generate=True)
        counted = handle.stats()
        with torch.no_grad():
            bare = like(ids).logits
    count = Counter()
    whole = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        with sf.steer(model, plan, prompt_length=8):
            torch.testing.assert_close(whole(ids, use_cache=False).logits, bare, **CLOSE)
            assert count.graphs == 1
            with pytest.raises(RuntimeError, match="leaves out tokens of a prompt whose real tokens"):
                whole(ids, attention_mask=mask, use_cache=False)
        with sf.steer(model, plan), pytest.raises(RuntimeError, match="pass prompt_length= to steer"):
            whole(ids, use_cache=False)
    torch._dynamo.reset()
    for compiled in (False, True):
        if compiled:
            model.forward = torch.compile(model.forward, backend="eager")
        with sf.steer(model, plan) as handle:
            got = model.generate(ids, attention_mask=mask, **GREEDY, output_logits=True, return_dict_in_generate=True)
            assert torch.equal(got.sequences, expected.sequences)
            torch.testing.assert_close(torch.stack(got.logits, 1), torch.stack(expected.logits, 1), **CLOSE)
            assert handle.stats()[0] >= counted[0]
        with torch.no_grad(), sf.steer(model, plan, prompt_length=8):
            torch.testing.assert_close(model(ids).logits, bare, **CLOSE)
    with pytest.raises(RuntimeError, match="no 17 neighbouring slots are free"):
        sf.steer(model, {1: sf.Add(table(tokens=17))})
    torch._dynamo.reset()


def test_slots_come_back_and_several_handles_stand_beside_each_other() -> None:
    model, ids, rows = build("llama"), token_ids(2, 7, 5), table()
    with torch.no_grad():
        clean = model(ids).logits
        outer = sf.steer(model, {1: sf.Add(rows, 2.0)})
        alone = model(ids).logits
        for _ in range(3):
            with sf.steer(model, sf.Plan({1: sf.Add(vector())}, positions="last")) as inner:
                both = model(ids).logits
            assert inner.stats() == [2]
            assert torch.equal(model(ids).logits, alone)
        delta = deltas(2 * rows, torch.ones_like(ids), 7)
        delta[:, -1] += vector()
        with edited_after(outer, model, delta) as expected:
            torch.testing.assert_close(both, expected(ids), **CLOSE)
        assert torch.equal(model(ids).logits, clean)


@contextmanager
def edited_after(handle: Any, model: Any, delta: Tensor) -> Iterator[Any]:
    handle.remove()
    with edited(model, 1, delta):
        yield lambda ids: model(ids).logits


def test_what_shows_no_prompt_is_refused() -> None:
    mamba = next((name for name in ("mamba", "mamba2", "rwkv") if name in FAMILIES), None)
    if mamba is not None:
        model = build(mamba)
        if not sf.steer.__globals__["controller_of"](model).passes.keeps_cache:
            rows = table(find_layers(model).d)
            with sf.steer(model, {1: sf.Add(rows)}), pytest.raises(ValueError, match="does not show where it begins"):
                model(token_ids(1, 5, 0))
            sf.reset(model)
    decoder = build("llama").model
    with pytest.raises(ValueError, match=r"steer: Add\(vector: 4×48.*\) on a bare decoder .* needs prompt_length="):
        sf.steer(decoder, {1: sf.Add(table())})


def test_continuous_batching_refuses_rows() -> None:
    from steerfast.hooks.attachment import Attachment
    from steerfast.hooks.continuous import check_paged

    plan = sf.Plan({1: sf.Add(table())})
    with pytest.raises(ValueError, match=r"steer: Add\(vector: 4×48.*\) needs to know where each prompt ends"):
        check_paged([Attachment([plan], False, [1.0], None)], False)


@pytest.mark.parametrize("start", [table(), torch.zeros(T, 48)], ids=["given", "zero"])
def test_rows_that_require_a_gradient_are_trained(start: Tensor, tmp_path: Path) -> None:
    """The gradient is that of a plain hook, an optimizer's step is seen by the next pass, and what keeps a copy refuses."""
    model, (ids, mask) = build("llama"), padded()
    V = start.clone().requires_grad_()
    real = mask.cumsum(1) - 1
    chosen = (torch.nn.functional.one_hot(real.clamp(0, T), T + 1)[..., :T] * mask[..., None]).float()

    def plain(rows: Tensor) -> Tensor:
        with edited(model, 1, 2 * chosen @ rows):
            return model(ids, attention_mask=mask, use_cache=False).logits.square().mean()

    optimizer = torch.optim.SGD([V], lr=0.1)
    others, seen = [], []
    with sf.steer(model, {1: [sf.Add(V, 2.0), sf.Add(vector())]}), sf.steer(model, {1: sf.Add(-vector())}):
        for _ in range(3):
            optimizer.zero_grad()
            others.append(V.detach().clone().requires_grad_())
            loss = model(ids, attention_mask=mask, use_cache=False).logits.square().mean()
            loss.backward()
            assert V.grad is not None
            seen.append((loss.detach(), V.grad.clone()))
            optimizer.step()
    for other, (loss, found) in zip(others, seen, strict=True):
        expected = plain(other)
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(found, torch.autograd.grad(expected, other)[0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(V, start)
    with pytest.raises(ValueError, match=r"Plan.save: vector of Add\(vector: 4×48.*requires a gradient"):
        sf.Plan({1: sf.Add(V)}).save(tmp_path / "p")


# --- plans, files, tools -----------------------------------------------------------------------------------------------


def test_rows_are_saved_shown_and_loaded(tmp_path: Path) -> None:
    rows = table()
    plan = sf.Plan({1: [sf.Add(rows, 2.0, keep_norm=True), sf.Add(vector())]})
    again = sf.Plan.load(plan.save(tmp_path / "p"))
    (first, second) = again.edits["resid_post", 1]
    assert torch.equal(first.vector, rows)
    assert (first.strength, first.keep_norm, second.vector.shape) == (2.0, True, (48,))
    assert repr(first) == "Add(vector: 4×48, strength=2.0, keep_norm=True)"
    assert [None if row is None else row.vector.tolist() for row in first.by_token] == [None, *rows[1:].tolist()]
    text = show(tmp_path / "p")
    sizes = [float(2 * row.norm()) for row in rows]
    assert "4 × 48" in text
    assert f"‖c·v‖ = 0 to {max(sizes):.4g}, one row per prompt token" in text
    doubled = sf.Plan.load(convert(tmp_path / "p", tmp_path / "q", "plan", strength=2.0))
    assert torch.equal(doubled.edits["resid_post", 1][0].vector, rows)
    assert doubled.edits["resid_post", 1][0].strength == 4.0


def test_one_row_is_one_token_and_not_a_vector() -> None:
    model, ids = build("llama"), token_ids(1, 5, 0)
    one = vector()[None]
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[2]
        with sf.steer(model, {1: sf.Add(one)}):
            got = model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(got[0, 0], x[0, 0] + one[0])
    assert torch.equal(got[0, 1:], x[0, 1:])


def test_what_holds_only_vectors_refuses_rows_by_name(tmp_path: Path) -> None:
    plan = sf.Plan({1: sf.Add(table(), 2.0)})
    plan.save(tmp_path / "p")
    for to in ("gguf", "directions", "steering-vectors", "lm-eval"):
        with pytest.raises(ValueError, match=r"convert: .*Add\(vector: 4×48.* added to the prompt's first tokens"):
            convert(tmp_path / "p", tmp_path / f"x-{to}", to)
        assert not (tmp_path / f"x-{to}").exists()
    with pytest.raises(ValueError, match="bake: Add at resid_post 1 adds a row of its own to each prompt token"):
        sf.bake(build("gpt2"), plan)


def test_the_dose_is_that_of_the_tokens_that_a_row_is_for() -> None:
    model, tokenizer = build("llama"), make_tokenizer()
    rows = table()
    texts = ["w3 w4 w5 w6 w7 w8 w9", "w10 w11", "w11 w12 w13"]
    acts = sf.collect(model, tokenizer, texts, layers=[1], position="all", progress=False)
    at = [i for n in (7, 2, 3) for i in range(n)]
    kept = [k for k, i in enumerate(at) if 0 < i < T]  # the first row is zero
    shares = torch.stack([2 * rows[at[k]].norm() / acts[1][k].norm() for k in kept])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        (found,) = sf.dose(model, tokenizer, {1: sf.Add(rows, 2.0)}, texts)
        assert found.dose == pytest.approx(float(shares.quantile(0.5)), rel=1e-4)
        assert found.accumulated == pytest.approx(found.dose, rel=1e-3)
        (mixed,) = sf.dose(model, tokenizer, {1: [sf.Add(rows, 2.0), sf.Add(vector())]}, texts)
        (plain,) = sf.dose(model, tokenizer, {1: sf.Add(vector())}, texts)
    assert mixed.stream == pytest.approx(plain.stream)
    with pytest.raises(ValueError, match="dose: no text is long enough"):
        sf.dose(model, tokenizer, {1: sf.Add(rows)}, ["w3"])


# --- from two prompts --------------------------------------------------------------------------------------------------


def last_hidden(model: Any, ids: list[int], layer: int) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states[layer + 1][0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_the_difference_of_two_prompts_token_by_token(name: str) -> None:
    model, tokenizer = build(name), make_tokenizer(bos=True, pad_token="<unk>")
    V = sf.extract.prompt_difference(model, tokenizer, "w3 w4 w5", "w3 w7", layer=1)
    expected = last_hidden(model, [1, 3, 4, 5], 1) - last_hidden(model, [1, 3, 7, 0], 1)
    torch.testing.assert_close(V, expected, **CLOSE)
    assert not V[:2].any(), "both prompts begin alike"
    assert sf.Add(V, 5.0).by_token[:2] == (None, None)
    before = sf.extract.prompt_difference(model, tokenizer, "w3 w4 w5", "w3 w7", layer=-1, site="resid_pre")
    torch.testing.assert_close(before, V, **CLOSE)
    empty = sf.extract.prompt_difference(model, tokenizer, "w3 w4", "", layer=0)
    torch.testing.assert_close(empty, last_hidden(model, [1, 3, 4], 0) - last_hidden(model, [1, 0, 0], 0), **CLOSE)


def test_prompts_that_make_no_difference_are_refused() -> None:
    model, tokenizer = build("llama"), make_tokenizer()
    for texts, error, message in (
        (("w3", "w3"), ValueError, r"both prompts are the tokens \[3\]"),
        (("w3", ["w4"]), TypeError, "against must be one text; got list"),
        (("", ""), ValueError, r"both prompts are the tokens \[\]"),
        (("w3 </s>", "w3"), ValueError, r"both prompts are the tokens \[3, 2\]"),  # padded with the end-of-text token
    ):
        with pytest.raises(error, match=f"prompt_difference: {message}"):
            sf.extract.prompt_difference(model, tokenizer, *texts, layer=1)  # type: ignore[arg-type]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither one token for a space nor a padding token"):
        sf.extract.prompt_difference(model, tokenizer, "w3 w4", "w5", layer=1)


@pytest.mark.model
def test_love_minus_hate_as_published_on_a_real_model(smollm: tuple[Any, Any]) -> None:
    """Greedy text with a cache is that of a plain hook in an uncached loop, and it is another text than the unsteered one."""
    model, tokenizer = smollm
    V = sf.extract.prompt_difference(model, tokenizer, "I love you so much", "I hate you", layer=8)
    ids = tokenizer("I hate you because", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, **GREEDY)
    with sf.steer(model, {8: sf.Add(V, 5.0)}) as handle:
        got = model.generate(ids, **GREEDY)
    expected, _ = truth(model, 8, 5 * V, ids, torch.ones_like(ids))
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    assert handle.stats() == [min(len(V), ids.shape[1])]
