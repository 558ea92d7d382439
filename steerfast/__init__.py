"""Fused kernels and a thin hook API for steering language models."""

from . import ops
from ._backends import use_backend
from .bank import Bank
from .barrier import Barrier, fit_barrier
from .hooks import Steering, prepare, steer
from .interventions import Ablate, Add, Amplify, Calibrate, Flow, Intervention
from .plan import ModelCard, Plan

__all__ = [
    "Ablate",
    "Add",
    "Amplify",
    "Bank",
    "Barrier",
    "Calibrate",
    "Flow",
    "Intervention",
    "ModelCard",
    "Plan",
    "Steering",
    "fit_barrier",
    "ops",
    "prepare",
    "steer",
    "use_backend",
]
