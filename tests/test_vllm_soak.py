"""The check of a long run: what transformers makes of a request passes, and each change of its trace, answer or rows does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

PROMPT, COUNT = [40, 9, 77, 21, 60, 33], 6
CHAINS = {"gated3": 1.0, "plan1": 0.5}
"""Of the request whose trace is changed: a plan with a condition, and one without."""


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        yield Soak(tmp_path_factory.mktemp("soak"))


class Soak:
    """The truth of a soak, and requests as an engine without a fault would answer and trace them."""

    def __init__(self, folder: Path) -> None:
        import vllm_soak_checks
        import vllm_soak_forms
        import vllm_soak_rows
        import vllm_truth

        self.checks, self.forms, self.rows, self.positions = (
            vllm_soak_checks,
            vllm_soak_forms.FORMS,
            vllm_soak_rows,
            vllm_truth,
        )
        self.folder, self.truth = folder, vllm_truth.Truth(folder)

    def found(self, ids: list[int], xargs: dict[str, Any], adapted: bool = False) -> Any:
        steered = self.checks.acts(xargs, len(PROMPT), ids, self.truth)
        return self.truth.run(ids, len(PROMPT), steered, {}, adapted)

    def request(self, xargs: dict[str, Any], adapted: bool = False) -> tuple[dict[str, Any], list[Any]]:
        """A request that was answered, and the lines of its trace."""
        ids = list(PROMPT)
        for _ in range(COUNT):
            ids.append(int(self.found(ids, xargs, adapted).logits[-1].argmax()))
        found, asked = self.found(ids, xargs, adapted), self.checks.acts(xargs, len(PROMPT), ids, self.truth)
        lines = [
            [
                "cmpl-soak-1-0-x",
                p,
                ids[p],
                [[name, s] for name, s, acts in asked if acts[p] and s],
                {gate: bool(opened[p]) for gate, opened in found.opened.items()},
            ]
            for p in range(len(ids) - 1)
        ]
        read = {}
        for name in xargs.get("steer_read", []):
            values = found.scores[name][len(PROMPT) : -1]
            values = values[:, 0] if values.shape[1] == 1 else values
            where = [*range(len(PROMPT), len(ids) - 1)]
            read[name] = {"tokens": len(values), "scores": values.tolist(), "positions": where}
            read[name] |= {"max": values.amax(0).tolist(), "mean": values.mean(0).tolist(), "last": values[-1].tolist()}
        answer = {"tokens": ids[len(PROMPT) :], "why": "length", "stop": None, "read": read or None}
        asked = {"request_id": "soak-1", "prompt": PROMPT, "max_tokens": COUNT, "vllm_xargs": xargs, "fate": "finish"}
        asked |= {"stop": [], "stop_token_ids": [], "adapted": adapted, "likeliest": True, "temperature": 0.0}
        asked["answer"] = answer
        return asked, lines

    def wrong(self, request: dict[str, Any], lines: list[Any], form: str = "lora", change: Any = None) -> list[str]:
        asked, told = json.loads(json.dumps({"soak-1": request})), json.loads(json.dumps(lines))
        if change is not None:
            change(asked["soak-1"], told)
        trace = self.folder / "trace"
        trace.write_text("".join(json.dumps(line) + "\n" for line in told))
        return self.checks.verify(asked, trace, self.truth, self.forms[form], self.folder / "captured")[0]


def test_a_change_of_an_answer_or_of_a_trace_is_seen(soak) -> None:
    xargs = {"steer": [*CHAINS], "steer_strength": [*CHAINS.values()], "steer_positions": "last"}
    xargs |= {"steer_read": ["lean", "several"], "steer_read_positions": "generated", "steer_read_what": "tokens"}
    request, lines = soak.request(xargs)
    assert {True, False} <= {line[4]["gated3/resid_post.1/0"] for line in lines}
    tokens, score = request["answer"]["tokens"], request["answer"]["read"]["lean"]["scores"]

    def limit(asked, _, level: float) -> None:
        asked["vllm_xargs"]["steer_abort"] = [f"lean>{level}"]

    assert soak.wrong(request, lines) == []
    assert soak.wrong(request, lines, change=lambda asked, _: limit(asked, _, max(score) + 1)) == []
    changes = [
        lambda _, lines: lines.pop(),  # not followed to its end
        lambda _, lines: lines[0].__setitem__(3, [["plan1", 0.5]]),  # before its first position
        lambda _, lines: lines[-1].__setitem__(3, []),
        lambda _, lines: lines[-1][3][-1].__setitem__(1, 0.6),
        lambda _, lines: lines[-1][3][-1].__setitem__(0, "plan2"),
        lambda _, lines: lines[-1].__setitem__(2, 3),  # another token
        lambda _, lines: lines[-2][4].__setitem__("gated3/resid_post.1/0", not lines[-2][4]["gated3/resid_post.1/0"]),
        lambda _, lines: lines.append(["cmpl-soak-2-0-x", 0, 1, [], {}]),  # nobody sent it
        lambda asked, _: asked.update(adapted=True),  # with the adapter it would have been another text
        lambda asked, _: asked["answer"]["tokens"].__setitem__(-1, (tokens[-1] + 1) % 128),  # not the likeliest
        lambda asked, _: asked["answer"]["tokens"].pop(),
        lambda asked, _: asked["answer"].update(why="stop"),
        lambda asked, _: asked["answer"].update(read=None),
        lambda asked, _: asked["answer"]["read"]["lean"]["scores"].__setitem__(1, score[1] + 0.02),
        lambda asked, _: asked["answer"]["read"]["several"]["last"].__setitem__(2, score[1] + 9),
        lambda asked, _: asked["answer"]["read"]["lean"]["positions"].__setitem__(0, 0),
        lambda asked, _: asked["answer"]["read"]["lean"].update(tokens=0, missing=5),
        lambda asked, _: limit(asked, _, min(score) - 1),  # it should have ended
        lambda asked, _: (limit(asked, _, 9e3), asked["answer"].update(why="stop", stop="steer_abort: lean>9000")),
    ]  # fmt: skip
    for i, change in enumerate(changes):
        assert soak.wrong(request, lines, change=change), i


@pytest.mark.parametrize(
    "plan", ["features0", "alone0", "many", "normal0", "normal1", "normal3", "both", "flow of two", "long", "by token"]
)
def test_the_answer_of_another_strength_is_seen(soak, plan) -> None:
    """Edits of every kind move what is read behind them, with the adapter and without."""
    for adapted in (False, True):
        xargs = {"steer": [plan], "steer_strength": [1.0], "steer_read": ["late"]}
        request, lines = soak.request(
            xargs | {"steer_read_positions": "generated", "steer_read_what": "tokens"}, adapted
        )
        assert soak.wrong(request, lines) == []

        def change(asked: dict[str, Any], told: list[Any]) -> None:
            asked["vllm_xargs"]["steer_strength"] = [0.9]
            for line in told:
                line[3] = [[name, 0.9] for name, _ in line[3]]

        assert any("off by" in line for line in soak.wrong(request, lines, change=change)), adapted


def test_what_was_drafted_and_taken_back_is_no_part_of_a_text(soak) -> None:
    request, lines = soak.request({"steer": ["plan1"], "steer_strength": [1.0]})
    p = len(PROMPT) + 1
    drafts = [[lines[0][0], p + i, 3, [["plan1", 1.0]], {}] for i in range(3)]
    told = [*lines[:p], *drafts, *lines[p:]]
    ends = [*told, [lines[0][0], p + COUNT, 3, [], {}]]
    assert soak.wrong(request, told, "ngram") == soak.wrong(request, ends, "ngram") == []
    assert soak.wrong(request, told, "plain")  # without drafts each line must be right
    told[-1] = [*told[-1][:2], 3, *told[-1][3:]]
    assert soak.wrong(request, told, "ngram")


def test_a_row_that_is_missing_too_much_or_another_is_seen(soak) -> None:
    xargs = {"steer_capture": [1, "mlp_out.1"], "steer_capture_positions": "1:6 | generated"}
    xargs |= {
        "steer_capture_edits": "after",
        "steer_capture_dtype": "float32",
        "steer": ["plan1"],
        "steer_strength": [1.0],
    }
    request, _ = soak.request(xargs)
    ids = [*PROMPT, *request["answer"]["tokens"]]
    streams = soak.found(ids, xargs).streams
    points = [("resid_post", 1, True, "float32"), ("mlp_out", 1, True, "float32")]
    rows = [soak.rows.Row(one, p, ids[p], streams[one[:3]][p]) for one in points for p in range(1, len(ids) - 1)]

    def wrong(rows: list[Any], answer: Any = request["answer"]) -> list[str]:
        counts = {"rows": 0}
        return soak.rows.not_as_asked(xargs, len(PROMPT), ids, answer, rows, streams, counts)

    last = len(ids) - 1
    assert wrong(rows) == wrong([*rows, soak.rows.Row(points[0], last, ids[last], streams[points[0][:3]][last])]) == []
    assert wrong([], None) == []  # a request that was hung up is given up
    for changed in (
        rows[1:],
        [*rows, rows[0]],
        [*rows, rows[0]._replace(position=0)],
        [*rows, rows[0]._replace(point=("resid_post", 2, True, "float32"))],
        [rows[0]._replace(token=3), *rows[1:]],
        [rows[0]._replace(stream=rows[0].stream + 0.1), *rows[1:]],
        [rows[0]._replace(stream=torch.full_like(rows[0].stream, float("nan"))), *rows[1:]],
    ):
        assert wrong(changed)
