"""Sparse autoencoders: the model, its files, training, measurement and explanation. Names only."""

from steerfast._names import lazily

_HOMES = {
    "cache": ["ActivationCache", "ActivationStream", "cache_activations"],
    "evaluate": ["Evaluation", "evaluate_sae"],
    "explanation": ["Explanations", "observe"],
    "training.config": ["TrainConfig"],
    "training.distributed": ["SplitData", "SplitFeatures"],
    "training.train": ["train_sae"],
    "transcoder": ["Transcoder"],
}
__getattr__, __all__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
