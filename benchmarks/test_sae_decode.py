"""`ops.sae_decode`: a sum of k gathered rows."""

from __future__ import annotations

from typing import Any

import peers
import pytest
from lab import sae_cases
from setting import AT, FEATURES, K, pick


@pytest.mark.parametrize("n", pick((1, 16, 256, 4096), (1, 256), (2,)))
def test_sae_decode(race: Any, n: int) -> None:
    race(lambda: sae_cases.sae_decode(AT, n, FEATURES, K), peers=peers.sae_decode())
