from .bake import everywhere as everywhere
from .barrier_constants import fit_steering_barrier as fit_steering_barrier
from .dose import DoseTable as DoseTable
from .evaluate import Choice as Choice
from .evaluate import ChoiceScores as ChoiceScores
from .evaluate import TextScores as TextScores
from .evaluate import evaluate_choices as evaluate_choices
from .evaluate import evaluate_text as evaluate_text
from .evaluate import read_choices as read_choices
from .flow_plot import plot_flow as plot_flow
from .refusal import Candidate as Candidate
from .refusal import Refusal as Refusal
from .refusal import RefusalRules as RefusalRules
from .refusal import refusal_rates as refusal_rates
from .refusal import select_refusal as select_refusal
from .sweep import Grid as Grid
from .sweep import Sweep as Sweep
from .sweep_scores import Question as Question

__all__: list[str]
