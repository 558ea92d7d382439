"""What is taken for a probe."""

from __future__ import annotations

from typing import Any

from steerfast.barriers.barrier import Barrier
from steerfast.place import Origin

from .features import TopKProbe
from .probe import Probe
from .rows import BarrierProbe, LinearProbe


def as_probe(caller: str, value: Any) -> Probe:
    """A probe as it is; a direction as a `LinearProbe`, a barrier as a `BarrierProbe`, an SAE as a `TopKProbe`.

    Args:
        caller: Who asks, for the messages.
        value: What a user gave.

    Raises:
        TypeError: it is none of these; a tensor does not say what is to be read, or where.
    """
    if isinstance(value, Probe):
        return value
    if isinstance(value, Barrier):
        return BarrierProbe(value)
    if isinstance(getattr(value, "origin", None), Origin):
        if hasattr(value, "vector"):
            return LinearProbe(value)
        if hasattr(value, "w_enc"):
            return TopKProbe(value)
    raise TypeError(
        f"{caller}: expected a probe, a direction, a barrier or an SAE; got {type(value).__name__}: wrap a vector as "
        "sf.probes.LinearProbe(vector, place=14), features as sf.probes.FeatureProbe(sae, [12, 77])"
    )
