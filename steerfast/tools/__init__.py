"""Tools around steering: what a dose does, sweeps, baking into weights, files, pictures. Names only."""

from steerfast._names import lazily

_HOMES = {
    "bake": ["everywhere"],
    "barrier_constants": ["fit_steering_barrier"],
    "dose": ["DoseTable"],
    "evaluate": ["Choice", "ChoiceScores", "TextScores", "evaluate_choices", "evaluate_text", "read_choices"],
    "flow_plot": ["plot_flow"],
    "lora": ["describe_lora", "write_lora"],
    "refusal": ["Candidate", "Refusal", "RefusalRules", "refusal_rates", "select_refusal"],
    "sweep": ["Grid", "Sweep"],
    "sweep_scores": ["Question"],
}
__getattr__, __all__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return __all__
