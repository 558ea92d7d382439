"""SAEs by the name of their release: what an installed sae-lens lists, and the files of it in the cache of huggingface_hub.

Of sae-lens only its list is read, pretrained_saes.yaml, without importing it.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILES: dict[str, tuple[str, ...]] = {
    "sae_lens": ("cfg.json", "sae_weights.safetensors"),
    "gemma_2": ("params.npz",),
    "gemma_2_transcoder": ("params.npz",),
    "gemma_3": ("config.json", "params.safetensors"),
    "llama_scope": ("hyperparams.json", "checkpoints/final.safetensors"),
    "llama_scope_r1_distill": ("config.json", "sae_weights.safetensors"),
    "dictionary_learning_1": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "qwen_scope": (),
    "goodfire": (),
    "deepseek_r1": (),
}
"""SAELens's name of a layout -> its files in the folder of an SAE, the weights last; none: the SAE is one file itself."""
REFUSED = {
    "temporal": "attends across the tokens before a row",
    "mntss_clt_layer_transcoder": "is a cross-layer transcoder, which writes several layers",
    "connor_rob_hook_z": "has a layout of its own, which no reader here knows",
    "mwhanna_transcoder": "has a layout of its own, which no reader here knows",
}


@dataclass(frozen=True)
class Release:
    """One SAE of a release, on this machine.

    Attributes:
        path: The file with its weights.
        overrides: What the list says beside its configuration.
    """

    path: Path
    overrides: dict[str, Any] = field(default_factory=dict)


def find(name: str, sae_id: str | None) -> Release | None:
    """The SAE of a release or repository, or with that id on Neuronpedia, fetched if its files are not cached.

    Args:
        name: A release, a repository OWNER/NAME, or without `sae_id` an id of Neuronpedia.
        sae_id: The SAE in it; of a repository its folder or file.

    Returns:
        None: no release, and nothing that could be an id.

    Raises:
        ValueError: a release that is not listed, an SAE that it does not have, or a layout that is not read.
        FileNotFoundError: files that are neither cached nor to be had.
    """
    listed = directory()
    if sae_id is None:
        found = _of_neuronpedia(listed, name) if "/" in name else None
        if found is None:
            return None
        name, sae_id = found
    named = {name: listed[name]} if name in listed else {t: r for t, r in listed.items() if r["repo_id"] == name}
    if not named and "/" not in name:
        raise ValueError(f"SAE.load: {_unlisted(listed, name)}")
    if not named:
        return Release(_fetch(name, _files_in(name, sae_id)))
    title, entry = _entry(named, name, sae_id)
    release = named[title]
    layout = str(release.get("conversion_func") or "sae_lens")
    if layout not in FILES:
        raise ValueError(f"SAE.load: release {title}: {layout} {REFUSED.get(layout, 'is a layout that is not read')}")
    path, repository = str(entry["path"]), str(release["repo_id"])
    files = [f"{path}/{file}" for file in FILES[layout]] or [path]
    overrides = dict(release.get("config_overrides") or {})
    if layout == "sae_lens" and "norm_scaling_factor" in entry:
        overrides["norm_scaling_factor"] = entry["norm_scaling_factor"]
    return Release(_fetch(repository, files), overrides)


@functools.cache
def directory() -> dict[str, dict[str, Any]]:
    """The releases that the installed sae-lens lists, by name; none if it is not installed."""
    found = importlib.util.find_spec("sae_lens")
    if found is None or found.origin is None:
        return {}
    import yaml

    file = Path(found.origin).parent / "pretrained_saes.yaml"
    if not file.is_file():
        return {}
    listed: dict[str, dict[str, Any]] = yaml.load(
        file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return listed


def _entry(named: dict[str, dict[str, Any]], name: str, sae_id: str) -> tuple[str, dict[str, Any]]:
    """The release that has an SAE, of those of a name or a repository, and what it says of it.

    Releases of one repository have equal ids for several SAEs, so there the path alone tells which one is meant.
    """
    keys = ("id", "path") if name in named else ("path",)
    for title, release in named.items():
        for entry in release["saes"]:
            if sae_id in [str(entry[key]) for key in keys]:
                return title, dict(entry)
    ids = list(dict.fromkeys(str(entry[keys[0]]) for release in named.values() for entry in release["saes"]))
    near = (
        [one for one in ids if one.startswith(sae_id)][:3] or difflib.get_close_matches(sae_id, ids, 3, 0.3) or ids[:3]
    )
    raise ValueError(
        f"SAE.load: release {name} has no SAE {sae_id!r} among its {len(ids)}; near it are {', '.join(near)}"
    )


def _of_neuronpedia(listed: dict[str, dict[str, Any]], name: str) -> tuple[str, str] | None:
    found = {
        (str(release["repo_id"]), str(entry["path"])): (title, str(entry["id"]))
        for title, release in listed.items()
        for entry in release["saes"]
        if entry.get("neuronpedia") == name
    }
    if len(found) > 1:
        several = " or ".join(f"SAE.load({title!r}, {sae_id!r})" for title, sae_id in found.values())
        raise ValueError(f"SAE.load: {name} is the id of {len(found)} SAEs; give {several}")
    return next(iter(found.values()), None)


def _unlisted(listed: dict[str, dict[str, Any]], name: str) -> str:
    if not listed:
        return f"{name} would be a release, and releases are listed by sae-lens, which is not installed: pip install sae-lens"
    near = ", ".join(difflib.get_close_matches(name, listed, 3, 0.7)) or "none is near it"
    version = importlib.metadata.version("sae-lens")
    return f"sae-lens {version} lists no release {name!r} ({near}); a repository is OWNER/NAME"


def _files_in(repository: str, sae_id: str) -> list[str]:
    """The files of an SAE in a repository that is not listed: itself if it is one, else those of a layout that is cached."""
    if sae_id.endswith((".pt", ".pth", ".npz")):
        return [sae_id]
    layouts = [[f"{sae_id}/{file}" for file in files] for files in dict.fromkeys(FILES.values()) if files]
    for files in layouts:
        if all(_cached(repository, file) for file in files):
            return files
    options = "; or ".join(" and ".join(files) for files in layouts)
    raise FileNotFoundError(
        f"SAE.load: sae-lens lists no repository {repository}, so its layout is not known, and the cache of huggingface_hub "
        f"holds no complete one below {sae_id}; fetch it: hf download {repository} --include '{sae_id}/*' (expected: {options})"
    )


def _cached(repository: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, file)
    return Path(found) if isinstance(found, str) else None


def _fetch(repository: str, files: list[str]) -> Path:
    """The last of the files in the cache; all of them are there, of one revision."""
    from huggingface_hub import constants, hf_hub_download

    if all(found := [_cached(repository, file) for file in files]):
        return found[-1]  # type: ignore[return-value]
    try:
        return [Path(hf_hub_download(repository, file)) for file in files][-1]
    except Exception as error:  # no network, no access, no such file: the same to the user
        missing = [file for file in files if _cached(repository, file) is None]
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"SAE.load: {', '.join(missing) or files[-1]} of {repository} could not be had ({reason}), and the cache at "
            f"{constants.HF_HUB_CACHE} does not hold it; fetch it where there is a network: hf download {repository} "
            f"{' '.join(files)}"
        ) from None
