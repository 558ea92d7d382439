"""The standard cases of the ops on a stream: what each must move and compute, ours, and plain PyTorch as a user writes it.

Every public function builds one `Case`; sizes are its arguments, and its name says them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import steerfast as sf
from steerfast import ops

from .case import Case, Compiled, Function, Inputs, Stream, error_share, same_as
from .methods import METHODS, amplify

ANGLE = 0.4  # radians that a flow turns


def add(at: Stream, n: int, slots: int = 8) -> Case:
    """x + scale · vectors[rows], every row with its own slot and strength."""
    bank, scale = at.rows(slots), torch.rand(n, device=at.device)
    rows = torch.randint(0, slots, (n,), device=at.device, dtype=torch.int32)
    best = lambda x, bank, scale: torch.addcmul(x, scale[:, None].to(x.dtype), bank[rows])  # noqa: E731
    chain = lambda x, bank, scale: (x + scale[:, None] * bank[rows]).to(x.dtype)  # noqa: E731
    return Case(
        f"add slots={slots} n={n} {at.tag}",
        bytes=(2 * n + min(n, slots)) * at.d * at.dtype.itemsize + 8 * n,
        operations=2 * n * at.d,
        fresh=lambda: (at.rows(n),),
        fixed=(bank, scale),
        ours=lambda x, bank, scale: ops.add(x, bank, rows, scale),
        judge=same_as(chain),
        peers={"eager": lambda: best, "naive chain": lambda: chain, "torch.compile": Compiled(chain)},
        dtype=at.dtype,
    )


def add_rms_norm(at: Stream, n: int) -> Case:
    """RMSNorm of (hidden + residual + scale · vectors[rows]), and the new stream."""
    run = ops.add_rms_norm
    weight, bank, scale = torch.rand(at.d, device=at.device).to(at.dtype), at.rows(8), torch.rand(n, device=at.device)
    rows = torch.randint(0, 8, (n,), device=at.device, dtype=torch.int32)
    nobody = torch.full_like(rows, -1)

    def chain(hidden: Tensor, residual: Tensor, weight: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return _normed((hidden + residual + scale[:, None] * bank[rows]).to(hidden.dtype), weight)

    def plain(hidden: Tensor, residual: Tensor, weight: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return _normed(hidden + residual, weight)

    return Case(
        f"add_rms_norm n={n} {at.tag}",
        bytes=4 * n * at.d * at.dtype.itemsize,
        operations=6 * n * at.d,
        fresh=lambda: (at.rows(n), at.rows(n)),
        fixed=(weight, bank, scale),
        ours=lambda hidden, residual, weight, bank, scale: run(hidden, residual, weight, bank, rows, scale),
        judge=_both(chain),
        peers={"eager": lambda: chain, "torch.compile": Compiled(chain)},
        yardsticks={
            "nobody steered": lambda: lambda h, r, w, bank, scale: run(h, r, w, bank, nobody, scale),
            "unsteered, torch.compile": Compiled(plain),
        },
        dtype=at.dtype,
    )


def add_in_a_block(at: Stream, n: int, slots: int = 8) -> Case:
    """A block's last sum, an addition to its rows and the norm of the next block, compiled as one graph with our opaque op.

    Beside it, in a quick run as well, the same in plain PyTorch, which the compiler fuses into the norm, and the graph without
    an addition.
    """
    bank, scale, weight = (
        at.rows(slots),
        torch.rand(n, device=at.device),
        torch.rand(at.d, device=at.device).to(at.dtype),
    )
    rows = torch.randint(0, slots, (n,), device=at.device, dtype=torch.int32)

    def normed(stream: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.rms_norm(stream, stream.shape[-1:], weight, 1e-6), stream

    def ours(hidden: Tensor, residual: Tensor, weight: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return normed(ops.add(hidden + residual, bank, rows, scale), weight)

    def plain(hidden: Tensor, residual: Tensor, weight: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return normed((hidden + residual + scale[:, None] * bank[rows]).to(hidden.dtype), weight)

    def nothing(hidden: Tensor, residual: Tensor, weight: Tensor, bank: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return normed(hidden + residual, weight)

    return Case(
        f"add in a compiled block n={n} {at.tag}",
        bytes=(4 * n + slots) * at.d * at.dtype.itemsize,
        operations=6 * n * at.d,
        fresh=lambda: (at.rows(n), at.rows(n)),
        fixed=(weight, bank, scale),
        ours=Compiled(ours)(),
        judge=_both(plain),
        peers={"fused by the compiler": lambda: Compiled(plain)()},
        yardsticks={"compiled, nothing added": lambda: Compiled(nothing)()},
        dtype=at.dtype,
    )


def _normed(stream: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = stream if stream.dtype == torch.float64 else stream.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.to(wide.dtype)
    return normed.to(stream.dtype), stream


def _both(formula: Function) -> Callable[[Inputs], Callable[[Any], float]]:
    def judge(inputs: Inputs) -> Callable[[Any], float]:
        true, naive = formula(*(v.double() for v in inputs)), formula(*inputs)
        return lambda got: max(error_share(g, t, v) for g, t, v in zip(got, true, naive, strict=True))

    return judge


def subspace(at: Stream, n: int, method: str, k: int, slots: int = 1) -> Case:
    """One method of the subspace op at rank k; with several slots every row has its own, round robin."""
    bank = sf.Bank(at.d, slots, max(64, 2 * k * slots), at.dtype, at.device)
    for _ in range(slots):
        intervention, best, chain = METHODS[method](at.basis(k).float())
        bank.register(intervention)
    slot, modes, rank = bank.view(0), bank.modes, bank.max_rank
    rows = torch.arange(n, device=at.device, dtype=torch.int32) % slots if slots > 1 else None
    shared = slot.project is slot.lift
    several = f" slots={slots}" if slots > 1 else ""

    def owned(formula: Function) -> Function:
        """The formula for each slot on its own rows."""
        if rows is None:
            return formula
        views = [bank.view(i) for i in range(slots)]

        def all_slots(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
            out = torch.empty_like(x)
            for i, view in enumerate(views):
                mine = slice(i, None, slots)
                out[mine] = formula(x[mine], view.project.to(x.dtype), view.lift.to(x.dtype))
            return out

        return all_slots

    return Case(
        f"{method} k={rank}{several} n={n} {at.tag}",
        bytes=(2 * n + (1 if shared else 2) * rank * min(n, slots)) * at.d * at.dtype.itemsize,
        operations=4 * n * at.d * rank,
        fresh=lambda: (at.rows(n),),
        fixed=(slot.project, slot.lift),
        ours=lambda x, b, c: ops.subspace(x, *bank.tensors, rows=rows, modes=modes, max_rank=rank),
        judge=same_as(owned(chain)),
        peers={"eager": lambda: owned(best), "naive chain": lambda: owned(chain)}
        | ({} if rows is not None else {"torch.compile": Compiled(chain)}),
        yardsticks={
            "its two products": lambda: lambda x, b, c: (x @ b.T) @ c,
            "one slot": lambda: lambda x, b, c: ops.subspace(x, *bank.tensors, modes=modes, max_rank=rank),
        },
        dtype=at.dtype,
    )


def op(at: Stream, n: int, name: str, k: int) -> Case:
    """A function of `sf.ops` on tensors, without a bank: ablate, amplify or calibrate."""
    run: dict[str, Function] = {
        "ablate": lambda x, b, c: ops.ablate(x, b),
        "amplify": lambda x, b, c: ops.amplify(x, b, 0.5),
        "calibrate": lambda x, b, c: ops.calibrate(x, b, 2.0),
    }
    case = subspace(at, n, name, k)
    return replace(case, name=f"ops.{case.name}", ours=run[name])


def affine(at: Stream, n: int) -> Case:
    """w⊙x + b, elementwise."""
    w, b = at.rows(2)
    chain = lambda x, w, b: w * x + b  # noqa: E731
    best = lambda x, w, b: torch.addcmul(b, w, x)  # noqa: E731
    return Case(
        f"affine n={n} {at.tag}",
        bytes=2 * n * at.d * at.dtype.itemsize,
        operations=2 * n * at.d,
        fresh=lambda: (at.rows(n),),
        fixed=(w, b),
        ours=ops.affine,
        judge=same_as(chain),
        peers={"eager": lambda: best, "naive chain": lambda: chain, "torch.compile": Compiled(chain)},
        dtype=at.dtype,
    )


def flow(at: Stream, n: int, k: int, steps: int = 10, method: str = "euler") -> Case:
    """The flow of a barrier of rank k over an angle of 0.4, beside the same steps in all d dimensions."""
    q, (lam, bias) = at.basis(k), torch.randn(2, k, device=at.device)
    ours = lambda x, q, lam, bias: ops.flow(x, q, lam, bias, angle=ANGLE, steps=steps, method=method)  # noqa: E731
    direct = lambda x, q, lam, bias: direct_flow(x, q, lam, bias, steps, method)  # noqa: E731
    lift = amplify(q.float())[1]
    ten = lambda x, q, lam, bias: ops.flow(x, q, lam, bias, angle=ANGLE, steps=10)  # noqa: E731
    same = lambda x, q, lam, bias: ops.flow(x, q, lam, bias, angle=ANGLE, steps=steps)  # noqa: E731
    return Case(
        f"flow {method} steps={steps} k={k} n={n} {at.tag}",
        bytes=(2 * n + k) * at.d * at.dtype.itemsize,
        operations=4 * n * at.d * k,
        fresh=lambda: (at.rows(n),),
        fixed=(q, lam, bias),
        ours=ours,
        judge=same_as(direct),
        peers={"all dimensions": lambda: direct},
        yardsticks={
            "its two products": lambda: lambda x, q, lam, bias: (x @ q.T) @ q,
            "amplify": lambda: lambda x, q, lam, bias: ops.amplify(x, q, 0.5),
            "amplify, eager": lambda: lambda x, q, lam, bias: lift(x, q, q),
            "euler, 10 steps": lambda: ten,
            "euler, same steps": lambda: same,
        },
        dtype=at.dtype,
    )


def direct_flow(x: Tensor, q: Tensor, lam: Tensor, bias: Tensor, steps: int, method: str = "euler") -> Tensor:
    """da/dt = ∇h/‖∇h‖ in d dimensions, by the rule that users of the published method write down."""
    a = x if x.dtype == torch.float64 else x.float()
    q = q.to(a.dtype)
    step = ANGLE / steps * a.norm(dim=-1, keepdim=True)

    def field(a: Tensor) -> Tensor:
        norm = a.norm(dim=-1, keepdim=True)
        point = a / norm
        u = (2 * lam * (point @ q.T) + bias) @ q
        tangent = u - (point * u).sum(-1, keepdim=True) * point
        return tangent / tangent.norm(dim=-1, keepdim=True)

    advance = PLAIN_STEPS[method]
    for _ in range(steps):
        a = advance(field, a, step)
    return a.to(x.dtype)


def _rk4_step(field: Function, a: Tensor, step: Tensor) -> Tensor:
    k1 = field(a)
    k2 = field(a + step / 2 * k1)
    k3 = field(a + step / 2 * k2)
    return a + step / 6 * (k1 + 2 * k2 + 2 * k3 + field(a + step * k3))


PLAIN_STEPS: dict[str, Function] = {"euler": lambda field, a, step: a + step * field(a), "rk4": _rk4_step}
"""The solvers that a flow can be checked against, as one step of theirs in all dimensions."""
