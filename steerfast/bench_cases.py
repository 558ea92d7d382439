"""The cases of the ops: what each must move and compute, ours, and the same in plain PyTorch as a user would write it.

Every public function builds one `Case`; sizes are its arguments, and its name says them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import steerfast as sf

from . import ops
from .timing import Case, Compiled, Function, Inputs, NotHere, error_share, same_as

SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Stream:
    """The residual stream of a case: where it lives, in what dtype, how wide."""

    device: str
    dtype: torch.dtype
    d: int

    @property
    def tag(self) -> str:
        """How a case names it, such as "d=4096 bf16"."""
        return f"d={self.d} {SHORT[self.dtype]}"

    def rows(self, n: int) -> Tensor:
        """n random rows."""
        return torch.randn(n, self.d, device=self.device).to(self.dtype)

    def basis(self, k: int) -> Tensor:
        """k orthonormal rows."""
        return torch.linalg.qr(torch.randn(self.d, k, device=self.device))[0].T.contiguous().to(self.dtype)

    def dictionary(self, features: int) -> Tensor:
        """Rows of length about 1, filled in parts: the float32 copy of a large one need not fit."""
        w = torch.empty(features, self.d, device=self.device, dtype=self.dtype)
        for part in w.split(8192):
            part.copy_(torch.randn(part.shape, device=self.device) / math.sqrt(self.d))
        return w


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
    if not hasattr(ops, "add_rms_norm"):
        raise NotHere("steerfast.ops has no add_rms_norm yet")
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


def _normed(stream: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = stream if stream.dtype == torch.float64 else stream.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight.to(wide.dtype)
    return normed.to(stream.dtype), stream


def _both(formula: Function) -> Callable[[Inputs], Callable[[Any], float]]:
    def judge(inputs: Inputs) -> Callable[[Any], float]:
        true, naive = formula(*(v.double() for v in inputs)), formula(*inputs)
        return lambda got: max(error_share(g, t, v) for g, t, v in zip(got, true, naive, strict=True))

    return judge


# --- methods of the subspace op: an intervention, and the same in plain PyTorch as (x, B, C) -> x' --------------------

Method = tuple[sf.Intervention, Function, Function]  # the intervention, the best eager form, the naive chain


def _ablate(rows: Tensor) -> Method:
    return (
        sf.Ablate(rows),
        lambda x, b, c: torch.addmm(x, x @ b.T, b, alpha=-1),
        lambda x, b, c: x - (x @ b.T) @ b,
    )


def _amplify(rows: Tensor) -> Method:
    return (
        sf.Amplify(rows, 0.5),
        lambda x, b, c: torch.addmm(x, torch.relu(x @ b.T), b, alpha=0.5),
        lambda x, b, c: x + 0.5 * (torch.relu(x @ b.T) @ b),
    )


def _amplify_keep_norm(rows: Tensor) -> Method:
    def chain(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        out = x + 0.5 * (torch.relu(x @ b.T) @ b)
        return out * (x.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True))

    def best(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        out = torch.addmm(x, torch.relu(x @ b.T), b, alpha=0.5)
        return out.mul_(x.norm(dim=-1, keepdim=True).div_(out.norm(dim=-1, keepdim=True)))

    return sf.Amplify(rows, 0.5, keep_norm=True), best, chain


def _calibrate(rows: Tensor) -> Method:
    return (
        sf.Calibrate(rows, 2.0),
        lambda x, b, c: torch.addmm(x, torch.relu(x @ b.T).neg_().add_(2.0 / len(b)), b),
        lambda x, b, c: x - torch.relu(x @ b.T) @ b + 2.0 * b.mean(0),
    )


def _affine_ablate(rows: Tensor) -> Method:
    chain = lambda x, b, c: x + (1.5 - x @ b.T) @ b  # noqa: E731
    return (
        sf.AffineAblate(rows[0], baseline=1.0, offset=0.5),
        lambda x, b, c: torch.addmm(x, 1.5 - x @ b.T, b),
        chain,
    )


def _clamp(rows: Tensor) -> Method:
    def act(y: Tensor) -> Tensor:
        return y.clamp(-0.5, 0.5) - y

    return (
        sf.Clamp(rows[0], low=-0.5, high=0.5),
        lambda x, b, c: torch.addmm(x, act(x @ b.T), b),
        lambda x, b, c: x + act(x @ b.T) @ b,
    )


def _rotate(rows: Tensor) -> Method:
    def act(y: Tensor) -> Tensor:
        return y.norm(dim=-1, keepdim=True) * y.new_tensor([math.cos(math.pi / 5), math.sin(math.pi / 5)]) - y

    return (
        sf.Rotate(rows[:2], degrees=36.0),
        lambda x, b, c: torch.addmm(x, act(x @ b.T), b),
        lambda x, b, c: x + act(x @ b.T) @ b,
    )


def _loreft(rows: Tensor) -> Method:
    w = torch.randn(rows.shape, device=rows.device) / math.sqrt(rows.shape[1])
    return (
        sf.LoReFT(rows, w),
        lambda x, b, c: torch.addmm(x, x @ b.T, c),
        lambda x, b, c: x + (x @ b.T) @ c,
    )


def _push(rows: Tensor) -> Method:
    def chain(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        short = torch.relu(3.0 - torch.relu(x @ b.T))
        out = x + 3.0 * (short / short.sum(-1, keepdim=True)) @ b
        return out * (x.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True))

    def best(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        short = torch.relu(3.0 - torch.relu(x @ b.T))
        out = torch.addmm(x, short.div_(short.sum(-1, keepdim=True)), b, alpha=3.0)
        return out.mul_(x.norm(dim=-1, keepdim=True).div_(out.norm(dim=-1, keepdim=True)))

    return sf.DeficitPush(rows, target=3.0), best, chain


METHODS: dict[str, Callable[[Tensor], Method]] = {
    "ablate": _ablate,
    "amplify": _amplify,
    "amplify keep_norm": _amplify_keep_norm,
    "calibrate": _calibrate,
    "affine_ablate": _affine_ablate,
    "clamp": _clamp,
    "rotate": _rotate,
    "loreft": _loreft,
    "push": _push,
}


def subspace(at: Stream, n: int, method: str, k: int, slots: int = 1) -> Case:
    """One method of the subspace op at rank k; with several slots every row has its own, round robin."""
    bank = sf.Bank(at.d, slots, max(64, 2 * k * slots), at.dtype, at.device)
    for _ in range(slots):
        intervention, best, chain = METHODS[method](at.basis(k).float())
        bank.register(intervention)
    slot, modes, rank = bank.view(0), bank.modes, bank.max_rank
    rows = torch.arange(n, device=at.device, dtype=torch.int32) % slots if slots > 1 else None
    shared = slot.project.data_ptr() == slot.lift.data_ptr()
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


def edit_features(at: Stream, n: int, features: int, count: int = 8) -> Case:
    """A few features of an SAE set to a value with the error term kept, beside encode, edit and two decodes of all."""
    w_enc, w_dec = at.dictionary(features), at.dictionary(features)
    bias = 0.1 * torch.randn(features, device=at.device).to(at.dtype)
    chosen = torch.randperm(features)[:count].sort().values.tolist()
    place = torch.tensor(chosen, device=at.device)
    parts = sf.Features(w_enc[place].float(), w_dec[place].float(), bias[place].float())
    bank = sf.Bank(at.d, 1, 2 * count, at.dtype, at.device)
    bank.register(sf.EditFeatures(parts, dict.fromkeys(range(count), 4.0)))

    def few(x: Tensor, w_enc: Tensor, w_dec: Tensor, bias: Tensor) -> Tensor:
        f = torch.relu(x @ w_enc[place].T + bias[place])
        return x + (4.0 - f) @ w_dec[place]

    def whole(x: Tensor, w_enc: Tensor, w_dec: Tensor, bias: Tensor) -> Tensor:
        f = torch.relu(torch.addmm(bias, x, w_enc.T))
        error = x - f @ w_dec
        f[:, place] = 4.0
        return f @ w_dec + error

    return Case(
        f"edit_features count={count} F={features} n={n} {at.tag}",
        bytes=(2 * n + 2 * count) * at.d * at.dtype.itemsize,
        operations=4 * n * at.d * count,
        fresh=lambda: (at.rows(n),),
        fixed=(w_enc, w_dec, bias),
        ours=lambda x, *_: ops.subspace(x, *bank.tensors, modes=bank.modes, max_rank=count),
        judge=same_as(few),
        peers={"eager": lambda: few, "whole SAE twice": lambda: whole},
        dtype=at.dtype,
        slack=100.0,  # the whole SAE takes the difference of two large sums
    )


# --- flow -------------------------------------------------------------------------------------------------------------

ANGLE = 0.4


def flow(at: Stream, n: int, k: int, steps: int = 10, method: str = "euler") -> Case:
    """The flow of a barrier of rank k over an angle of 0.4, beside the same steps in all d dimensions."""
    if method != "euler" and "method" not in inspect.signature(ops.flow).parameters:
        raise NotHere(f"steerfast.ops.flow has no method {method} yet")
    q, (lam, bias) = at.basis(k), torch.randn(2, k, device=at.device)
    more: dict[str, Any] = {} if method == "euler" else {"method": method}
    ours = lambda x, q, lam, bias: ops.flow(x, q, lam, bias, angle=ANGLE, steps=steps, **more)  # noqa: E731
    direct = lambda x, q, lam, bias: direct_flow(x, q, lam, bias, steps, method)  # noqa: E731
    lift = _amplify(q.float())[1]
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

    for _ in range(steps):
        k1 = field(a)
        if method == "euler":
            a = a + step * k1
        elif method == "rk4":
            k2 = field(a + step / 2 * k1)
            k3 = field(a + step / 2 * k2)
            a = a + step / 6 * (k1 + 2 * k2 + 2 * k3 + field(a + step * k3))
        else:
            raise NotHere(f"no plain form of {method} to check against")
    return a.to(x.dtype)


# --- sparse autoencoders ----------------------------------------------------------------------------------------------


def sae_encode(at: Stream, n: int, features: int, k: int) -> Case:
    """Top-K of relu(x W_encᵀ + b), beside the full matrix of pre-activations in float32 and torch.topk."""
    w, b = at.dictionary(features), (0.1 * torch.randn(features, device=at.device)).to(at.dtype)
    return Case(
        f"sae_encode F={features} k={k} n={n} {at.tag}",
        bytes=(w.numel() + n * at.d) * at.dtype.itemsize + 8 * n * k,
        operations=2 * n * w.numel(),
        fresh=lambda: (at.rows(n),),
        fixed=(w, b),
        ours=lambda x, w, b: ops.sae_encode(x, w, b, k),
        judge=_exact_top_k,
        peers={"eager": lambda: lambda x, w, b: torch.relu(_product(x, w) + b).topk(k)},
        yardsticks={
            "product alone": lambda: lambda x, w, b: x @ w.T,
            "eager, rounded": lambda: lambda x, w, b: torch.addmm(b, x, w.T).relu_().topk(k),
        },
        dtype=at.dtype,
    )


def sae_encode_threshold(at: Stream, n: int, features: int, capacity: int) -> Case:
    """What lies above a threshold of 3.5 deviations, compacted and sorted, beside the full matrix and torch.topk."""
    w, b = at.dictionary(features), torch.zeros(features, device=at.device, dtype=at.dtype)
    level = 3.5 if features > 1000 else 2.0
    threshold = torch.full((features,), level, device=at.device)

    def best(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre = _product(x, w) + b
        pre = torch.where(pre > threshold, pre, 0)
        return (*pre.topk(capacity), (pre > 0).sum(1))

    def judge(inputs: Inputs) -> Callable[[Any], float]:
        """Every selected value is right, and the counts are those of float64 but for what lies at the threshold."""
        x, w, b = inputs[0][:16], inputs[1], inputs[2]
        true = x.double() @ w.double().T + b.double()
        tolerance = 2 * (x.float() @ w.float().T - true).abs().max() + true.max() * torch.finfo(torch.float32).eps
        least, most = ((true > level + sign * tolerance).sum(1) for sign in (1, -1))

        def share(got: tuple[Tensor, Tensor, Tensor]) -> float:
            values, indices, counts = got[0][:16], got[1][:16].long(), got[2][:16]
            error = torch.where(values > 0, values - true.gather(1, indices), 0).abs().max()
            wrong = ((counts < least) | (counts > most)).any() or not ((values > 0).sum(1) == counts).all()
            return math.inf if wrong else float(error / tolerance)

        return share

    return Case(
        f"sae_encode_threshold F={features} n={n} {at.tag}",
        bytes=(w.numel() + n * at.d) * at.dtype.itemsize,
        operations=2 * n * w.numel(),
        fresh=lambda: (at.rows(n),),
        fixed=(w, b),
        ours=lambda x, w, b: ops.sae_encode_threshold(x, w, b, threshold, capacity),
        judge=judge,
        peers={"eager": lambda: best},
        yardsticks={"product alone": lambda: lambda x, w, b: x @ w.T},
        dtype=at.dtype,
    )


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x Wᵀ in float32: from tensor cores without rounding where PyTorch offers it."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T


def _exact_top_k(inputs: Inputs) -> Callable[[Any], float]:
    """Nothing left out is larger than the smallest selected, up to twice the rounding of a float32 product."""
    x, w, b = inputs[0][:16], inputs[1], inputs[2]
    wide, naive = [], []
    for rows, bias in zip(w.split(8192), b.split(8192), strict=True):
        wide.append(torch.relu(x.double() @ rows.double().T + bias.double()))
        naive.append(torch.relu(x.float() @ rows.float().T + bias.float()))
    true = torch.cat(wide, 1)
    tolerance = 2 * (torch.cat(naive, 1) - true).abs().max() + true.max() * torch.finfo(torch.float32).eps

    def share(got: tuple[Tensor, Tensor]) -> float:
        values, indices = got[0][:16], got[1][:16].long()
        if (values.diff(dim=1) > 0).any() or (indices.sort(dim=1).values.diff(dim=1) == 0).any():
            return math.inf
        error = (values - true.gather(1, indices)).abs().max()
        left_out = true.scatter(1, indices, 0).amax(1) - values[:, -1]
        return max(float(error / tolerance), float(left_out.max() / (2 * tolerance)))

    return share


def sae_decode(at: Stream, n: int, features: int, k: int) -> Case:
    """Σ values · W_dec[indices], beside a gather, an embedding bag and the dense product."""
    w = at.dictionary(features)

    def fresh() -> Inputs:
        places = torch.rand(n, features, device=at.device).topk(k).indices if n * features < 1 << 26 else None
        if places is None:
            places = torch.randint(0, features, (n, k), device=at.device)
        return torch.rand(n, k, device=at.device), places.int()

    def chain(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("nk,nkd->nd", values.to(w.dtype), w[indices.long()])

    def bag(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(indices, w, per_sample_weights=values.to(w.dtype), mode="sum")

    def dense(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        full = w.new_zeros(n, features).scatter_add_(1, indices.long(), values.to(w.dtype))
        return full @ w

    def judge(inputs: Inputs) -> Callable[[Any], float]:
        values, indices, w = inputs
        some = slice(0, 64)
        true = torch.einsum("nk,nkd->nd", values[some].double(), w[indices[some].long()].double())
        naive = chain(values[some], indices[some], w)
        return lambda got: error_share(got[some], true, naive)

    return Case(
        f"sae_decode F={features} k={k} n={n} {at.tag}",
        bytes=n * (k + 1) * at.d * at.dtype.itemsize + 8 * n * k,
        operations=2 * n * k * at.d,
        fresh=fresh,
        fixed=(w,),
        ours=lambda values, indices, w: ops.sae_decode(values, indices, w),
        judge=judge,
        peers={"eager": lambda: bag, "naive chain": lambda: chain, "dense": lambda: dense},
        dtype=at.dtype,
    )
