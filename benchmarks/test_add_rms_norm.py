"""`ops.add_rms_norm`: steering fused with the residual addition and the norm that follows."""

from __future__ import annotations

from typing import Any

import pytest
from lab import cases
from setting import AT, pick


@pytest.mark.parametrize("n", pick((1, 64, 8192), (1, 256), (3,)))
def test_add_rms_norm(race: Any, n: int) -> None:
    race(lambda: cases.add_rms_norm(AT, n))
