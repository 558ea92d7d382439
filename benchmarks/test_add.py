"""`ops.add`: a bank of vectors, every row with its own."""

from __future__ import annotations

from typing import Any

import peers
import pytest
from lab import cases
from setting import AT, pick


@pytest.mark.parametrize("n", pick((1, 64, 256, 8192), (1, 256), (3,)))
@pytest.mark.parametrize("slots", pick((8, 256), (8, 256), (2,)))
def test_add(race: Any, n: int, slots: int) -> None:
    race(lambda: cases.add(AT, n, slots), yardsticks=peers.add(AT, n, slots))
