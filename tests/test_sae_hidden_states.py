"""Rows of vLLM's hidden states, what opens which rows, and, where vLLM is installed, a real extraction beside transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm_engines import ENVIRONMENT, environment, needs_vllm

import steerfast as sf
from steerfast.place import Place
from steerfast.sae import hidden_states as module
from steerfast.sae.cache import CacheConfig
from steerfast.sae.hidden_states import MANIFEST, Extraction, HiddenStates

LAYERS, D = 3, 16


def write(folder: Path, sizes: list[int], d: int = D, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Tensor]]:
    """Files as vLLM's connector names and fills them."""
    folder.mkdir(exist_ok=True)
    dice, made = torch.Generator().manual_seed(0), []
    for number, size in enumerate(sizes):
        states = torch.randn(size, LAYERS, d, generator=dice).to(dtype)
        content = {"hidden_states": states, "token_ids": torch.arange(size) % 7}
        save_file(content, str(folder / f"{number:04d}.safetensors"))
        made.append(content)
    return made


def all_rows(source: HiddenStates) -> Tensor:
    parts = [source.read(shard) for shard in range(len(source.counts))]
    assert [len(part) for part in parts] == list(source.counts)
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_those_of_the_files(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_ROWS", 20)
    made = write(tmp_path, [9, 12, 1, 30, 8, 3], dtype=dtype)
    source = HiddenStates(tmp_path, index=2, special=(3, 5))
    wanted = [one["hidden_states"][1:, 2][~torch.isin(one["token_ids"][1:], torch.tensor([3, 5]))] for one in made]
    assert torch.equal(all_rows(source), torch.cat(wanted))
    assert source.read(0).dtype == dtype
    assert (len(source.counts), source.d, len(source)) == (2, D, sum(map(len, wanted)))
    assert source.fingerprint == HiddenStates(tmp_path, index=2, special=(3, 5)).fingerprint
    assert source.fingerprint != HiddenStates(tmp_path, index=1, special=(3, 5)).fingerprint


def test_states_are_not_read_when_they_are_counted(tmp_path: Path) -> None:
    write(tmp_path, [500] * 3, d=64)
    read: list[int] = []
    whole = sum(file.stat().st_size for file in tmp_path.iterdir())
    opened = module._tensor

    def counted(file: object, about: object, tensor: dict) -> Tensor:
        read.append(tensor["data_offsets"][1] - tensor["data_offsets"][0])
        return opened(file, about, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_tensor", counted)
        source = HiddenStates(tmp_path, index=0)
        assert sum(read) < whole / 20
        source.read(0)
        assert sum(read) > whole


def test_a_manifest_says_which_layers(tmp_path: Path) -> None:
    made = write(tmp_path, [9, 12])
    about = Extraction("LlamaForCausalLM", (4, 7, 29), 12, 2, "abc", (3,))
    (tmp_path / MANIFEST).write_bytes(about.content())
    source = HiddenStates(tmp_path, layer=7)
    kept = [one["hidden_states"][1:, 1][one["token_ids"][1:] != 3] for one in made]
    assert torch.equal(all_rows(source), torch.cat(kept))
    assert (source.origin.model, source.origin.place) == ("LlamaForCausalLM", Place("resid_post", 7))
    with pytest.raises(ValueError, match="layer is 8; extracted are 4, 7, 29"):
        HiddenStates(tmp_path, layer=8)
    (tmp_path / "0001.safetensors").unlink()
    with pytest.raises(ValueError, match="has 1 of 2 contexts; run the collection again"):
        HiddenStates(tmp_path, layer=7)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        HiddenStates(tmp_path, layer=7)


def test_states_of_other_texts_do_not_stand_beside(tmp_path: Path) -> None:
    """Only the manifests tell: the files have the same shapes."""
    for name, text in (("read", "abc"), ("written", "abc"), ("other", "def")):
        write(tmp_path / name, [9, 12])
        about = Extraction("LlamaForCausalLM", (4, 7, 29), 12, 2, text, (3,))
        (tmp_path / name / MANIFEST).write_bytes(about.content())
    read, written, other = (HiddenStates(tmp_path / name, layer=7) for name in ("read", "written", "other"))
    assert sf.sae.SideBySide([read, written]).widths == (D, D)
    with pytest.raises(ValueError, match="collected on different texts"):
        sf.sae.SideBySide([read, other])


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HiddenStates(tmp_path / "nowhere")
    write(tmp_path, [9, 12])
    with pytest.raises(ValueError, match="index is None; the files hold 3 layers"):
        HiddenStates(tmp_path)
    with pytest.raises(ValueError, match=r"no hidden_states\.json that says which layers"):
        HiddenStates(tmp_path, layer=4)
    source = HiddenStates(tmp_path, index=0)
    last = tmp_path / "0001.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="was cut off since it was opened"):
        source.read(0)
    with pytest.raises(ValueError, match=r"0001\.safetensors has \d+ bytes, its header says \d+; it is not whole"):
        HiddenStates(tmp_path, index=0)
    for content in (b"", b"\xff" * 20, whole[:12]):
        last.write_bytes(content)
        with pytest.raises(ValueError, match="is no safetensors file, or is not whole"):
            HiddenStates(tmp_path, index=0)
    write(tmp_path / "other", [5], d=8)
    (tmp_path / "other" / "0000.safetensors").replace(last)
    with pytest.raises(ValueError, match=r"are they of different models\?"):
        HiddenStates(tmp_path, index=0)
    save_file({"activations": torch.zeros(3, 4)}, str(last))
    with pytest.raises(ValueError, match=r"holds activations \[3, 4\]; expected hidden_states"):
        HiddenStates(tmp_path, index=0)


def test_rows_that_are_not_finite(tmp_path: Path) -> None:
    made = write(tmp_path, [40, 40])
    made[1]["hidden_states"][5, 0, 3] = float("nan")
    save_file(made[1], str(tmp_path / "0001.safetensors"))
    config = sf.sae.TrainConfig(features=32, k=4, tokens=64, batch=32)
    with pytest.raises(ValueError, match="row 43 of shard 0 holds NaN or Inf"):
        sf.sae.train_sae(HiddenStates(tmp_path, index=0), config)
    sf.sae.train_sae(HiddenStates(tmp_path, index=1), config)


def test_rows_are_opened_by_what_lies_there(tmp_path: Path) -> None:
    write(tmp_path / "states", [9, 12])
    assert isinstance(sf.sae.open_rows(tmp_path / "states", index=1), HiddenStates)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no cache\.json, and no file that ends in"):
        sf.sae.open_rows(tmp_path / "empty")
    (tmp_path / "empty" / "cache.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        sf.sae.open_rows(tmp_path / "empty")
    with pytest.raises(TypeError, match="leaves nothing to choose"):
        sf.sae.open_rows(tmp_path / "empty", layer=3)


TEXTS = [
    "The old lighthouse stood at the end of the pier, and nobody had climbed its stairs since the storm of 1953.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
] * 4


def test_what_is_collected_is_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a server's default steers every request that says nothing, each context says that it is not steered."""
    from steerfast.vllm import hidden_states, plans, probes, scores, wire

    sf.Plan({1: sf.Add(torch.ones(16))}).save(tmp_path / "plans" / "love")
    sf.probes.LinearProbe(torch.ones(16), place=1).save(tmp_path / "probes" / "seen")
    library, _ = plans.load(tmp_path / "plans", 16, 2)
    read, _ = probes.load_probes(tmp_path / "probes", 16, 2, library)
    default = wire.read({"steer": "love"}, library), scores.read_probes({"steer_read": "seen"}, read, None)
    asked: list[dict] = []

    class Engine:
        def generate(self, prompts: list[dict], params: list[SimpleNamespace], use_tqdm: bool) -> None:
            for one in params:
                asked.append(one.extra_args)
                save_file({"x": torch.ones(1)}, one.extra_args["kv_transfer_params"]["hidden_states_path"])

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    hidden_states._extract(Engine(), torch.ones(3, 4, dtype=torch.int32).numpy(), tmp_path, [0, 2], None)
    assert len(asked) == 2
    for fields in asked:
        assert wire.read(fields, library, default[0]) == ()
        assert scores.read_probes(fields, read, default[1]) is None
        assert wire.read(fields, plans.Library()) == ()  # an engine without plans


@needs_vllm
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.model
def test_vllm_extracts_what_transformers_computes(smollm, tmp_path: Path) -> None:
    """Layers in the middle and at the end, in two parts, the second one after the first was interrupted."""
    from steerfast.models.demo import path
    from steerfast.vllm.hidden_states import collect_hidden_states

    model, tokenizer = smollm
    config = CacheConfig(context=32, dtype=torch.float32)
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}
    with environment(**ENVIRONMENT):
        for part in ((1, 2), (2, 2)):
            collect_hidden_states(str(path()), TEXTS, [7, -1], tmp_path, CacheConfig(context=32, part=part), **options)
    for layer in (7, 29):
        source = HiddenStates(tmp_path, layer)
        stream = sf.sae.ActivationStream(model, tokenizer, TEXTS, ("resid_post", layer), context=config.context)
        assert source.origin.place == stream.origin.place
        torch.testing.assert_close(all_rows(source), stream.read(0), rtol=1e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"layers .* there"):
        collect_hidden_states(str(path()), TEXTS, [7], tmp_path, config)
