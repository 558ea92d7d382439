"""Bare passes: what a caller does between them to a cache, its rows and its padding is seen, or refused by its name."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import pytest
import torch
import transformers
from families import build, edited, token_ids
from transformers import DynamicCache, StaticCache

import steerfast as sf
from steerfast.hooks import passes as hooks_passes
from steerfast.models.caches import cache_in

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
IDS = token_ids(2, 10, 0)
PADDED = torch.ones_like(IDS)
PADDED[1, 8:] = 0
V5 = int(transformers.__version__.split(".")[0]) >= 5


def v(seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(48, generator=torch.Generator().manual_seed(seed))


def plan(positions: Any = "all") -> sf.Plan:
    return sf.Plan({1: sf.Add(v())}, positions)


def always(positions: str = "all") -> sf.Plan:
    """The same behind a condition that every prompt meets, read in the block before."""
    met = sf.Condition(sf.probes.LinearProbe(v(1), place=0), -1e6)
    return sf.Plan({1: sf.When(met, sf.Add(v()), layer=0)}, positions)


@pytest.fixture
def llama() -> Any:
    return copy.deepcopy(build("llama"))


def by_hand(model: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Greedy tokens of the whole text anew each time, the vector added to all behind the prompt."""

    def add(block: Any, args: Any, output: Any) -> Any:
        return torch.cat([output[:, :length], output[:, length:] + v()], 1)

    with model.model.layers[1].register_forward_hook(add):
        return model.generate(ids, use_cache=False, **GREEDY)


# --- a condition beside edits of generated tokens ---------------------------------------------------------------------


@pytest.mark.skipif(not V5, reason="the block of transformers 4 returns a tuple")
@pytest.mark.parametrize(
    "more", [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}], ids=str
)
@pytest.mark.parametrize("live", [False, True])
def test_a_condition_is_decided_where_nobody_is_edited(llama: Any, monkeypatch: Any, more: Any, live: bool) -> None:
    """In the prompt, of which "generated" edits nothing; also where only the device knows how far a cache is."""
    if live:
        monkeypatch.setattr(hooks_passes, "past_length", _counter)
    wanted = by_hand(llama, IDS[:1], 10)
    with sf.steer(llama, always("generated")) as handle:
        assert torch.equal(llama.generate(IDS[:1], **GREEDY, **more), wanted)
        assert handle.decisions() == [[True]] or bool(torch.as_tensor(handle.decisions()).all())
    assert not torch.equal(llama.generate(IDS[:1], **GREEDY), wanted)


def _counter(inputs: Any) -> Any:
    """The cache's own counter as the position of a pass, as on a GPU."""
    found = cache_in(inputs)
    return 0 if found is None else found[1].get_seq_length()


@pytest.mark.skipif(not V5, reason="transformers 4 counts a static cache from its keys")
def test_a_static_cache_that_holds_a_prompt_already_decides_nothing(llama: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(hooks_passes, "past_length", _counter)
    cache = StaticCache(config=llama.config, max_cache_len=16)
    with torch.no_grad():
        llama(IDS[:, :6], past_key_values=cache, use_cache=True)
        with sf.steer(llama, always(), prompt_length=6), pytest.raises(ValueError, match="before this forward pass"):
            llama(IDS[:, 6:7], past_key_values=cache, use_cache=True)


def test_a_strength_raised_while_generating_finds_its_condition_decided(llama: Any) -> None:
    with sf.steer(llama, always("generated"), strength=0.0) as handle, edited(llama) as found, torch.no_grad():
        cache = DynamicCache(config=llama.config)
        llama(IDS, past_key_values=cache, use_cache=True)
        handle.strength = 1.0
        llama(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert found == [["0" * 10] * 2, ["1"] * 2]


def test_a_row_without_a_token_decides_nothing(llama: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[1] = 0
    with sf.steer(llama, always()), edited(llama) as found, torch.no_grad():
        llama(IDS, attention_mask=mask, use_cache=False)
    assert found == [["0" * 9 + "1", "0" * 10]]


# --- a text in several passes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "length", "wanted"),
    [
        ("all", 10, ["11111", "11100"]),
        ("-1", 10, ["00001", "00100"]),
        ("last", (10, 8), ["00001", "00100"]),
        ("generated", 5, ["11111", "11100"]),
    ],
    ids=str,
)
def test_padding_that_comes_with_a_later_pass_is_left_alone(
    llama: Any, positions: str, length: Any, wanted: list[str]
) -> None:
    cache = DynamicCache(config=llama.config)
    with (
        torch.no_grad(),
        sf.steer(llama, plan(positions), prompt_length=length) as handle,
        edited(llama) as found,
    ):
        for stop in (5, 10):
            llama(IDS[:, stop - 5 : stop], attention_mask=PADDED[:, :stop], past_key_values=cache, use_cache=True)
        llama(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert found[1] == wanted
    behind = 2 if positions in ("all", "last", "generated") else 0
    assert handle.stats() == [sum(row.count("1") for rows in found[:2] for row in rows) + behind]


def test_a_probe_reads_no_padding_of_a_later_pass(llama: Any) -> None:
    probe = sf.probes.LinearProbe(v(2), place=1)
    with torch.no_grad(), sf.read(llama, probe) as whole:
        llama(IDS, attention_mask=PADDED, use_cache=False)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.read(llama, probe) as parts:
        llama(IDS[:, :5], attention_mask=PADDED[:, :5], past_key_values=cache, use_cache=True)
        llama(IDS[:, 5:], attention_mask=PADDED, past_key_values=cache, use_cache=True)
    assert torch.equal(parts["probe"].read, whole["probe"].read)
    torch.testing.assert_close(parts["probe"].last(), whole["probe"].last(), rtol=1e-4, atol=1e-4)


def test_a_condition_that_was_decided_stays_so_while_padding_comes(llama: Any) -> None:
    """More of a text becomes known: it is still that text."""
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.steer(llama, always(), prompt_length=5), edited(llama) as found:
        llama(IDS[:, :5], attention_mask=PADDED[:, :5], past_key_values=cache, use_cache=True)
        llama(IDS[:, 5:], attention_mask=PADDED, past_key_values=cache, use_cache=True)
    assert found == [["00001"] * 2, ["11111", "11100"]]


def static(config: Any) -> Any:
    return StaticCache(config=config, max_cache_len=32)


def dynamic(config: Any) -> Any:
    return DynamicCache(config=config)


CACHES = [dynamic, pytest.param(static, marks=pytest.mark.skipif(not V5, reason="transformers 4 cuts no static cache"))]


@pytest.mark.parametrize("cache_of", CACHES)
def test_a_cache_cut_into_its_prompt_says_no_more_where_that_ends(llama: Any, cache_of: Any) -> None:
    whole = torch.ones(2, 13, dtype=torch.long)
    for positions in ("all", "generated"):
        cache = cache_of(llama.config)
        with torch.no_grad(), sf.steer(llama, plan(positions)), edited(llama) as found:
            llama(IDS, attention_mask=PADDED, past_key_values=cache, use_cache=True)
            cache.crop(-4 if V5 else 6)
            if positions == "generated":
                with pytest.raises(ValueError, match="needs the prompt's length"):
                    llama(IDS[:, :7], attention_mask=whole, past_key_values=cache, use_cache=True)
            else:
                llama(IDS[:, :7], attention_mask=whole, past_key_values=cache, use_cache=True)
                assert found[1] == ["1" * 7] * 2  # columns 8 and 9 were padding of the text before


def test_what_a_cut_cache_still_holds_is_still_known(llama: Any) -> None:
    ids, probe = IDS.clone(), sf.probes.LinearProbe(v(2), place=1)
    ids[0, 2] = 50
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.steer(llama, plan("after:ids:50")), sf.read(llama, probe) as read, edited(llama) as found:
        llama(ids, past_key_values=cache, use_cache=True)
        cache.crop(-4 if V5 else 6)
        llama(ids[:, :3], past_key_values=cache, use_cache=True)
    assert found == [["0001111111", "0000000000"], ["111", "000"]]
    assert torch.equal(read["probe"].read, torch.ones(2, 9, dtype=torch.bool))


def test_a_padded_second_turn_moves_no_end_of_the_prompt(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.steer(llama, plan("generated")), edited(llama) as found:
        llama(IDS[:, :5], past_key_values=cache, use_cache=True)
        llama(IDS[:, 5:], attention_mask=PADDED, past_key_values=cache, use_cache=True)
        cache.crop(-3 if V5 else 7)
        llama(IDS[:, 7:9], attention_mask=torch.ones(2, 9), past_key_values=cache, use_cache=True)
    assert found == [["00000"] * 2, ["11111", "11100"], ["11"] * 2]


@pytest.mark.parametrize("positions", ["-1", "last", "-2:", "when"])
def test_an_end_that_has_been_passed_by_is_refused(llama: Any, positions: str) -> None:
    """That a row ended in the first pass shows only in the second."""
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.steer(llama, always() if positions == "when" else plan(positions), prompt_length=10):
        llama(IDS[:, :8], attention_mask=PADDED[:, :8], past_key_values=cache, use_cache=True)
        with pytest.raises(ValueError, match=r"prompt 1 has ended before this pass.* prompt_length= for each"):
            llama(IDS[:, 8:], attention_mask=PADDED, past_key_values=cache, use_cache=True)


def test_tokens_behind_the_prompt_may_be_taken_back(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.steer(llama, always("generated")), edited(llama) as found:
        llama(IDS[:, :6], past_key_values=cache, use_cache=True)
        llama(IDS[:, 6:9], past_key_values=cache, use_cache=True)
        cache.crop(-2 if V5 else 7)
        llama(IDS[:, 7:9], past_key_values=cache, use_cache=True)
    assert found == [["0" * 6] * 2, ["111"] * 2, ["11"] * 2]


@pytest.mark.parametrize("cache_of", CACHES)
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("positions", ["after:ids:50", "between:ids:50..51", "when", "read", "rows", "lengths"])
def test_rows_that_change_places_are_refused_where_it_matters_which_is_which(
    llama: Any, positions: str, cut: int, cache_of: Any
) -> None:
    cache, probe = cache_of(llama.config), sf.probes.LinearProbe(v(2), place=1)
    steered = {
        "when": lambda: sf.steer(llama, always()),
        "read": lambda: sf.read(llama, probe),
        "rows": lambda: sf.steer(llama, [plan(), None]),
        "lengths": lambda: sf.steer(llama, plan("generated"), prompt_length=[10, 8]),
    }.get(positions, lambda: sf.steer(llama, plan(positions)))
    with torch.no_grad(), steered():
        llama(IDS, past_key_values=cache, use_cache=True)
        for _ in range(3):
            llama(IDS[:, :1], past_key_values=cache, use_cache=True)
        if cut:
            cache.crop(-cut if V5 else 13 - cut)
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ValueError, match=r"reordered|rows of this cache have changed places"):
            llama(IDS[:, :1], past_key_values=cache, use_cache=True)


def test_a_probe_of_prompts_keeps_what_it_read_of_rows_that_change_places(llama: Any) -> None:
    cache, probe = DynamicCache(config=llama.config), sf.probes.LinearProbe(v(2), place=1)
    with torch.no_grad(), sf.read(llama, probe, positions="prompt") as read:
        llama(IDS, past_key_values=cache, use_cache=True)
        before = read["probe"].last()
        cache.reorder_cache(torch.tensor([1, 0]))
        llama(IDS[:, :1], past_key_values=cache, use_cache=True)
        assert torch.equal(read["probe"].last(), before)


def test_keys_that_were_copied_are_still_those_of_their_rows(llama: Any) -> None:
    ids, cache = IDS.clone(), DynamicCache(config=llama.config)
    ids[0, 2] = 50
    with torch.no_grad(), sf.steer(llama, plan("after:ids:50")), edited(llama) as found:
        llama(ids, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        llama(ids[:, :2], past_key_values=cache, use_cache=True)
        with llama.model.layers[2].register_forward_pre_hook(_fail), pytest.raises(MemoryError):
            llama(ids[:, :3], past_key_values=cache, use_cache=True)
        for layer in cache.layers:  # the pass had reached two of three layers
            layer.keys, layer.values = layer.keys[:, :, :12], layer.values[:, :, :12]
        llama(ids[:, :1], past_key_values=cache, use_cache=True)
    assert [found[0], found[1], found[-1]] == [["0001111111", "0" * 10], ["11", "00"], ["1", "0"]]


def _fail(*_: Any) -> None:
    raise MemoryError


def test_rows_that_change_places_are_steered_alike(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.steer(llama, plan("generated")), edited(llama) as found:
        llama(IDS, past_key_values=cache, use_cache=True)
        for _ in range(2):
            cache.reorder_cache(torch.tensor([1, 0]))
            llama(IDS[:, :1], past_key_values=cache, use_cache=True)
    assert found == [["0" * 10] * 2, ["1"] * 2, ["1"] * 2]


# --- several documents in a row -----------------------------------------------------------------------------------------

AT = torch.cat([torch.arange(4), torch.arange(6)])[None]


@pytest.mark.parametrize("positions", ["!0:1", "-1", "prompt & !-2:", "generated", "after:ids:50", "when", "read"])
def test_packed_documents_are_refused_where_a_token_counts_in_its_text(llama: Any, positions: str) -> None:
    probe = sf.probes.LinearProbe(v(2), place=1)
    steered = {
        "when": lambda: sf.steer(llama, always()),
        "read": lambda: sf.read(llama, probe),
    }.get(positions, lambda: sf.steer(llama, plan(positions)))
    with torch.no_grad(), steered():
        llama(IDS[:1], use_cache=False, position_ids=torch.arange(10)[None])
        with pytest.raises(ValueError, match="holds several documents"):
            llama(IDS[:1], use_cache=False, position_ids=AT)
    with torch.no_grad(), steered(), pytest.raises(ValueError, match="holds several documents"):
        llama(IDS[:1], use_cache=False, cu_seq_lens_q=torch.tensor([0, 4, 10]))
    with torch.no_grad(), steered():  # beside a cache, position ids tell no documents apart
        llama(IDS[:1], position_ids=AT)


@pytest.mark.parametrize("positions", ["all", f"ids:{int(IDS[0, 1])},{int(IDS[0, 6])}"])
def test_packed_documents_are_steered_as_each_alone(llama: Any, positions: str) -> None:
    with torch.no_grad(), sf.steer(llama, plan(positions)):
        packed = llama(IDS[:1], use_cache=False, position_ids=AT).logits
        alone = torch.cat([llama(part, use_cache=False).logits for part in (IDS[:1, :4], IDS[:1, 4:])], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


# --- passes of whoever goes around the model ----------------------------------------------------------------------------


def test_a_generate_taken_before_the_plan_is_refused_where_its_prompt_counts(llama: Any) -> None:
    kept = functools.partial(llama.generate, **GREEDY)
    with sf.steer(llama, plan("generated")):
        with pytest.raises(RuntimeError, match=r"call model\.generate while the plan is active"):
            kept(IDS[:1], prefill_chunk_size=3)
        announced = llama.generate(IDS[:1], **GREEDY)
    with sf.steer(llama, plan()):
        everywhere = kept(IDS[:1])
    assert not torch.equal(announced, everywhere)
    with sf.steer(llama, plan()):
        assert torch.equal(llama.generate(IDS[:1], **GREEDY), everywhere)
    with sf.steer(llama, plan("generated"), prompt_length=10):
        assert torch.equal(kept(IDS[:1]), announced)


def test_a_processor_steers_its_own_passes_inside_an_unsteered_generate(llama: Any) -> None:
    class Asked(transformers.LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            with sf.steer(llama, plan("generated"), prompt_length=10):
                first = llama(ids, use_cache=False).logits[:, -1]
            with sf.steer(llama, plan("!0:10")):
                assert torch.equal(llama(ids, use_cache=False).logits[:, -1], first)
            return first

    with sf.steer(llama, plan("generated")):
        wanted = llama.generate(IDS[:1], **GREEDY)
    found = llama.generate(IDS[:1], logits_processor=transformers.LogitsProcessorList([Asked()]), **GREEDY)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("threads", [False, True])
def test_a_pass_that_began_before_the_plan_stays_as_it_was(llama: Any, threads: bool) -> None:
    handles: list[Any] = []

    def attach(*_: Any) -> None:
        if handles:
            return
        if threads:
            other = threading.Thread(target=lambda: handles.append(sf.steer(llama, plan())))
            other.start()
            other.join()
        else:
            handles.append(sf.steer(llama, plan()))

    sf.steer(llama, plan()).remove()  # what the model does is known
    with torch.no_grad(), llama.model.layers[0].register_forward_hook(attach):
        plain = llama(IDS, use_cache=False).logits
        steered = llama(IDS, use_cache=False).logits
        handles[0].remove()
        assert torch.equal(llama(IDS, use_cache=False).logits, plain)
    assert not torch.equal(steered, plain)


def test_a_pass_inside_a_pass_leaves_the_outer_one_as_it_was(llama: Any) -> None:
    other, inner = token_ids(3, 4, 5), []

    def run(*_: Any) -> None:
        if not inner:
            inner.append(None)
            inner[0] = llama(other, use_cache=False).logits

    cache = DynamicCache(config=llama.config)
    with torch.no_grad(), sf.steer(llama, plan("last")) as handle:
        alone, wanted = llama(other, use_cache=False).logits, llama(IDS, use_cache=False).logits
        with llama.model.layers[0].register_forward_hook(run):
            found = llama(IDS, past_key_values=cache, use_cache=True).logits
        assert torch.equal(inner[0], alone)
        torch.testing.assert_close(found, wanted)
        before = handle.stats()
        llama(IDS[:, :1], past_key_values=cache, use_cache=True)
        assert handle.stats() == [before[0] + 2]


def test_blocks_without_their_decoder_are_refused(llama: Any) -> None:
    def hand(ids: torch.Tensor) -> Any:
        x, at = llama.model.embed_tokens(ids), torch.arange(ids.shape[1])[None]
        for block in llama.model.layers[:2]:
            x = block(x, position_embeddings=llama.model.rotary_emb(x, at), position_ids=at)
        return x

    with torch.no_grad():
        hand(IDS)
        with sf.steer(llama, plan()):
            with pytest.raises(RuntimeError, match="runs outside a pass of its decoder"):
                hand(IDS)
            llama(IDS, attention_mask=PADDED, use_cache=False)
            with pytest.raises(RuntimeError, match="runs outside a pass of its decoder"):
                hand(IDS)
        hand(IDS)


def test_a_decoder_whose_forward_is_called_past_its_hooks_is_refused(llama: Any) -> None:
    with torch.no_grad(), sf.steer(llama, plan("last")) as handle:
        with pytest.raises(RuntimeError, match=r"runs outside a pass of its decoder.* forward alone runs no hook"):
            llama.model.forward(IDS)
        assert torch.equal(llama.forward(IDS).logits, llama(IDS).logits)
    assert handle.stats() == [4]


@pytest.mark.parametrize("where", ["model.layers.2", "lm_head"])
def test_an_interrupted_pass_leaves_no_mask_behind(llama: Any, where: str) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    part = llama.get_submodule(where)
    with torch.no_grad(), sf.steer(llama, plan()):
        with part.register_forward_pre_hook(stop), pytest.raises(KeyboardInterrupt):
            llama(IDS[:, :8], attention_mask=PADDED[:, :8] * 0 + (torch.arange(8) > 2), use_cache=False)
        with edited(llama) as found:
            llama.model(IDS, use_cache=False)
            llama.model(IDS[:1], attention_mask=torch.ones(1, 10), use_cache=False)
            llama(IDS, attention_mask=PADDED, use_cache=False)
    assert found == [["1" * 10] * 2, ["1" * 10], ["1" * 10, "1" * 8 + "00"]]
