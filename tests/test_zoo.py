"""Every architecture of transformers, steered, against an oracle of plain hooks and against what it did before.

`tests/data/zoo.json` holds the outcome of every check of every pair; one may become better, never worse. Wrong and raised
outcomes that are known are listed, and only ever fewer. `python tests/zoo.py --write` writes the table anew.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="a process of its own for each model, with limits: POSIX only")

import transformers
import zoo
import zoo_checks
import zoo_oracle
import zoo_runner
import zoo_table
from packaging.version import Version

TABLE = zoo_table.load()
pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks a process that has loaded torch"),
    pytest.mark.skipif(
        Version(transformers.__version__) < Version(TABLE["transformers"]),
        reason="the table is of a newer transformers",
    ),
]

SOME = set(
    """
llama gpt2 gpt_neox_japanese phi gemma2 olmo2 gemma4_text opt
gpt_oss qwen3_moe deepseek_v3
jamba nemotron_h bamba qwen3_next lfm2 zamba2 recurrent_gemma
mamba2 rwkv
falcon bloom bert cpmant xlnet reformer deepseek_v4 beam mllama
llava blip-2 bart t5
""".split()  # noqa: SIM905
)
"""Plain, post-norm, parallel; mixtures; hybrids; states; outputs of every kind; several streams; pictures; encoders."""

PAIRS = {f"{kind} {name}": mapping for mapping, kind, name in zoo.pairs()}
CHOSEN = [
    pair
    for pair, mapping in PAIRS.items()
    if pair.split()[0] in SOME and not (mapping == "seq2seq" and "t5" not in pair)
]


@pytest.fixture(scope="module")
def few() -> dict[str, Any]:
    asked = [*CHOSEN, "no_such_type NoSuchClass"]
    return zoo_runner.run_all([tuple(pair.split()) for pair in asked], progress=zoo_runner.say)


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    jobs = int(os.environ.get("ZOO_JOBS", "1"))
    return zoo_runner.run_all([tuple(pair.split()) for pair in PAIRS], jobs, progress=zoo_runner.say)


def known(pair: str) -> dict[str, str]:
    """What the table says of a pair; {} if it does not know it."""
    one = TABLE["pairs"].get(f"{PAIRS[pair]} {pair}")
    return {} if one is None else zoo_table.spread(one, zoo_checks.CHECKS)


def compare(pair: str, results: dict[str, Any]) -> None:
    before, now = known(pair), results[pair]["outcomes"]
    down = [
        f"{check}\n    was {before.get(check, 'unknown')}\n    is  {outcome}"
        for check, outcome in now.items()
        if zoo_table.worse(before.get(check), outcome)
    ]
    assert not down, f"{pair}, transformers {transformers.__version__}, worse than in zoo.json:\n" + "\n".join(down)


@pytest.mark.parametrize("pair", CHOSEN)
def test_a_few_of_every_kind(pair: str, few: dict[str, Any]) -> None:
    compare(pair, few)


@pytest.mark.zoo
@pytest.mark.parametrize("pair", list(PAIRS))
def test_all(pair: str, everything: dict[str, Any]) -> None:
    compare(pair, everything)


def test_the_page_is_what_the_table_gives() -> None:
    assert zoo_table.PAGE.read_text(encoding="utf-8") == zoo_table.page(TABLE)


def test_what_is_known_to_be_wrong_is_said() -> None:
    """Every fault that is known stands on the page; a warning counts them, so that each run shows what is left."""
    page = zoo_table.PAGE.read_text(encoding="utf-8")
    left = page[page.index("## What is wrong") :]
    faults: dict[str, set[str]] = {one: set() for one in zoo_table.BAD}
    for pair, outcomes in TABLE["pairs"].items():
        for outcome in outcomes.values():
            if zoo_table.word(outcome) in zoo_table.BAD:
                _, kind, class_name = pair.split()
                assert f"| {kind} | {class_name} |" in left
                faults[zoo_table.word(outcome)].add(kind)
    for one, kinds in faults.items():
        if kinds:
            warnings.warn(f"zoo: {one} in {len(kinds)} types: {', '.join(sorted(kinds))}", stacklevel=1)


def test_the_table_knows_every_check() -> None:
    for pair, one in TABLE["pairs"].items():
        assert set(one) in ({"every check"}, set(zoo_checks.CHECKS)), pair
        assert {zoo_table.word(outcome) for outcome in one.values()} <= set(zoo_table.RANKS), pair


@pytest.mark.parametrize(
    ("old", "new", "down"),
    [
        ("right", "right", False),
        ("right", "refused: steer: no", True),
        ("refused: steer: no", "right", False),
        ("refused: steer: no", "refused: steer: another reason", False),
        ("refused: steer: no", "raised: KeyError: 3", True),
        ("wrong: off", "refused: steer: no", False),
        ("wrong: off", "raised: KeyError: 3", False),
        ("raised: KeyError: 3", "wrong: off", True),
        ("right", "not comparable: it does not run", True),
        ("right: 3 of 4 layers", "right: 2 of 4 layers", True),
        ("right: 3 of 4 layers", "right", False),
        (None, "refused: steer: no", False),
        (None, "wrong: off", True),
        (None, "raised: KeyError: 3", True),
    ],
)
def test_never_worse(old: str | None, new: str, down: bool) -> None:
    assert zoo_table.worse(old, new) is down


# --- the oracle sees what it is there to see -----------------------------------------------------------------------------


class Plain:
    """A handle as `steer` returns it, whose work is done by plain hooks."""

    def stats(self) -> list[int]:
        return [0]


def steering(change: Callable[..., Any]) -> Callable[..., Any]:
    """A `steer` made of plain hooks, which `change` may spoil: it maps (edits, where) to those that act."""

    @contextmanager
    def steer(subject: zoo_oracle.Subject, plan: Any, **more: Any) -> Iterator[Plain]:
        one = plan[0] if isinstance(plan, list) else plan
        edits = dict(one.edits) if hasattr(one, "edits") else one
        positions = getattr(one, "positions", "all")
        where = zoo_oracle.FIRST_ROW if isinstance(plan, list) else zoo_oracle.POSITIONS[positions][0]
        places = [(key[1], key[0]) if isinstance(key, tuple) else (key, "resid_post") for key in edits]
        vectors = [(edit[0] if isinstance(edit, (list, tuple)) else edit).vector for edit in edits.values()]
        acting = [(layer % 4, site, vector) for (layer, site), vector in zip(places, vectors, strict=True)]
        with zoo_oracle.plainly(subject, *change(acting, where)):
            yield Plain()

    return steer


SPOILT: dict[str, tuple[Callable[..., Any], str]] = {
    "another layer": (lambda edits, where: ([((k + 1) % 4, site, v) for k, site, v in edits], where), "resid_post"),
    "another side": (lambda edits, where: ([(k, "resid_post", v) for k, _, v in edits], where), "resid_pre"),
    "too strong": (lambda edits, where: ([(k, site, 1.01 * v) for k, site, v in edits], where), "negative layer"),
    "nothing": (lambda edits, where: ([], where), "resid_post"),
    "every row": (lambda edits, where: (edits, zoo_oracle.EVERYWHERE), "rows"),
    "every position": (lambda edits, where: (edits, zoo_oracle.EVERYWHERE), "generate last"),
    "the pads": (lambda edits, where: (edits, zoo_oracle.EVERYWHERE), "padding"),
}


@pytest.fixture(scope="module")
def llama() -> zoo_oracle.Subject:
    return zoo_oracle.Subject("llama", "LlamaForCausalLM")


@pytest.mark.parametrize("spoilt", list(SPOILT))
def test_the_oracle_sees(spoilt: str, llama: zoo_oracle.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    change, check = SPOILT[spoilt]
    monkeypatch.setattr(zoo_checks, "_steer", steering(change))
    assert zoo_checks.outcome_of(zoo_checks.CHECKS[check], llama).startswith("wrong: ")


@pytest.mark.parametrize(
    "check", ["resid_post", "resid_pre", "rows", "generate all", "generate last", "negative layer", "removal"]
)
def test_plain_hooks_are_right(check: str, llama: zoo_oracle.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_checks, "_steer", steering(lambda edits, where: (edits, where)))
    assert zoo_checks.outcome_of(zoo_checks.CHECKS[check], llama) == "right"


def test_the_oracle_sees_what_is_left_behind(llama: zoo_oracle.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []

    @contextmanager
    def steer(subject: zoo_oracle.Subject, plan: Any) -> Iterator[Plain]:
        left.append(subject.blocks[0].module.register_forward_hook(lambda module, args, output: None))
        yield Plain()

    monkeypatch.setattr(zoo_checks, "_steer", steer)
    try:
        assert zoo_checks.outcome_of(zoo_checks.CHECKS["removal"], llama) == "wrong: 1 hooks are left"
    finally:
        left[0].remove()


@pytest.mark.parametrize(
    ("kind", "class_name", "attention", "mlp"),
    [
        ("llama", "LlamaForCausalLM", "self_attn", "mlp"),
        ("gpt_neox", "GPTNeoXForCausalLM", "attention", "mlp"),
        ("bloom", "BloomForCausalLM", "self_attention", "mlp"),
        ("gemma2", "Gemma2ForCausalLM", "post_attention_layernorm", "post_feedforward_layernorm"),
        ("mamba2", "Mamba2ForCausalLM", "mixer", None),
    ],
)
def test_the_oracle_finds_what_a_block_adds(kind: str, class_name: str, attention: str, mlp: str | None) -> None:
    subject = zoo_oracle.Subject(kind, class_name)
    names = {module: name for name, module in subject.blocks[1].module.named_modules()}
    found = [None if term is None else names[term.module] for term in zoo_oracle.added(subject, 1)]
    assert found == [attention, mlp]


# --- a process for each model --------------------------------------------------------------------------------------------


def alone(examine: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The outcomes of a model whose examination is `examine`, in a process with small limits."""
    monkeypatch.setattr(zoo_checks, "examine", examine)
    monkeypatch.setattr(zoo_runner, "SECONDS", 1)
    child = zoo_runner.start("kind", "Class", folder / "answer.json")
    _, status = os.waitpid(child, 0)
    return set(zoo_runner.finish("kind", "Class", status, folder / "answer.json")["outcomes"].values())


def test_a_model_that_crashes_ends_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = alone(lambda kind, name: os.kill(os.getpid(), signal.SIGTERM), tmp_path, monkeypatch)
    assert found == {"raised: its process ended with SIGTERM"}


def test_a_model_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(kind: str, name: str) -> None:
        while True:
            pass

    assert alone(hang, tmp_path, monkeypatch) == {"raised: it took more than 1 s"}


def test_a_model_that_eats_memory_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = alone(lambda kind, name: {"outcomes": {"size": str(len(bytearray(1 << 40)))}}, tmp_path, monkeypatch)
    assert found == {"raised: its process ended with exit code 1"}


def test_a_type_that_is_none(few: dict[str, Any]) -> None:
    assert set(few["no_such_type NoSuchClass"]["outcomes"].values()) == {
        "does not build: AttributeError: module transformers has no attribute NoSuchClass"
    }
