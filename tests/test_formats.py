"""Files of other libraries: real ones in tests/data, round trips, hostile input, and the libraries themselves where
they are installed (tests that name a missing one are skipped)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import VOCAB, build
from safetensors.torch import save_file

import steerfast as sf
from steerfast.directions.direction import Direction
from steerfast.directions.sets import DirectionSet, save_directions
from steerfast.integrations import gguf, lm_eval, repeng, steering_vectors
from steerfast.integrations.read import load_directions
from steerfast.place import Origin, Place
from steerfast.plan import ModelCard

DATA = Path(__file__).parent / "data"
LAYERS, WIDTH = (1, 3, 12), 8


def row(layer: int) -> torch.Tensor:
    """What tests/data/write_with_peers.py writes."""
    return torch.from_numpy((((np.arange(WIDTH) * 7 + layer * 13) % 17 + 1) / 3).astype(np.float32))


def some(site: str = "resid_post", width: int = 48, layers: tuple[int, ...] = (1, 2)) -> DirectionSet:
    generator = torch.Generator().manual_seed(len(site))
    rows = {layer: torch.randn(width, generator=generator) for layer in layers}
    return DirectionSet(
        [
            Direction(v, "m", 1.0, Origin("LlamaForCausalLM", Place(site, layer), "last", 50.0))
            for layer, v in rows.items()
        ]
    )


def equal(got: DirectionSet, expected: DirectionSet) -> None:
    assert list(got) == list(expected)
    for name, direction in expected.items():
        assert torch.equal(got[name].vector, direction.vector)
        assert got[name].origin.place == direction.origin.place


# --- files that the libraries wrote ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "method", "model"),
    [
        ("gguf_float32.gguf", "llama.cpp control vector", "llama"),
        ("repeng.gguf", "llama.cpp control vector", "llama"),
        ("dialz.gguf", "Dialz steering vector", "llama"),
        ("steering_vectors.pt", "steering-vectors", None),
    ],
)
def test_real_files(file: str, method: str, model: str | None, tmp_path: Path) -> None:
    renamed = tmp_path / "no-extension"
    renamed.write_bytes((DATA / file).read_bytes())
    for path in (DATA / file, renamed):
        found = load_directions(path)
        assert [direction.origin.place.layer for direction in found.values()] == list(LAYERS)
        for layer, direction in zip(LAYERS, found.values(), strict=True):
            assert torch.equal(direction.vector, row(layer))
            assert direction.method == method
            assert direction.origin == Origin(model, Place("resid_post", layer))


def test_real_files_of_other_kinds() -> None:
    for layer, direction in zip(LAYERS, load_directions(DATA / "gguf_float16.gguf").values(), strict=True):
        assert torch.equal(direction.vector, row(layer).half().float())
    with pytest.warns(UserWarning, match="'mlp' is read as mlp_out"):
        found = load_directions(DATA / "steering_vectors_mlp.pt")
    assert list(found) == ["mlp_out.1", "mlp_out.3", "mlp_out.12"]
    for layer, direction in zip(LAYERS, load_directions(DATA / "lm_eval.pt").values(), strict=True):
        assert torch.equal(direction.vector, 2 * row(layer))
        assert direction.method == "2.0·(lm-eval)"
    with pytest.raises(
        ValueError, match=r"gguf_model.gguf is a GGUF of a 'llama' model with 1 tensors, not of a control"
    ):
        load_directions(DATA / "gguf_model.gguf")


def test_a_control_vector_in_float64_is_rounded(tmp_path: Path) -> None:
    """repeng writes one where a vector was multiplied by a NumPy number."""
    values = 1.1 * np.arange(1, 5)
    file = tmp_path / "double.gguf"
    file.write_bytes(gguf_bytes([tensor("direction.1", kind=28)], data=values.astype("<f8").tobytes()))
    assert torch.equal(load_directions(file)["resid_post.1"].vector, torch.from_numpy(values.astype(np.float32)))
    file.write_bytes(gguf_bytes([tensor("direction.1", kind=28)], data=(1e300 * values).astype("<f8").tobytes()))
    with pytest.raises(ValueError, match=r"layer 1: .*(NaN|Inf)"):
        load_directions(file)


def test_a_clamp_of_lm_eval_is_a_plan() -> None:
    path = DATA / "lm_eval_clamp.pt"
    with pytest.raises(ValueError, match=r"lm_eval\.read_plan"):
        load_directions(path)
    (edit,) = lm_eval.read_plan(path).edits["resid_post", 1]
    x, v, b = torch.randn(5, WIDTH), row(1), row(3)
    unit = v / v.norm()
    expected = x + unit * (2.0 - ((x - b) * unit).sum(1, keepdim=True))  # lm-eval's formula, the bias put back
    torch.testing.assert_close(edit.apply(x), expected, rtol=1e-5, atol=1e-5)
    assert [type(e).__name__ for (e,) in lm_eval.read_plan(DATA / "lm_eval.pt").edits.values()] == ["Add"] * 3


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:gguf.write. how many layers")
def test_round_trips_are_exact(tmp_path: Path) -> None:
    given = some()
    odd = {"a": Direction(torch.tensor([1e-45, -3.4e38, 0.1]), "given", 1.0, Origin(place=7))}
    for write, read in (
        (gguf.write, gguf.read),
        (steering_vectors.write, steering_vectors.read),
        (lm_eval.write, lm_eval.read),
    ):
        for vectors in (given, DirectionSet(odd)):
            path = write(tmp_path / "file", vectors)
            assert [p.name for p in tmp_path.iterdir()] == ["file"]
            for back in (read(path), load_directions(path)):
                for x, y in zip(back.values(), vectors.values(), strict=True):
                    assert torch.equal(x.vector, y.vector)
                    assert x.origin.place == y.origin.place
    with pytest.warns(UserWarning, match="attn_out"):
        equal(load_directions(steering_vectors.write(tmp_path / "attn", some("attn_out"))), some("attn_out"))
    equal(load_directions(lm_eval.write(tmp_path / "gpt2", given, blocks="h")), given)
    assert gguf.read(gguf.write(tmp_path / "hint", given))["resid_post.1"].origin.model == "llama"
    assert gguf.read(gguf.write(tmp_path / "hint", given, "qwen2"))["resid_post.1"].origin.model == "qwen2"


@pytest.mark.parametrize("write", [steering_vectors.write, lm_eval.write])
def test_what_a_format_cannot_hold_is_refused(write: Any, tmp_path: Path) -> None:
    v = torch.ones(4)
    twice = {name: Direction(v, "m", 1.0, Origin(place=1)) for name in ("a", "b")}
    homeless = {"a": Direction(v, "m", 1.0)}
    for vectors, message in (
        (twice, "two directions are (of layer 1|at layers.1)"),
        (homeless, "layer"),
        ({"a": Direction(v, "m", 1.0, Origin(place=-1))}, "layer|would be at"),
        (some("resid_pre"), "resid_pre"),
        ({**some("mlp_out"), **some()}, "site"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "file", vectors)
    assert not list(tmp_path.iterdir())


def test_a_control_vector_has_every_layer_of_its_model_but_the_first(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    card = ModelCard("LlamaForCausalLM:", 48, 6)
    given = DirectionSet(dict(some(layers=(2, 4))), card)
    for path in (gguf.write(tmp_path / "known", given), gguf.write(tmp_path / "told", some(layers=(2, 4)), layers=6)):
        reader = library.GGUFReader(path)
        assert [tensor.name for tensor in reader.tensors] == [f"direction.{layer}" for layer in range(1, 6)]
        assert [bool(tensor.data.any()) for tensor in reader.tensors] == [False, True, False, True, False]
        assert reader.get_field("controlvector.layer_count").contents() == 5
        assert all(tensor.tensor_type == library.GGMLQuantizationType.F32 for tensor in reader.tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            equal(gguf.read(path), given)
    with pytest.warns(UserWarning, match="the file ends with layer 4"):
        path = gguf.write(tmp_path / "unknown", some(layers=(2, 4)))
    assert len(library.GGUFReader(path).tensors) == 4


def test_what_llama_cpp_adds_at_one_layer_is_one_sum(tmp_path: Path) -> None:
    u, v = torch.randn(2, 8)
    made = [Direction(u, "m", 1.0, Origin(place=Place("resid_pre", 3))), Direction(v, "m", 1.0, Origin(place=2))]
    found = gguf.read(gguf.write(tmp_path / "file", made, layers=4))
    assert list(found) == ["resid_post.2"]
    assert torch.equal(found["resid_post.2"].vector, u + v)
    with pytest.raises(ValueError, match="cancels to zero"):
        gguf.write(tmp_path / "none", [made[1], replace(made[0], vector=-v)], layers=4)


def test_what_a_control_vector_cannot_hold_is_refused(tmp_path: Path) -> None:
    v = torch.ones(4)
    for vectors, message in (
        ({"a": Direction(v, "m", 1.0)}, "'a' does not know its layer"),
        ({"a": Direction(v, "m", 1.0, Origin(place=-1))}, "'.*' has layer -1"),
        (some("mlp_out"), "is of site 'mlp_out'; here a control vector holds resid_post only"),
        (some(layers=(0, 1)), "no control vector for layer 0"),
        (
            some("resid_pre", layers=(0, 3)),
            r"'resid_pre.0' is at resid_pre 0, and llama.cpp adds nothing before block 2",
        ),
        (some("resid_pre", layers=(1, 3)), r"'resid_pre.1' is at resid_pre 1"),
        (some(layers=(2, 5)), "a direction is of layer 5; the model has 5 layers, 0 to 4"),
        ([Direction(torch.ones(2 + i), "m", 1.0, Origin(place=i)) for i in (1, 2)], r"widths \[3, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            gguf.write(tmp_path / "file", vectors, layers=5)
    with pytest.raises(ValueError, match="layers"):
        gguf.write(tmp_path / "file", some(), layers=0)
    assert not list(tmp_path.iterdir())


# --- hostile GGUF ----------------------------------------------------------------------------------------------------


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def keyed(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


def tensor(name: str | bytes, width: int = 4, offset: int = 0, kind: int = 0, dimensions: int = 1) -> bytes:
    return text(name) + struct.pack(f"<I{dimensions}QIQ", dimensions, *[width] * dimensions, kind, offset)


def gguf_bytes(
    tensors: list[bytes] | None = None,
    values: list[bytes] | None = None,
    data: bytes | None = None,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    tensors = [tensor("direction.1"), tensor("direction.2", offset=32)] if tensors is None else tensors
    values = [keyed("general.architecture", "controlvector")] if values is None else values
    counts = (len(tensors), len(values)) if counts is None else counts
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(values) + b"".join(tensors)
    data = (np.ones(4, "<f4").tobytes() + bytes(16)) * 2 if data is None else data
    return header + bytes(-len(header) % 32) + data


NAN = np.array([1, np.nan, 1, 1], "<f4").tobytes() + bytes(16)
ARCHITECTURE = keyed("general.architecture", "controlvector")
BAD_GGUF = {
    "model": (gguf_bytes(values=[keyed("general.architecture", "qwen2")]), "is a GGUF of a 'qwen2' model"),
    "no architecture": (gguf_bytes(values=[]), "names no architecture"),
    "architecture of the wrong type": (
        gguf_bytes(values=[text("general.architecture") + struct.pack("<II", 4, 1)]),
        "is a GGUF of a 1 model",
    ),
    "unknown key": (gguf_bytes(values=[ARCHITECTURE, keyed("other.mode", "project")]), "unknown key 'other.mode'"),
    "key twice": (gguf_bytes(values=[ARCHITECTURE, ARCHITECTURE]), "appears twice"),
    "hint of the wrong type": (
        gguf_bytes(values=[ARCHITECTURE, text("controlvector.model_hint") + struct.pack("<II", 4, 1)]),
        "model_hint is 1",
    ),
    "value of no type": (
        gguf_bytes(values=[ARCHITECTURE, text("general.a") + struct.pack("<I", 99)]),
        "unknown type 99",
    ),
    "nested array": (
        gguf_bytes(values=[ARCHITECTURE, text("general.a") + struct.pack("<IIQ", 9, 9, 1)]),
        "array of the type 9",
    ),
    "endless texts": (
        gguf_bytes(values=[ARCHITECTURE, text("general.a") + struct.pack("<IIQ", 9, 8, 1 << 60)]),
        "truncated or damaged",
    ),
    "endless numbers": (
        gguf_bytes(values=[ARCHITECTURE, text("general.a") + struct.pack("<IIQ", 9, 4, 1 << 60)]),
        "truncated or damaged",
    ),
    "endless text": (
        gguf_bytes(values=[ARCHITECTURE, text("general.a") + struct.pack("<IQ", 8, 1 << 62)]),
        "truncated or damaged",
    ),
    "alignment": (
        gguf_bytes(values=[ARCHITECTURE, text("general.alignment") + struct.pack("<II", 4, 24)]),
        "power of two",
    ),
    "path in a name": (gguf_bytes([tensor("direction.1/../../x")]), r"unknown tensor 'direction\.1/"),
    "path as a name": (gguf_bytes([tensor("../direction.1")]), "unknown tensor"),
    "not text": (gguf_bytes([tensor(b"direction.\xff")]), "not UTF-8"),
    "other tensor": (gguf_bytes([tensor("bias.1")]), "expected direction.<layer>"),
    "negative layer": (gguf_bytes([tensor("direction.-1")]), "unknown tensor"),
    "layer with zeros": (gguf_bytes([tensor("direction.01")]), "unknown tensor"),
    "layer 0": (gguf_bytes([tensor("direction.0")]), "layer 0"),
    "twice": (gguf_bytes([tensor("direction.1"), tensor("direction.1", offset=32)]), "two vectors for layer 1"),
    "two widths": (gguf_bytes([tensor("direction.1"), tensor("direction.2", 3, 32)]), r"widths \[3, 4\]"),
    "matrix": (gguf_bytes([tensor("direction.1", dimensions=2)]), "2 dimensions"),
    "scalar": (gguf_bytes([tensor("direction.1", dimensions=0)]), "0 dimensions"),
    "no elements": (gguf_bytes([tensor("direction.1", 0)]), "no elements"),
    "quantised": (gguf_bytes([tensor("direction.1", kind=8)]), r"GGML type 8; expected F32"),
    "none": (gguf_bytes([]), "holds no tensors"),
    "larger than the file": (gguf_bytes([tensor("direction.1", 1 << 40)]), "truncated or damaged"),
    "absurdly large": (gguf_bytes([tensor("direction.1", (1 << 64) - 1)]), "truncated or damaged"),
    "beyond the end": (gguf_bytes([tensor("direction.1", offset=1 << 63)]), "truncated or damaged"),
    "absurd counts": (gguf_bytes(counts=((1 << 64) - 1, (1 << 64) - 1)), "more than its"),
    "absurd tensors": (gguf_bytes(counts=(1 << 40, 1)), "more than its"),
    "NaN": (gguf_bytes(data=NAN * 2), "layer 1: .*NaN or Inf"),
    "zeros": (gguf_bytes(data=bytes(64)), "layer 1: .*all zero"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "version": (gguf_bytes(version=1), "of version 1"),
    "magic alone": (b"GGUF", "too short"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf(case: str, tmp_path: Path) -> None:
    content, message = BAD_GGUF[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_directions(path)
    assert str(path) in str(error.value)


def test_a_gguf_with_other_general_keys_and_types_is_read(tmp_path: Path) -> None:
    packed = [
        ARCHITECTURE,
        keyed("general.name", "a vector"),
        text("general.tags") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("general.numbers") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        text("general.flag") + struct.pack("<I?", 7, True),
        text("general.alignment") + struct.pack("<II", 4, 64),
    ]
    header = gguf_bytes([tensor("direction.2", kind=30)], packed, b"")
    values = torch.tensor([1.0, -2.0, 0.5, 3.0])
    path = tmp_path / "good"
    path.write_bytes(header + bytes(-len(header) % 64) + values.bfloat16().view(torch.int16).numpy().tobytes())
    (direction,) = load_directions(path).values()
    assert torch.equal(direction.vector, values)
    assert direction.origin.place.layer == 2


@pytest.mark.parametrize("file", ["repeng.gguf", "steering_vectors.pt", "lm_eval.pt"])
def test_truncated_and_flipped_files_never_pass_for_whole(file: str, tmp_path: Path) -> None:
    whole = (DATA / file).read_bytes()
    path = tmp_path / file
    step = 1 if file.endswith("gguf") else 17
    for size in range(0, len(whole) - 20, step):  # the last tensor of a GGUF ends before its padding
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=file):
            load_directions(path)
    for position in range(0, len(whole), step):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with contextlib.suppress(ValueError):  # any other error is a failure; what passes is one flipped number
            assert all(direction.vector.isfinite().all() for direction in load_directions(path).values())


# --- hostile torch files and pickles ---------------------------------------------------------------------------------


class Malice:
    """Pickles to a program that leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_malice_is_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    harmful = {"layer_activations": {1: torch.ones(4)}, "layer_type": Malice(marker)}
    torch.save(harmful, tmp_path / "new.pt")
    torch.save(harmful, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps(Malice(marker)))
    (tmp_path / "text.pkl").write_bytes(pickle.dumps(Malice(marker), protocol=0))
    readers = (load_directions, steering_vectors.read, lm_eval.read, lm_eval.read_plan, gguf.read)
    for name in ("new.pt", "old.pt", "bare.pkl", "text.pkl"):
        for read in readers:
            with pytest.raises(ValueError, match=name):
                read(tmp_path / name)
    with pytest.raises(ValueError, match="bare pickle, which can run any program"):
        load_directions(tmp_path / "bare.pkl")
    code = f"from steerfast.integrations import load_directions; load_directions({str(tmp_path / 'new.pt')!r})"
    environment = os.environ | {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "cannot be read safely" in run.stderr
    assert not marker.exists()
    pickle.loads((tmp_path / "bare.pkl").read_bytes())
    assert marker.exists()  # the trap works on whoever steps into it


V = torch.ones(4)
ENTRY = {"steering_vector": V, "steering_coefficient": 1.0, "action": "add", "bias": None, "head_index": None}
BAD_TORCH: dict[str, tuple[Any, str]] = {
    "bare dict of layers": ({1: V}, "a dict of Tensor with the keys 1.*would be a guess"),
    "state dict": ({"model.weight": V}, "'model.weight'"),
    "tensor": (V, "a Tensor"),
    "empty": ({}, "a dict"),
    "unknown field": ({"layer_activations": {1: V}, "scale": 2.0}, "unknown field 'scale'"),
    "layer type": ({"layer_activations": {1: V}, "layer_type": "input_layernorm"}, "expected one of decoder_block"),
    "layer type of the wrong type": ({"layer_activations": {1: V}, "layer_type": 3}, "layer_type is 3"),
    "no layers": ({"layer_activations": {}}, "expected a dict of layer"),
    "list of layers": ({"layer_activations": [V]}, "expected a dict of layer"),
    "layer by name": ({"layer_activations": {"1": V}}, "'1' is not a layer"),
    "negative layer": ({"layer_activations": {-1: V}}, "-1 is not a layer"),
    "no tensor": ({"layer_activations": {1: [1.0]}}, "layer 1 is a list"),
    "integers": ({"layer_activations": {1: V.long()}}, "int64"),
    "sparse": ({"layer_activations": {1: V.to_sparse()}}, "sparse|safely"),
    "matrix": ({"layer_activations": {1: torch.ones(2, 4)}}, r"\(2, 4\); expected \(d,\)"),
    "two widths": ({"layer_activations": {1: V, 2: torch.ones(3)}}, r"widths \[3, 4\]"),
    "NaN": ({"layer_activations": {1: V * float("nan")}}, "layer 1: .*NaN or Inf"),
    "zeros": ({"layer_activations": {1: V * 0}}, "layer 1: .*all zero"),
    "one number for many": ({"layer_activations": {1: torch.ones(1).expand(10**9)}}, "more than the file holds"),
    "hookpoint": ({"layers.x": ENTRY}, "hookpoint 'layers.x' is unknown"),
    "hookpoint with a path": ({"../layers.3": ENTRY}, "is unknown"),
    "hookpoint of another library": ({"blocks.3.hook_resid_post": ENTRY}, "is unknown"),
    "hookpoint number": ({3: ENTRY}, "hookpoint 3 is unknown"),
    "norm": ({"layers.3.input_layernorm": ENTRY}, "is unknown"),
    "key": ({"layers.3": ENTRY | {"mode": 1}}, "unknown key 'mode'"),
    "action": ({"layers.3": ENTRY | {"action": "scale"}}, "action is 'scale'"),
    "no action": ({"layers.3": {"steering_vector": V}}, "action is None"),
    "head": ({"layers.3": ENTRY | {"head_index": 1}}, "head_index is 1"),
    "bias": ({"layers.3": ENTRY | {"bias": V}}, "bias, which lm-eval itself refuses"),
    "coefficient": ({"layers.3": ENTRY | {"steering_coefficient": "much"}}, "must be a number"),
    "infinite": ({"layers.3": ENTRY | {"steering_coefficient": float("inf")}}, "must be finite"),
    "nothing": ({"layers.3": ENTRY | {"steering_coefficient": 0.0}}, "steers nothing"),
    "overflow": ({"layers.3": ENTRY | {"steering_coefficient": 1e300}}, "NaN or Inf"),
    "layer twice": ({"layers.3": ENTRY, "model.layers.3": ENTRY}, "two vectors for layer 3"),
    "two widths of lm-eval": ({"layers.3": ENTRY, "layers.4": ENTRY | {"steering_vector": torch.ones(3)}}, "widths"),
}


@pytest.mark.parametrize("case", BAD_TORCH)
def test_bad_torch_files(case: str, tmp_path: Path) -> None:
    content, message = BAD_TORCH[case]
    path = tmp_path / "bad.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        load_directions(path)
    assert str(path) in str(error.value)


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match=r"bad.pt is a zip archive, but none that torch.save wrote"):
        load_directions(path)
    torch.save({"layer_activations": {1: torch.ones(4096)}}, path)
    with zipfile.ZipFile(path) as whole:
        entries = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"bad.pt is a compressed archive"):
        load_directions(path)
    with zipfile.ZipFile(path, "w") as archive:  # the tensor is shorter than the pickle says
        for name, content in entries.items():
            archive.writestr(name, content[:64] if "/data/" in name else content)
    with pytest.raises(ValueError, match=r"bad.pt"):
        load_directions(path)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match="TorchScript"):
        load_directions(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lm_eval.read(tmp_path / "nowhere")


# --- lm-eval's CSV ---------------------------------------------------------------------------------------------------

HEADER = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description,\n"


def sparse_model(folder: Path, loader: str = "sparsify") -> torch.Tensor:
    folder.mkdir(parents=True)
    decoder = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
    encoder = {"encoder.weight": torch.zeros(6, WIDTH)} if loader == "sparsify" else {"W_enc": torch.zeros(WIDTH, 6)}
    file = "sae.safetensors" if loader == "sparsify" else "sae_weights.safetensors"
    save_file({"W_dec": decoder, "b_dec": torch.ones(WIDTH), **encoder}, folder / file)
    return decoder


def test_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = sparse_model(tmp_path / "sae" / "layers.3")
    second = sparse_model(tmp_path / "lens" / "layer_5" / "canonical", "sae_lens")
    path = tmp_path / "steer.csv"
    path.write_text(
        HEADER
        + 'sparsify,add,sae,layers.3,4,10.0,,,"dogs, mostly",\n'
        + f"sae_lens,add,{tmp_path / 'lens'},layers.5.mlp,0,-2.5,,layer_5/canonical,,\n"
    )
    found = load_directions(path)
    assert list(found) == ["resid_post.3", "mlp_out.5"]
    assert torch.equal(found["resid_post.3"].vector, 10 * first[4])
    assert torch.equal(found["mlp_out.5"].vector, -2.5 * second[0])
    assert found["resid_post.3"].method == "10.0·(lm-eval feature 4 of sae)"
    path.write_text(HEADER + "sparsify,clamp,sae,layers.3,4,10.0,,,,\n")
    (edit,) = lm_eval.read_plan(path).edits["resid_post", 3]
    unit = first[4] / first[4].norm()
    assert edit.numbers()["low"] == pytest.approx(10 + float(unit.sum()), rel=1e-6)
    with pytest.raises(ValueError, match="line 2: action is 'clamp'"):
        load_directions(path)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("", ValueError, "names no vectors"),
        ("sparsify,add,sae,layers.3,6,1,,,,\n", ValueError, "has 6 features"),
        ("sparsify,add,sae,layers.3,-1,1,,,,\n", ValueError, "feature_index is '-1'"),
        ("sparsify,add,sae,layers.3,1,much,,,,\n", ValueError, "must be a number"),
        ("sparsify,add,sae,layers.3,1,nan,,,,\n", ValueError, "must be finite"),
        ("sparsify,add,sae,layers.3,1,1,0,,,\n", ValueError, "head_index"),
        ("sparsify,scale,sae,layers.3,1,1,,,,\n", ValueError, "action is 'scale'"),
        ("other,add,sae,layers.3,1,1,,,,\n", ValueError, "loader is 'other'"),
        ("sparsify,add,sae,../layers.3,1,1,,,,\n", ValueError, "hookpoint"),
        ("sae_lens,add,sae,layers.3,1,1,,../../etc,,\n", ValueError, "expected a folder below"),
        ("sparsify,add,,layers.3,1,1,,,,\n", ValueError, "sparse_model is empty"),
        ("sparsify,add,sae,layers.4,1,1,,,,\n", FileNotFoundError, "not on this machine"),
        ("sparsify,add,sae,layers.3,1,1,,,,,more\n", ValueError, "line 2 has more cells"),
        ("sparsify,add,sae,layers.3\n", ValueError, "feature_index is ''"),
        ("sparsify,add,sae,layers.3,1,1,,,,\n" * 2, ValueError, "two vectors for layer 3"),
        ("sparsify,add,broken,layers.3,1,1,,,,\n", ValueError, "is not such an autoencoder"),
        ("sparsify,add,lens,layers.3,1,1,,,,\n", ValueError, "is not such an autoencoder"),
        ('sparsify,add,"sae\n', ValueError, "not a CSV"),
        ("sparsify,add,\xff,layers.3,1,1,,,,\n", ValueError, "not a CSV in UTF-8"),
    ],
)
def test_bad_csv(rows: str, error: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sparse_model(tmp_path / "sae" / "layers.3")
    sparse_model(tmp_path / "lens" / "layers.3", "sae_lens")
    (tmp_path / "lens" / "layers.3" / "sae_weights.safetensors").rename(
        tmp_path / "lens" / "layers.3" / "sae.safetensors"
    )
    (tmp_path / "broken" / "layers.3").mkdir(parents=True)
    (tmp_path / "broken" / "layers.3" / "sae.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    path = tmp_path / "steer.csv"
    path.write_bytes((HEADER + rows).encode("latin-1"))
    with pytest.raises(error, match=message) as raised:
        load_directions(path)
    assert "steer.csv" in str(raised.value)


def test_csv_columns(tmp_path: Path) -> None:
    path = tmp_path / "steer.csv"
    path.write_text("sparse_model,hookpoint,feature_index\n")
    with pytest.raises(ValueError, match="lacks the column 'steering_coefficient'"):
        load_directions(path)
    path.write_text("sparse_model,hookpoint,feature_index,steering_coefficient,mode\n")
    with pytest.raises(ValueError, match="unknown column 'mode'"):
        load_directions(path)


# --- what is no vector file ------------------------------------------------------------------------------------------


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, np.ones(3))
    save_file({"a": torch.ones(3)}, tmp_path / "tensors")
    contents = {
        "array": (array.getvalue(), "NumPy array, which says neither layer nor site"),
        "empty": (b"", "is empty"),
        "json": (b' {"a": 1}', "looks like JSON"),
        "prose": (b"once upon a time", "of no known format"),
        "table": (b"a,b\n1,2\n", "of no known format"),
        "tensors": ((tmp_path / "tensors").read_bytes(), "looks like a safetensors file alone"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_directions(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    for file, message in (
        ("plan.json", "is not a plan"),
        ("barrier.json", "holds a barrier, not a set of directions: read it with Barrier.load"),
        ("sae.json", "holds an SAE, not a set of directions: read it with SAE.load"),
        ("adapter_config.json", "PEFT"),
        ("x", "a folder without"),
    ):
        folder = tmp_path / f"folder of {file}"
        folder.mkdir()
        (folder / file).write_text("{}")
        with pytest.raises(ValueError, match=message):
            load_directions(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_directions(tmp_path / "nowhere")
    equal(load_directions(save_directions(tmp_path / "ours", some())), some())


def test_a_plan_that_only_adds_is_read_as_its_directions(tmp_path: Path) -> None:
    given = some()
    plan = DirectionSet(given, ModelCard("LlamaForCausalLM:tiny", 48, 20)).plan(strength=2.0)
    back = load_directions(plan.save(tmp_path / "plan"))
    assert back.model == plan.model
    for mine, other in zip(back.values(), given.values(), strict=True):
        assert (mine.origin.place, mine.origin.model) == (other.origin.place, "LlamaForCausalLM")
        assert torch.equal(mine.vector, 2 * other.vector)
    for place, (edit,) in plan.edits.items():
        assert torch.equal(back.plan().edits[place][0].vector, edit.strength * edit.vector)  # type: ignore[attr-defined]
    for refused, message in (
        (
            sf.Plan({1: sf.Ablate(row(1))}),
            r"Ablate\(.*\) at resid_post 1 is no vector that is added; only a plan can hold",
        ),
        (sf.Plan({1: sf.Add(row(1))}, "last"), "the plan has positions='last', which vectors cannot say"),
        (sf.Plan({-1: sf.Add(row(1))}), "resid_post -1 counts from the end"),
    ):
        with pytest.raises(ValueError, match=f"^load_directions: {tmp_path / 'other'}: {message}"):
            load_directions(refused.save(tmp_path / "other"))
    save_directions(plan.save(tmp_path / "both"), {"mine": given["resid_post.1"]})
    assert list(load_directions(tmp_path / "both")) == ["mine"]


# --- the libraries themselves ----------------------------------------------------------------------------------------


def logits(model: Any, ids: torch.Tensor, plan: Any = None) -> torch.Tensor:
    with torch.no_grad():
        if plan is None:
            return model(ids).logits
        with sf.steer(model, plan):
            return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steering_vectors_means_the_same(family: str, tmp_path: Path) -> None:
    library = pytest.importorskip("steering_vectors")
    model, ids = build(family), torch.randint(3, VOCAB, (2, 6))
    for site in ("resid_post", "mlp_out", "attn_out"):
        given = some(site, layers=(0, 2))
        fields = torch.load(steering_vectors.write(tmp_path / "ours.pt", given))
        theirs = library.SteeringVector(**fields)
        assert steering_vectors.to_object(given).layer_type == theirs.layer_type
        with torch.no_grad(), theirs.apply(model):
            expected = model(ids).logits
        torch.testing.assert_close(logits(model, ids, given.plan()), expected, rtol=0, atol=1e-5)
        torch.save(theirs, tmp_path / "theirs.pt")
        for back in (load_directions(tmp_path / "theirs.pt"), steering_vectors.from_object(theirs)):
            equal(back, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_repeng_means_the_same(tmp_path: Path) -> None:
    pytest.importorskip("repeng", exc_type=(ImportError, AttributeError))
    from repeng import ControlModel, ControlVector

    model, ids = build("llama"), torch.randint(3, VOCAB, (1, 6))
    given = some(layers=(1, 2))
    theirs = ControlVector.import_gguf(gguf.write(tmp_path / "ours.gguf", given, layers=3))
    assert theirs.model_type == "llama"
    assert list(theirs.directions) == [1, 2]
    wrapped = ControlModel(model, [1, 2])
    try:
        wrapped.set_control(theirs, 0.7)
        with torch.no_grad():
            expected = wrapped(ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        wrapped.unwrap()
    torch.testing.assert_close(logits(model, ids, given.plan(0.7)), expected, rtol=0, atol=1e-5)
    theirs.export_gguf(tmp_path / "theirs.gguf")
    equal(load_directions(tmp_path / "theirs.gguf"), given)
    equal(repeng.from_object(theirs), given)
    assert repeng.to_object(given) == theirs


def test_repeng_objects_without_repeng() -> None:
    class ControlVector:
        model_type = "llama"

        def __init__(self, directions: Any) -> None:
            self.directions = directions

    given = some(layers=(0, 2))
    equal(repeng.from_object(ControlVector({d.origin.place.layer: d.vector.numpy() for d in given.values()})), given)
    for directions, message in (
        ({-1: np.ones(3)}, "-1 is not a layer"),
        ({1: np.ones(3), 2: np.ones(4)}, "widths"),
        ({1: np.full(3, np.nan)}, "NaN"),
        ({1: np.ones((2, 3))}, r"\(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            repeng.from_object(ControlVector(directions))
    with pytest.raises(TypeError, match="expected a ControlVector"):
        repeng.from_object({1: np.ones(3)})
    with pytest.raises(TypeError, match="expected a SteeringVector"):
        steering_vectors.from_object({1: torch.ones(3)})
    if importlib.util.find_spec("repeng") is None:
        with pytest.raises(ImportError, match="pip install repeng"):
            repeng.to_object(given)


def test_the_gguf_library_reads_ours(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    given = some(layers=(1, 2))
    reader = library.GGUFReader(gguf.write(tmp_path / "ours.gguf", given, layers=3))
    for tensor, direction in zip(reader.tensors, given.values(), strict=True):
        assert tensor.tensor_type == library.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, direction.vector.numpy())


def test_lm_eval_means_the_same(tmp_path: Path) -> None:
    library = pytest.importorskip("lm_eval.models.hf_steered")
    model, ids = build("llama"), torch.randint(3, VOCAB, (2, 6))
    given = some(layers=(0, 2))
    entries = torch.load(lm_eval.write(tmp_path / "ours.pt", given), weights_only=True)
    hooks = {
        name: lambda acts, v=item["steering_vector"]: library.SteeredModel.add(acts, v, None)
        for name, item in entries.items()
    }
    with torch.no_grad(), library.steer(model, hooks):
        expected = model(ids).logits
    torch.testing.assert_close(logits(model, ids, lm_eval.read_plan(tmp_path / "ours.pt")), expected, rtol=0, atol=1e-5)

    v, b = given["resid_post.2"].vector, torch.randn(48)
    clamp = {"steering_vector": v, "steering_coefficient": 3.0, "action": "clamp", "bias": b}
    torch.save({"layers.2": clamp}, tmp_path / "clamp.pt")
    hooks = {"layers.2": lambda acts: library.SteeredModel.clamp(acts, v / v.norm(), 3.0, None, b)}
    with torch.no_grad(), library.steer(model, hooks):
        expected = model(ids).logits
    torch.testing.assert_close(
        logits(model, ids, lm_eval.read_plan(tmp_path / "clamp.pt")), expected, rtol=0, atol=1e-5
    )


# --- layers of zeros -------------------------------------------------------------------------------------------------


def zeros_in(kind: str, zero: tuple[int, ...], path: Path) -> tuple[Any, Any]:
    """(a function that reads vectors of three layers, of which some are all zero; the layers)."""
    rows = {layer: torch.zeros(WIDTH) if layer in zero else row(layer) for layer in LAYERS}
    if kind == "repeng":
        return repeng.from_object, type("ControlVector", (), {"directions": rows, "model_type": "llama"})
    if kind == "steering-vectors":
        torch.save({"layer_activations": rows, "layer_type": "decoder_block"}, path)
        return load_directions, path
    tensors = [tensor(f"direction.{layer}", WIDTH, i * 32) for i, layer in enumerate(LAYERS)]
    path.write_bytes(gguf_bytes(tensors, data=b"".join(values.numpy().tobytes() for values in rows.values())))
    return gguf.read, path


def test_a_layer_of_zeros_of_a_control_vector_is_left_out(tmp_path: Path) -> None:
    """So a file says that nothing is added there."""
    read, given = zeros_in("gguf", (3,), tmp_path / "file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(read(given)) == ["resid_post.1", "resid_post.12"]
    read, given = zeros_in("gguf", LAYERS, tmp_path / "all")
    with pytest.raises(ValueError, match=r"layer 1: .*all zero"):
        read(given)


@pytest.mark.parametrize("kind", ["repeng", "steering-vectors"])
def test_a_layer_of_zeros_is_left_out_and_named(kind: str, tmp_path: Path) -> None:
    """llama.cpp takes such a file; a plan of it equals one of the other layers."""
    read, given = zeros_in(kind, (3,), tmp_path / "file")
    with pytest.warns(
        UserWarning, match=r"the vector of layer 3 is all zero, which steers nothing; it is left out"
    ) as seen:
        found = read(given)
    assert [w.filename for w in seen] == [__file__]
    assert [direction.origin.place.layer for direction in found.values()] == [1, 12]
    assert all(torch.equal(found[f"resid_post.{layer}"].vector, row(layer)) for layer in (1, 12))
    read, given = zeros_in(kind, (1, 12), tmp_path / "two")
    with pytest.warns(UserWarning, match=r"the vectors of layers 1, 12 are all zero"):
        assert list(read(given)) == ["resid_post.3"]
    read, given = zeros_in(kind, LAYERS, tmp_path / "all")
    with pytest.raises(ValueError, match=r"layer 1: .*all zero"):
        read(given)
