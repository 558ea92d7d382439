"""Fused kernels and a thin hook API for steering language models. Names only: each is imported at its first use."""

from importlib import import_module
from typing import Any

_HOMES = {
    "bank": ["Bank"],
    "barriers.barrier": ["Barrier", "BarrierInfo"],
    "barriers.fit": ["fit_barrier"],
    "directions.direction": ["Direction"],
    "directions.sets": ["DirectionInfo", "DirectionSet", "list_directions", "save_directions"],
    "edits.base": ["Intervention"],
    "edits.conditions": ["Condition", "When", "WhenToken"],
    "edits.features": ["Amplify", "Calibrate", "DeficitPush", "EditFeatures", "Features"],
    "edits.flow": ["Flow", "flow"],
    "edits.linear": ["Ablate", "Add", "Affine", "AffineAblate", "Clamp", "LoReFT"],
    "edits.rotations": ["Householder", "Rotate", "Spherical"],
    "hooks.steer": ["Steering", "active", "prepare", "reset", "steer", "unprepare"],
    "integrations.read": ["load_directions"],
    "models.collect": ["Activations", "collect"],
    "ops.backends": ["use_backend"],
    "plan": ["ModelCard", "Plan"],
    "sae.cache": ["ActivationCache", "ActivationStream", "cache_activations"],
    "sae.evaluate": ["Evaluation", "evaluate_sae"],
    "sae.explain": ["Explanations", "explain"],
    "sae.model": ["SAE"],
    "sae.training.config": ["TrainConfig"],
    "sae.training.distributed": ["SplitData", "SplitFeatures"],
    "sae.training.train": ["train_sae"],
    "tools.bake": ["bake", "everywhere"],
    "tools.dose": ["DoseTable", "dose"],
    "tools.plot_flow": ["plot_flow"],
    "tools.sweep": ["Grid", "Probe", "Sweep", "sweep"],
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = {"extract": "directions.extract", "integrations": "integrations", "ops": "ops"}

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
