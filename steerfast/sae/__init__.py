"""Sparse autoencoders: the model, its files, training, measurement and explanation. Names only."""

from steerfast._names import lazily

_HOMES = {
    "cache": ["ActivationCache", "ActivationStream", "CacheConfig", "cache_activations", "cache_places"],
    "detection": ["Detection", "detect"],
    "documents": ["read_documents"],
    "evaluate": ["Evaluation", "evaluate_sae"],
    "evidence": ["Evidence", "ObserveConfig", "observe"],
    "explanation": ["Explanations"],
    "hidden_states": ["HiddenStates"],
    "judge": ["Judge", "judged_detection"],
    "opening": ["open_rows"],
    "page": ["write_page"],
    "relations": ["Relations", "relate"],
    "tables": ["TableRows"],
    "training.config": ["TrainConfig"],
    "training.distributed": ["Mesh"],
    "training.objectives": ["BatchTopK", "JumpReLU", "Matryoshka", "TopK", "Transcode"],
    "training.sources": ["PlacesStream", "SideBySide"],
    "training.train": ["train_sae", "train_saes"],
    "transcoder": ["Transcoder"],
    "use": ["explain_use"],
}
__getattr__, __all__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
