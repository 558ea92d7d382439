"""Probes: what reads the stream, and never changes it. Names only."""

from steerfast._names import lazily

_HOMES = {
    "given": ["as_probe"],
    "info": ["ProbeInfo"],
    "probe": ["Probe"],
    "rows": ["BarrierProbe", "LinearProbe", "LogisticProbe", "SimilarityProbe"],
    "features": ["FeatureProbe", "TopKProbe"],
}
__getattr__, __all__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
