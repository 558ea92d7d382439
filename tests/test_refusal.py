"""The refusal direction against the selection of its authors, redone with plain hooks in float64, on tiny models."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_cli import saved  # noqa: F401  # a fixture
from torch import Tensor

import steerfast as sf
from steerfast._null import Null
from steerfast.cli import main as cli
from steerfast.tools import Candidate, Refusal, RefusalRules, refusal_rates, select_refusal
from steerfast.tools.refusal_scores import RefusalScorer, divergence

TEMPLATE = "Q {instruction} A:"
HARMFUL = [f"zzz {word}" for word in "abcdefghij"]
HARMLESS = [f"{word} kkk m" for word in "nopqrstuvwx"]
EASY = RefusalRules(words=("i", "s"), divergence=9.0, induction=-99.0, late=0.0, filtered=False, draws=3)


class Letters:
    """A tokenizer: one token per letter, one special token in front."""

    all_special_ids = (1,)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [3 + ord(letter) % 90 for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(33 + i) for i in ids)


def ids_of(instruction: str) -> Tensor:
    return torch.tensor([Letters()(TEMPLATE.replace("{instruction}", instruction))["input_ids"]])


@contextmanager
def hooked(hooks: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    handles = [getattr(module, register)(hook) for module, register, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without(r: Tensor) -> Callable[[Tensor], Tensor]:
    unit = r / r.norm()
    return lambda x: x - (x @ unit)[..., None] * unit


def ablating(model: Any, r: Tensor) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Every block's input, and what attention and MLP return, without r: the authors' hooks."""
    cut = without(r)

    def before(_: Any, args: Any) -> Any:
        return (cut(args[0]), *args[1:])

    def behind(_: Any, __: Any, out: Any) -> Any:
        return (cut(out[0]), *out[1:]) if isinstance(out, tuple) else cut(out)

    found: list[tuple[Any, str, Callable[..., Any]]] = []
    for block in model.model.layers:
        found += [(block, "register_forward_pre_hook", before)]
        found += [(part, "register_forward_hook", behind) for part in (block.self_attn, block.mlp)]
    return found


def adding(model: Any, r: Tensor, layer: int) -> list[tuple[Any, str, Callable[..., Any]]]:
    hook = lambda _, args: (args[0] + r, *args[1:])  # noqa: E731
    return [(model.model.layers[layer], "register_forward_pre_hook", hook)]


@torch.no_grad()
def first(model: Any, instructions: list[str], hooks: list[Any]) -> Tensor:
    with hooked(hooks):
        return torch.stack([model(ids_of(text)).logits[0, -1] for text in instructions])


def refusal(logits: Tensor, words: list[int]) -> float:
    p = logits.softmax(-1)[:, words].sum(-1)
    return float((torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)).mean())


def authors(name: str) -> tuple[dict[tuple[int, int], tuple[float, float, float]], dict[tuple[int, int], Tensor]]:
    """(position, layer) to the three scores, and to the direction, prompt by prompt in float64."""
    model = deepcopy(build(name)).double()
    words = sorted({3 + ord(letter) % 90 for letter in "is"})
    held = [side[::5] for side in (HARMFUL, HARMLESS)]
    taught = [[text for i, text in enumerate(side) if i % 5] for side in (HARMFUL, HARMLESS)]
    streams: dict[str, list[Tensor]] = {}
    for text in [*taught[0], *taught[1]]:
        seen: list[Tensor] = []
        keep = lambda _, args: seen.append(args[0][0, -3:].clone())  # noqa: B023, E731
        first(model, [text], [(block, "register_forward_pre_hook", keep) for block in model.model.layers])
        streams[text] = seen
    scores, directions = {}, {}
    plain = first(model, held[1], [])
    for position in (-3, -2, -1):
        for layer in range(3):
            means = [torch.stack([streams[text][layer][position] for text in side]).mean(0) for side in taught]
            r = means[0] - means[1]
            if not r.norm() > 1e-6:
                continue
            directions[position, layer] = r
            ablated = [first(model, side, ablating(model, r)) for side in held]
            added = first(model, held[1], adding(model, r, layer))
            p, q = plain.softmax(-1), ablated[1].softmax(-1)
            kl = float((p * (torch.log(p + 1e-6) - torch.log(q + 1e-6))).sum(-1).mean())
            scores[position, layer] = refusal(ablated[0], words), refusal(added, words), kl
    return scores, directions


def selected(name: str = "llama", rules: RefusalRules = EASY, **others: Any) -> Refusal:
    return select_refusal(build(name), Letters(), HARMFUL, HARMLESS, rules, TEMPLATE, **{"progress": False, **others})


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_candidate_has_the_scores_of_the_authors_hooks(name: str) -> None:
    scores, directions = authors(name)
    found = selected(name, batch_size=3)
    assert {(one.position, one.layer) for one in found} == set(scores)
    assert (-1, 0) not in scores  # every prompt has the same token there: nothing differs
    for one in found:
        assert (one.bypass, one.induction, one.divergence) == pytest.approx(scores[one.position, one.layer], abs=2e-5)
    best = min(scores, key=lambda key: scores[key][0])
    assert found.best is not None
    assert (found.best.position, found.best.layer) == best
    torch.testing.assert_close(found.direction.vector.double(), directions[best], rtol=1e-4, atol=1e-5)
    assert found.direction.origin.place == ("resid_pre", best[1])
    assert found.direction.origin.position == best[0]


class Ending(Letters):
    """One that puts a token behind each text, too, as tokenizers with `add_eos_token` do."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": super().__call__(text, add_special_tokens)["input_ids"] + [2] * add_special_tokens}


def test_the_answer_begins_behind_the_template_not_behind_an_end_of_text_token() -> None:
    plain, ending = (
        select_refusal(build("llama"), tokenizer, HARMFUL, HARMLESS, EASY, TEMPLATE, progress=False)
        for tokenizer in (Letters(), Ending())
    )
    assert ending.tokens == plain.tokens
    assert (ending.unsteered, list(ending)) == (plain.unsteered, list(plain))
    rates = [refusal_rates(build("llama"), tok, HARMFUL, [None], EASY, TEMPLATE) for tok in (Letters(), Ending())]
    assert rates[0] == rates[1]


def test_the_plans_do_what_was_scored(tmp_path: Path) -> None:
    found, model = selected(), build("llama")
    scorer = RefusalScorer(model, Letters(), EASY.words, TEMPLATE, 8)
    harmful, harmless = scorer.ids(HARMFUL[::5]), scorer.ids(HARMLESS[::5])
    ablate, induce = (sf.Plan.load(plan.save(tmp_path / n)) for n, plan in (("a", found.ablate), ("i", found.induce)))
    assert float(scorer.refusal(scorer.logits(harmful, ablate)).mean()) == pytest.approx(found.best.bypass, abs=1e-5)
    assert float(scorer.refusal(scorer.logits(harmless, induce)).mean()) == pytest.approx(
        found.best.induction, abs=1e-5
    )
    kl = divergence(scorer.logits(harmless), scorer.logits(harmless, ablate))
    assert kl == pytest.approx(found.best.divergence, abs=1e-5)
    assert not model._forward_hooks


def test_the_share_of_the_last_layers_is_exact() -> None:
    for tenths in range(10):
        for count in range(1, 101):
            assert RefusalRules(late=tenths / 10).layers(count) == range(count * (10 - tenths) // 10), (tenths, count)


def test_the_limits_and_the_last_layers_drop_candidates() -> None:
    every = selected()
    late = selected(rules=RefusalRules(("i", "s"), 9.0, -99.0, late=0.3, filtered=False, draws=0))
    assert {one.layer for one in late} == {1}
    assert late.bypass_null is None
    cut = sorted(one.divergence for one in every)[len(every) // 2]
    limited = selected(rules=RefusalRules(("i", "s"), cut, -99.0, late=0.0, filtered=False, draws=0))
    assert {one.fallen for one in limited} == {"", "divergence"}
    standing = [one for one in every if one.divergence <= cut]
    assert limited.best is not None
    assert limited.best.bypass == pytest.approx(min(one.bypass for one in standing))


def test_where_all_fall_it_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"select_refusal: all \d+ candidates fell \(\d+ by induction\)"):
        found = selected(rules=RefusalRules(("i", "s"), 9.0, 99.0, late=0.0, filtered=False))
    assert (found.best, found.direction, found.ablate, found.induce) == (None, None, None, None)
    assert "All 6 candidates fell" in repr(found)
    assert json.loads(found.save_table(tmp_path / "t.json").read_text())["best"] is None
    assert found.heat_map(tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"


def test_the_nulls_are_controls_at_the_same_place() -> None:
    found = selected()
    assert isinstance(found.bypass_null, Null)
    assert isinstance(found.induction_null, Null)
    assert found.bypass_null.effect == -found.best.bypass
    assert found.induction_null.effect == found.best.induction
    assert len(found.bypass_null.shuffled) == len(found.induction_null.random) == 3
    assert len({*found.bypass_null.shuffled, *found.bypass_null.random}) == 6
    again = selected()
    assert again.bypass_null == found.bypass_null


def test_prompts_that_the_model_treats_otherwise_are_left_out() -> None:
    scorer = RefusalScorer(build("llama"), Letters(), EASY.words, TEMPLATE, 8)
    pool = [f"{a}{b}{c}" for a in "abcdefg" for b in "hijk" for c in "lmno"]
    likely = scorer.logits(scorer.ids(pool)).softmax(-1)
    # words so that about half of the pool is "refused"
    order = likely.median(0).values.argsort(descending=True)
    letters = {3 + ord(c) % 90: c for c in map(chr, range(33, 123))}
    words: list[str] = []
    for token in order.tolist():
        if token in letters:
            words.append(letters[token])
            score = RefusalScorer(build("llama"), Letters(), words, TEMPLATE, 8).refusal(likely.log())
            if 0.2 < float((score > 0).double().mean()) < 0.8:
                break
    refused = [text for text, s in zip(pool, score.tolist(), strict=True) if s > 0]
    rules = RefusalRules(tuple(words), 99.0, -99.0, late=0.0, draws=0)
    found = select_refusal(build("llama"), Letters(), pool[:60], pool[60:], rules, TEMPLATE, progress=False)
    assert found.prompts == (len(set(refused) & set(pool[:60])), len(set(pool[60:]) - set(refused)))
    (share,) = refusal_rates(build("llama"), Letters(), pool, [None], rules, TEMPLATE)
    assert share == pytest.approx(len(refused) / len(pool))
    none = RefusalRules(("i",), 9.0, 0.0, late=0.0)
    with pytest.raises(ValueError, match=r"the model refuses 0 of 10 harmful prompts by .*filtered=False"):
        select_refusal(build("llama"), Letters(), HARMFUL, HARMLESS, none, TEMPLATE, progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"template": None}, "no chat template; give template="),
        ({"template": "Q:"}, r"must hold \"{instruction}\""),
        ({"template": "Q {instruction}"}, "no token follows the instruction"),
        ({"harmful": ["a"]}, "harmful holds 1 texts; expected at least 5"),
        ({"harmless": "abc"}, "harmless must be several texts"),
        ({"harmful": ["a", "b", "", "c", "d"]}, "holds ''; expected texts with content"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    given = {"harmful": HARMFUL, "harmless": HARMLESS, "rules": EASY, "template": TEMPLATE, "progress": False}
    with pytest.raises((TypeError, ValueError), match=words):
        select_refusal(build("llama"), Letters(), **{**given, **change})


def test_bad_rules_are_named() -> None:
    for rules, words in (
        ({"words": ()}, "words is"),
        ({"late": 1.0}, "late is 1.0"),
        ({"divergence": math.nan}, "divergence"),
    ):
        with pytest.raises(ValueError, match=words):
            RefusalRules(**rules)
    assert RefusalRules().fallen(math.nan, 0.0, 0.0) == "no number"


def test_the_table_puts_the_best_first() -> None:
    rows = [
        Candidate(-1, 3, -2.0, 1.0, 0.5, "divergence"),
        Candidate(-1, 4, -1.0, 1.0, 0.05, ""),
        Candidate(-2, 4, 0.0, 1.0, 0.0, ""),
    ]
    shown = repr(Refusal(rows, (3.0, -3.0), {-1: "\n", -2: "x"})).splitlines()
    assert shown[0] == "Candidates; refusal unsteered: +3.00 on harmful and -3.00 on harmless prompts, nats"
    assert shown[2].split() == ["-1", r"'\n'", "4", "-1.00", "+1.00", "0.050", "best"]
    assert shown[-1].split()[-1] == "divergence"


def test_the_command_leaves_plans_table_and_picture(tmp_path: Path, capsys: Any, saved: Any) -> None:  # noqa: F811
    harmful = [f"i hate {word}" for word in ("dog", "fox", "you", "people", "i", "hate")]
    harmless = [f"love the {word}" for word in ("dog", "fox", "you", "people", "i", "hate")]
    xstest = tmp_path / "xstest.csv"
    xstest.write_text("id,prompt,label\n1,the dog,safe\n2,the fox,unsafe\n3,the lazy dog,safe\n")
    command = ["refusal", saved("llama"), "--harmful", *harmful, "--harmless", *harmless, "--every", "--late", "0"]
    command += ["--draws", "2", "--divergence", "9", "--template", "{instruction} because good", "--words", "bad"]
    command += ["--xstest", str(xstest), "--out", str(tmp_path / "out")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*command, "--induction", "-99"]) == 0
    shown = capsys.readouterr().out
    assert "XSTest      2 safe prompts: refused 0.0% unsteered, 0.0% ablated" in shown
    assert "Null        bypass: " in shown
    plan = sf.Plan.load(tmp_path / "out" / "ablate")
    assert ("attn_out", 0) in plan.edits
    assert next(iter(sf.Plan.load(tmp_path / "out" / "induce").edits)).site == "resid_pre"
    assert json.loads((tmp_path / "out" / "refusal.json").read_text())["candidates"]
    assert (tmp_path / "out" / "refusal.png").stat().st_size > 1000
    assert cli.main([*command, "--induction", "99"]) == 1
    told = capsys.readouterr().out
    for name in ("ablate", "induce"):
        assert f"{name} is of an earlier run: remove it" in told
    assert "candidates fell" in told
    assert cli.main([*command, "--xstest", str(tmp_path / "none.csv")]) == 2
