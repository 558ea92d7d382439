"""Whether what a soak's requests were answered, and what its trace says of them, is what transformers makes of their texts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm_soak_forms import Form
from vllm_soak_rows import Rows, captured, not_as_asked
from vllm_truth import CLOSE, Truth, chosen
from vllm_truth_plans import UNSURE

Lines = list[tuple[int, int, list[list[Any]], dict[str, bool]]]


def verify(
    asked: dict[str, dict[str, Any]], trace: Path, truth: Truth, form: Form, folder: Path
) -> tuple[list[str], dict[str, float]]:
    """What is not as transformers has it, in words, and how much was compared."""
    lines: dict[str, Lines] = {}
    with open(trace) as file:
        for line in file:
            name, *rest = json.loads(line)
            lines.setdefault(sent_as(name), []).append(tuple(rest))
    rows: dict[str, Rows] = {}
    for name, found in captured(folder).items() if form.captures else ():
        rows.setdefault(sent_as(name), []).extend(found)
    wrong = [f"nobody sent {name}" for name in (lines.keys() | rows.keys()) - asked.keys() - {"last"}]
    counts: dict[str, float] = dict.fromkeys(
        ("steered_tokens", "decisions", "scores", "rows", "ended_by_limit", "unsure", "unsure_texts", "largest_error"),
        0,
    )
    for name, request in asked.items():
        if request["fate"] != "refuse" and (request.get("answer") or name in lines):
            told = settled(lines.get(name, []), request) if form.drafts else lines.get(name, [])
            found = check(request, told, rows.get(name, []), truth, counts)
            wrong += [f"{name}: {reason}" for reason in found] + [json.dumps(request)] * bool(found)
    return wrong, counts


def sent_as(name: str) -> str:
    """A request's name without what the server adds: what it completes, an index, a suffix."""
    return name.removeprefix("cmpl-").rsplit("-", 2)[0]


def settled(lines: Lines, request: dict[str, Any]) -> Lines:
    """What a trace says of the tokens that stay: a step takes back what was drafted at and behind the place where it begins."""
    kept: Lines = []
    for line in lines:
        while kept and kept[-1][0] >= line[0]:
            kept.pop()
        kept.append(line)
    if (answer := request.get("answer")) is None:
        return kept
    text = [*request["prompt"], *answer["tokens"]]
    end = len(text) - 1
    # a step without anybody steered writes no line, and so takes none back
    return [
        line
        for line in kept
        if line[0] <= end and (line[1] == text[line[0]] or (line[0] < end and (line[2] or line[3])))
    ]


def check(request: dict[str, Any], lines: Lines, rows: Rows, truth: Truth, counts: dict[str, float]) -> list[str]:
    """The same of one request, of which the trace has these lines and the folder of captures these rows."""
    xargs, prompt, answer = request["vllm_xargs"], request["prompt"], request.get("answer")
    known = {position: token for position, token, *_ in lines} | dict(enumerate(prompt))
    if answer is not None:
        known |= dict(enumerate(answer["tokens"], len(prompt)))
    if answer is None and not any(
        xargs.get("steer_strength", [])
    ):  # it may have run where the table was empty and not written down
        return [f"position {line[0]}: applied {line[2]}; asked for nothing" for line in lines if line[2]]
    ids = [known.get(position, -1) for position in range(max(known) + 1)]
    if -1 in ids:
        return [f"the trace leaves out position {ids.index(-1)}"]
    steered = acts(xargs, len(prompt), ids, truth)
    wrong, seen = _applied(lines, ids, steered, counts)
    found = truth.run(ids, len(prompt), steered, seen, request["adapted"])
    if found.doubtful:
        counts["unsure_texts"] += 1
        return wrong
    counts["decisions"] += found.decided
    counts["unsure"] += found.unsure
    wrong += [f"decided otherwise: {gate}" for gate in found.wrong]
    wrong += not_as_asked(xargs, len(prompt), ids, answer, rows, found.streams, counts, request["stop"])
    if answer is None:
        return wrong
    ids = ids[: len(prompt) + len(answer["tokens"])]  # what was under way when it ended is not answered
    reached = max((position for position, *_ in lines), default=-1)
    if any(s for _, s, _ in steered) and answer["tokens"] and reached < len(ids) - 2:
        wrong.append(f"followed to position {reached} of {len(ids) - 2}")
    last = found.logits[len(prompt) - 1 : len(ids) - 1]
    behind = last.max(-1).values - last.gather(1, torch.tensor(ids[len(prompt) :], dtype=torch.int64)[:, None])[:, 0]
    if request["likeliest"] and not request["temperature"] and (behind > CLOSE).any():
        wrong.append(f"token {int(behind.argmax())} is {float(behind.max()):g} below the likeliest one")
    scores = {name: value.numpy()[: len(ids)] for name, value in found.scores.items()}
    return wrong + _ended(request, answer, ids, scores, counts) + _scored(request, answer, ids, scores, truth, counts)


def acts(xargs: dict[str, Any], prompt: int, ids: list[int], truth: Truth) -> list[tuple[str, float, np.ndarray]]:
    """Plans in order, with strengths and where they act."""
    found = []
    for name, strength in zip(xargs.get("steer", []), xargs.get("steer_strength", []), strict=True):
        plan = truth.plans[name]
        where = chosen(xargs.get("steer_positions", plan.positions), prompt, ids)
        if plan.by_token:
            where &= np.arange(len(ids)) < min(plan.by_token, prompt)
        found.append((name, strength, where))
    return found


def _applied(
    lines: Lines, ids: list[int], steered: list[tuple[str, float, np.ndarray]], counts: dict[str, float]
) -> tuple[list[str], dict[str, dict[int, bool]]]:
    """Lines that are not what was asked for; and what the gates have decided, the same in every line of a position."""
    wrong: list[str] = []
    seen: dict[str, dict[int, bool]] = {}
    for position, token, applied, decided in lines:
        # a plan of two interventions shows up twice, with one strength
        found = [tuple(pair) for i, pair in enumerate(applied) if i == 0 or pair != applied[i - 1]]
        wanted = [(name, strength) for name, strength, acts in steered if acts[position] and strength]
        if not _same(found, wanted) or token != ids[position]:
            wrong.append(f"position {position}: token {token}, applied {found}; asked {ids[position]}, {wanted}")
        counts["steered_tokens"] += bool(applied)
        for gate, opened in decided.items():
            if seen.setdefault(gate, {}).setdefault(position, opened) != opened:
                wrong.append(f"position {position}: {gate} decided both ways")
    return wrong, seen


def _same(found: list[Any], wanted: list[Any]) -> bool:
    alias = {"gated15": "gated1"}  # one content, one slot
    names = [[alias.get(name, name) for name, _ in pairs] for pairs in (found, wanted)]
    return names[0] == names[1] and all(abs(a - b) < 1e-6 for (_, a), (_, b) in zip(found, wanted, strict=True))


def _ended(
    request: dict[str, Any],
    answer: dict[str, Any],
    ids: list[int],
    scores: dict[str, np.ndarray],
    counts: dict[str, float],
) -> list[str]:
    """Whether it ended where it had to, and why."""
    xargs, prompt, tokens = request["vllm_xargs"], len(request["prompt"]), answer["tokens"]
    read = chosen(xargs.get("steer_read_positions", "all"), prompt, ids)
    surely, maybe = len(ids), dict[str, set[int]]()  # the first position that is beyond a limit, and those that may be
    for limit in xargs.get("steer_abort", []):
        name, sign, level = re.split("([<>])", limit)
        beyond = (scores[name][:, 0] - float(level)) * (1 if sign == ">" else -1)
        near = UNSURE * max(1.0, abs(float(level)))
        surely = min([surely, *np.nonzero(read & (beyond > near))[0].tolist()])
        maybe[f"steer_abort: {name}{sign}{float(level):g}"] = set(np.nonzero(read & (beyond > -near))[0].tolist())
    if answer["stop"] in maybe:
        counts["ended_by_limit"] += 1
        at = len(ids) - 1
        here = at in maybe[answer["stop"]] if tokens else any(p < prompt for p in maybe[answer["stop"]])
        good = answer["why"] == "stop" and here and (surely >= at or not tokens)
        return [] if good else [f"ended at {at} of {prompt} by {answer['stop']}, and {surely} is beyond: {xargs}"]
    if surely < len(ids) - 1:  # the last token is never read
        return [f"went on to {len(ids) - 1}, and {surely} of {prompt} is beyond: {xargs}"]
    words = [f"w{token}" for token in tokens]
    stops = [i for i, token in enumerate(tokens) if token in request["stop_token_ids"] or words[i] in request["stop"]]
    if answer["why"] == "length":
        return [] if len(tokens) == request["max_tokens"] and not stops else [f"{len(tokens)} tokens, stops {stops}"]
    told = tokens[-1] if answer["stop"] in request["stop_token_ids"] else words[-1]
    return [] if stops == [len(tokens) - 1] and answer["stop"] == told else [f"{answer}, stops {stops}"]


def _scored(
    request: dict[str, Any],
    answer: dict[str, Any],
    ids: list[int],
    scores: dict[str, np.ndarray],
    truth: Truth,
    counts: dict[str, float],
) -> list[str]:
    """Scores that are not what transformers reads, or of other tokens than were asked for."""
    xargs, prompt = request["vllm_xargs"], len(request["prompt"])
    names = dict.fromkeys(
        [*xargs.get("steer_read", []), *(re.split("[<>]", one)[0] for one in xargs.get("steer_abort", []))]
    )
    if not names:
        return [] if answer["read"] is None else [f"read {answer['read']}"]
    if answer["read"] is None or list(answer["read"]) != list(names):
        return [f"read {answer['read']} for {list(names)}"]
    ended = str(answer["stop"]).startswith("steer_abort")
    where = np.nonzero(chosen(xargs["steer_read_positions"], prompt, ids)[: len(ids) - (not ended)])[0]
    wrong = []
    for name in names:
        got, values = answer["read"][name], scores[name][where]
        if ended and not answer["tokens"]:  # in the prompt, of which a few further tokens may have been run
            values = values[: got["tokens"]]
        elif got["tokens"] != len(values):
            wrong.append(f"{name}: {got} for {len(values)} tokens")
            continue
        if not len(values) and ended:
            wrong.append(f"{name}: ended by what was not read: {got}")
            continue
        counts["scores"] += values.size if truth.probes[name].kind != "top" else truth.probes[name].k * len(values)
        if "positions" in got and got["positions"] != where[: len(values)].tolist():
            wrong.append(f"{name}: positions {got['positions']} for {where.tolist()}")
        error = _error(truth.probes[name], got, values, xargs["steer_read_what"])
        counts["largest_error"] = max(counts["largest_error"], error)
        if not error < CLOSE:
            wrong.append(f"{name}: off by {error:g}")
    return wrong


def _error(look: Any, got: dict[str, Any], values: np.ndarray, what: str) -> float:
    """How far what is answered is from the scores (tokens, m), over the largest of them where that is above 1."""
    scale = max(1.0, float(np.abs(values).max(initial=0)))
    if look.kind == "top":
        found, features = (
            np.array(got["scores"]).reshape(-1, look.k),
            np.array(got["features"], int).reshape(-1, look.k),
        )
        best, theirs = -np.sort(-values, axis=1)[:, : look.k], np.take_along_axis(values, features, 1) * (found > 0)
        return max(float(np.abs(found - wanted).max(initial=0)) for wanted in (best, theirs)) / scale
    wanted = {"scores": values} if what == "tokens" else {}
    if len(values):
        wanted |= {"max": values.max(0), "mean": values.mean(0), "last": values[-1]}
    errors = [np.asarray(got[name], dtype=float).reshape(numbers.shape) - numbers for name, numbers in wanted.items()]
    return max((float(np.abs(error).max(initial=0)) for error in errors), default=0.0) / scale
