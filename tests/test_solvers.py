"""Solvers: every tableau is what it claims, and every flow on k + 1 numbers is the same scheme in all d dimensions."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import reference
import torch
from flowing import KINDS, RAW, barrier, by_hand, formula, unit_gradient

import steerfast as sf
from steerfast.edits.flow import field_of
from steerfast.ops import few, solvers
from steerfast.ops.solvers import Field, integrate, pack, scheme, unpack
from steerfast.ops.tableaus import SOLVERS, Tableau

FIXED = [name for name, solver in SOLVERS.items() if not solver.adaptive and not solver.single]


def points(n: int = 6, d: int = 12) -> torch.Tensor:
    return 4 * torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_small_space_is_exact(name, kind):
    """In float64, against steps in all d dimensions: all the way, and up to a level that some rows reach."""
    h, a = barrier(kind, 12), points()
    if SOLVERS[name].geodesic and kind in RAW:
        pytest.skip("a raw barrier has no great circles")
    for level in (None, float(h(a).median())):
        edit = sf.Flow(h, angle=0.3, steps=4, method=name, level=level, tolerance=1e-2)
        got = sf.flow(a, h, angle=0.3, steps=4, method=name, level=level, tolerance=1e-2)
        torch.testing.assert_close(got, by_hand(a, edit), atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(edit.apply(a, -0.5), by_hand(a, edit, -0.5), atol=1e-5, rtol=1e-5)  # float32 numbers


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_reference_is_that_of_autograd(kind):
    """In coordinates; the part along x, which the sphere takes away, is taken away from both."""
    h, a = barrier(kind, 12), points()
    for row, expected in zip(a, unit_gradient(h, a), strict=True):
        z = h.basis.double() @ row / (1 if h.raw else row.norm())
        gradient = formula(h).gradient(z) @ h.basis.double()
        if not h.raw:
            gradient = gradient - (gradient @ row) * row / (row @ row)
        torch.testing.assert_close(gradient / gradient.norm(), expected)
        torch.testing.assert_close(formula(h).height(z), h(row[None])[0])


def test_the_tableaus_of_the_reference_are_ours():
    for name, solver in SOLVERS.items():
        scheme = reference.WALKS[name].scheme
        assert (scheme.a, scheme.b) == (solver.tableau.a, solver.tableau.b), name


@pytest.mark.parametrize("name", FIXED)
def test_measured_order_of_convergence(name):
    """Halving the step divides the error by 2 to the order of the scheme."""
    h, a = barrier("quadratic", 12), points()
    true = sf.flow(a, h, angle=0.5, steps=400, method="rk4")
    errors = [(sf.flow(a, h, angle=0.5, steps=n, method=name) - true).norm().item() for n in (16, 32, 64)]
    measured = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert all(abs(found - SOLVERS[name].tableau.order) < 0.3 for found in measured), measured


@pytest.mark.parametrize("name", ["euler", "midpoint"])
def test_fixed_steps_are_those_of_torchdiffeq(name):
    odeint = pytest.importorskip("torchdiffeq").odeint
    h, a = barrier("mlp", 12), points()
    length, span = 0.4 * a.norm(dim=1, keepdim=True), torch.tensor([0.0, 1.0], dtype=torch.float64)
    path = odeint(lambda _, y: length * unit_gradient(h, y), a, span, method=name, options={"step_size": 1 / 10})
    torch.testing.assert_close(sf.flow(a, h, angle=0.4, steps=10, method=name), path[-1], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_all_solvers_tend_to_the_flow_of_torchdiffeq(kind):
    odeint = pytest.importorskip("torchdiffeq").odeint
    h, a = barrier(kind, 12), points()
    length, span = 0.4 * a.norm(dim=1, keepdim=True), torch.tensor([0.0, 1.0], dtype=torch.float64)
    true = odeint(lambda _, y: length * unit_gradient(h, y), a, span, method="dopri5", rtol=1e-10, atol=1e-10)[-1]
    moved = (true - a).norm()
    assert (sf.flow(a, h, angle=0.4, steps=64, method="rk4") - true).norm() < 1e-6 * moved
    assert (sf.flow(a, h, angle=0.4, steps=40, method="adaptive", tolerance=1e-6) - true).norm() < 1e-4 * moved
    assert (sf.flow(a, h, angle=0.4, steps=400) - true).norm() < 5e-3 * moved


def test_adaptive_steps_keep_the_tolerance_and_arrive():
    """The error falls with the tolerance; with too few attempts the path still has its length."""
    h, a = barrier("quadratic", 12), points()
    true = sf.flow(a, h, angle=0.5, steps=800, method="rk4")
    errors = [
        (sf.flow(a, h, angle=0.5, steps=200, method="adaptive", tolerance=t) - true).norm().item() / true.norm().item()
        for t in (1e-2, 1e-4, 1e-6, 1e-8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    straight = barrier("raw", 12)
    for steps in (1, 2, 7):
        got = sf.flow(a, straight, T=2.0, steps=steps, method="adaptive", tolerance=1e-9)
        torch.testing.assert_close((got - a).norm(dim=1), torch.full((6,), 2.0, dtype=torch.float64))


def test_the_geodesic_keeps_the_norm_and_the_others_lose_it_by_their_order():
    h, a = barrier("rff", 12), points()
    r = a.norm(dim=1)
    assert (sf.flow(a, h, angle=0.8, steps=5, method="geodesic").norm(dim=1) / r - 1).abs().max() < 1e-14
    grown = sf.flow(a, h, angle=0.8, steps=5).norm(dim=1) ** 2 / r**2
    torch.testing.assert_close(grown, torch.full_like(grown, 1 + 0.8**2 / 5))  # Euler adds ε² a step
    assert (sf.flow(a, h, angle=0.8, steps=5, method="rk4").norm(dim=1) / r - 1).abs().max() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_and_torch_run_the_same_formulas(kind, monkeypatch):
    h, a = barrier(kind, 12), points().float()
    for name in SOLVERS:
        if SOLVERS[name].geodesic and kind in RAW:
            continue
        small = sf.flow(a, h, angle=0.5, steps=5, method=name, level=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(solvers, "SMALL", 0)
            patch.setattr(few, "SMALL", 0)
            torch.testing.assert_close(sf.flow(a, h, angle=0.5, steps=5, method=name, level=1.0), small)


@pytest.mark.parametrize("kind", ["linear", "quadratic", "raw", "bent"])
def test_one_row_and_several_take_the_same_steps(kind, monkeypatch):
    """The two fast ways of Euler against `_integrate`, with rows that have no way to go among them."""
    h, a = barrier(kind, 12), points()
    a[2], a[4] = 0.0, 3 * h.basis[0].double()  # a pole of the linear barrier
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(few, "_eulers_of_one", lambda *args, run=few._eulers_of_one: calls.append(1) or run(*args))
        alone = torch.cat([sf.flow(row[None], h, angle=0.4) for row in a])
        together = sf.flow(a, h, angle=0.4)
        assert len(calls) == (0 if h.raw else 6)  # a raw barrier has a way of its own
        patch.setattr(solvers, "SMALL", 0)
        patch.setattr(few, "SMALL", 0)
        true = sf.flow(a, h, angle=0.4)
    torch.testing.assert_close(together, true, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(alone, true, atol=1e-12, rtol=1e-12)
    for n in (1, 6):  # nothing moves, bit for bit
        still = -0.0 * a[:n].float()
        assert torch.equal(sf.flow(still, h, angle=0.4).view(torch.int32), still.view(torch.int32))


def test_one_row_beyond_all_numbers_is_not_a_number():
    h, x = barrier("quadratic", 12), torch.full((1, 12), 1e19)
    for rows in (x, x.repeat(2, 1)):
        assert not sf.flow(rows, h, T=1.0).isfinite().any()
    sf.flow(torch.ones(1, 12, dtype=torch.float64), h, T=1e200)  # r² overflows on the way


def test_full_rank_rows_take_the_steps_of_all_dimensions():
    """Nothing lies outside the span, and rounding must not pose as it: its share grows with every step."""
    q, lam = (
        torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0],
        torch.linspace(0.5, 1.5, 16, dtype=torch.float64),
    )
    h, a = sf.Barrier(q.float(), lam.float(), torch.zeros(16)), points(20, 16)
    true = by_hand(a, sf.Flow(h, angle=2.0, steps=50))
    for rows in (a, a[:1]):
        got = sf.flow(rows, h, angle=2.0, steps=50)
        torch.testing.assert_close(got, true[: len(rows)], atol=1e-3, rtol=1e-3)


def test_a_gradient_reaches_the_strength():
    h, x = barrier("quadratic", 12), points(2).float()
    bank = sf.Bank(12, slots=2, directions=12)
    rows = torch.full((2,), bank.register(sf.Flow(h, angle=0.4)), dtype=torch.int32)
    for n in (1, 2):
        scale = torch.ones(n, requires_grad=True)
        sf.ops.subspace(x[:n], *bank.tensors, rows[:n], scale, modes=bank.modes).sum().backward()
        assert scale.grad.abs().min() > 0


def test_banks_in_a_batch_may_differ_in_whether_they_are_raw():
    x, h = points(3).float(), barrier("bent", 12)
    flows = [sf.Flow(dataclasses.replace(h, raw=raw), T=1.0) for raw in (True, False)]
    slot = flows[0].slot()
    both = torch.stack([flow.slot().numbers for flow in flows])
    got = torch.func.vmap(lambda table: sf.ops.subspace(x, slot.directions, table, slot.header().tensor()))(both)
    torch.testing.assert_close(got, torch.stack([flow.apply(x) for flow in flows]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 2000])
def test_no_number_as_a_strength_is_no_number_where_h_stands_still(n):
    h = sf.Barrier(torch.eye(4)[:2], torch.zeros(2), torch.zeros(2), raw=True)
    bank = sf.Bank(4, slots=1)
    rows = torch.full((n,), bank.register(sf.Flow(h, T=1.0)), dtype=torch.int32)
    strengths = torch.full((n,), torch.nan)
    assert sf.ops.subspace(torch.ones(n, 4), *bank.tensors, rows, strengths)[:, :2].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_scheme_survives_its_rows(name, kind):
    field, how = field_of(barrier(kind, 12)), scheme(name, 1e-3, 0.75)
    table = torch.zeros(field.eigenvalues.shape[0], 8)
    table[:, 0], table[:, 1] = field.eigenvalues, field.bias
    rows = pack(field, how)
    back, again = unpack(table, rows, field.raw)
    for got, expected in zip(back, field, strict=True):
        assert torch.equal(got, expected) if isinstance(expected, torch.Tensor) else got == expected
    flat = [n for stage in how.stages for n in stage]
    assert [n for stage in again.stages for n in stage] == pytest.approx(flat, rel=1e-6)
    assert (again.geodesic, again.order, again.level) == (how.geodesic, how.order, 0.75)


def test_plain_euler_needs_no_rows():
    assert pack(field_of(barrier("quadratic", 12)), scheme("euler")) is None
    assert pack(field_of(barrier("quadratic", 12)), scheme("one-step")) is None
    assert pack(field_of(barrier("bent", 12)), scheme("euler")) is None
    assert pack(field_of(barrier("rff", 12)), scheme("euler")) is not None
    for kind in ("quadratic", "bent"):
        assert bool(sf.Flow(barrier(kind, 12), angle=0.4).slot().constants[3]) == (kind == "bent")


def test_gradients_through_every_solver():
    q = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64))[0].T
    y = (points(3, 7) @ q.T).requires_grad_()
    norm = points(3, 7).norm(dim=1, keepdim=True)
    numbers = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def run(y, numbers, name):
        return integrate(y, norm, Field(numbers[0], numbers[1]), 0.3 * norm, 3, scheme(name))

    for name in ("euler", "geodesic", "rk4"):
        assert torch.autograd.gradcheck(run, (y, numbers, name))


@pytest.mark.parametrize(
    ("a", "b", "order", "error", "message"),
    [
        (((), (0.5,)), (0.0, 1.0), 3, (), "order 3 is claimed, but b·c² = 1/3 does not hold"),
        (((),), (0.9,), 1, (), "Σb = 1"),
        (((), (0.5, 0.5)), (0.0, 1.0), 2, (), "expected 0, 1, 2"),
        (((), (0.5,)), (0.0, 1.0), 2, (0.5,), "expected 0, 1, 2"),
        (((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3, (), ""),
        (((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), 4, (), "needs slopes older"),
        (((), (1.0,)), (0.5, 0.5), 2, (0.1, 0.2), "no multiple of the last slope"),
    ],
)
def test_a_tableau_that_does_not_hold_is_refused(a, b, order, error, message):
    if not message:  # Kutta's third-order scheme: p = 2 + 6·(2/3), m = -6 reach its last stage
        assert Tableau(a, b, order, error).paths()[2] == pytest.approx((6.0, -6.0))
        return
    with pytest.raises(ValueError, match=message):
        Tableau(a, b, order, error)


def test_the_embedded_scheme_is_one():
    """b - error is a scheme of its own, one order lower."""
    tableau = SOLVERS["adaptive"].tableau
    lower = np.array(tableau.b) - np.array(tableau.error)
    Tableau(tableau.a, tuple(lower.tolist()), tableau.order - 1)
