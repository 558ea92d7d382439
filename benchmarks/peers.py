"""Other libraries' ways to the same answers, and the published way of ODESteer. All optional: what is absent is named.

Nothing here is a requirement. A peer's modules are taken one by one where its package as a whole would drag in others.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lab.case import Function, NotHere, Stream
from lab.cases import ANGLE
from torch import Tensor

from steerfast import ops

Makers = dict[str, Callable[[], Function]]


def alone(package: str, module: str) -> ModuleType:
    """One module of a package, without running the package's own imports."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    file = Path(next(iter(found.submodule_search_locations))) / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_peer_{package}_{module}", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise NotHere(f"this version of {package} has no module {module}")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def add(at: Stream, n: int, slots: int) -> Makers:
    """In place, as an engine's op does it: hotwire's, and our twin, each on a stream of its own."""
    bank, scales = at.rows(slots), torch.ones(slots, device=at.device)
    rows = torch.randint(0, slots, (n,), device=at.device, dtype=torch.int32)
    first = at.rows(n)

    def checked(edit: Callable[[Tensor], Any]) -> Function:
        stream = first.clone()
        edit(stream)
        true = first.double() + bank[rows].double()
        if (stream.double() - true).abs().max() > 4 * true.abs().max() * torch.finfo(at.dtype).eps:
            raise NotHere("red: it does not add the vectors")
        return lambda x, *_: edit(stream)

    def hotwire() -> Function:
        if at.device != "cuda":
            raise NotHere("hotwire's kernel needs a GPU")
        steer = alone("hotwire", "_kernel").steer
        return checked(lambda stream: steer(stream, bank, rows, scales))

    return {"in place": lambda: checked(lambda stream: ops.add_(stream, bank, rows)), "hotwire, in place": hotwire}


def sae_encode(k: int) -> Makers:
    """EleutherAI's sparsify and SAELens's Top-K SAE."""

    def sparsify() -> Function:
        encoder = alone("sparsify", "fused_encoder").fused_encoder

        def encode(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            values, indices, _ = encoder(x, w, b, k, "topk")
            values, order = values.float().sort(dim=1, descending=True)  # it leaves them in any order
            return values, indices.gather(1, order)

        return encode

    def sae_lens() -> Function:
        lens = importlib.import_module("sae_lens")
        built: dict[int, Any] = {}

        def encode(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            if not built:
                config = lens.TopKSAEConfig(
                    d_in=w.shape[1], d_sae=w.shape[0], k=k, dtype=str(w.dtype), device=str(w.device),
                    apply_b_dec_to_input=False,
                )  # fmt: skip
                sae = lens.TopKSAE(config)
                with torch.no_grad():
                    sae.W_enc.copy_(w.T)
                    sae.b_enc.copy_(b)
                built[0] = sae.eval()
            return built[0].encode(x)

        return encode

    def sae_lens_sorted() -> Function:
        encode = sae_lens()
        return lambda x, w, b: encode(x, w, b).to_dense().float().topk(k)

    return {"sparsify": sparsify, "SAELens": sae_lens_sorted}


def sae_decode() -> Makers:
    """The decode of EleutherAI's sparsify: Triton on a GPU, an embedding bag elsewhere."""

    def sparsify() -> Function:
        if not torch.cuda.is_available():
            raise NotHere("sparsify's Triton decode needs a GPU; without one it is an embedding bag")
        bag = alone("sparsify", "xformers").xformers_embedding_bag
        return lambda values, indices, w: bag(indices.long(), w, values.to(w.dtype))

    return {"sparsify": sparsify}


def flow(steps: int) -> Makers:
    """Gradients by autograd in all dimensions, and torchdiffeq's fixed-step Euler."""

    def autograd() -> Function:
        def run(x: Tensor, q: Tensor, lam: Tensor, bias: Tensor) -> Tensor:
            return _follow(x, steps, lambda a: _barrier(a, q, lam, bias))

        return run

    def torchdiffeq() -> Function:
        odeint = importlib.import_module("torchdiffeq").odeint

        def run(x: Tensor, q: Tensor, lam: Tensor, bias: Tensor) -> Tensor:
            start = x.float()
            length = ANGLE * start.norm(dim=-1, keepdim=True)

            def field(_: Tensor, a: Tensor) -> Tensor:
                return length * _unit_gradient(a, lambda a: _barrier(a, q, lam, bias))

            span = torch.tensor([0.0, 1.0], device=x.device)
            return odeint(field, start, span, method="euler", options={"step_size": 1 / steps})[-1].to(x.dtype)

        return run

    return {"autograd": autograd, "torchdiffeq": torchdiffeq}


BY_HAND = "published way, by hand"


def published_flow(at: Stream, steps: int = 10, components: int = 8000) -> Makers:
    """ODESteer's own way, a polynomial count sketch by FFT. Another barrier than ours, so other answers.

    h(a) = w · φ(a/‖a‖) with φ = ifft(fft(C₁z) · fft(C₂z)), z = (√γ·x, √c₀), γ = 0.1, c₀ = 1: a sketch of (γ·x·y + c₀)². In two
    forms: its authors', the gradient by autograd through the FFTs; and the best that one writes by hand, ∇ = Σᵢ Cᵢᵀ·ifft(fft(w) ·
    conj(fft(Cⱼz))), j the other of the two, with fft(w) kept.
    """
    hashes = torch.randint(0, components, (2, at.d + 1), device=at.device)
    signs = torch.randint(0, 2, (2, at.d + 1), device=at.device).float() * 2 - 1
    weight = torch.randn(components, device=at.device)

    def sketches(x: Tensor) -> Tensor:
        """fft(Cᵢz) of unit rows, (2, n, components // 2 + 1)."""
        z = torch.cat([math.sqrt(0.1) * x, torch.ones_like(x[:, :1])], dim=1)
        zero = z.new_zeros(len(z), components)
        return torch.fft.rfft(torch.stack([zero.index_add(1, hashes[i], z * signs[i]) for i in (0, 1)]))

    def authors() -> Function:
        def barrier(a: Tensor) -> Tensor:
            first, second = sketches(a / a.norm(dim=-1, keepdim=True))
            return torch.fft.irfft(first * second, n=components) @ weight

        return lambda x, *_: _follow(x, steps, barrier)

    def by_hand() -> Function:
        kept = torch.fft.rfft(weight)

        def run(x: Tensor, *_: Tensor) -> Tensor:
            a = x.float()
            step = ANGLE / steps * a.norm(dim=-1, keepdim=True)
            for _i in range(steps):
                point = a / a.norm(dim=-1, keepdim=True)
                first, second = torch.fft.irfft(kept * sketches(point).flip(0).conj(), n=components)
                pulled = first.index_select(1, hashes[0]) * signs[0] + second.index_select(1, hashes[1]) * signs[1]
                u = pulled[:, :-1]
                tangent = u - (point * u).sum(-1, keepdim=True) * point
                a = a + step * (tangent / tangent.norm(dim=-1, keepdim=True))
            return a.to(x.dtype)

        return run

    return {"published way": authors, BY_HAND: by_hand}


def _barrier(a: Tensor, q: Tensor, lam: Tensor, bias: Tensor) -> Tensor:
    y = (a / a.norm(dim=-1, keepdim=True)) @ q.to(a.dtype).T
    return (y * y) @ lam + y @ bias


def _unit_gradient(a: Tensor, barrier: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        gradient = torch.autograd.grad(barrier(leaf).sum(), leaf)[0]
    return gradient / gradient.norm(dim=-1, keepdim=True)


def _follow(x: Tensor, steps: int, barrier: Callable[[Tensor], Tensor]) -> Tensor:
    a = x.float()
    step = ANGLE / steps * a.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        a = a + step * _unit_gradient(a, barrier)
    return a.to(x.dtype)
