"""What a process allows its products does not reach ours: settings are read inside each product, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from places import INTERPRETED, PLACES, backend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import steerfast as sf
from steerfast.barriers.fit import KINDS
from steerfast.sae import explanation, relations

D, F = 24, 64
cublas, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
SUMS = ["allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"]


class Spy(TorchDispatchMode):
    """The settings that each product meets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[bool]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.mv):
            self.seen.append((mkldnn.fp32_precision, [getattr(cublas, name) for name in SUMS]))
        return func(*args, **kwargs or {})


def settings() -> list[Any]:
    return [torch.get_float32_matmul_precision(), mkldnn.fp32_precision, *(getattr(cublas, name) for name in SUMS)]


@contextmanager
def allowing(precision: str, sums: bool = True) -> Iterator[None]:
    """What a user may have set."""
    before = settings()
    torch.set_float32_matmul_precision(precision)
    for name in SUMS:
        setattr(cublas, name, sums)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        mkldnn.fp32_precision = before[1]
        for name, value in zip(SUMS, before[2:], strict=True):
            setattr(cublas, name, value)


def dictionary() -> tuple[Tensor, Tensor]:
    return torch.randn(F, D), torch.randn(F)


def banked(x: Tensor) -> Tensor:
    bank = sf.Bank(D, slots=2)
    bank.register(sf.Amplify(torch.randn(3, D)))
    return sf.ops.subspace(x, *bank.tensors)


OPS: dict[str, Callable[[Tensor], Any]] = {
    "ablate": lambda x: sf.ops.ablate(x, torch.eye(D)[:3]),
    "flow": lambda x: sf.ops.flow(x, torch.eye(D)[:3], torch.ones(3), torch.ones(3), angle=0.4),
    "similarity": lambda x: sf.ops.similarity(x, torch.eye(D)[:3]),
    "subspace": banked,
    "top k": lambda x: sf.ops.sae_encode(x, *dictionary(), k=4),
    "jumprelu": lambda x: sf.ops.sae_encode_threshold(x, *dictionary(), torch.ones(F), 32),
    "decode": lambda x: sf.ops.sae_decode(
        x[:, :4].half(), torch.zeros(9, 4, dtype=torch.int32), torch.randn(F, D).half()
    ),
    "edit": sf.Amplify(torch.randn(3, D)).apply,
}


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("name", OPS)
def test_products_of_the_pytorch_backend_take_every_bit(name, precision):
    x = torch.randn(9, D)
    with backend("cpu"), allowing(precision):
        before = settings()
        with Spy() as spy:
            OPS[name](x)
        assert spy.seen
        assert {seen[0] for seen in spy.seen} == {"ieee"}
        assert settings() == before


def test_settings_come_back_after_an_error():
    with backend("cpu"), allowing("high"):
        before = settings()
        with pytest.raises(TypeError, match="hinge"):
            sf.ops.torch_backend.hinged(torch.randn(2, D), torch.eye(D), fails)
        assert settings() == before


def test_autocast_of_another_device_and_a_setting_at_once():
    """Autocast for one device stays on while that of another is off."""
    x = torch.randn(9, D)
    with backend("cpu"), allowing("medium"), torch.autocast("xpu", torch.bfloat16), Spy() as spy:
        assert torch._C._is_any_autocast_enabled()
        OPS["ablate"](x)
    assert {seen[0] for seen in spy.seen} == {"ieee"}


def fails(y: Tensor) -> Tensor:
    raise TypeError("in a hinge")


def test_no_setting_is_written_where_none_would_change(monkeypatch):
    """A write is seen by every thread."""
    monkeypatch.setattr(torch._C, "_set_fp32_precision_setter", fails)
    with backend("cpu"):
        for run in OPS.values():
            run(torch.randn(9, D))


@pytest.mark.parametrize("place", [place for place in PLACES if place != "cpu"])
@pytest.mark.parametrize("op", ["subspace", "subspace_", "flow"])
def test_a_flow_of_full_rank_adds_up_in_float32(place, op):
    """Its kernel stands between two products of a library."""
    barrier = sf.Barrier(torch.linalg.qr(torch.randn(D, D))[0], torch.randn(D), torch.randn(D))
    flow = sf.Flow(barrier, angle=0.4, steps=2)
    with backend(place) as device, allowing("high"):
        before, x = settings(), torch.randn(3, D, device=device)
        bank = sf.Bank(D, slots=1, directions=D, device=device)
        bank.register(flow)
        runs = {
            "subspace": lambda: sf.ops.subspace(x, *bank.tensors, None, None, bank.modes, bank.max_rank),
            "subspace_": lambda: sf.ops.subspace_(x, *bank.tensors, None, None, bank.modes, bank.max_rank),
            "flow": lambda: sf.flow(x, barrier, angle=0.4),
        }
        with Spy() as spy:
            runs[op]()
        assert len(spy.seen) == 2
        assert all(seen[1] == [False] * 3 for seen in spy.seen)
        assert not INTERPRETED or {seen[0] for seen in spy.seen} == {"ieee"}
        assert settings() == before


SIDES = torch.randn(60, D), torch.randn(60, D) + 0.3
RELU = sf.SAE(*torch.randn(2, F, D), torch.randn(F), torch.randn(D), threshold=torch.rand(F))
SKIP = sf.sae.Transcoder(*torch.randn(2, F, D), k=3, w_skip=torch.randn(D, D))
UNDER_AUTOCAST: dict[str, Callable[[Tensor], Tensor]] = {
    "encode": RELU.encode,
    "decode": lambda x: RELU.decode(x[:, :1].expand(-1, F)),
    "skip": SKIP,
    "relations": lambda x: torch.cat(relations._nearest(x, 3)),
    "explanations": lambda x: explanation._rank(x, torch.eye(D), 3, "information")[0],
    **{f"fit {kind}": lambda x, kind=kind: sf.fit_barrier(*SIDES, kind)(x) for kind in KINDS},
}


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_autocast_changes_no_sae_and_no_fit(name):
    x = torch.randn(9, D)
    with backend("cpu"):
        alone = UNDER_AUTOCAST[name](x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(UNDER_AUTOCAST[name](x), alone)
