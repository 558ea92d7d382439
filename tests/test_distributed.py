"""A model whose weights lie in several processes: tensor parallelism, FSDP2, and what wraps a model for them."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import steerfast as sf

dist = pytest.importorskip("torch.distributed")
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

LAYER, SITES = 1, ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")
IDS = torch.tensor([[0, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
VECTOR = torch.randn(48, generator=torch.Generator().manual_seed(0))
ROUNDING = 2e-5
"""A sum over 2 processes rounds otherwise than one product: a few units of 1.2e-7 (2.1e-6 measured)."""


def answers(model: Any, strength: float = 3.0) -> dict[str, Any]:
    """What each site gives, or the error of its refusal: (logits, new tokens, stats, activations); "" is the unsteered model."""
    found: dict[str, Any] = {
        "": model(input_ids=IDS, attention_mask=MASK).logits,
        "name": sf.Plan({1: sf.Add(VECTOR)}, model=model).model.name,
    }
    for site in SITES:
        inputs = {"input_ids": IDS, "attention_mask": MASK}
        try:
            with sf.steer(model, {(site, LAYER): sf.Add(VECTOR)}, strength=strength) as handle:
                logits = model(**inputs).logits
                tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
                counts = handle.stats()
        except (ValueError, TypeError) as error:
            found[site] = str(error)
            continue
        acts = sf.collect(model, inputs=[inputs], layers=[LAYER], site=site, position="all", progress=False)[LAYER]
        found[site] = logits, tokens, counts, acts
    found["after"] = model(input_ids=IDS, attention_mask=MASK).logits
    for name, action in (
        ("bake", lambda: sf.bake(model, sf.tools.everywhere(model, sf.Ablate(VECTOR)))),
        ("collect", lambda: sf.collect(model, inputs=[inputs], layers=[LAYER], site="head_out", progress=False)),
    ):
        try:
            action()
        except ValueError as error:
            found[name] = str(error)
    return found


def parallel(folder: str) -> nn.Module:
    """As transformers splits it."""
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")


def sharded(folder: str) -> nn.Module:
    """As fully_shard is meant to be used: block by block, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = AutoModelForCausalLM.from_pretrained(folder)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {"tp": parallel, "fsdp": sharded}


@torch.no_grad()
def worker(rank: int, folder: str, port: int) -> None:
    """One of two processes: its answers go to files."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for way, load in WAYS.items():
            try:
                model: Any = load(folder).eval()
            except (ImportError, TypeError, NotImplementedError) as error:  # this release has no such way
                torch.save(f"{type(error).__name__}: {error}", f"{folder}/{way}{rank}.pt")
                continue
            # under FSDP each process has its own batch, and may have its own plan
            torch.save(answers(model, 3.0 + rank * (way == "fsdp")), f"{folder}/{way}{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def together(folder) -> Any:
    """Way -> the answers of the two processes, which are started once: most of their time is imports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (str(folder), port), nprocs=2)
    return lambda way: [torch.load(folder / f"{way}{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(folder) -> dict[float, dict[str, Any]]:
    """Strength -> the answers of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return {s: answers(AutoModelForCausalLM.from_pretrained(folder).eval(), s) for s in (3.0, 4.0)}
    finally:
        torch.set_num_threads(threads)


def both(way: str, together: Any) -> list[dict[str, Any]]:
    """The answers of the two processes to one way."""
    found = together(way)
    if isinstance(found[0], str):
        pytest.skip(f"{way} is not to be had here: {found[0]}")
    return found


def off(found: Any, expected: Any) -> float:
    """How far a site's logits and activations are off; its tokens and its counts are not."""
    assert torch.equal(found[1], expected[1])
    assert found[2] == expected[2]
    return max(float((found[i] - expected[i]).abs().max()) for i in (0, 3))


def test_tensor_parallel(together, alone) -> None:
    """Every site that is whole in each process is right to rounding, and in all processes the same; head_out is refused."""
    found = both("tp", together)
    expected = alone[3.0]
    for site in SITES[:-1]:
        errors = [off(one[site], expected[site]) for one in found]
        assert max(errors) < ROUNDING
        assert torch.equal(found[0][site][0], found[1][site][0])
        assert float((expected[site][0] - expected[""]).abs().max()) > 0.1
    for one in found:
        assert torch.equal(one["after"], one[""])
        assert one["head_out"].startswith("steer: cannot steer or read head_out of layer 1")
        assert one["collect"].startswith("collect: cannot steer or read head_out of layer 1")
        assert "tensor parallelism" in one["head_out"]
        assert "use attn_out" in one["head_out"]
        assert "in parts (model." in one["bake"]


def test_fully_shard(together, alone) -> None:
    """Every site has the bits of one process, with a plan's strength of its own in each; the model keeps its name."""
    for rank, one in enumerate(both("fsdp", together)):
        expected = alone[3.0 + rank]
        for site in SITES:
            assert off(one[site], expected[site]) == 0.0
        assert torch.equal(one["after"], expected[""])
        assert one["name"] == expected["name"]
        assert "keeps its weights in parts" in one["bake"]


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_wrapper_for_data_parallelism_names_its_module(one_process) -> None:
    """steer(DDP(model)) says what to pass; that steers the wrapper's own passes too, and generates."""
    model = build("llama")
    wrapped = nn.parallel.DistributedDataParallel(model)
    plan = {LAYER: sf.Add(VECTOR, 3.0)}
    for call in (
        lambda: sf.steer(wrapped, plan),
        lambda: sf.collect(wrapped, inputs=[{"input_ids": IDS}], layers=[1]),
        lambda: sf.bake(wrapped, plan),
    ):
        with pytest.raises(TypeError, match=r"got DistributedDataParallel; it wraps one: pass its \.module"):
            call()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad(), sf.steer(model, plan):
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)
        acts = sf.collect(model, inputs=[inputs], layers=[LAYER], progress=False)[LAYER]
    with torch.no_grad(), sf.steer(wrapped.module, plan) as handle:
        assert torch.equal(wrapped(**inputs).logits, logits)
        assert handle.stats() == [11]
        assert torch.equal(wrapped.module.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
        assert torch.equal(sf.collect(wrapped.module, inputs=[inputs], layers=[LAYER], progress=False)[LAYER], acts)
    with torch.no_grad():
        assert float((wrapped(**inputs).logits - logits).abs().max()) > 0.1


class Bridge(nn.Module):
    """As TransformerLens 4 wraps a model: it shows the model's config, and another forward."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.original_model = model
        self.config = model.config

    def forward(self, input: Tensor) -> Tensor:
        return self.original_model(input).logits


@pytest.mark.parametrize("shows_config", [True, False])
def test_a_bridge_names_its_original_model(shows_config) -> None:
    """steer(bridge) says what to pass; that steers the bridge's own passes, too."""
    bridge = Bridge(build("llama"))
    if not shows_config:
        del bridge.config
    plan = {LAYER: sf.Add(VECTOR, 3.0)}
    with pytest.raises(TypeError, match=r"got Bridge; it wraps one: pass its \.original_model"):
        sf.steer(bridge, plan)
    with torch.no_grad():
        with sf.steer(bridge.original_model, plan):
            steered = bridge(IDS)
            assert torch.equal(steered, bridge.original_model(input_ids=IDS).logits)
        assert float((bridge(IDS) - steered).abs().max()) > 0.1
