"""Fused kernels and a thin hook API for steering language models. Names only: each is imported at its first use."""

from ._names import lazily

__version__ = "0.2.0"

_HOMES = {
    "bank": ["Bank"],
    "barriers.barrier": ["Barrier"],
    "barriers.fit": ["fit_barrier"],
    "barriers.velocity": ["VelocityField"],
    "directions.direction": ["Direction"],
    "directions.extract": [],
    "directions.fit": ["fit"],
    "directions.fits.heads": ["fit_heads"],
    "directions.fits.lineas": ["LinEAS", "fit_lineas"],
    "directions.fits.loreft": ["fit_loreft"],
    "directions.fits.velocity": ["fit_velocity"],
    "directions.fits.vector": ["LMObjective", "ReFTr1", "RePS", "fit_vector"],
    "directions.pairs": ["directions_from"],
    "directions.sets": ["DirectionSet", "list_directions", "save_directions"],
    "edits.base": ["Intervention"],
    "edits.conditions": ["Condition", "When", "WhenToken"],
    "edits.features": ["Amplify", "Calibrate", "DeficitPush", "EditFeatures", "Features"],
    "edits.fit_condition": ["fit_condition"],
    "edits.flow": ["Flow", "flow"],
    "edits.linear": ["Ablate", "Add", "Affine", "AffineAblate", "Clamp", "LoReFT"],
    "edits.rotations": ["Householder", "Rotate", "Spherical"],
    "hooks.compiled": ["Room"],
    "hooks.reading": ["Reading", "read"],
    "hooks.steer": ["Steering", "active", "prepare", "reset", "steer", "unprepare", "warmup"],
    "integrations": [],
    "integrations.read": ["load_directions"],
    "models.collect": ["collect"],
    "ops": [],
    "ops.backends": ["use_backend"],
    "plan": ["Plan"],
    "probes": [],
    "probes.fit": ["fit_probe"],
    "sae": [],
    "sae.explanation": ["explain"],
    "sae.model": ["SAE"],
    "tools": [],
    "tools.bake": ["bake"],
    "tools.dose": ["dose"],
    "tools.sweep": ["sweep"],
}
__getattr__, __all__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
