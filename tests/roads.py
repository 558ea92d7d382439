"""The roads that a call of the subspace op can take, whatever its sizes would choose."""

from __future__ import annotations

import pytest

ROADS = ["rows", "split", "tiles", "wide"]
"""Programs of a token each; tiles whose columns are split (of tables of one column); whole tiles; three launches."""


def take(monkeypatch: pytest.MonkeyPatch, road: str) -> None:
    """Send every call of the kernels down one road."""
    from steerfast_kernels import subspace, subspace_tiles

    monkeypatch.setattr(subspace, "TILE_RANK", 1000 if road == "rows" else 1)
    monkeypatch.setattr(subspace, "ONE_LAUNCH", [(1 << 62, 0)])
    monkeypatch.setattr(subspace, "WIDE_RANK", 0 if road == "wide" else 1000)
    monkeypatch.setattr(subspace_tiles, "SPLIT_ROWS", 1000 if road == "split" else 0)
