from .bake import everywhere as everywhere
from .dose import DoseTable as DoseTable
from .flow_plot import plot_flow as plot_flow
from .sweep import Grid as Grid
from .sweep import Question as Question
from .sweep import Sweep as Sweep

__all__: list[str]
