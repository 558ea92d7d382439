from .cache import ActivationCache as ActivationCache
from .cache import ActivationStream as ActivationStream
from .cache import cache_activations as cache_activations
from .evaluate import Evaluation as Evaluation
from .evaluate import evaluate_sae as evaluate_sae
from .explanation import Explanations as Explanations
from .explanation import observe as observe
from .training.config import TrainConfig as TrainConfig
from .training.distributed import SplitData as SplitData
from .training.distributed import SplitFeatures as SplitFeatures
from .training.train import train_sae as train_sae
from .transcoder import Transcoder as Transcoder

__all__: list[str]
