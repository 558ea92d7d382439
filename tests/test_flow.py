"""`sf.Flow`, `sf.flow` and `ops.flow`: every solver and barrier on every backend, the laws of the flow, and bad input."""

from __future__ import annotations

import pytest
import reference
import torch
from flowing import KINDS, RAW, barrier, by_hand, orthonormal, slerp, velocity
from places import DTYPES, PLACES, assert_exact, backend, runs

import steerfast as sf
from steerfast.ops.slots import FLOW, SOLVE
from steerfast.ops.tableaus import SOLVERS
from steerfast.place import Origin, Place

MODES = ("euler", "geodesic", "midpoint", "rk4", "ssp3", "adaptive")


def stream(n: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (3 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))).to(dtype)


def methods(kind: str, place: str = "cpu") -> list[str]:
    """The solvers that a barrier can take; on the interpreter, which is slow, those that share the least."""
    some = ("euler", "geodesic", "adaptive") if place == "interpreter" else MODES
    return [method for method in some if kind not in RAW or not SOLVERS[method].geodesic]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_solver_and_barrier_is_as_exact_as_its_formula(place, kind):
    rank = 17  # the tiles; the other kinds with their own ranks take the rows
    with backend(place) as device:
        for dtype in (
            t for t in DTYPES if runs(place, t) and (place != "interpreter" or t == DTYPES[kind == "quadratic"])
        ):
            x = stream(2 if place == "interpreter" else 7, 40, dtype).to(device)
            for method in methods(kind, place):
                for k in (3, rank) if kind in ("quadratic", "rff") and method in ("euler", "adaptive") else (3,):
                    how = {"angle": 0.4, "steps": 4, "method": method, "level": 3.0, "tolerance": 1e-2}
                    flow = sf.Flow(barrier(kind, 40, k), **how)
                    run = flow.alone(torch.device(device))
                    naive = reference.naive(by_hand, x, flow)
                    assert_exact(run(x, 1.0), by_hand(x, flow), naive, f"{kind} {method} {dtype} rank {k}")


def test_a_default_device_elsewhere_does_not_move_a_flow_on_a_cpu():
    torch.manual_seed(0)
    x, basis, lam, bias = torch.randn(4, 24), torch.linalg.qr(torch.randn(24, 3))[0].T, torch.randn(3), torch.randn(3)
    here = sf.ops.flow(x, basis, lam, bias, angle=0.3)
    with torch.device("meta"):
        there = sf.ops.flow(x, basis, lam, bias, angle=0.3)
    assert torch.equal(here, there)


@pytest.mark.parametrize("method", ["euler", "rk4", "adaptive"])
@pytest.mark.parametrize(
    "followed",
    [barrier("quadratic", 40), barrier("mlp", 40), velocity("identity", 40)],
    ids=["quadratic", "mlp", "velocity"],
)
def test_a_device_that_is_neither_cpu_nor_cuda_is_not_read_from_the_host(followed, method):
    out = sf.flow(torch.ones(2, 40, device="meta"), followed, T=1.0, method=method)
    assert (out.shape, out.device.type) == ((2, 40), "meta")


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_a_bank_have_their_own_barrier_solver_length_and_level(place):
    with backend(place) as device:
        flows = [
            sf.Flow(barrier("quadratic", 40), angle=0.3),
            sf.Flow(barrier("rff", 40, seed=1), T=2.0, steps=3, method="rk4"),
            sf.Flow(barrier("mlp", 40, seed=2), angle=0.5, steps=5, method="geodesic", level=0.5),
            sf.Flow(barrier("bent", 40, seed=3), T=1.0, steps=3, keep_norm=True),
            sf.Flow(barrier("linear", 40, seed=4), angle=0.6, steps=6, method="adaptive"),
        ]
        bank = sf.Bank(40, slots=6, directions=16, device=device)
        slots = [bank.register(flow) for flow in flows]
        assert bank.modes & (FLOW | SOLVE) == FLOW | SOLVE
        x = stream(6, 40).to(device)
        rows = torch.tensor([*slots, -1], dtype=torch.int32, device=device)
        scale = torch.tensor([1.0, 0.5, 1.0, 2.0, 0.75, 1.0], device=device)
        got = sf.ops.subspace(x, *bank.tensors, rows, scale, bank.modes, bank.max_rank)
        for i, flow in enumerate(flows):
            alone = by_hand(x[i], flow, scale[i].item())
            torch.testing.assert_close(got[i].double().cpu(), alone, atol=2e-5, rtol=2e-5)
        assert torch.equal(got[5], x[5])


@pytest.mark.parametrize("place", PLACES)
def test_a_full_rank_flow_is_two_products_around_its_steps(place):
    """With a row table, several columns and unowned rows, as low-rank ones; -1 rows keep their bits."""
    with backend(place) as device:
        flow = sf.Flow(barrier("full", 12), angle=0.4, steps=5, method="midpoint")
        bank = sf.Bank(12, slots=3, directions=12, device=device)
        bank.register(flow, 1)
        x = stream(5, 12).to(device)
        x[4] = -0.0
        rows = torch.tensor([[1, -1], [-1, -1], [0, 1], [1, 1], [-1, 2]], dtype=torch.int32, device=device)
        scale = torch.tensor([[1.0, 1], [1, 1], [1, 0.5], [1, 0.25], [1, 1]], device=device)
        got = sf.ops.subspace(x, *bank.tensors, rows, scale, bank.modes, bank.max_rank)
        once, half = by_hand(x, flow), by_hand(x, flow, 0.5)
        twice = by_hand(once, flow, 0.25)
        for i, expected in ((0, once[0]), (2, half[2]), (3, twice[3])):
            torch.testing.assert_close(got[i].double().cpu(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(got.view(torch.int32)[[1, 4]], x.view(torch.int32)[[1, 4]])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_length_is_the_identity_bit_for_bit(place, kind):
    with backend(place) as device:
        x = stream(4, 12).to(device)
        x[1, ::2], x[2] = -0.0, 0.0
        for method in methods(kind, place)[-2:] if place == "interpreter" else methods(kind):
            for path in ({"angle": 0.0},) if place == "interpreter" else ({"T": 0.0}, {"angle": 0.0}):
                got = sf.flow(x, barrier(kind, 12), **path, method=method)
                if place == "cpu" or kind == "full":
                    assert torch.equal(got.view(torch.int32), x.view(torch.int32)), (method, path)
                assert torch.equal(got, x)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_poles_and_overshoot_are_finite(place, kind):
    with backend(place) as device:
        h = barrier(kind, 12)
        top = h.basis[:1] * 5
        x = torch.cat([torch.zeros(1, 12), top, -top, top + 1e-6, 1e-20 * stream(1, 12), 1e15 * stream(1, 12)]).to(
            device
        )
        for method in methods(kind, place)[-2:] if place == "interpreter" else methods(kind):
            for path in ({"T": 100.0},) if place == "interpreter" else ({"angle": 4.0}, {"T": 100.0}):
                assert sf.flow(x, h, **path, steps=3, method=method).isfinite().all(), (method, path)
        if kind not in RAW:
            assert torch.equal(sf.flow(x, h, angle=0.5)[0], x[0])  # no direction, so no move
        flat = sf.Barrier(h.basis, torch.zeros(h.rank), torch.zeros(h.rank))
        assert torch.equal(sf.flow(x, flat, T=1.0, method="rk4"), x)  # h is constant


@pytest.mark.parametrize("place", PLACES)
def test_addition_is_one_euler_step_of_a_linear_raw_barrier(place):
    with backend(place) as device:
        v, x = stream(1, 12, seed=5)[0], stream(6, 12).to(device)
        h = sf.Barrier.linear(v, raw=True)
        for steps, method in ((1, "euler"), (10, "one-step"), (7, "euler"), (3, "rk4")):
            got = sf.flow(x, h, T=2.5, steps=steps, method=method)
            torch.testing.assert_close(got, sf.ops.add(x, (2.5 * v / v.norm()).to(device)), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("place", PLACES)
def test_spherical_steering_is_a_linear_barrier_on_the_sphere(place):
    """The flow turns every row along the great circle towards v; the geodesic steps are on it, exactly."""
    with backend(place) as device:
        v, x = stream(1, 12, seed=5)[0], stream(6, 12)
        h = sf.Barrier.linear(v)
        true = slerp(x.double(), v.double(), 0.6)
        got = sf.flow(x.to(device), h, angle=0.6, steps=4, method="geodesic").cpu()
        torch.testing.assert_close(got.double(), true, atol=3e-6, rtol=3e-6)
    many = sf.flow(x.double(), h, angle=0.6, steps=60, method="rk4")
    assert (many - true).abs().max() < 1e-5
    assert (sf.flow(x.double(), h, angle=0.6, steps=4) - true).norm() > 1e-3  # Euler is not on the sphere


@pytest.mark.parametrize("place", [PLACES[0], PLACES[2]])
@pytest.mark.parametrize("kind", KINDS)
def test_h_grows_along_the_path_and_stops_at_the_level(place, kind):
    with backend(place) as device:
        h, x = barrier(kind, 12), stream(8, 12).to(device)
        path = [x]
        for _ in range(12):
            path.append(sf.flow(path[-1], h, angle=0.01, steps=1))
        heights = torch.stack([h(a.double().cpu()) for a in path])
        assert (heights[1:] >= heights[:-1]).all()
        level = float(h(x.cpu()).median())
        end = h(sf.flow(x, h, angle=1.0, steps=20, method="rk4", level=level).double().cpu())
        free = h(sf.flow(x, h, angle=1.0, steps=20, method="rk4").double().cpu())
        above = h(x.cpu().double()) >= level
        assert torch.equal(sf.flow(x, h, angle=1.0, steps=20, method="rk4", level=level).cpu()[above], x.cpu()[above])
        reaches = ~above & (free > level)
        assert reaches.any()
        assert ((end - level).abs()[reaches] < 0.02 * (free - level)[reaches].abs() + 2e-3).all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_no_row_goes_farther_than_its_path(place, kind):
    """Also where it lies in the span but for rounding, near a pole, and steps beyond: there α would grow without bound."""
    h, draw = barrier(kind, 12), torch.Generator().manual_seed(0)
    inside = torch.randn(40, h.rank, generator=draw) @ h.basis
    noise = torch.tensor([0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2]).repeat(5)[:, None]
    rows = inside + noise * inside.norm(dim=1, keepdim=True) * torch.randn(40, 12, generator=draw)
    with backend(place) as device:
        for method in ("euler",) if place == "interpreter" else ("euler", "rk4", "geodesic"):
            for x in (rows.to(device), rows[:1].to(device), rows[7:8].to(device)):
                moved = (sf.flow(x, h, angle=1.0, steps=8, method=method) - x).norm(dim=1)
                assert (moved <= 1.01 * x.norm(dim=1)).all(), method


@pytest.mark.parametrize("place", PLACES)
def test_a_row_on_a_principal_axis_is_stationary_whatever_rounding_says(place):
    h = sf.Barrier(orthonormal(3, 12), torch.tensor([2.0, 1.5, -1.0]), torch.zeros(3))
    rows = torch.cat([c * h.basis for c in (9.35, 0.85, -3.3, 1e-3)])
    with backend(place) as device:
        for x in (rows.to(device), rows[:1].to(device)):
            for method in ("euler", "geodesic", "rk4"):
                assert torch.equal(sf.flow(x, h, angle=0.5, steps=3, method=method), x), method


@pytest.mark.parametrize("place", PLACES)
def test_norms(place):
    with backend(place) as device:
        h, x = barrier("quadratic", 40), stream(6, 40).to(device)
        r = x.norm(dim=1)
        euler = sf.flow(x, h, T=1.5, steps=6).norm(dim=1)
        torch.testing.assert_close(euler**2 - r**2, torch.full_like(r, 1.5**2 / 6), atol=2e-3, rtol=0)  # ε² a step
        torch.testing.assert_close(sf.flow(x, h, angle=0.7, steps=3, method="geodesic").norm(dim=1), r)
        kept = sf.Flow(h, angle=0.7, steps=3, keep_norm=True).alone(torch.device(device))(x, 1.0)
        torch.testing.assert_close(kept.norm(dim=1), r)
        turned = torch.nn.functional.cosine_similarity(kept, sf.flow(x, h, angle=0.7, steps=3))
        torch.testing.assert_close(turned, torch.ones_like(turned))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_negative_strength_is_the_flow_of_minus_h(place, kind):
    """Also where sizes of steps are compared: adaptive steps, and a level, to which h then falls."""
    if place == "interpreter" and kind != "quadratic":
        pytest.skip("the kernel's sign is the same for every kind, and the interpreter slow")
    with backend(place) as device:
        h, x = barrier(kind, 12), stream(4, 12).to(device)
        strengths, at = torch.tensor([-1.0, -0.5, 0.7, -2.0], device=device), torch.device(device)
        down, heights = (strengths < 0).cpu(), h(x.cpu())
        level = float(heights[down].sort().values[:2].mean())  # between two rows
        for method in methods(kind, place)[-1:] if place == "interpreter" else methods(kind):
            how = {"angle": 0.5, "steps": 3 if place == "interpreter" else 6, "method": method, "tolerance": 1e-3}
            for stop in (level,) if place == "interpreter" else (None, level):
                got = sf.Flow(h, level=stop, **how).alone(at)(x, strengths)
                turned = sf.Flow(-h, level=None if stop is None else -stop, **how).alone(at)(x, -strengths)
                torch.testing.assert_close(got, turned, atol=1e-5, rtol=1e-5)
                falls = down & (heights > (-torch.inf if stop is None else stop))
                assert falls.any()
                assert (h(got.cpu()) < heights)[falls].all(), method
                assert torch.equal(got.cpu()[down & ~falls], x.cpu()[down & ~falls]), method


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 5])
def test_numbers_of_sixteen_bits_are_widened(n, dtype):
    """A few rows on a CPU are stepped in NumPy, which has no bfloat16."""
    q, x = orthonormal(3, 12), stream(n, 12)
    lam, bias = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rows in (x, x.to(dtype)):
        got = sf.ops.flow(rows, q.to(dtype), lam, bias, angle=0.4)
        assert torch.equal(got, sf.ops.flow(rows, q, lam.float(), bias.float(), angle=0.4))


@pytest.mark.parametrize("place", PLACES)
def test_as_many_directions_as_the_stream_is_wide_are_no_flow_of_full_rank(place):
    """A bank may hold low-rank flows alone and just d rows: without `max_rank` nothing promises one slot of all of them."""
    with backend(place) as device:
        flows = [sf.Flow(barrier("quadratic", 12, seed=seed), angle=0.4, steps=4) for seed in (0, 1)]
        bank = sf.Bank(12, slots=2, directions=12, device=device)
        rows = torch.tensor([bank.register(flow) for flow in flows], dtype=torch.int32, device=device)
        x = stream(2, 12).to(device)
        twin = x.clone()
        got = sf.ops.subspace(x, *bank.tensors, rows, modes=bank.modes)
        sf.ops.subspace_(twin, *bank.tensors, rows, modes=bank.modes)
        for i, flow in enumerate(flows):
            torch.testing.assert_close(got[i].double().cpu(), by_hand(x[i], flow), atol=1e-5, rtol=1e-5)
        assert torch.equal(twin, got)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", [3, 40])
def test_a_basis_that_rounds_still_moves_rows_to_the_right_place(place, rank):
    """Rounding x' costs at most eps/2 of ‖x‖ = ‖δ‖/0.4, rounding Q at most eps/2 in the projection and in the lift."""
    q = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(5)))[0][:rank]
    lam, bias = torch.randn(2, rank, generator=torch.Generator().manual_seed(6))
    flow = sf.Flow(sf.Barrier(q, lam, bias), angle=0.4, steps=5)
    with backend(place) as device:
        for dtype in (t for t in DTYPES[1:] if runs(place, t)):
            x = stream(7, 40, dtype).to(device)
            start = x.double().cpu()
            true = by_hand(x, flow) - start
            moved = flow.alone(torch.device(device))(x, 1.0).double().cpu() - start
            error = (moved - true).norm(dim=1) / true.norm(dim=1)
            assert error.max() < 2.5 * torch.finfo(dtype).eps, (dtype, error.max())


def test_a_basis_is_converted_once_and_kept_with_its_barrier():
    """What a pass would upload again costs time, and cannot be captured."""
    x, flow = stream(4, 12, torch.bfloat16), sf.Flow(barrier("full", 12), angle=0.4)
    run = flow.alone(x.device)
    assert not torch.equal(run(x, 1.0), x)
    kept = flow.barrier.basis_as(x.device, x.dtype)
    assert kept.dtype == torch.bfloat16
    kept.zero_()
    for again in (run, flow.alone(x.device)):
        assert torch.equal(again(x, 1.0), x)  # it is this tensor that they read


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["euler", "rk4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_graph_replays_a_full_rank_flow(dtype, method):
    flow = sf.Flow(barrier("full", 64), angle=0.4, steps=5, method=method)
    run = flow.alone(torch.device("cuda"))
    static = stream(9, 64, dtype).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(static, 1.0)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static, 1.0)
    for seed in (1, 2):
        x = stream(9, 64, dtype, seed).cuda()
        static.copy_(x)
        graph.replay()
        true = by_hand(x, flow)
        moved = (true - x.double().cpu()).norm(dim=1)
        assert ((out.double().cpu() - true).norm(dim=1) / moved).max() < 4 * torch.finfo(dtype).eps + 1e-5


def test_a_row_does_not_depend_on_a_nearly_stationary_neighbour():
    h = barrier("quadratic", 12)
    x = torch.cat(
        [stream(5, 12), 3 * barrier("linear", 12).basis, torch.zeros(1, 12), torch.full((1, 12), float("nan"))]
    )
    got = sf.flow(x, h, angle=0.4)
    assert torch.equal(got[:5], sf.flow(x[:5], h, angle=0.4))
    assert got[:7].isfinite().all()
    assert got[7].isnan().all()


def test_the_op_takes_every_method():
    q, x = orthonormal(3, 12), stream(5, 12)
    lam, bias = torch.randn(2, 3)
    h = sf.Barrier(q, lam, bias)
    for method in SOLVERS:
        got = sf.ops.flow(x, q, lam, bias, angle=0.4, steps=6, method=method)
        torch.testing.assert_close(got, sf.flow(x, h, angle=0.4, steps=6, method=method))
        twin = x.clone()
        assert sf.ops.flow_(twin, q, lam, bias, angle=0.4, steps=6, method=method) is twin
        assert torch.equal(twin, got)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_gives_back_its_flow(kind, tmp_path):
    flow = sf.Flow(barrier(kind, 12), angle=0.4, steps=6, method="rk4", level=2.0, keep_norm=True)
    sf.Plan({3: flow}, positions="last").save(tmp_path)
    back = sf.Plan.load(tmp_path).edits["resid_post", 3][0]
    assert isinstance(back, sf.Flow)
    assert repr(back) == repr(flow)
    x = stream(5, 12)
    assert torch.equal(back.alone(x.device)(x, 1.0), flow.alone(x.device)(x, 1.0))
    assert torch.equal(back.barrier(x), flow.barrier(x))


@pytest.fixture(scope="module")
def tiny():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=12, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, head_dim=6
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["quadratic", "full", "mlp"])
def test_only_the_asked_positions_move(tiny, kind):
    """The published positions: the last prompt token and every generated one; strength multiplies the length."""
    flow = sf.Flow(barrier(kind, 12), angle=0.4, steps=4, method="heun")
    tokens = torch.arange(1, 8)[None]
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, plans in (("plain", {}), ("steered", {1: flow})):
            collected = tiny.model.layers[1].register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: out if isinstance(out, torch.Tensor) else out[0]})
            )
            if plans:
                with sf.steer(tiny, sf.Plan(plans, positions="last"), strength=0.5, prompt_length=5):
                    tiny(tokens)
            else:
                tiny(tokens)
            collected.remove()
    assert torch.equal(seen["steered"][0, :4], seen["plain"][0, :4])
    expected = sf.flow(seen["plain"][0, 4:], flow.barrier, angle=0.2, steps=4, method="heun")
    torch.testing.assert_close(seen["steered"][0, 4:], expected, atol=1e-5, rtol=1e-5)


def test_a_batch_mixes_barriers_and_lengths(tiny):
    plans = [sf.Plan({1: sf.Flow(barrier(kind, 12, seed=i), angle=0.3)}) for i, kind in enumerate(("rff", "linear"))]
    tokens = torch.arange(1, 7).repeat(3, 1)
    with torch.no_grad():
        with sf.steer(tiny, [plans[0], None, plans[1]], strength=[1.0, 1.0, 2.0]):
            together = tiny(tokens).logits
        plain = tiny(tokens).logits
        with sf.steer(tiny, plans[1], strength=2.0):
            alone = tiny(tokens[:1]).logits[0]
    torch.testing.assert_close(together[1], plain[1])
    torch.testing.assert_close(together[2], alone)
    assert not torch.allclose(together[0], plain[0], atol=1e-4)


@pytest.mark.parametrize("kind", ["quadratic", "raw"])
def test_a_picture_shows_h_along_the_path(kind, tmp_path, monkeypatch):
    """What is drawn is what h is: its last heights are those where the flow ends, and the gains those of its steps."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(
        figure, "Figure", lambda *args, run=figure.Figure, **kwargs: drawn.append(run(*args, **kwargs)) or drawn[-1]
    )
    h, x = barrier(kind, 12), stream(7, 12)
    flow = sf.Flow(h, T=2.0, steps=5, method="rk4")
    path = sf.tools.plot_flow(flow, x, tmp_path / "flow.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert list(tmp_path.iterdir()) == [path]
    left, right = drawn[0].axes
    start, end = h(x.double()), h(sf.flow(x.double(), h, T=2.0, steps=5, method="rk4"))
    lines = left.get_lines()
    for i in range(7):
        assert lines[i].get_ydata()[[0, -1]] == pytest.approx([start[i].item(), end[i].item()])
    assert lines[7].get_ydata()[-1] == pytest.approx(end.mean().item())
    gains = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in right.get_lines()}
    assert gains["rk4"][5] == pytest.approx((end - start).mean().item())
    one = h(sf.flow(x.double(), h, T=2.0, steps=1)) - start
    assert gains["euler"][1] == pytest.approx(one.mean().item())
    assert ("geodesic" in gains) == (kind != "raw")
    with pytest.raises(ValueError, match="the barrier has width 12 and x 8"):
        sf.tools.plot_flow(flow, x[:, :8], path)


def test_the_published_preset():
    flow = sf.Flow.odesteer(sf.Barrier(torch.eye(3), torch.ones(3), torch.ones(3), sketch=_sketch(3)), T=5.0)
    assert (flow.T, flow.angle, flow.steps, flow.method) == (5.0, None, 10, "euler")
    away = sf.Flow.odesteer(-flow.barrier, T=5.0)
    assert torch.equal(away.barrier.sketch.weights, -flow.barrier.sketch.weights)
    with pytest.raises(ValueError, match="the published one is fit_barrier"):
        sf.Flow.odesteer(barrier("quadratic", 12), T=5.0)


def _sketch(d):
    from steerfast.barriers.barrier import Sketch

    return Sketch(
        torch.zeros(2, d + 1, dtype=torch.int32), torch.ones(2, d + 1, dtype=torch.int8), torch.ones(4), 0.1, 1.0
    )


BAD = [
    ({"angle": -0.1}, "angle is -0.1; expected >= 0"),
    ({"T": -1.0}, "T is -1.0; expected >= 0"),
    ({"T": float("nan")}, "T must be finite"),
    ({}, "give exactly one"),
    ({"T": 1.0, "angle": 1.0}, "give exactly one"),
    ({"T": 1.0, "steps": 0}, "steps is 0"),
    ({"T": 1.0, "steps": 2.5}, "steps is 2.5"),
    ({"T": 1.0, "method": "magic"}, "method is 'magic'; expected one of 'euler'"),
    ({"T": 1.0, "level": float("inf")}, "level must be finite"),
    ({"T": 1.0, "method": "adaptive", "tolerance": 0.0}, "tolerance is 0.0"),
]


@pytest.mark.parametrize(("numbers", "message"), BAD)
def test_bad_numbers_are_named(numbers, message):
    with pytest.raises(ValueError, match=message):
        sf.Flow(barrier("linear", 12), **numbers)
    with pytest.raises(ValueError, match=message):
        sf.flow(torch.ones(1, 12), barrier("linear", 12), **numbers)


def test_barriers_that_do_not_fit_are_named(tiny):
    with pytest.raises(ValueError, match="the barrier has width 12 and x 8"):
        sf.flow(torch.ones(1, 8), barrier("linear", 12), T=1.0)
    with pytest.raises(ValueError, match="follows great circles, but the barrier is raw"):
        sf.Flow(barrier("raw", 12), T=1.0, method="geodesic")
    with pytest.raises(TypeError, match="barrier must come from fit_barrier"):
        sf.Flow(torch.ones(12), T=1.0)
    with pytest.raises(ValueError, match="has width 16"):
        sf.steer(tiny, {1: sf.Flow(barrier("linear", 16), T=1.0)})
    h = barrier("linear", 12)
    other = sf.Barrier(h.basis, h.eigenvalues, h.bias, origin=Origin("OtherForCausalLM", Place("resid_post", 1)))
    assert sf.Flow(other, T=1.0).origin.place == ("resid_post", 1)
    with pytest.warns(
        UserWarning, match="comes from activations of OtherForCausalLM; this model is a LlamaForCausalLM"
    ):
        sf.steer(tiny, {1: sf.Flow(other, T=1.0)}).remove()
    x = torch.ones(2, 12)
    with pytest.raises(ValueError, match="method is 'magic'"):
        sf.ops.flow(x, x[:1], torch.ones(1), torch.ones(1), T=1.0, method="magic")
