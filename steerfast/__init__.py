"""Fused kernels and a thin hook API for steering language models. Names only: each is imported at its first use."""

from importlib import import_module
from typing import Any

_HOMES = {
    "baking": ["bake", "everywhere"],
    "bank": ["Bank"],
    "barrier": ["Barrier", "BarrierInfo"],
    "conditions": ["Condition", "When", "WhenToken"],
    "extract": ["Activations", "Direction", "collect"],
    "fitting": ["fit_barrier"],
    "flow_plot": ["plot_flow"],
    "flows": ["Flow", "flow"],
    "hooks": ["Steering", "prepare", "steer"],
    "integrations": ["load_vectors"],
    "interventions": [
        "Ablate", "Add", "Affine", "AffineAblate", "Amplify", "Calibrate", "Clamp", "DeficitPush", "EditFeatures", "Features",
        "Intervention", "LoReFT",
    ],
    "plan": ["ModelCard", "Plan"],
    "rotations": ["Householder", "Rotate", "Spherical"],
    "sae.cache": ["ActivationCache", "ActivationStream", "cache_activations"],
    "sae.distributed": ["SplitData", "SplitFeatures"],
    "sae.evaluate": ["Evaluation", "evaluate_sae"],
    "sae.explain": ["Explanations", "explain"],
    "sae.model": ["SAE"],
    "sae.training": ["TrainConfig", "train_sae"],
    "sweeping": ["Grid", "Probe", "Sweep", "sweep"],
    "vectors": [
        "DirectionInfo", "DirectionSet", "DoseTable", "dose", "list_directions", "load_directions", "save_directions",
    ],
    "_backends": ["use_backend"],
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = ("extract", "integrations", "ops")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
