"""The command line, run in-process: what it prints, what it writes, and what it says about bad input."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCAB, build
from transformers import AutoTokenizer

import steerfast as sf
from steerfast.cli import demo, demo_prompts, shared
from steerfast.cli import main as cli
from steerfast.cli.generate import GAP, _Columns
from steerfast.directions.trained import train
from steerfast.models.layers import Layers, find_layers
from steerfast.place import Origin
from steerfast.tools import check as proofs

SENTENCE = "the quick brown fox jumps over the lazy dog kind rude love hate you i because people are good bad"
WORDS = list(dict.fromkeys(SENTENCE.split()))
README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """A function from a family's name to the directory of its tiny model with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def save(name: str, tokenizer: bool = True) -> str:
        folder = tmp_path_factory.getbasetemp() / f"{name}-{tokenizer}"
        if folder.exists():
            return str(folder)
        build(name).save_pretrained(folder)
        words = [*WORDS, *(f"w{i}" for i in range(VOCAB - 3 - len(WORDS)))]
        vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2, **{word: 3 + i for i, word in enumerate(words)}}
        inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
        if tokenizer:
            PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
        return str(folder)

    return save


def extract(model: str, out: Path, *more: str) -> list[str]:
    sides = ["--positive", "i love you", "people are kind", "--negative", "i hate you", "people are rude"]
    return ["extract", model, *sides, "--out", str(out), *more]


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of stderr after the progress."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("…")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("command", [[], ["demo"], ["extract"], ["generate"], ["check"]])
def test_help_teaches_with_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"examples?:\n  steerfast " + "".join(command), shown)
    assert max(map(len, shown.splitlines())) <= 110


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nfrom steerfast.cli.main import main\n"
        "try: main(['extract', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'transformers', 'triton', 'sklearn', 'gguf'} & (set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_extract_saves_what_the_library_computes(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama")
    assert cli.main(extract(folder, tmp_path / "plan", "--layers", "0,2", "--strength", "3")) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "plan") in shown
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sides = [["i love you", "people are kind"], ["i hate you", "people are rude"]]
    pos, neg = (sf.collect(model, tokenizer, side, layers=[0, 2], progress=False) for side in sides)
    directions = sf.extract.mean_difference(pos, neg)
    by_hand = sf.Plan({layer: sf.Add(v, strength=3.0) for layer, v in directions.items()})
    ids = tokenizer("the fox jumps over you", return_tensors="pt")["input_ids"]
    logits = []
    with torch.no_grad():
        plain = model(ids).logits
        for plan in (sf.Plan.load(tmp_path / "plan"), by_hand):
            with sf.steer(model, plan):
                logits.append(model(ids).logits)
    assert torch.equal(*logits)
    assert (logits[0] - plain).abs().max() > 1e-3
    for layer, v in directions.items():
        assert re.search(rf"^ *{layer} +{re.escape(f'{v.norm:.4g}')} ", shown, re.MULTILINE)


def test_extract_leaves_the_directions_beside_the_plan(saved, tmp_path: Path) -> None:
    options = ["--layers", "0,2", "--strength", "3", "--steer", "last"]
    assert cli.main(extract(saved("llama"), tmp_path / "love", *options)) == 0
    found, plan = sf.load_directions(tmp_path / "love"), sf.Plan.load(tmp_path / "love")
    assert list(found) == ["resid_post.0", "resid_post.2"]
    assert found.model == plan.model
    for direction in found.values():
        (edit,) = plan.edits[direction.origin.place]
        assert torch.equal(edit.vector, direction.vector)
        assert (edit.strength, direction.method, direction.origin.model) == (3.0, "mean_difference", "LlamaForCausalLM")
        assert direction.origin.typical_norm > 0
    assert cli.main(extract(saved("llama"), tmp_path / "love", "--layer", "1", "--site", "mlp_out")) == 0
    (one,) = sf.load_directions(tmp_path / "love").values()
    assert [one.origin.place] == list(sf.Plan.load(tmp_path / "love").edits) == [("mlp_out", 1)]


def test_a_plan_of_a_top_k_sae_generates_with_its_sae(saved, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("STEERFAST_SAES", raising=False)
    torch.manual_seed(0)
    sae = sf.SAE(torch.randn(64, 48), torch.randn(64, 48), k=4, origin=Origin(place=("resid_post", 1)))
    sae.save(tmp_path / "saes" / "mine")
    sf.Plan([sf.EditFeatures(sae, dict.fromkeys(range(20), 30.0))]).save(tmp_path / "plan")
    command = ["generate", saved("llama"), "love", "--plan", str(tmp_path / "plan"), "--tokens", "3"]
    assert cli.main(command) == 2
    assert sae.fingerprint in only_line(capsys)
    assert cli.main([*command, "--saes", str(tmp_path / "saes")]) == 0
    shown = capsys.readouterr().out
    monkeypatch.setenv("STEERFAST_SAES", str(tmp_path / "saes"))
    assert cli.main(command) == 0
    texts = [re.sub(r"\(.*", "", text) for text in (shown, capsys.readouterr().out)]
    assert texts[0] == texts[1]
    proof = ["check", saved("llama"), "--plan", str(tmp_path / "plan"), "--saes", str(tmp_path / "saes" / "mine")]
    assert cli.main(proof) == 0


@pytest.mark.parametrize(
    ("options", "site", "length"),
    [
        (["--method", "pca", "--layer", "-1", "--site", "attn_out"], ("attn_out", 2), 1.0),
        (["--method", "logistic", "--normalize", "--position", "mean"], ("resid_post", 1), 1.0),
        (["--method", "difference", "--normalize", "--steer", "generated"], ("resid_post", 1), 1.0),
    ],
)
def test_extract_options(saved, tmp_path: Path, options: list[str], site: tuple[str, int], length: float) -> None:
    assert cli.main(extract(saved("llama"), tmp_path, *options)) == 0
    plan = sf.Plan.load(tmp_path)
    ((place, (edit,)),) = plan.edits.items()
    assert place == site
    assert edit.vector.norm() == pytest.approx(length, rel=1e-5)
    assert plan.positions == ("generated" if "--steer" in options else "all")


def test_extract_takes_any_selector_and_keeps_what_is_special(saved, tmp_path: Path, capsys) -> None:
    model = saved("llama")
    assert cli.main(extract(model, tmp_path, "--steer", "all&!special")) == 0
    plan = sf.Plan.load(tmp_path)
    assert plan.positions == "all & !special"
    assert plan.special == sf.Plan(plan.edits, special=AutoTokenizer.from_pretrained(model)).special
    with pytest.raises(SystemExit):
        cli.main(extract(model, tmp_path, "--steer", "everywhere"))
    assert "--steer: this is 'everywhere'; expected all, prompt, generated, last, special" in capsys.readouterr().err


def test_texts_come_from_files(saved, tmp_path: Path) -> None:
    (tmp_path / "kind.txt").write_text("i love you\n\npeople are kind\n", encoding="utf-8")
    assert cli.main(extract(saved("llama"), tmp_path / "a")) == 0
    argv = extract(saved("llama"), tmp_path / "b")
    argv[3:5] = [f"@{tmp_path / 'kind.txt'}"]
    assert cli.main(argv) == 0
    a, b = (sf.Plan.load(tmp_path / name).edits["resid_post", 1][0].vector for name in "ab")
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [("8", [8]), ("-1", [9]), ("6,8", [6, 8]), ("6-9", [6, 7, 8, 9]), ("middle", [5]), ("all", list(range(10)))],
)
def test_layers_are_read(spec: str, expected: list[int]) -> None:
    assert shared.layers(spec, Layers((torch.nn.Identity(),) * 10, "layers", 8, "Ten")) == expected


def test_generate_streams_both_texts(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved("llama")
    assert cli.main(extract(folder, tmp_path, "--strength", "20")) == 0
    capsys.readouterr()
    argv = ["generate", folder, "i hate you because", "--plan", str(tmp_path), "--tokens", "12"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    _, unsteered, steered = re.split(r"\[(?:un)?steered\]\n", shown)
    texts = [part.rpartition("\n(")[0].strip() for part in (unsteered, steered)]
    assert texts[0] != texts[1]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("i hate you because", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    for expected, plan in zip(texts, (None, sf.Plan.load(tmp_path)), strict=True):
        handle = sf.steer(model, plan) if plan else None
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        if handle:
            handle.remove()
        assert tokenizer.decode(out, skip_special_tokens=True) == expected
    assert cli.main([*argv, "--strength", "0"]) == 0
    _, unsteered, steered = re.split(r"\[(?:un)?steered\]\n", capsys.readouterr().out)
    assert unsteered.rpartition("\n(")[0] == steered.rpartition("\n(")[0]


@pytest.fixture
def flowing(saved, tmp_path: Path) -> tuple[str, list[str], Path]:
    """A tiny model, the arguments of `fit flow` on texts in files, and its directory of output."""
    (tmp_path / "kind.txt").write_text("i love you\npeople are kind\nlove the good dog\nkind fox\n")
    (tmp_path / "rude.txt").write_text("i hate you\npeople are rude\nhate the bad dog\nrude fox\n")
    sides = ["--positive", f"@{tmp_path / 'kind.txt'}", "--negative", f"@{tmp_path / 'rude.txt'}"]
    out = tmp_path / "flow"
    return saved("llama"), ["fit", "flow", saved("llama"), *sides, "--layer", "1", "--out", str(out)], out


def test_fit_saves_what_the_library_fits(flowing, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, argv, out = flowing
    numbers = ["--set", "kind=quadratic", "T=0.3", "steps=4", "--set", "method=heun", "--steer", "all"]
    assert cli.main([*argv, *numbers]) == 0
    shown = capsys.readouterr().out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [(tmp_path / f"{side}.txt").read_text().splitlines() for side in ("kind", "rude")]
    sides = [sf.collect(model, tokenizer, side, [1], progress=False) for side in texts]
    expected = sf.fit_barrier(*sides, kind="quadratic")
    x = torch.randn(5, expected.width)
    plan = sf.Plan.load(out)
    (place, (flow,)), *rest = plan.edits.items()
    assert (place, rest, plan.positions) == (("resid_post", 1), [], "all")
    assert (flow.T, flow.angle, flow.steps, flow.method) == (0.3, None, 4, "heun")
    torch.testing.assert_close(flow.barrier(x), expected(x))
    assert "4 positive and 4 negative texts, resid_post of layer 1" in shown
    assert f"accuracy {expected.info.accuracy:.1%}, log-likelihood {expected.info.log_likelihood:.3f}" in shown
    assert (
        f"closes {flow.info.closed:.1%} of the distance between the sides, at a dose of {flow.info.dose:.2f}" in shown
    )
    typical = expected.origin.typical_norm
    sf.save_directions(out, {1: sf.Direction(torch.randn(expected.width), "old", 1.0)})
    capsys.readouterr()
    assert cli.main([*argv, "--set", "kind=linear", "norms=2"]) == 0  # over what is there
    assert f"Directions  {out / 'directions.json'} is of an earlier run: remove it" in capsys.readouterr().out
    (again,) = sf.Plan.load(out).edits["resid_post", 1]
    assert again.T / typical == pytest.approx(2)


def test_generate_flows_along_a_saved_plan(flowing, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command prints is what the library generates, and a strength of 0 is the unsteered text."""
    folder, argv, out = flowing
    assert cli.main([*argv, "--set", "kind=linear", "angle=1.5"]) == 0
    capsys.readouterr()
    generate = ["generate", folder, "i hate you because", "--plan", str(out), "--tokens", "12"]
    assert cli.main(generate) == 0
    _, unsteered, steered = re.split(r"\[(?:un)?steered\]\n", capsys.readouterr().out)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("i hate you because", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with sf.steer(model, sf.Plan.load(out)):
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert steered.rpartition("\n(")[0].strip() == tokenizer.decode(expected, skip_special_tokens=True)
    assert steered.rpartition("\n(")[0] != unsteered.rpartition("\n(")[0]
    assert cli.main([*generate, "--strength", "0"]) == 0
    _, unsteered, steered = re.split(r"\[(?:un)?steered\]\n", capsys.readouterr().out)
    assert unsteered.rpartition("\n(")[0] == steered.rpartition("\n(")[0]


def test_fit_draws(flowing, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """With matplotlib a picture; without it one clear line, before anything is loaded or written."""
    _, argv, out = flowing
    picture = tmp_path / "flow.png"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert cli.main([*argv, "--set", "kind=linear", "--plot", str(picture)]) == 2
        assert only_line(capsys) == 'steerfast fit: plot_flow: needs matplotlib; pip install "steerfast[bench]"'
        assert not out.exists()
    pytest.importorskip("matplotlib")
    assert cli.main([*argv, "--set", "kind=linear", "--plot", str(picture)]) == 0
    assert f"Picture     {picture}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("method", ["clamp", "rotate", "edit_features"])
def test_fit_by_other_methods(flowing, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command saves is what the library fits; the plane of a rotation is made of all layers."""
    folder, argv, out = flowing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [(tmp_path / f"{side}.txt").read_text().splitlines() for side in ("kind", "rude")]
    sides = [sf.collect(model, tokenizer, side, slice(None), progress=False) for side in texts]
    given = {
        "clamp": {"low": 0.5, "high": None},
        "rotate": {"adaptive": True},
        "edit_features": {"count": 2, "tau": 0},
    }[method]
    numbers = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    more: dict[str, Any] = {}
    if method == "edit_features":
        eye = torch.eye(sides[0][1].shape[1])
        more["sae"] = sf.SAE(eye, eye, origin=sides[0].origin(1))
        numbers += ["--sae", str(more["sae"].save(tmp_path / "sae"))]
    expected = sf.fit(method, *sides, layer=1, **given, **more)
    argv[1] = method
    assert cli.main([*argv, "--set", *numbers, "--steer", "generated"]) == 0
    plan = sf.Plan.load(out)
    ((place, (made,)),) = plan.edits.items()
    assert (place, plan.positions, made.info) == (("resid_post", 1), "generated", expected.info)
    x = torch.randn(5, expected.width)
    torch.testing.assert_close(made.apply(x), expected.apply(x))


@pytest.mark.parametrize(
    ("method", "more", "match"),
    [
        ("clamp", ["--set", "low"], "--set: cannot read 'low'; write NAME=VALUE, such as low=1"),
        ("clamp", ["--set", "level=1"], "'clamp' has no setting 'level'; it has low, high, keep_norm"),
        ("clamp", ["--layer", "0,1"], "--layer: '0,1' names 2 layers"),
        (
            "clamp",
            ["--layer", "-4"],
            "--layer: layer -4 is out of range; this model (LlamaForCausalLM) has 3 layers, 0 to 2",
        ),
        ("loreft", ["--layer", "-4"], "--layer: layer -4 is out of range; this model (LlamaForCausalLM) has 3 layers"),
        ("clamp", ["--plot", "x.png"], "--plot: draws a flow, and the method is clamp"),
        ("amplify", [], "--sae: amplify edits features of an SAE; give its path"),
        ("clamp", ["--sae", "sae"], "--sae: clamp edits no features of an SAE; leave it out"),
        (
            "velocity",
            ["--set", "angle=1"],
            "--set: velocity has no setting 'angle'; it has rank, damping, seed, draws",
        ),
        ("reps", ["--neutral", "Some text."], "--neutral: reps looks at no neutral text; leave it out"),
        ("vector", ["--site", "mlp_out"], "--site: got mlp_out, but vector is trained at resid_post"),
        ("reps", ["--position", "mean"], "--position: got mean, but reps is trained at resid_post"),
        ("velocity", ["--plot", "x.png"], "--plot: draws a flow, and the method is velocity"),
    ],
)
def test_fit_says_what_is_wrong(
    flowing, method: str, more: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, argv, out = flowing
    argv[1] = method
    assert cli.main([*argv, *more]) == 2
    assert match in only_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("method", ["vector", "loreft", "lineas"])
def test_fit_trains(flowing, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the command saves is what the library trains on the same texts."""
    folder, argv, out = flowing
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sides = [(tmp_path / f"{side}.txt").read_text().splitlines() for side in ("kind", "rude")]
    given = {"steps": 3} if method == "lineas" else {"steps": 3, "seed": 2}
    expected = train(method, model, tokenizer, *sides, 1, **given)
    argv[1] = method
    assert cli.main([*argv, "--set", *(f"{name}={value}" for name, value in given.items())]) == 0
    assert f"{method}: 4 positive and 4 negative texts, resid_post of layer 1" in capsys.readouterr().out
    plan = sf.Plan.load(out)
    ((place, (made,)),) = plan.edits.items()
    assert (place, plan.positions) == (("resid_post", 1), "all")
    x = torch.randn(5, model.config.hidden_size)
    torch.testing.assert_close(made.apply(x), expected.apply(x))


@pytest.mark.model
def test_a_velocity_of_the_command_line_steers_a_real_model(
    smollm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pairs of texts in files, a field with its null, a plan from the last token of the prompt on."""
    things = ["film", "meal", "trip", "talk", "house", "week", "song", "game", "friend", "news"]
    words = [("wonderful", "terrible"), ("lovely", "awful")]
    for side in (0, 1):
        text = "".join(f"The {thing} was {words[i % 2][side]}.\n" for i, thing in enumerate(things))
        (tmp_path / f"{side}.txt").write_text(text)
    sides = ["--positive", f"@{tmp_path / '0.txt'}", "--negative", f"@{tmp_path / '1.txt'}"]
    neutral = ["The library opens at nine and closes at five.", "He put the keys on the table and went to the hall."]
    numbers = ["--set", "rank=1", "draws=1", "--neutral", *neutral]
    assert (
        cli.main(["fit", "velocity", "demo", *sides, "--layer", "14", *numbers, "--out", str(tmp_path / "plan")]) == 0
    )
    shown = capsys.readouterr().out
    plan = sf.Plan.load(tmp_path / "plan")
    ((place, (flow,)),) = plan.edits.items()
    info = flow.barrier.info
    assert (place, plan.positions, flow.T) == (("resid_post", 14), "last", 1.0)
    assert info.nats > 1
    assert (
        f"pairs move by {info.nats:+.3g} nats of log-odds, at {info.damage:.2g} nats a token of neutral text" in shown
    )
    assert f"Null        {info.null}" in shown
    model, tokenizer = smollm
    ids = tokenizer("The party was", return_tensors="pt")
    good, bad = (tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("lovely", "awful"))
    with torch.no_grad():
        before = model(**ids).logits[0, -1]
        with sf.steer(model, plan, prompt_length=ids["input_ids"].shape[1]):
            after = model(**ids).logits[0, -1]
    assert after[good] - after[bad] > before[good] - before[bad] + 0.5


@pytest.mark.model
def test_fit_steers_a_real_model(smollm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts in files, a barrier, a plan: kind words become likelier, and more so the further the flow goes."""
    words = (("wonderful", "excellent", "lovely", "kind", "perfect"), ("terrible", "awful", "nasty", "rude", "boring"))
    frames = ("The film was {}", "What a {} day", "Her cooking was {}", "They are {} people")
    for name, side in zip(("pos", "neg"), words, strict=True):
        (tmp_path / name).write_text("\n".join(frame.format(word) for word in side for frame in frames))
    sides = ["--positive", f"@{tmp_path / 'pos'}", "--negative", f"@{tmp_path / 'neg'}"]
    assert cli.main(["fit", "flow", "demo", *sides, "--layer", "14", "--out", str(tmp_path / "plan")]) == 0
    assert "Barrier     rank" in capsys.readouterr().out
    model, tokenizer = smollm
    inputs = tokenizer("I think this place is", return_tensors="pt")
    good, bad = (torch.tensor([tokenizer(f" {word}")["input_ids"][0] for word in side]) for side in words)

    def odds(strength: float) -> float:
        with torch.no_grad(), sf.steer(model, sf.Plan.load(tmp_path / "plan"), strength=strength):
            logits = model(**inputs, prompt_length=inputs["input_ids"].shape[1]).logits[0, -1].log_softmax(-1)
        return float(logits[good].logsumexp(0) - logits[bad].logsumexp(0))

    none, some, all_of_it = odds(1e-6), odds(0.5), odds(1.0)
    assert all_of_it > some > none + 0.2


def test_two_columns_show_one_batch(saved, tmp_path: Path, capsys, monkeypatch) -> None:
    folder = saved("llama")
    assert cli.main(extract(folder, tmp_path, "--strength", "20")) == 0
    argv = ["generate", folder, "i hate you because", "--plan", str(tmp_path), "--tokens", "12"]
    capsys.readouterr()
    assert cli.main(argv) == 0
    _, *parts = re.split(r"\[(?:un)?steered\]\n", capsys.readouterr().out)
    expected = [" ".join(part.rpartition("\n(")[0].split()) for part in parts]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("LINES", "30")
    assert cli.main(argv) == 0
    screen = rendered(capsys.readouterr().out)
    rows = [line.split(GAP.rstrip()) for line in screen if GAP.rstrip() in line]
    assert [side.strip() for side in rows[0]] == ["unsteered", "steered"]
    assert [" ".join(" ".join(row[i].split()) for row in rows[1:]).strip() for i in (0, 1)] == expected


def rendered(output: str) -> list[str]:
    """What a terminal shows after cursor-up, carriage return and clear-line."""
    screen, row = [""], 0
    for part in re.findall(r"\x1b\[\d*[AK]|\r|\n|[^\x1b\r\n]+", output):
        if part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1])
        elif part == "\x1b[K":
            screen[row] = ""
        elif part == "\n":
            row += 1
            screen += [""] * (row + 1 - len(screen))
        elif part != "\r":
            screen[row] += part
    return screen


def test_columns_redraw_only_what_changes() -> None:
    written: list[str] = []
    columns = _Columns(written.append, 45, 10)  # 20 characters a side
    words = ("alpha beta gamma delta epsilon zeta eta theta iota kappa " * 6).split()
    for i in range(1, len(words)):
        columns.show([" ".join(words[:i]), " ".join(words[: i // 3])])
    screen = rendered("".join(written))
    assert all(len(line) <= 45 for line in screen)
    left = [line.split(GAP)[0].split() for line in screen if GAP in line]
    assert [word for line in left for word in line] == words[:-1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3", "mpt", "mixtral"])
def test_check_passes_on_real_architectures(saved, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", saved(name)]) == 0
    shown = capsys.readouterr().out
    assert "failed" not in shown
    assert shown.count("\n  ok ") == 6
    assert "Steering works on this model." in shown


def test_check_in_bfloat16_with_a_plan(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(extract(saved("llama"), tmp_path)) == 0
    assert cli.main(["check", saved("llama"), "--dtype", "bfloat16", "--plan", str(tmp_path)]) == 0
    assert "the plan fits and changes the logits" in capsys.readouterr().out


def test_check_fails_where_steering_does(saved, capsys, monkeypatch) -> None:
    """A hook that adds half the vector, steers padding, and stays behind must be found out, each by its own proof."""
    real = proofs.steer

    def half(model, plan, **options):
        plan = plan if isinstance(plan, (dict, sf.Plan)) else plan[0]
        return real(model, plan, strength=0.5, **options)

    monkeypatch.setattr(proofs, "steer", half)
    assert cli.main(["check", saved("llama")]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"failed +prefill", shown)
    assert re.search(r"failed +cached decode", shown)
    assert re.search(r"failed +batch-mates", shown)
    assert re.search(r"ok +removal", shown)


def test_check_finds_a_hook_left_behind(saved) -> None:
    model = build("llama")
    from transformers import AutoTokenizer

    findings = proofs.check(model, AutoTokenizer.from_pretrained(saved("llama")))
    outcomes = []
    left = None
    for finding in findings:
        outcomes.append(finding.outcome)
        if len(outcomes) == 5:
            left = find_layers(model).blocks[0].register_forward_hook(lambda m, a, out: out * 1.01)
    left.remove()
    assert outcomes == ["ok"] * 5 + ["failed"]


def test_check_skips_a_site_that_only_numbers_refuse(saved) -> None:
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=101, n_embd=48, n_layer=2, n_head=4, n_positions=32)).eval()
    found = list(proofs.check(model, AutoTokenizer.from_pretrained(saved("llama"))))
    sites = next(one for one in found if one.name.startswith("attn_out + mlp_out"))
    assert sites.outcome == "skipped"
    assert re.search(r"cannot steer or read attn_out of layer 0 .* is off by", sites.detail)
    assert "failed" not in [one.outcome for one in found]


def test_check_fails_where_the_sites_add_up_on_three_tokens_alone(saved) -> None:
    model = deepcopy(build("llama"))
    block = find_layers(model).blocks[1]
    block.register_forward_hook(lambda m, a, out: out + 1.0 if out.shape[1] > 3 else out)
    found = {one.name: one for one in proofs.check(model, AutoTokenizer.from_pretrained(saved("llama")))}
    sites = found.pop("attn_out + mlp_out = resid_post − resid_pre")
    assert (sites.outcome, sites.detail[:8]) == ("failed", "layer 1:")
    assert "is off by 1 from what the block adds" in sites.detail


SIDES = ["--positive", "love", "--negative", "hate", "--out", "TMP/p"]
BAD = [
    (["generate", "MODEL", "hello", "--plan", "TMP/none"], "does not exist; a plan is a folder with plan.json"),
    (["extract", "MODEL", *SIDES, "--positive", "@TMP/none.txt"], "none.txt does not exist"),
    (["extract", "MODEL", *SIDES, "--layers", "40"], "layer 40 is out of range"),
    (["extract", "MODEL", *SIDES, "--layers", "one"], "--layers: cannot read 'one'"),
    (["fit", "add", "MODEL", *SIDES, "--layer", "one"], "--layer: cannot read 'one'"),
    (["extract", "MODEL", "--positive", "love", "--negative", "love", "--out", "TMP/p"], "do not differ"),
    (["extract", "MODEL", *SIDES, "--position", "first"], "got 'first'"),
    (["extract", "MODEL", *SIDES, "--positive", "kind", "--method", "pca"], "needs pairs"),
    (["extract", "MODEL", *SIDES, "--positive", ""], "has no tokens"),
    (["extract", "MODEL", *SIDES, "--strength", "nan"], "strength"),
    (["check", "TMP/no-model"], "is not a directory"),
    (["check", "MODEL", "--plan", "TMP/none"], "does not exist"),
    (["generate", "MODEL", "love", "--chat", "--plan", "PLAN"], "no chat template"),
    (["generate", "MODEL", "love", "--plan", "BROKEN"], "is not JSON"),
    (["generate", "OTHER", "love", "--plan", "PLAN"], "width 48, 3 layers"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert cli.main(extract(saved("llama"), tmp_path / "plan")) == 0
    broken = sf.Plan.load(tmp_path / "plan").save(tmp_path / "broken")
    (broken / "plan.json").write_text("{")
    named = {"MODEL": saved("llama"), "OTHER": saved("gpt_neo"), "PLAN": str(tmp_path / "plan"), "BROKEN": str(broken)}
    capsys.readouterr()
    assert cli.main([named.get(word, word).replace("TMP", str(tmp_path)) for word in argv]) == 2
    line = only_line(capsys)
    assert line.startswith(f"steerfast {argv[0]}: ")
    assert message in line
    assert not (tmp_path / "p").exists()


SWEPT = ["--prompts", "a", "--wanted", " b", "--unwanted", " c", *SIDES]
TEXT = ["--text", "no.txt", "--out", "x"]
UNUSED = [
    ("eval no/model --prompts a --strength 2 --saes no --draws 3", "--saes, --strength, --draws", "without --plan"),
    ("eval no/model --prompts a --plan no --limit 2 --batch-size 3", "--limit, --batch-size", "without --choices"),
    ("eval no/model --choices no.json --tokens 3", "--tokens", "without --prompts"),
    ("check no/model --saes no", "--saes", "without --plan"),
    ("check no/model --engine vllm --device cpu", "--device", "with --engine vllm"),
    ("sweep no/model SWEPT --sae no --methods add flow", "--sae", "with --methods add flow"),
    ("plan convert no x --to gguf --model no --dtype float32", "--model, --dtype", "with --to gguf"),
    ("sae collect no/model TEXT --at 1 --engine vllm --device cpu", "--device", "with --engine vllm"),
    ("sae train no/model TEXT --layer 1 --reads attn_out", "--reads", "of --kind topk"),
    ("sae train --rows no --out x --context 8 --dtype float32", "--context, --dtype", "beside --rows"),
    ("sae explain no no/model --title = --passage 8 --tokens 9", "--title, --tokens, --passage", "without --corpus"),
    ("sae explain no no/model --corpus no --vocabulary words.txt", "--vocabulary", "of words by use"),
    ("sae explain no no/model --judge-model a --judge-key b", "--judge-model, --judge-key", "without --judge"),
    ("sae steer no no/model hello --feature 1 --most 3", "--most", "without --words"),
]


@pytest.mark.parametrize(
    ("argv", "options", "where"), UNUSED, ids=[f"{argv.split()[0]} {what}" for argv, what, _ in UNUSED]
)
def test_an_option_that_nothing_looks_at_is_refused(
    argv: str, options: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Before anything is read, and named; an option that says what is so by default is none."""
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text("love")
    given = {"SWEPT": SWEPT, "TEXT": TEXT}
    assert cli.main([word for part in argv.split() for word in given.get(part, [part])]) == 2
    line = only_line(capsys)
    assert f"{options} would say nothing {where}" in line
    assert line.endswith("; leave it out")


def test_the_usual_value_of_an_option_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["eval", "no/such/model", "--prompts", "a", "--strength", "1", "--draws", "20", "--batch-size", "16"])
        == 2
    )
    assert "no/such/model is not a directory" in only_line(capsys)


OUT = ["--positive", "love", "--negative", "hate", "--out"]
OUTPUTS = [
    ["extract", "no/model", *OUT, "FOLDER"],
    ["fit", "clamp", "no/model", *OUT, "FOLDER"],
    ["fit", "flow", "no/model", *OUT, "x", "--plot", "FILE"],
    ["sweep", "no/model", "--prompts", "a", "--wanted", " b", "--unwanted", " c", *OUT, "FOLDER"],
    ["refusal", "no/model", "--harmful", "a", "--harmless", "b", "--out", "FOLDER"],
    ["eval", "no/model", "--prompts", "a", "--out", "FILE"],
    ["demo", "--out", "FOLDER"],
    ["bench", "--out", "FILE"],
    ["plan", "convert", "no/plan", "FILE", "--to", "gguf"],
    ["sae", "collect", "no/model", "--text", "no.txt", "--at", "1", "--out", "FOLDER"],
    ["sae", "train", "no/model", "--text", "no.txt", "--layer", "1", "--out", "FOLDER"],
    ["sae", "train", "no/model", "--text", "no.txt", "--layer", "1", "--out", "x", "--cache", "FOLDER"],
    ["sae", "eval", "no/sae", "no/model", "--text", "no.txt", "--out", "FILE"],
    ["sae", "info", "no/sae", "--save", "FOLDER"],
    *(["sae", "explain", "no/sae", "no/model", option, "FILE"] for option in ("--scores", "--html", "--save")),
]


@pytest.mark.parametrize("argv", OUTPUTS, ids=" ".join)
def test_where_nothing_can_be_written_nothing_runs(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    Path("folder").mkdir()
    bad = {"FOLDER": ["taken", "taken/below"], "FILE": ["folder", "taken/below"]}
    (kind,) = {*argv} & {*bad}
    for path in bad[kind]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([path if word == kind else word for word in argv])
        assert stopped.value.code == 2
        assert f"{path.split('/')[0]} " in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "taken"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerfast.files.replace.os.access", lambda path, mode: False)
    with pytest.raises(argparse.ArgumentTypeError, match=f"{tmp_path} may not be written into; give another folder"):
        shared.out_file(str(tmp_path / "a" / "b.json"))


def test_missing_folders_of_files_are_made(saved, tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "scores.json"
    assert cli.main(["eval", saved("llama"), "--prompts", "i love", "--tokens", "2", "--out", str(file)]) == 0
    assert json.loads(file.read_text())["kind"] == "steerfast.eval"


def test_a_model_without_tokenizer_is_one_line(saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", saved("llama", tokenizer=False)]) == 2
    assert only_line(capsys).startswith("steerfast check: ")


def test_debug_shows_the_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(tmp_path / "none"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupted_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["extract", "model"]) == 130
    assert only_line(capsys) == "interrupted"


@pytest.mark.parametrize("command", ["extract", "fit"])
def test_help_on_a_console_without_the_letters(command: str) -> None:
    ascii_only = os.environ | {
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
    }
    run = [sys.executable, "-m", "steerfast", command, "--help"]
    done = subprocess.run(run, env=ascii_only, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--positive" in done.stdout


def test_python_dash_m_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steerfast", "check", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "this",
        "that",
        "it",
        "its",
        "i",
        "me",
        "my",
        "you",
        "your",
        "he",
        "him",
        "his",
        "she",
        "her",
        "we",
        "us",
        "our",
        "they",
        "them",
        "their",
        "what",
        "who",
        "every",
        "all",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "am",
        "do",
        "does",
        "did",
        "to",
        "of",
        "in",
        "at",
        "on",
        "by",
        "for",
        "with",
        "from",
        "and",
        "or",
        "but",
        "so",
        "not",
        "no",
        "the",
    ]
)


def test_the_demo_tests_its_barrier_on_words_that_it_was_not_fitted_on() -> None:
    """No content word in common, nor an inflection of one: the first five letters decide."""

    def stems(texts: tuple[str, ...]) -> set[str]:
        words = {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}
        return {word[:5] for word in words - FUNCTION_WORDS}

    held_out = (*demo_prompts.KIND_HELD_OUT, *demo_prompts.UNKIND_HELD_OUT)
    fitted = (*demo_prompts.KIND, *demo_prompts.UNKIND)
    assert len(held_out) >= 40
    assert len(demo_prompts.KIND_HELD_OUT) == len(demo_prompts.UNKIND_HELD_OUT)
    assert len(set(held_out)) == len(held_out)
    assert stems(held_out) & stems(fitted) == set()


def test_the_demo_names_an_sae_that_is_not_there(tmp_path: Path, capsys) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--sae", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.model
@pytest.mark.slow
def test_demo_steers_a_real_model(smollm, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("steerfast.models.demo.load", lambda progress=None: smollm)
    assert cli.main(["demo", "--out", str(tmp_path), "--tokens", "12"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    report = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    methods = report["methods"]
    assert set(methods) == {"add", "ablate", "amplify", "calibrate", "flow", "sae"}
    hate = methods["add"]["texts"][0]
    assert hate["prompt"] == "I hate you because"
    assert "love" not in hate["unsteered"]
    assert "love" in hate["steered"]
    for name in ("add", "ablate", "amplify", "calibrate", "flow"):
        assert all(text["steered"] != text["unsteered"] for text in methods[name]["texts"])
    assert methods["ablate"]["numbers"]["projection_before"] > 1
    assert methods["ablate"]["numbers"]["projection_after"] < 1e-3
    assert methods["flow"]["numbers"]["h_after"] > methods["flow"]["numbers"]["h_before"]
    assert methods["flow"]["numbers"]["held_out"] >= 40
    assert methods["flow"]["numbers"]["accuracy"] >= 0.75
    assert methods["sae"]["numbers"]["she_over_he_after"] > methods["sae"]["numbers"]["she_over_he_before"] + 0.3
    doctor = methods["sae"]["texts"][0]
    assert doctor["unsteered"].lstrip().startswith("he ")
    assert doctor["steered"].lstrip().startswith("she ")
    assert report["backend"] in shown
    assert str(tmp_path / "results.json") in shown
    model, tokenizer = smollm
    inputs = tokenizer(list(demo_prompts.PROMPTS), return_tensors="pt", padding=True, padding_side="left")
    with sf.steer(model, sf.Plan.load(tmp_path / methods["flow"]["plan"])):
        out = demo.greedy(model, inputs, 12, tokenizer.pad_token_id)
    again = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert again == [text["steered"] for text in methods["flow"]["texts"]]


@pytest.mark.model
def test_the_lines_of_the_readme_run(smollm, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr("steerfast.models.demo.load", lambda *args, **kwargs: smollm)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert "love" in capsys.readouterr().out
    assert sf.Plan.load(tmp_path / "love-plan").edits


def test_the_readme_is_short_and_its_links_hold() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (README.parent / target).exists(), target


def test_the_table_of_methods_names_every_intervention() -> None:
    text = (README.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    public = [name for name in sf.Intervention.registry if name in sf.__all__]
    assert [name for name in public if f"| [`sf.{name}`](#{name.lower()}) |" not in text] == []
