"""Cases of the CPU backend, each beside the best that a user would write by hand: every way is timed, the fastest counts.

The hand-written ways take tensors that are ready: no slot is looked up, no argument checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

import steerfast as sf
from steerfast import ops
from steerfast.ops import compiled_cpu

from . import cases, sae_cases
from .case import Case, Function, NotHere, Stream, Within, same_as
from .methods import METHODS


def _beside(case: Case, ways: Mapping[str, Function], name: str | None = None, ours: Function | None = None) -> Case:
    """A case beside these ways alone."""
    peers = {way: (lambda run=run: run) for way, run in ways.items()}  # type: ignore[misc]
    return replace(case, name=name or case.name, ours=ours or case.ours, peers=peers, yardsticks={}, slack=8.0)


ROADS = "calls", "compiled"


def on(road: str, case: Case) -> Case:
    """A case on one road of the CPU backend: PyTorch's calls, or what numba has compiled, which its name then says."""
    if road == "calls":
        return replace(case, ours=Within(case.ours, _only_calls))
    if compiled_cpu.kernels() is None:
        raise NotHere("numba is not installed")
    return replace(case, name=f"{case.name} compiled", ours=Within(case.ours, nullcontext))


@contextmanager
def _only_calls() -> Iterator[None]:
    """As where numba is not installed."""
    kept = compiled_cpu.kernels
    compiled_cpu.kernels = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        compiled_cpu.kernels = kept


def add(at: Stream, n: int) -> Case:
    """x + v, the whole batch with one vector."""
    case = Case(
        f"add one n={n} {at.tag}",
        bytes=2 * n * at.d * at.dtype.itemsize,
        operations=n * at.d,
        fresh=lambda: (at.rows(n),),
        fixed=(at.rows(1)[0],),
        ours=ops.add,
        judge=same_as(lambda x, v: x + v),
        dtype=at.dtype,
    )
    return _beside(case, {"eager": lambda x, v: x + v})


def add_with_rows(at: Stream, n: int) -> Case:
    """x + scale · vectors[rows], a strength for each row."""
    case = cases.add(at, n, 8)
    ways = {name: case.peers[name]() for name in ("eager", "naive chain")}
    return _beside(case, ways, f"add rows n={n} {at.tag}")


def affine(at: Stream, n: int) -> Case:
    """w⊙x + b."""
    case = cases.affine(at, n)
    return _beside(case, {name: case.peers[name]() for name in ("eager", "naive chain")})


def op(at: Stream, n: int, name: str, k: int = 8) -> Case:
    """Ablate, amplify or calibrate on tensors."""
    case = cases.op(at, n, name, k)
    return _beside(case, {name: case.peers[name]() for name in ("eager", "naive chain")})


def op_in_place(at: Stream, n: int, k: int = 8) -> Case:
    """Amplify by -1 where the stream lies. What it leaves has no positive y, so that every call does the same work again."""

    def chain(x: Tensor, b: Tensor) -> Tensor:
        return x - torch.relu(x @ b.T) @ b

    case = Case(
        f"amplify in place k={k} n={n} {at.tag}",
        bytes=2 * n * at.d * at.dtype.itemsize,
        operations=4 * n * at.d * k,
        fresh=lambda: (at.rows(n),),
        fixed=(at.basis(k),),
        ours=lambda x, b: ops.amplify_(x, b, -1.0),
        judge=same_as(chain),
        dtype=at.dtype,
    )
    return _beside(case, {"eager": lambda x, b: x.addmm_(torch.relu(x @ b.T), b, alpha=-1.0)})


def bank(at: Stream, n: int, method: str, k: int) -> Case:
    """One method from a bank of one slot."""
    case = cases.subspace(at, n, method, k)
    ways = {name: case.peers[name]() for name in ("eager", "naive chain")}
    return _beside(case, ways, f"bank {case.name}")


def owners(at: Stream, n: int, k: int) -> Case:
    """Every row with its own slot, beside the loop over the owners, and beside one batched product of the gathered rows."""
    bank = sf.Bank(at.d, n, 2 * k * n, at.dtype)
    for _ in range(n):
        bank.register(sf.Amplify(at.basis(k).float(), 0.5))
    lifts = [bank.view(i).lift for i in range(n)]
    rows = torch.arange(n, dtype=torch.int32)

    def chain(x: Tensor) -> Tensor:
        own = [b.to(x.dtype) for b in lifts]
        return torch.cat([r + 0.5 * torch.relu(r @ b.T) @ b for r, b in zip(x.split(1), own, strict=True)])

    def loop(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for i, b in enumerate(lifts):
            r = x[i : i + 1]
            out[i : i + 1] = torch.addmm(r, torch.relu(r @ b.T), b, alpha=0.5)
        return out

    case = Case(
        f"bank amplify k={k} owners={n} {at.tag}",
        bytes=(2 + k) * n * at.d * at.dtype.itemsize,
        operations=4 * n * at.d * k,
        fresh=lambda: (at.rows(n),),
        ours=lambda x: ops.subspace(x, *bank.tensors, rows=rows, modes=bank.modes, max_rank=k),
        judge=same_as(chain),
        dtype=at.dtype,
    )
    return _beside(case, {"eager": loop})


def sae_encode(at: Stream, n: int, features: int, k: int) -> Case:
    """Top-K of the encoder's activations; the fast forms by hand round 16-bit activations before they choose."""
    case = sae_cases.sae_encode(at, n, features, k)
    rounded = case.yardsticks["eager, rounded"]
    wide = {"eager": lambda x, w, b: torch.addmm(b, x, w.T).relu_().topk(k)}
    if at.dtype == torch.float32:
        return _beside(case, wide)
    exact = _beside(case, {"eager": lambda x, w, b: torch.addmm(b.float(), x.float(), w.float().T).relu_().topk(k)})
    return replace(exact, yardsticks={"eager, rounded": rounded})


MODES = {
    "ablate": 1,
    "affine_ablate": 1,
    "clamp": 1,
    "rotate": 2,
    "amplify": 8,
    "amplify keep_norm": 8,
    "calibrate": 8,
    "loreft": 8,
    "push": 8,
}
assert MODES.keys() == METHODS.keys()
