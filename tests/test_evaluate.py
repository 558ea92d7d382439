"""Multiple choice and free text: scores against one answer at a time in float64, files of the field, and the command."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_cli import saved  # noqa: F401  # a fixture
from test_sweeping import Letters

import steerfast as sf
from steerfast.cli import main as cli
from steerfast.tools import Choice, ChoiceScores, TextScores, evaluate_choices, evaluate_text, read_choices
from steerfast.tools.evaluate import distinct

CHOICES = [
    Choice("is it day", (" yes", " it is"), (" no", " never so", " who")),
    Choice("or night", (" no",), (" yes",)),
    Choice("what", (" a long answer",), (" b",)),
]


def plan(positions: str = "all") -> sf.Plan:
    v = torch.randn(48, generator=torch.Generator().manual_seed(2))
    return sf.Plan({1: sf.Add(v, 1.5)}, positions)


def by_hand(steered: sf.Plan | None, strength: float = 1.0) -> list[tuple[list[float], list[float]]]:
    """Σ log p of each answer, alone, with the vector added by a plain hook in float64 from the last prompt token on."""
    model = deepcopy(build("llama")).double()
    found = []
    for choice in CHOICES:
        head = Letters()(choice.prompt)["input_ids"]
        scores = []
        for answer in (*choice.matching, *choice.others):
            tail = Letters()(answer, False)["input_ids"]
            ids = torch.tensor([head + tail])

            def hook(_: Any, __: Any, out: Any, start: int = len(head) - 1) -> Any:
                x = (out[0] if isinstance(out, tuple) else out).clone()
                ((edit,),) = steered.edits.values()
                x[:, start:] += strength * edit.strength * edit.vector.double()
                return (x, *out[1:]) if isinstance(out, tuple) else x

            handle = None if steered is None else model.model.layers[1].register_forward_hook(hook)
            with torch.no_grad():
                rows = model(ids).logits[0, len(head) - 1 : -1].log_softmax(-1)
            if handle is not None:
                handle.remove()
            scores.append(float(rows.gather(1, torch.tensor(tail)[:, None]).sum()))
        found.append((scores[: len(choice.matching)], scores[len(choice.matching) :]))
    return found


def expected(scores: list[tuple[list[float], list[float]]]) -> tuple[float, float, float, float]:
    right = [sum(map(math.exp, a)) for a, _ in scores]
    wrong = [sum(map(math.exp, b)) for _, b in scores]
    n = len(scores)
    matching = sum(a > b for a, b in zip(right, wrong, strict=True)) / n
    mass = sum(a / (a + b) for a, b in zip(right, wrong, strict=True)) / n
    first = sum(a[0] > max(b) for a, b in scores) / n
    return matching, mass, first, sum(math.log(a / b) for a, b in zip(right, wrong, strict=True)) / n


@pytest.mark.parametrize(("steered", "strength"), [(None, 1.0), (plan("last"), 1.0), (plan("last"), -0.7)])
def test_the_scores_are_those_of_one_answer_at_a_time(steered: Any, strength: float) -> None:
    found = evaluate_choices(build("llama"), Letters(), CHOICES, steered, strength, draws=0, batch_size=4)
    scores = (found.matching, found.mass, found.first, found.log_odds)
    assert scores == pytest.approx(expected(by_hand(steered, strength)), abs=1e-4)
    assert (found.count, found.null) == (3, None)


def test_the_null_adds_random_directions_of_the_same_dose() -> None:
    found = evaluate_choices(build("llama"), Letters(), CHOICES, plan(), 2.0, draws=3)
    plain = evaluate_choices(build("llama"), Letters(), CHOICES).log_odds
    assert found.null is not None
    assert found.null.effect == pytest.approx(found.log_odds - plain)
    ((edit,),) = plan().edits.values()
    generator = torch.Generator().manual_seed(0)
    for effect in found.null.random:
        v = torch.randn(48, generator=generator)
        length = 2.0 * edit.strength * float(edit.vector.norm())
        control = sf.Plan({1: sf.Add(v / v.norm(), length)})
        again = evaluate_choices(build("llama"), Letters(), CHOICES, control, draws=0).log_odds
        assert effect == pytest.approx(again - plain, abs=1e-4)
    assert len(found.null.random) == 3
    assert found.null.shuffled == ()


def controls(edits: dict[Any, Any], strength: float = 1.0) -> Any:
    from steerfast.models.texts import TextReader
    from steerfast.tools import evaluate

    reader = TextReader.of(Letters(), "t")
    return evaluate._controls(build("llama"), reader, sf.Plan(edits), strength, CHOICES, 1)


def test_a_control_is_as_long_as_the_edit_at_the_strength_that_is_steered_with() -> None:
    generator = torch.Generator().manual_seed(3)
    turn = sf.Rotate(torch.linalg.qr(torch.randn(48, 2, generator=generator)).Q.T, degrees=60.0)
    texts = [choice.prompt for choice in CHOICES]
    x = sf.collect(build("llama"), Letters(), texts, [2], "all", progress=False)[2]
    for strength in (1.0, 0.1, -0.5):
        (found,) = controls(
            {-1: turn}, strength
        )  # a layer from the end, and a dose that is not proportional to the strength
        ((edit,),) = found.edits.values()
        wanted = float((turn.apply(x, strength) - x).norm(dim=1).quantile(0.5))
        assert float(edit.strength * edit.vector.norm()) == pytest.approx(wanted, rel=1e-4)
    low = sf.Clamp(turn.plane[0], high=float((x @ turn.plane[0]).quantile(0.8)))  # four of five rows stay
    (found,) = controls({2: low})
    change = (low.apply(x) - x).norm(dim=1)
    ((edit,),) = found.edits.values()
    assert float(edit.vector.norm()) == pytest.approx(float(change[change > 0].quantile(0.5)), rel=1e-4)


def test_a_control_stands_under_the_conditions_of_the_plan() -> None:
    generator = torch.Generator().manual_seed(3)
    v, w = torch.randn(2, 48, generator=generator)
    never = sf.When(sf.Condition(w, threshold=0.999), sf.Add(v, 2.0), layer=0)
    (found,) = controls({1: [never, sf.Add(w)]})
    gated, plain = found.edits["resid_post", 1]
    assert (gated.condition, gated.layer) == (never.condition, 0)
    assert float(gated.then.vector.norm()) == pytest.approx(2 * float(v.norm()), rel=1e-4)
    assert float(plain.vector.norm()) == pytest.approx(float(w.norm()), rel=1e-4)
    alone = evaluate_choices(build("llama"), Letters(), CHOICES, sf.Plan({1: never}), draws=2)
    assert alone.null is not None
    assert alone.null.random == pytest.approx((0.0, 0.0), abs=1e-6)
    (found,) = controls({1: sf.Add(torch.stack([v, 3 * w]))}, 2.0)  # rows of their own for two tokens
    ((edit,),) = found.edits.values()
    lengths = torch.stack([2 * v.norm(), 6 * w.norm()])
    torch.testing.assert_close(edit.vector.norm(dim=1), lengths, rtol=1e-4, atol=0)


def test_where_nothing_is_moved_there_is_no_null() -> None:
    found = evaluate_choices(build("llama"), Letters(), CHOICES, plan(), 0.0, draws=2)
    assert found.null is None
    assert found.log_odds == pytest.approx(evaluate_choices(build("llama"), Letters(), CHOICES).log_odds)


def test_choice_scores_by_hand() -> None:
    logs = [([0.5, 0.1], [0.2]), ([0.1], [0.3])]
    found = ChoiceScores.of([tuple(torch.tensor(side).double().log() for side in one) for one in logs])
    assert found.matching == 0.5
    assert found.mass == pytest.approx((0.75 + 0.25) / 2)
    assert found.first == 0.5
    assert str(found).startswith("matching 50.0%, mass 0.500, first 50.0%")


def test_distinct_n_and_repetition_by_hand() -> None:
    texts = ["the dog the dog", "The cat"]
    assert distinct(texts, 1) == 3 / 6
    assert distinct(texts, 2) == 3 / 4
    assert distinct(texts, 3) == 2 / 2
    assert math.isnan(distinct(["one"], 2))
    found = TextScores.of([*texts, "one"])
    assert found.repetition == pytest.approx((1 / 3 + 0) / 2)
    assert list(found.distinct) == [1, 2, 3]


def test_files_of_the_field_are_read(tmp_path: Path) -> None:
    pairs = [
        {
            "question": "Q?\n\nChoices:\n(A) x\n(B) y",
            "answer_matching_behavior": "(B)",
            "answer_not_matching_behavior": "(A)",
        }
    ]
    (tmp_path / "caa.json").write_text(json.dumps(pairs * 3))
    (one, _) = read_choices(tmp_path / "caa.json", limit=2)
    assert one == Choice("Q?\n\nChoices:\n(A) x\n(B) y\n\nAnswer:", (" (B)",), (" (A)",))

    class Chat:
        chat_template = "x"

    (chat, *_) = read_choices(tmp_path / "caa.json", Chat())
    assert (chat.prompt, chat.matching) == ([{"role": "user", "content": pairs[0]["question"]}], ("(B)",))
    (tmp_path / "t.csv").write_text(
        "Type,Question,Best Answer,Correct Answers,Incorrect Answers\nA,Why?,Good,Fine; Good;So. ,Bad; Worse.;\n"
    )
    (truth,) = read_choices(tmp_path / "t.csv")
    assert truth == Choice("Q: Why?\nA:", (" Good.", " Fine.", " So."), (" Bad.", " Worse."))


HEAD = "Question,Best Answer,Correct Answers,Incorrect Answers\n"
PAIRS = json.dumps(
    [{"question": "Q", "answer_matching_behavior": f"B{i}", "answer_not_matching_behavior": "C"} for i in range(2)]
)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", "a.json holds no questions; expected CAA's pairs"),
        ("a.json", "{}", "a.json holds one dict; expected CAA's pairs"),
        ("a.json", "[1]", "question 1 of .*a.json has no 'question'; expected CAA's pairs"),
        (
            "a.json",
            '[{"question": "x"}]',
            "question 1 of .*a.json has no 'answer_matching_behavior'; expected CAA's pairs",
        ),
        ("a.json", PAIRS.replace("B1", ""), "question 2 of .*a.json has '' as 'answer_matching_behavior'; expected"),
        (
            "a.json",
            PAIRS.replace('"B1"', "[1]"),
            r"question 2 of .*a.json has \[1\] as 'answer_matching_behavior'; expected",
        ),
        ("a.csv", "", "a.csv holds no questions"),
        ("a.csv", HEAD, "a.csv holds no questions"),
        ("a.csv", "x,y\n1,2\n", "question 1 of .*a.csv has no 'Question'; expected"),
        ("a.csv", f"{HEAD}q,a,b,c\nq\n", "question 2 of .*a.csv has '' as 'Best Answer'"),
        ("a.csv", f"{HEAD}q,,b,c\n", "question 1 of .*a.csv has '' as 'Best Answer'"),
        ("a.csv", f"{HEAD}q,a,b,\n", "question 1 of .*a.csv has '' as 'Incorrect Answers'"),
        ("a.csv", f"{HEAD}q,a,b,; ;\n", "question 1 of .*a.csv has no answer in 'Incorrect Answers', but '; ;'"),
        ("a.csv", f"{HEAD}{'q' * 200_000},a,b,c\n", "a.csv is no CSV"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        read_choices(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_choices(tmp_path / "none.csv")


def test_bad_questions_are_named() -> None:
    for fields, words in (
        (("", (" a",), (" b",)), "prompt is empty"),
        (("x", (), (" b",)), "matching is"),
        (("x", (" a",), "b"), "others"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            Choice(*fields)
    with pytest.raises(ValueError, match="choices is empty"):
        evaluate_choices(build("llama"), Letters(), [])


def test_the_command_scores_both(tmp_path: Path, saved: Any, capsys: Any) -> None:  # noqa: F811
    row = {"question": "people are", "answer_matching_behavior": "kind", "answer_not_matching_behavior": "rude"}
    (tmp_path / "q.json").write_text(json.dumps([row] * 2))
    folder = str(plan().save(tmp_path / "plan"))
    command = ["eval", saved("llama"), "--plan", folder, "--choices", str(tmp_path / "q.json"), "--draws", "2"]
    assert cli.main([*command, "--prompts", "i love", "--tokens", "5", "--out", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    assert "  unsteered   matching" in shown
    assert "of 2 random directions did as well" in shown
    assert "texts, steered: distinct-1" in shown
    found = json.loads((tmp_path / "out.json").read_text())["found"]
    assert found["texts"]["steered"]["texts"] != found["texts"]["unsteered"]["texts"]
    assert found["choices"][str(tmp_path / "q.json")]["steered"]["count"] == 2
    short = ["eval", saved("llama"), "--prompts", "i love", "--tokens", "1", "--out", str(tmp_path / "short.json")]
    assert cli.main(short) == 0  # one word has no pairs: null, for JSON has no NaN
    strict = json.loads((tmp_path / "short.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict["found"]["texts"]["unsteered"]["distinct"]["3"] is None
    assert cli.main(["eval", saved("llama")]) == 2
    assert "give questions or beginnings of texts" in capsys.readouterr().err


def test_free_text_is_the_models_greedy_text() -> None:
    model, tokenizer = build("llama"), Letters()
    tokenizer.decode = lambda ids, **_: " ".join(map(str, ids.tolist()))  # type: ignore[attr-defined]
    found = evaluate_text(model, tokenizer, ["abc", "some"], plan(), tokens=4)
    for text, prompt in zip(found.texts, ("abc", "some"), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with sf.steer(model, plan()), torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert text == " ".join(map(str, out[0, ids.shape[1] :].tolist()))
