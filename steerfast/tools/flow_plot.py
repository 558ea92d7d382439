"""A picture of a flow: h along the path, and what the number of steps does to where it ends."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from torch import Tensor

from steerfast._checks import check_stream, instance_of
from steerfast.barriers.barrier import Barrier
from steerfast.edits.flow import Flow, flow
from steerfast.files.replace import replace_file
from steerfast.ops.tableaus import SOLVERS

POINTS = 21  # of the path
ROWS = 64  # of x that are drawn at most
COUNTS = (1, 2, 3, 5, 10, 20, 40)
METHODS = ("euler", "geodesic", "midpoint", "rk4")  # beside the flow's own


def plot_flow(edit: Flow, x: Tensor, path: str | os.PathLike[str]) -> Path:
    """Draw a flow from rows of x as a PNG: h along its path, and h where it ends by solver and number of steps.

    Args:
        edit: The flow.
        x: Activations to start from, (n, d); the first 64 are drawn.
        path: The file.

    Returns:
        The file.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: the flow follows a velocity field, which has no h.
        ValueError: x has another width than the barrier.

    Example:
        >>> import torch, steerfast as sf
        >>> h = sf.Barrier.linear(torch.tensor([1.0, 0.0]))
        >>> sf.tools.plot_flow(sf.Flow(h, angle=0.4), torch.tensor([[3.0, 4.0]]), "flow.png").name  # doctest: +SKIP
        'flow.png'
    """
    FigureCanvasAgg, Figure = require_matplotlib()
    check_stream("plot_flow", x)
    instance_of("plot_flow", "edit", edit, Flow, "sf.Flow(barrier, T=1.0)")
    if not isinstance(edit.barrier, Barrier):
        raise TypeError(
            "plot_flow: the flow follows a velocity field, which has no h to draw; it draws flows of barriers"
        )
    h, start = edit.barrier, x.reshape(-1, x.shape[-1])[:ROWS].double().cpu()
    length, name = (
        (edit.T, "length")
        if edit.T is not None
        else (edit.angle or 0.0, "share of the length" if edit.barrier.raw else "angle (radians)")
    )

    def end(share: float, steps: int, method: str) -> Tensor:
        path = {"angle": share * length} if edit.T is None else {"T": share * length}
        return h(flow(start, h, **path, steps=steps, method=method, level=edit.level, tolerance=edit.tolerance))

    shares = [i / (POINTS - 1) for i in range(POINTS)]
    heights = torch.stack([end(share, edit.steps, edit.method) for share in shares])  # (POINTS, n)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = [share * length for share in shares]
    left.plot(lengths, heights.numpy(), color="0.8", linewidth=0.7)
    left.plot(lengths, heights.mean(1).numpy(), color="C0", linewidth=2, label="mean")
    left.axhline(0, color="k", linewidth=0.5)
    left.set(xlabel=name, ylabel="h = log p₊/p₋", title=f"h along the path ({edit.method}, {edit.steps} steps)")
    left.legend()
    for method in dict.fromkeys((edit.method, *METHODS)):
        if h.raw and SOLVERS[method].geodesic:
            continue
        gains = [float((end(1.0, steps, method) - heights[0]).mean()) for steps in COUNTS]
        right.plot(COUNTS, gains, marker="o", markersize=3, linewidth=2 if method == edit.method else 1, label=method)
    right.set_xscale("log")
    right.set_xticks(COUNTS, [str(count) for count in COUNTS], minor=False)
    right.minorticks_off()
    right.set(xlabel="steps", ylabel="mean gain of h", title=f"effect by the number of steps ({name} {length:g})")
    right.legend()
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    replace_file(Path(path), image.getvalue())
    return Path(path)


def require_matplotlib(owner: str = "plot_flow") -> tuple[type, type]:
    """(FigureCanvasAgg, Figure), so that nothing global of matplotlib is touched."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'{owner}: needs matplotlib; pip install "steerfast[bench]"') from error
    return FigureCanvasAgg, Figure
