"""Activations by vLLM's own extraction of hidden states: an engine that runs contexts and keeps the streams behind some layers.

vLLM's name for the stream behind layer L is L + 1. Its `ExampleHiddenStatesConnector` writes a file for each request.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from steerfast._checks import whole_numbers
from steerfast.files.remote import safetensors_header
from steerfast.files.replace import replace_file
from steerfast.sae.cache import CacheConfig
from steerfast.sae.contexts import Contexts
from steerfast.sae.hidden_states import MANIFEST, Extraction

_AT_A_TIME = 256  # contexts that an engine is given together
_PATIENCE = 60.0  # seconds in which a file must be whole after its request has ended
_PLAIN: dict[str, list[str]] = {"steer": [], "steer_read": []}
"""What every context says: a default of the machine's server (STEERFAST_DEFAULT) is not what is collected."""


def collect_hidden_states(
    model: str,
    texts: Iterable[str],
    layers: Iterable[int],
    directory: str | os.PathLike[str],
    config: CacheConfig | None = None,
    progress: Callable[[str], None] | None = None,
    **engine: Any,
) -> Path:
    """Collect the streams behind some layers on packed texts with vLLM, a file for each context; `HiddenStates` reads them.

    A collection that was interrupted goes on. Parts may run at the same time, each with its engine, into one directory.

    Args:
        model: Name or directory of the model.
        texts: Strings; the same ones, in the same order, for all parts and when going on.
        layers: 0-based, negative from the end.
        directory: Made if need be.
        config: Length of a context, and part; the dtype is the engine's. None: `CacheConfig()`.
        progress: Called with a line of text now and then.
        engine: Further arguments of `vllm.LLM`, such as tensor_parallel_size.

    Returns:
        The directory.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: no such layer; too few texts; the directory holds another collection.
        OSError: a file did not appear: the disk is full, or the engine's log says why.

    Example:
        >>> folder = collect_hidden_states("meta-llama/Llama-3.1-8B", texts, [12, 20], "hidden")  # doctest: +SKIP
        >>> sf.sae.HiddenStates(folder, layer=12)  # doctest: +SKIP
    """
    from transformers import AutoConfig, AutoTokenizer

    config, folder = config or CacheConfig(), Path(directory).absolute()
    about, tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    count = about.get_text_config().num_hidden_layers
    numbers = whole_numbers("collect_hidden_states", "layers", list(layers), count)
    if not numbers or not all(-count <= layer < count for layer in numbers):
        raise ValueError(f"collect_hidden_states: layers is {numbers}; this model has {count} layers, 0 to {count - 1}")
    wanted = tuple(sorted({layer % count for layer in numbers}))
    folder.mkdir(parents=True, exist_ok=True)
    contexts = Contexts(tokenizer, texts, config.context, folder)
    special = tuple(sorted(tokenizer.all_special_ids))
    name = (about.architectures or [type(about).__name__])[0]
    made_from = Extraction(name, wanted, contexts.length, len(contexts), contexts.digest, special)
    _claim(folder, made_from)
    missing = [n for n in range(config.part[0] - 1, len(contexts), config.part[1]) if not _whole(_file(folder, n))]
    if missing:
        _extract(_engine(model, wanted, folder, contexts.length, engine), contexts, folder, missing, progress)
    return folder


def _engine(model: str, layers: tuple[int, ...], folder: Path, length: int, options: dict[str, Any]) -> Any:
    try:
        from vllm import LLM
    except ImportError:
        raise ImportError("collect_hidden_states: needs vLLM; install it, or collect with transformers") from None
    ids = [layer + 1 for layer in layers]
    return LLM(
        model=model,
        max_model_len=length + 1,
        enable_prefix_caching=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": ids}},
        },
        kv_transfer_config={
            "kv_connector": "WholeHiddenStatesConnector",
            "kv_connector_module_path": "steerfast.vllm.hidden_connector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                "shared_storage_path": str(folder),
                "allow_custom_save_path": True,
                "use_synchronization_lock": False,
            },
        },
        **options,
    )


def _extract(
    engine: Any, contexts: Contexts, folder: Path, numbers: list[int], progress: Callable[[str], None] | None
) -> None:
    from vllm import SamplingParams

    for start in range(0, len(numbers), _AT_A_TIME):
        some = numbers[start : start + _AT_A_TIME]
        paths = [{"kv_transfer_params": {"hidden_states_path": str(_file(folder, n))}} for n in some]
        wishes = [SamplingParams(max_tokens=1, temperature=0.0, extra_args=path | _PLAIN) for path in paths]
        prompts = [{"prompt_token_ids": contexts[n : n + 1][0].tolist()} for n in some]
        engine.generate(prompts, wishes, use_tqdm=False)
        for file in (_file(folder, n) for n in some):
            _wait(file)
        if progress is not None:
            progress(f"collected {start + len(some)} of {len(numbers)} contexts")


def _claim(folder: Path, made_from: Extraction) -> None:
    """The folder is of this collection, from now on."""
    file = folder / MANIFEST
    if not file.exists():
        replace_file(file, made_from.content())
        return
    there = Extraction.parse(file.read_bytes(), str(file))
    if there != made_from:
        differs = ", ".join(_differences(there, made_from))
        raise ValueError(
            f"collect_hidden_states: {folder} holds another collection ({differs}); choose another directory"
        )


def _differences(there: Extraction, here: Extraction) -> Iterator[str]:
    for key, old in vars(there).items():
        if old != (new := getattr(here, key)):
            yield f"{key} {old!r} there, {new!r} here"


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.safetensors"


def _whole(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            safetensors_header(opened, file.stat().st_size, str(file))
    except ValueError:
        return False
    return True


def _wait(file: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not _whole(file):
        if time.monotonic() > end:
            raise OSError(f"collect_hidden_states: vLLM did not write {file}; is the disk full? Its log says why")
        time.sleep(0.02)
