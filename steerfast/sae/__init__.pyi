from .cache import ActivationCache as ActivationCache
from .cache import ActivationStream as ActivationStream
from .cache import CacheConfig as CacheConfig
from .cache import cache_activations as cache_activations
from .cache import cache_places as cache_places
from .detection import Detection as Detection
from .detection import detect as detect
from .documents import read_documents as read_documents
from .evaluate import Evaluation as Evaluation
from .evaluate import evaluate_sae as evaluate_sae
from .evidence import Evidence as Evidence
from .evidence import ObserveConfig as ObserveConfig
from .evidence import observe as observe
from .explanation import Explanations as Explanations
from .judge import Judge as Judge
from .judge import judged_detection as judged_detection
from .page import write_page as write_page
from .relations import Relations as Relations
from .relations import relate as relate
from .training.config import TrainConfig as TrainConfig
from .training.distributed import SplitData as SplitData
from .training.distributed import SplitFeatures as SplitFeatures
from .training.train import train_sae as train_sae
from .transcoder import Transcoder as Transcoder
from .use import explain_use as explain_use

__all__: list[str]
