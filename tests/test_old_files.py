"""Files that earlier releases saved still load, and mean the same numbers.

data/v0.1 holds one file of every kind that release 0.1 writes, made by data/write_v0_1.py. Beside them, expected.json and
expected.safetensors hold what `look` saw of each object before it was saved: its fields, and what it does to a few rows in
float64. A field that a later release adds is no difference; one that is gone, or has another value, is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import steerfast as sf
from steerfast.files.container import BARRIER, DIRECTIONS, PLAN, SAE
from steerfast.place import Origin

OLD = Path(__file__).parent / "data" / "v0.1"
D, HEAD = 12, 8  # widths of the stream and of a head
LARGE = 200  # elements from which on a saved tensor is known by its checksum
NEAR = 1e-6  # for what is computed, and for rows that an intervention or a barrier brings to length 1 once more

READERS: dict[str, Callable[[Path], Any]] = {
    "plans": sf.Plan.load,
    "barriers": sf.Barrier.load,
    "saes": sf.SAE.load,
    "directions": sf.load_directions,
    "vectors": sf.load_directions,  # the files of other libraries, as `sf.integrations` writes them
    "explanations": sf.sae.Explanations.load,
    "caches": sf.sae.ActivationCache.open,
}
NAMES = [f"{kind}/{path.name}" for kind in READERS for path in sorted((OLD / kind).glob("*"))]
CONTAINERS = {"plans": PLAN, "barriers": BARRIER, "saes": SAE, "directions": DIRECTIONS}
BIT_FOR_BIT = {"saes", "directions", "vectors", "explanations", "caches"}

# What the sweep, the cache and the training run of data/v0.1 were asked; going on with them asks the same.
TEXTS = ["The cat sat on the mat.", "A dog ran over the hill.", "Rain fell all night.", "The sun is out again."]
PLACE = ("resid_post", 1)
CONTEXT = 8
SIDES = (["abc d", "bcd", "cc"], ["xyz", "zz y", "wxy"])
PROBE = sf.tools.Question(("hello", "some more"), (" abc", " d"), (" xyz", " w", " zzz"), ("plain text", "the rest"))
GRID = sf.tools.Grid((0, -1), (-0.5, 0.0, 1.0), ("mean_difference", "flow"))
CONFIG = sf.sae.TrainConfig(
    features=16, k=2, tokens=96, batch=16, lr=0.01, k_start=4, k_anneal=0.5, dead_after=24, aux_k=2, seed=3
)


MEAN = "a mean, which is not read"


class Letters:
    """A tokenizer: one token per letter, one special token in front."""

    bos_token_id, eos_token_id, all_special_ids = 1, 2, (1, 2)

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if not isinstance(text, str):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        return {"input_ids": [1] * add_special_tokens + [3 + ord(letter) % 90 for letter in text]}


def tiny_model() -> nn.Module:
    """Two layers of width D with random weights, the same for one version of torch and transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=101, max_position_embeddings=64, tie_word_embeddings=False)
    return LlamaForCausalLM(config).eval()


# --- what there is to see of an object ---------------------------------------------------------------------------------


def rows(width: int) -> Tensor:
    """Rows of many lengths, in float64, the same on every machine."""
    lengths = torch.tensor([0.1, 0.25, 0.5, 1.0], dtype=torch.float64)[:, None]
    steps = torch.arange(len(lengths) * width, dtype=torch.float64).view(-1, width)
    return ((steps * 37) % 41 - 20) / 8 * lengths


def look(thing: Any) -> Any:
    """Everything that counts of what a file holds: fields, and what it does to `rows`."""
    if isinstance(thing, sf.Plan):
        edits = {f"{site} {layer}": list(chain) for (site, layer), chain in thing.edits.items()}
        return {"edits": {place: [look(edit) for edit in chain] for place, chain in edits.items()}} | {
            "positions": thing.positions, "model": thing.model,
        }  # fmt: skip
    if isinstance(thing, sf.Intervention):
        found = fields(thing) | {"is": type(thing).__name__, "place": thing.origin.place, "effect": effect(thing)}
        found.pop("sae", None)  # how features are kept is nobody's business: their effect is
        if isinstance(thing, sf.Flow):
            found |= {"barrier": look(thing.barrier)}
        if isinstance(thing, sf.When):
            probe, there = (
                thing.condition.probe,
                {"threshold": thing.condition.threshold, "above": thing.condition.above},
            )
            found["condition"] = there | {"direction": probe.direction, "similarity": probe.kind}
            found |= {"then": look(thing.then), "decisions": thing.condition(rows(thing.width))}
        return found
    if isinstance(thing, sf.Barrier):
        x = rows(thing.width)
        origin = {name: value for name, value in shown(thing.origin).items() if name in ("layer", "site", "model")}
        found = fields(thing) | {"value": thing(x), "step": sf.flow(x, thing, T=0.5, steps=1)}
        found |= {"info": fields(thing.info) | origin | {"typical_norm": MEAN}}
        return found | (
            {} if thing.sketch is None else {"sketched": thing.sketch.features(x) @ thing.sketch.weights.double()}
        )
    if isinstance(thing, sf.SAE):
        x, wide = rows(thing.d), thing.to(dtype=torch.float64)
        values, indices = wide.topk(x)
        sparse = {"values": values, "indices": indices, "decoded": wide.decode_topk(values, indices, x)}
        source = {
            "place": thing.place,
            "model": thing.source.model or thing.origin.model or "",
            "hook_name": thing.source.hook_name,
        }
        sparse |= {"origin": source | {"source": thing.source.library}}
        return (
            fields(thing) | sparse | {"encoded": wide.encode(x), "activation": thing.activation, "place": thing.place}
        )
    if isinstance(thing, sf.DirectionSet):
        directions = {n: fields(one) | shown(one.origin) for n, one in thing.items()}
        return {"directions": directions, "model": thing.model}
    if isinstance(thing, sf.sae.ActivationCache):
        shards = [(thing.read(shard), *thing.contexts(shard)) for shard in range(len(thing.counts))]
        return {"info": thing.info, "counts": thing.counts, "shards": shards, "length": len(thing)}
    if isinstance(thing, sf.tools.Sweep):
        return {"cells": list(thing), "baseline": thing.baseline, "unit": thing.unit}
    return thing


def fields(thing: Any) -> dict[str, Any]:
    return {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}


def shown(origin: Origin) -> dict[str, Any]:
    """An origin in the words of release 0.1."""
    site, layer = origin.place or (None, None)
    found = {"layer": layer, "site": site, "model": origin.model}
    return found | {"position": origin.position, "activation_norm": origin.typical_norm}


def effect(edit: sf.Intervention) -> Tensor:
    """What an intervention makes of `rows`, whatever its condition."""
    return (edit.then if isinstance(edit, sf.When) else edit).apply(rows(edit.width))


def plain(seen: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """What was seen, as JSON has it; tensors go into a dict under their path."""
    if isinstance(seen, Tensor):
        if seen.numel() >= LARGE and seen.dtype != torch.float64:
            digest = hashlib.sha256(seen.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            return f"{seen.dtype} {tuple(seen.shape)}, SHA-256 {digest}"
        tensors[path] = seen.detach().clone().contiguous()
        return "tensor"
    if dataclasses.is_dataclass(seen):
        seen = fields(seen)
    if isinstance(seen, Mapping):
        return {str(key): plain(value, tensors, f"{path}/{key}") for key, value in seen.items()}
    if isinstance(seen, (list, tuple)):
        return [plain(value, tensors, f"{path}/{i}") for i, value in enumerate(seen)]
    return "NaN" if isinstance(seen, float) and math.isnan(seen) else seen


@cache
def expected() -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((OLD / "expected.json").read_text(encoding="utf-8")), load_file(OLD / "expected.safetensors")


def assert_same(thing: Any, name: str, stored: float = NEAR) -> None:
    """What is seen of a thing is what release 0.1 saw under that name, stored tensors within a tolerance of their own."""
    tensors: dict[str, Tensor] = {}
    got, (texts, numbers) = plain(look(thing), tensors, name), expected()
    assert_holds(got, texts[name], name)
    for path, tensor in numbers.items():
        if path.startswith(f"{name}/"):
            tolerance = NEAR if tensor.dtype == torch.float64 else stored  # float64 is computed
            torch.testing.assert_close(
                tensors[path], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}"
            )


def assert_holds(got: Any, wanted: Any, path: str) -> None:
    """Every field that was there is there with its value."""
    if isinstance(wanted, dict):
        gone = wanted.keys() - (got.keys() if isinstance(got, dict) else set())
        assert not gone, f"{path} lacks {sorted(gone)}"
        for key, value in wanted.items():
            assert_holds(got[key], value, f"{path}/{key}")
    elif isinstance(wanted, list) and isinstance(got, list) and len(got) == len(wanted):
        for i, value in enumerate(wanted):
            assert_holds(got[i], value, f"{path}/{i}")
    # A site without a layer is no place any more; a layer without a site meant resid_post.
    elif got != MEAN and not (path.endswith("/site") and (got is None or wanted is None)):
        assert got == wanted, f"{path}: {got!r}, was {wanted!r}"


# --- the files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_old_file_means_what_it_meant(name: str) -> None:
    kind = name.partition("/")[0]
    assert_same(READERS[kind](OLD / name), name, stored=0.0 if kind in BIT_FOR_BIT else NEAR)


@pytest.mark.parametrize("name", [name for name in NAMES if name.partition("/")[0] in CONTAINERS])
def test_an_old_file_that_is_saved_again_keeps_every_bit(name: str, tmp_path: Path) -> None:
    """Its tensors, an embedded encoder among them; what the newer JSON says is read as the old one was."""
    old, kind = OLD / name, CONTAINERS[name.partition("/")[0]]
    if not (old / kind.text_name).is_file():
        pytest.skip("in the format of another library")
    read = READERS[name.partition("/")[0]]
    new = read(old).save(tmp_path)
    assert json.loads((new / kind.text_name).read_bytes())["schema"] == kind.schema
    if kind is PLAN:  # an object inside two others is written with each of them: by name the tensors may differ
        assert bits(new) == bits(old)
    else:
        assert (new / kind.tensors_name).read_bytes() == (old / kind.tensors_name).read_bytes()
    assert_same(read(new), name, stored=0.0 if kind in (SAE, DIRECTIONS) else NEAR)


def bits(folder: Path) -> list[Any]:
    """The tensors of a plan, dtype and bits, in the order of its edits."""
    stored = load_file(folder / "plan.safetensors")
    seen = {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for name, t in stored.items()}
    text = json.loads((folder / "plan.json").read_bytes())
    items = [item for place in text["edits"] for item in place["interventions"]]
    kept = [{name.removeprefix("probe."): seen[key] for name, key in item["tensors"].items()} for item in items]
    return [*kept, seen.get("positions")]


def test_every_file_has_its_numbers() -> None:
    texts, numbers = expected()
    assert set(texts) == {*NAMES, "sweep", "training"}
    for name in {*NAMES, "training"}:
        assert any(path.startswith(f"{name}/") for path in numbers), f"nothing is known of {name}"


def test_old_directions_are_listed_without_their_vectors() -> None:
    found = sf.list_directions(OLD / "directions")
    assert found.damaged == {}
    assert len(found) == sum(len(sf.load_directions(OLD / name)) for name in NAMES if name.startswith("directions/"))
    for info in found:
        direction = sf.load_directions(info.path)[info.name]
        shown = {name: value for name, value in fields(direction).items() if name != "vector"}
        assert info._asdict() == {"path": info.path, "name": info.name, "width": len(direction.vector), **shown}


# --- what goes on where it stopped -------------------------------------------------------------------------------------


@pytest.fixture
def idle() -> nn.Module:
    """The model of the old files, which may not run: all that is asked for has been saved."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the model has run, so what was saved was not used")

    model = tiny_model()
    model.forward = refuse
    return model


def copied(name: str, tmp_path: Path) -> Path:
    """A copy that may be written into."""
    return Path(shutil.copytree(OLD / name, tmp_path / "copy"))


def test_an_old_sweep_is_not_measured_again(idle: nn.Module, tmp_path: Path) -> None:
    # an old file holds no null, which would be drawn now
    grid = dataclasses.replace(GRID, draws=0)
    with pytest.warns(UserWarning, match="does not say its model's weights and dtype"):
        found = sf.sweep(idle, Letters(), SIDES, PROBE, grid, out=copied("sweep", tmp_path), progress=False)
    assert_same(found, "sweep")


def test_an_old_cache_is_not_collected_again(idle: nn.Module, tmp_path: Path) -> None:
    folder = copied("caches/letters", tmp_path)
    assert_same(
        sf.sae.cache_activations(idle, Letters(), TEXTS, PLACE, folder, context=CONTEXT), "caches/letters", stored=0.0
    )


def test_an_old_checkpoint_is_refused_by_name_and_a_new_run_trains_the_same_sae(tmp_path: Path) -> None:
    cache = sf.sae.ActivationCache.open(OLD / "caches" / "letters")
    folder = copied("training", tmp_path)
    with pytest.raises(ValueError, match="is a checkpoint of an older version"):
        sf.sae.train_sae(cache, CONFIG, folder)
    assert_same(sf.sae.train_sae(cache, CONFIG, tmp_path / "new"), "training")
