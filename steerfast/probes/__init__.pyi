from .features import FeatureProbe as FeatureProbe
from .features import TopKProbe as TopKProbe
from .given import as_probe as as_probe
from .info import ProbeInfo as ProbeInfo
from .probe import Probe as Probe
from .rows import BarrierProbe as BarrierProbe
from .rows import LinearProbe as LinearProbe
from .rows import LogisticProbe as LogisticProbe
from .rows import SimilarityProbe as SimilarityProbe

__all__: list[str]
