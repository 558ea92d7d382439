"""The cases that the project set itself numbers for on a GPU: `headline.py` measures them, `static/` predicts them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import steerfast as sf
from steerfast import ops
from steerfast.edits.selected import SelectedFeatures, edit_row
from steerfast.ops.slots import ALL_MODES

from . import cases, sae_cases
from .case import Case, Inputs, Stream, same_as

N, TOKENS, FEATURES, K = 8192, 4096, 65536, 32


@dataclass(frozen=True)
class Goal:
    """A case at the size of a goal.

    Attributes:
        make: (stream, n, *sizes) -> the case.
        n: Rows of the stream.
        sizes: What else it is called with.
        d: Width of the stream.
    """

    make: Callable[..., Case]
    n: int
    sizes: tuple[Any, ...] = ()
    d: int = 4096

    def case(self, at: Stream) -> Case:
        """The case on a stream of this kind."""
        return self.make(replace(at, d=self.d), self.n, *self.sizes)

    def tiny(self) -> Goal:
        """The same kind of case for a rehearsal."""
        small = tuple(_few(size) if isinstance(size, int) else size for size in self.sizes)
        return replace(self, n=min(self.n, 3), sizes=small, d=16 + 24 * self.d // 4096)


def _few(size: int) -> int:
    """A rank, a number of slots or of features that an interpreter is done with at once; ranks keep their kind of kernel."""
    return 130 if size == FEATURES else min(size, 17)


def prepared(at: Stream, n: int, k: int) -> Case:
    """Every row amplified by the kernel that knows every mode, beside the one that knows the mode of its bank alone."""
    bank, rows = sf.Bank(at.d, 1, 2 * k, at.dtype, at.device), torch.zeros(n, 1, dtype=torch.int32, device=at.device)
    basis = at.basis(k)
    bank.register(sf.Amplify(basis.float(), 0.5))
    modes = bank.modes

    def run(modes: int) -> Callable[..., Tensor]:
        return lambda x, *_: ops.subspace(x, *bank.tensors, rows=rows, modes=modes, max_rank=k)

    chain = lambda x, b, c: x + 0.5 * (torch.relu(x @ b.T) @ b)  # noqa: E731
    case, view = cases.subspace(at, n, "amplify", k), bank.view(0)
    return replace(
        case, name=f"all modes k={k} n={n} {at.tag}", fixed=(view.project, view.lift), ours=run(ALL_MODES), judge=same_as(chain),
        yardsticks={"one mode": lambda: run(modes)},
    )  # fmt: skip


def columns(at: Stream, n: int, k: int, count: int = 2) -> Case:
    """Every row edited by several columns of its table, one after another."""
    bank, rows = (
        sf.Bank(at.d, 1, 2 * k, at.dtype, at.device),
        torch.zeros(n, count, dtype=torch.int32, device=at.device),
    )
    bank.register(sf.Amplify(at.basis(k).float(), 0.5))
    modes = bank.modes

    def chain(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        for _ in range(count):
            x = x + 0.5 * (torch.relu(x @ b.T) @ b)
        return x

    case, view = cases.subspace(at, n, "amplify", k), bank.view(0)
    return replace(
        case, name=f"{count} columns k={k} n={n} {at.tag}", operations=count * case.operations,
        fixed=(view.project, view.lift), peers={}, yardsticks={"eager": lambda: chain}, judge=same_as(chain),
        ours=lambda x, *_: ops.subspace(x, *bank.tensors, rows=rows, modes=modes, max_rank=k),
    )  # fmt: skip


def nobody(at: Stream, n: int, k: int, columns: int = 4, in_place: bool = False) -> Case:
    """A prepared layer of rank k that no row asks for: columns of -1, every mode compiled."""
    rows = torch.full((n, columns), -1, dtype=torch.int32, device=at.device)
    bank, op = sf.Bank(at.d, 4, 8 * k, at.dtype, at.device), ops.subspace_ if in_place else ops.subspace
    return Case(
        f"nobody steered {'in place ' if in_place else ''}k={k} P={columns} n={n} {at.tag}",
        bytes=4 * n * columns + (0 if in_place else 2 * n * at.d * at.dtype.itemsize),
        operations=0,
        fresh=lambda: (at.rows(n),),
        ours=lambda x: op(x, *bank.tensors, rows=rows, modes=ALL_MODES, max_rank=k),
        judge=same_as(lambda x: x),
        dtype=at.dtype,
    )


def nobody_in_place(at: Stream, n: int, k: int) -> Case:
    """`nobody`, where nothing needs to be written."""
    return nobody(at, n, k, in_place=True)


def split_stream(at: Stream, n: int, k: int) -> Case:
    """A stream that an engine carries as hidden + residual, written into the residual; its active part is halved.

    Each call halves what is left, so that a stream which is edited again and again stays finite.
    """
    bank, basis = sf.Bank(at.d, 1, 2 * k, at.dtype, at.device), at.basis(k)
    bank.register(sf.Amplify(basis.float(), -0.5))
    modes = bank.modes

    def chain(hidden: Tensor, residual: Tensor, b: Tensor) -> Tensor:
        return residual - 0.5 * (torch.relu((hidden + residual) @ b.T) @ b)

    def best(hidden: Tensor, residual: Tensor, b: Tensor) -> Tensor:
        return residual.addmm_(torch.relu((hidden + residual) @ b.T), b, alpha=-0.5)

    return Case(
        f"split stream k={k} n={n} {at.tag}",
        bytes=(3 * n + k) * at.d * at.dtype.itemsize,
        operations=4 * n * at.d * k,
        fresh=lambda: (at.rows(n), at.rows(n)),
        fixed=(bank.view(0).project,),
        ours=lambda hidden, residual, _: ops.subspace_split_(
            hidden, residual, *bank.tensors, modes_and_rank=(modes, k)
        ),
        judge=same_as(chain),
        yardsticks={"eager": lambda: best},  # in place, too, so not checked on inputs that ours has changed
        dtype=at.dtype,
    )


def encode_mixed(at: Stream, n: int, features: int, k: int) -> Case:
    """A 16-bit stream and a float32 dictionary, beside a dictionary of the stream's dtype."""
    case = sae_cases.sae_encode(at, n, features, k)
    w, b = replace(at, dtype=torch.float32).dictionary(features), torch.zeros(features, device=at.device)

    def rounded() -> Callable[..., Any]:
        w16, b16 = w.to(at.dtype), b.to(at.dtype)
        return lambda x, *_: ops.sae_encode(x, w16, b16, k)

    return replace(
        case,
        name=f"{case.name} x fp32",
        bytes=w.nbytes + n * at.d * at.dtype.itemsize + 8 * n * k,
        fixed=(w, b),
        ours=lambda x, w, b: ops.sae_encode(x, w, b, k),
        peers={"eager": lambda: lambda x, w, b: torch.relu(x.float() @ w.T + b).topk(k)},
        yardsticks={"16-bit dictionary": rounded},
    )


def edit_top_k(at: Stream, n: int, features: int, k: int, count: int) -> Case:
    """A few features of a Top-K SAE set to a value, as `sf.EditFeatures` does it: what is selected must be known first."""
    w, w_dec = at.dictionary(features), at.dictionary(count)
    bias = (0.1 * torch.randn(features, device=at.device)).to(at.dtype)
    chosen = torch.randperm(features)[:count].sort().values.int().to(at.device)
    selected = SelectedFeatures(w, bias, w_dec, chosen, k=k)
    table, scale = torch.tensor([edit_row("set", 4.0)] * count, device=at.device), torch.ones(n, device=at.device)

    def formula(x: Tensor, w: Tensor, w_dec: Tensor, bias: Tensor) -> Tensor:
        pre = torch.relu(x @ w.T + bias)
        least = pre.topk(k).values[:, -1:]
        f = torch.where(pre >= least, pre, 0)[:, chosen.long()]
        return x + (4.0 - f) @ w_dec

    def judge(inputs: Inputs) -> Callable[[Tensor], float]:
        """Of a row whose selection hangs on the rounding of its numbers either answer is right: few of them may be far off."""
        x, w, w_dec, bias = (value[:16] if i == 0 else value for i, value in enumerate(inputs))
        wide = torch.cat([x.double() @ part.double().T for part in w.split(8192)], 1) + bias.double()
        exact = torch.relu(wide)
        least = exact.topk(k).values[:, -1:]
        f = torch.where(exact >= least, exact, 0)[:, chosen.long()]
        close = ((exact[:, chosen.long()] - least).abs() < 1e-3 * least).any(1)
        true = x.double() + (4.0 - f) @ w_dec.double()
        allowed = 2 * (formula(x.float(), w.float(), w_dec.float(), bias.float()).to(x.dtype).double() - true).abs()
        unit = true.abs().max() * torch.finfo(x.dtype).eps

        def share(got: Tensor) -> float:
            error = (got[:16].double() - true).abs().amax(1)
            return float((error[~close] / (allowed[~close].max() + unit)).max()) if not close.all() else math.inf

        return share

    return Case(
        f"edit top-k count={count} F={features} k={k} n={n} {at.tag}",
        bytes=(w.numel() + (2 * n + count) * at.d) * at.dtype.itemsize,
        operations=2 * n * w.numel(),
        fresh=lambda: (at.rows(n),),
        fixed=(w, w_dec, bias),
        ours=lambda x, *_: selected.edit(x, table, scale),
        judge=judge,
        yardsticks={"eager": lambda: formula},
        dtype=at.dtype,
    )


def _hinge(n: int, k: int, d: int = 4096, slots: int = 1) -> Goal:
    return Goal(cases.subspace, n, ("amplify", k, slots), d)


RANKS = (1, 8, 16, 32, 64, 128, 256, 512)
GOALS: dict[str, Goal] = {
    "add": Goal(cases.add, N),
    "add n=64": Goal(cases.add, 64),
    "hinge k=1": Goal(cases.subspace, N, ("ablate", 1)),
    **{f"hinge k={k}": _hinge(N, k) for k in RANKS if 1 < k <= 64},
    "flow k=8": Goal(cases.flow, N, (8,)),
    "flow k=64": Goal(cases.flow, N, (64,)),
    **{f"keep_norm k={k}": Goal(cases.subspace, N, ("amplify keep_norm", k)) for k in (8, 16, 64)},
    **{f"hinge k=64 n={n}": _hinge(n, 64) for n in (1024, 1025, 1536, 2049, 4097, 8191)},
    "hinge k=1 n=64": Goal(cases.subspace, 64, ("ablate", 1)),
    "hinge k=8 n=64": _hinge(64, 8),
    "hinge k=64 n=64": _hinge(64, 64),
    "all modes k=8": Goal(prepared, N, (8,)),
    "split stream k=8": Goal(split_stream, N, (8,)),
    "split stream k=64": Goal(split_stream, N, (64,)),
    **{f"hinge k={k} d={d}": _hinge(N, k, d) for d in (576, 2304, 3584, 5120) for k in (8, 64)},
    **{f"hinge k={k}": _hinge(N, k) for k in RANKS if k > 64},
    "hinge k=64, 64 owners": _hinge(64, 64, slots=64),
    "hinge k=8, 256 owners": _hinge(256, 8, slots=256),
    **{f"nobody in place k={k} n={n}": Goal(nobody_in_place, n, (k,)) for n in (64, 256, N) for k in (8, 64)},
    "encode": Goal(sae_cases.sae_encode, TOKENS, (FEATURES, K)),
    "encode n=16": Goal(sae_cases.sae_encode, 16, (FEATURES, K)),
    "encode n=1": Goal(sae_cases.sae_encode, 1, (FEATURES, K)),
    "edit top-k n=1": Goal(edit_top_k, 1, (FEATURES, K, 8)),
    "edit top-k n=16": Goal(edit_top_k, 16, (FEATURES, K, 8)),
    "encode mixed": Goal(encode_mixed, TOKENS, (FEATURES, K)),
    "encode mixed n=16": Goal(encode_mixed, 16, (FEATURES, K)),
    "encode mixed n=1": Goal(encode_mixed, 1, (FEATURES, K)),
}
"""Short name -> the goal, those first that the most hangs on."""
