"""Rows of activations by what lies at a path."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

from steerfast.files.remote import Folder

from .cache import ActivationCache
from .hidden_states import HiddenStates
from .tables import TableRows

StoredRows: TypeAlias = ActivationCache | HiddenStates | TableRows


def open_rows(source: Any, **choice: Any) -> StoredRows:
    """Open rows of activations for `train_sae`, whatever holds them.

    | what lies there | opened as | what can be chosen |
    |---|---|---|
    | cache.json beside shards: `cache_activations`, `steerfast sae collect`, an engine's capture | `ActivationCache` | |
    | .safetensors with hidden_states: vLLM's own extraction | `HiddenStates` | `layer`, `index`, `special` |
    | .parquet or .arrow files; a `datasets.Dataset` | `TableRows` | `column`, `origin` |

    Args:
        source: A folder or file, as a path or, but for an `ActivationCache`, an address that fsspec knows; or a data set.
        choice: Keyword arguments of what it is opened as.

    Raises:
        FileNotFoundError: there is nothing at the path, or nothing of these.
        TypeError, ValueError, ImportError: as what it is opened as; a choice that it does not have.

    Example:
        >>> _ = sf.sae.cache_activations(model, tokenizer, true_statements, ("resid_post", 0), "cache", context=8)
        >>> sf.sae.open_rows("cache").origin.place
        Place(site='resid_post', layer=0)
    """
    if not isinstance(source, str | os.PathLike):
        return TableRows(source, **choice)
    folder = Folder(source, "open_rows")
    root = str(folder.root)
    caches = {os.path.dirname(file) for file in folder.files(".json") if os.path.basename(file).startswith("cache.")}
    if root in caches and os.path.isdir(root):
        if choice:
            raise TypeError(
                f"open_rows: {folder.name} is an ActivationCache, which leaves nothing to choose; got {choice}"
            )
        return ActivationCache.open(root)
    if caches:
        found = ", ".join(sorted(os.path.relpath(cache, root) for cache in caches))
        raise FileNotFoundError(f"open_rows: {folder.name} has caches in {found}; give one of them, in a local folder")
    if folder.files(".parquet", ".arrow"):
        return TableRows(source, **choice)
    if folder.files(".safetensors"):
        return HiddenStates(source, **choice)
    raise FileNotFoundError(
        f"open_rows: {folder.name} has no cache.json, and no file that ends in .parquet, .arrow or .safetensors"
    )
