"""`ops.sae_encode`: exact Top-K without the matrix of pre-activations."""

from __future__ import annotations

from typing import Any

import peers
import products
import pytest
from lab import sae_cases
from setting import AT, FEATURES, K, pick


@pytest.mark.parametrize("n", pick((1, 16, 256, 4096), (1, 256), (2,)))
def test_sae_encode(race: Any, n: int) -> None:
    matrix = n * FEATURES * AT.dtype.itemsize
    race(
        lambda: sae_cases.sae_encode(AT, n, FEATURES, K),
        peers=peers.sae_encode(K),
        yardsticks=products.tiles(),
        memory=("ours", "eager"),
        sizes={"matrix": matrix},
    )


@pytest.mark.parametrize("n", pick((16, 4096), (1,), (2,)))
def test_sae_encode_threshold(race: Any, n: int) -> None:
    race(lambda: sae_cases.sae_encode_threshold(AT, n, FEATURES, pick(64, 64, 16)))


@pytest.mark.parametrize("n", pick((1, 16, 4096), (1, 256), (2,)))
def test_sae_edit_topk(race: Any, n: int) -> None:
    race(lambda: sae_cases.sae_edit_topk(AT, n, FEATURES, K))
