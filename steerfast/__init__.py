"""Fused kernels and a thin hook API for steering language models."""

from . import extract, ops
from ._backends import use_backend
from .bank import Bank
from .barrier import Barrier, fit_barrier
from .extract import Activations, Direction, collect
from .hooks import Steering, prepare, steer
from .interventions import (
    Ablate,
    Add,
    AffineAblate,
    Amplify,
    Calibrate,
    Clamp,
    DeficitPush,
    EditFeatures,
    Features,
    Flow,
    Intervention,
    LoReFT,
    Rotate,
)
from .plan import ModelCard, Plan

__all__ = [
    "Ablate",
    "Activations",
    "Add",
    "AffineAblate",
    "Amplify",
    "Bank",
    "Barrier",
    "Calibrate",
    "Clamp",
    "DeficitPush",
    "Direction",
    "EditFeatures",
    "Features",
    "Flow",
    "Intervention",
    "LoReFT",
    "ModelCard",
    "Plan",
    "Rotate",
    "Steering",
    "collect",
    "extract",
    "fit_barrier",
    "ops",
    "prepare",
    "steer",
    "use_backend",
]
