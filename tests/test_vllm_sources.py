"""The table of seams against source trees that are made up from it, the record of a check, and model runners of no engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm_sources

from steerfast.vllm import guards, record, seam_table, sources
from steerfast.vllm.seam_table import RELEASES, RUNNERS, SEAMS, V1, V2, Form

Seams = dict[str, tuple[Form, ...]]


def tree(root: Path, seams: Seams) -> Path:
    """A source tree that has the first form of every seam and nothing else; nobody could run it."""
    modules: dict[str, dict[str, list[str]]] = {}
    for seam, (form, *_) in seams.items():
        module, _, path = seam.partition(":")
        here = modules.setdefault(module, {})
        owner, _, function = path.rpartition(".")
        if path[:1].isupper() and not owner:
            here.setdefault(path, []).extend(f"    {name}: int" for name in form.names)
        elif not path:
            here.setdefault("", []).append(f"from somewhere import {', '.join(form.names)}")
        else:
            first = ["self"] if owner else []
            body = "; ".join([f"use(self.{name})" for name in form.names] or ["pass"])
            line = f"def {function}({', '.join([*first, *form.takes])}): {body}"
            here.setdefault(owner, []).append(f"    {line}" if owner else line)
    for module, owners in modules.items():
        lines = [*owners.pop("", [])]
        for owner, inside in owners.items():
            lines += [f"class {owner}:", *(inside or ["    pass"])]
        file = root.joinpath(*module.split(".")[1:], "__init__.py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines))
    (root / "_version.py").write_text("__version__ = version = '99.0'\n")
    return root


def changed(seam: str, **fields: tuple[str, ...]) -> Seams:
    (form, *_) = SEAMS[seam]
    return {**SEAMS, seam: (form._replace(**fields),)}


def test_a_tree_that_has_all_is_known(tmp_path: Path) -> None:
    found, differs = sources.forms(tree(tmp_path, SEAMS))
    assert differs == []
    assert [*found] == [*SEAMS]
    assert sources.release(tmp_path) == "99.0"
    assert sources.release(tmp_path / "v1") == "unknown"


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if ":" in seam and SEAMS[seam][0] != Form()])
def test_whatever_a_seam_asks_for_is_missed_by_name(tmp_path: Path, seam: str) -> None:
    """Every argument and every name of the form, taken away one at a time."""
    (form, *_) = SEAMS[seam]
    for field in ("takes", "names"):
        for name in getattr(form, field):
            rest = tuple(other for other in getattr(form, field) if other != name)
            _, differs = sources.forms(tree(tmp_path, changed(seam, **{field: rest})))
            wanted = f"has another {seam}, which {'takes' if field == 'takes' else 'has'} no {name}"
            # a method that a class lacks is two seams fewer: its own, and one among the class's names
            assert wanted in differs, (name, differs)


@pytest.mark.parametrize("seam", [seam for seam in SEAMS if "." in seam.partition(":")[2]])
def test_a_method_that_is_gone_is_missed_by_name(tmp_path: Path, seam: str) -> None:
    _, differs = sources.forms(tree(tmp_path, {other: known for other, known in SEAMS.items() if other != seam}))
    assert f"has no {seam}" in differs


def test_a_module_that_is_gone_and_arguments_in_another_place_are_told_apart(tmp_path: Path) -> None:
    seam = f"{seam_table.PROCESSOR}.process_inputs"
    root = tree(tmp_path, changed(seam, takes=("prompt", "request_id", "params", "resumable")))
    _, differs = sources.forms(root)
    assert differs == [f"has another {seam}, which takes prompt, request_id, params, resumable in another order"]
    _, differs = sources.forms(tree(tmp_path, changed(seam, takes=("new", *SEAMS[seam][0].takes))))
    assert differs == [f"has another {seam}, which takes new before request_id"]
    (root / "forward_context" / "__init__.py").unlink()
    _, differs = sources.forms(root)
    assert "has no vllm.forward_context:ForwardContext" in differs


def test_a_second_form_is_known_by_what_it_has(tmp_path: Path) -> None:
    seam = f"{seam_table.SCHEDULER}._free_request"
    later = Form(("freed",), seen=("99.0",))
    both = {**SEAMS, seam: (*SEAMS[seam], later)}
    root = tree(tmp_path, {**SEAMS, seam: (later,)})
    found, differs = sources.forms(root, both)
    assert (found[seam], differs) == (later, [])
    _, differs = sources.forms(root)
    assert differs == [f"has another {seam}, which takes no request"]


def test_a_form_may_stand_elsewhere(tmp_path: Path) -> None:
    """What has moved is another form of the same seam, found at either place and missed at both."""
    seam = "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware"
    place = "vllm.entrypoints.later:init_entrypoints_middleware"
    (form, *_) = SEAMS[seam]
    both = {**SEAMS, seam: (form, form._replace(at=place, seen=("99.0",)))}
    without = {other: known for other, known in SEAMS.items() if other != seam}
    assert sources.forms(tree(tmp_path / "old", SEAMS), both)[0][seam] == form
    found, differs = sources.forms(tree(tmp_path / "new", {**without, place: (form,)}), both)
    assert (found[seam].at, differs) == (place, [])
    _, differs = sources.forms(tree(tmp_path / "none", without), both)
    assert differs == [f"has no {seam} or has no {place}"]


def test_what_a_method_only_keeps_to_itself_is_no_attribute_of_its_class(tmp_path: Path) -> None:
    root = tree(tmp_path, SEAMS)
    file = root / "v1" / "request" / "__init__.py"
    file.write_text(
        "class Request:\n    def __init__(self, request_id):\n        self.request_id, self.sampling_params = request_id, None\n"
        "        self.all_token_ids: list = []\n        num_computed_tokens = 0\n"
        "    @property\n    def num_prompt_tokens(self): return 0\n"
    )
    names = ("request_id", "sampling_params", "all_token_ids", "num_computed_tokens", "num_prompt_tokens")
    _, differs = sources.forms(root, {"vllm.v1.request:Request": (Form(names=names),)})
    assert differs == ["has another vllm.v1.request:Request, which has no num_computed_tokens"]


def test_a_new_kind_of_request_is_seen(tmp_path: Path) -> None:
    root = tree(tmp_path, SEAMS)
    (root / "entrypoints" / "decisions.py").write_text(
        "class Other: pass\nclass DecisionRequest:\n    def to_sampling_params(self): pass\n"
    )
    _, differs = sources.forms(root)
    assert differs == ["makes sampling parameters in vllm.entrypoints.decisions:DecisionRequest, too"]


def test_every_release_is_seen_in_one_form_of_every_seam() -> None:
    for seam, known in SEAMS.items():
        assert sorted(release for form in known for release in form.seen) == sorted(RELEASES), seam


# --- at start ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("STEERFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STEERFAST_PLANS", raising=False)
    return tmp_path / "cache"


@pytest.mark.parametrize("release", [*RELEASES, f"{RELEASES[-1]}+cpu"])
def test_a_tested_release_starts_by_what_it_has_and_not_by_its_number(cache: Path, tmp_path: Path, release) -> None:
    guards.check_engine(release, tree(tmp_path, SEAMS))
    gone = f"{seam_table.WRAPPER}.init_device"
    other = tree(tmp_path / "other", {seam: known for seam, known in SEAMS.items() if seam != gone})
    with pytest.raises(
        RuntimeError, match=rf"vLLM {release.replace('+', '.')} has no .*:WorkerWrapperBase\.init_device"
    ):
        guards.check_engine(release, other)


def test_an_unknown_release_starts_with_a_record_of_a_passed_check(cache: Path, tmp_path: Path) -> None:
    root = tree(tmp_path, SEAMS)
    stopped = pytest.raises(RuntimeError, match="but was not tested; run `steerfast check MODEL --engine vllm` once")
    with stopped:
        guards.check_engine("99.0", root)
    left = record.write("99.0")
    assert left.is_relative_to(cache)
    guards.check_engine("99.0", root)
    with stopped:
        guards.check_engine("99.1", root)
    known = {**SEAMS}
    del known[f"{V2}.prepare_inputs"]
    with pytest.raises(
        RuntimeError, match=r"has no vllm\.v1\.worker\.gpu\.model_runner:GPUModelRunner\.prepare_inputs"
    ):
        guards.check_engine("99.0", tree(tmp_path / "other", known))


@pytest.mark.parametrize("damage", ["", "{", "[]", "\xff", "engine", "plugin", "schema", "more"])
def test_a_record_that_is_damaged_or_about_something_else_is_none(cache: Path, damage: str) -> None:
    left = record.write("99.0")
    assert record.passed("99.0")
    content = json.loads(left.read_text())
    if damage.isalpha() and damage.isascii():
        left.write_text(json.dumps({**content, damage: "x"}))
    else:
        left.write_bytes(damage.encode("latin-1"))
    assert not record.passed("99.0")
    record.write("99.0")
    assert record.passed("99.0")


def test_the_record_knows_the_sources_that_passed(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One byte more in a file of ours, and the check has to be run again."""
    left = record.write("99.0")
    package = tmp_path / "steerfast"
    (package / "vllm").mkdir(parents=True)
    (package / "vllm" / "seams.py").write_text("a = 1\n")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    hashes = set()
    for text in ("a = 1\n", "a = 1 \n", None):
        monkeypatch.setattr(record.importlib.util, "find_spec", lambda name: spec if name == "steerfast" else None)
        record._plugin.cache_clear()
        if text is None:
            (package / "vllm" / "seams.py").rename(package / "vllm" / "slots.py")
        else:
            (package / "vllm" / "seams.py").write_text(text)
        assert not record.passed("99.0")
        hashes.add(json.loads(record.write("99.0").read_text())["plugin"])
        assert record.passed("99.0")
    monkeypatch.undo()
    record._plugin.cache_clear()
    assert len(hashes) == 3
    assert left.is_file()


def test_a_record_among_the_plans_counts_while_they_are_served(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record.write("99.0", tmp_path / "plans")
    assert not record.passed("99.0")
    monkeypatch.setenv("STEERFAST_PLANS", str(tmp_path / "plans"))
    assert record.passed("99.0")
    assert not cache.exists()


class First:
    """A model runner of the first generation, from no engine."""

    input_ids = SimpleNamespace(gpu=None)

    def _update_states(self, scheduler_output) -> None: ...

    def _prepare_inputs(self, scheduler_output, numbers) -> None: ...

    def sample_tokens(self, grammar_output) -> None: ...

    def _dummy_run(self, num_tokens) -> None: ...


class Second:
    """And one of the second."""

    def finish_requests(self, scheduler_output) -> None: ...

    def add_requests(self, scheduler_output) -> None: ...

    def prepare_inputs(self, scheduler_output, more=None) -> None: ...

    def sample_tokens(self, grammar_output) -> None: ...

    def _dummy_run(self, num_tokens, *args) -> None: ...


def test_a_runner_is_known_by_its_methods_whatever_its_class() -> None:
    assert guards.check_runner(First())
    assert not guards.check_runner(Second())
    for kind in (First, Second):
        for method in RUNNERS[V1 if kind is First else V2]:
            other = type("Other", (kind,), {method: lambda self, output: None})
            with pytest.raises(
                RuntimeError, match=rf"Other\.{method} of this vLLM takes output, not what steering needs"
            ):
                guards.check_runner(other())
    with pytest.raises(RuntimeError, match="Other is no model runner that steering knows"):
        guards.check_runner(type("Other", (First, Second), {})())
    with pytest.raises(RuntimeError, match="int is no model runner"):
        guards.check_runner(3)
    with pytest.raises(RuntimeError, match=r"Other of this vLLM has no input_ids\.gpu"):
        guards.check_runner(type("Other", (First,), {"input_ids": 0})())
    half = type("Half", (), {"prepare_inputs": Second.prepare_inputs})
    with pytest.raises(RuntimeError, match="Half of this vLLM has no finish_requests, which steering needs"):
        guards.check_runner(half())


# --- make seams --------------------------------------------------------------------------------------------------------


def test_the_command_says_which_seams_a_folder_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "vllm", SEAMS)
    assert vllm_sources.main([str(root), "--keep", str(tmp_path)]) == 0
    assert f"99.0: {len(SEAMS)} seams, all of a known form; not among the tested releases" in capsys.readouterr().out
    assert vllm_sources.main([str(tmp_path), "--keep", str(tmp_path)]) == 0  # the folder that holds `vllm` will do
    tree(root, changed(f"{seam_table.SCHEDULER}._free_request", takes=("other",)))
    assert vllm_sources.main([str(root), "--keep", str(tmp_path)]) == 1
    assert "  has another vllm.v1.core.sched.scheduler:Scheduler._free_request, which takes no request" in (
        capsys.readouterr().out
    )


def test_a_tested_release_whose_form_is_another_ones_fails(tmp_path: Path, capsys, monkeypatch) -> None:
    root = tree(tmp_path / "vllm", SEAMS)
    (root / "_version.py").write_text(f"__version__ = '{RELEASES[0]}+cpu'\n")
    assert vllm_sources.main([str(root), "--keep", str(tmp_path)]) == 0
    assert f"{RELEASES[0]}: {len(SEAMS)} seams, all of the form that it was seen with" in capsys.readouterr().out
    seam = f"{seam_table.SCHEDULER}.schedule"
    monkeypatch.setitem(SEAMS, seam, (SEAMS[seam][0]._replace(seen=RELEASES[1:]),))
    assert vllm_sources.main([str(root), "--keep", str(tmp_path)]) == 1
    assert f"  has a form of {seam} that {RELEASES[0]} was not seen with" in capsys.readouterr().out


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no folder of vLLM's sources"):
        vllm_sources.main([str(tmp_path), "--keep", str(tmp_path)])
