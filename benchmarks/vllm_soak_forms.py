"""The forms of an engine that a soak runs: all share one generator of requests and one check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

SLOTS, COLUMNS = 24, 8
"""Slots for a fifth of what all plans take, so that they come and go; and how many interventions a token can have."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1", "STEERFAST_SLOTS": str(SLOTS), "STEERFAST_COLUMNS": str(COLUMNS),
}  # fmt: skip
OPTIONS = [
    "--disable-uvicorn-access-log", "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "16",
    "--max-num-batched-tokens", "64", "--block-size", "32",
]  # fmt: skip
WAVES = 4
"""Of requests: the engine sleeps between them. Request i comes in wave i % 4."""
ENOUGH = 64
CAPTURED = ["0", "1", "2", "mlp_out.1", "attn_out.2"]
"""What may be captured: layers, and places."""


class Form(NamedTuple):
    """What an engine is started with, beside `OPTIONS`.

    Attributes:
        options: Of the command line; FOLDER stands for that of model and adapter.
        eager: Whether nothing is compiled.
        blocks: Of keys and values: fewer than the requests need, so that they are preempted, or enough to keep some for those
            that come again.
        captures: Whether rows may be captured.
        adapts: Whether some requests have an adapter.
        drafts: Whether tokens are drafted, of which some do not stay. vLLM 0.32 on a CPU then gives greedy requests beside random
            ones another text than alone (see findings/): random ones come in the last wave, whose texts are taken as they are.
    """

    options: tuple[str, ...] = ()
    eager: bool = True
    blocks: int = 14
    captures: bool = True
    adapts: bool = False
    drafts: bool = False

    def command(self, folder: Path) -> list[str]:
        """The options of the server."""
        own = [option.replace("FOLDER", str(folder)) for option in self.options]
        eager = ["--enforce-eager"] * self.eager
        return [*OPTIONS, *eager, "--num-gpu-blocks-override", str(self.blocks), *own]

    def settings(self, folder: Path) -> dict[str, str]:
        """The environment of the server."""
        made = ENVIRONMENT | {f"STEERFAST_{what.upper()}": str(folder / what) for what in ("plans", "probes", "saes")}
        if self.captures:
            made |= {"STEERFAST_CAPTURE": str(folder / "captured"), "STEERFAST_CAPTURE_PLACES": ", ".join(CAPTURED)}
        return made


def _drafts(**more: object) -> tuple[str, ...]:
    return ("--speculative-config", json.dumps({"num_speculative_tokens": 3, **more}))


ADAPTER = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", "adapted=FOLDER/adapter")
"""On a CPU vLLM 0.32 gives base requests the adapter of its last slot: one slot more than adapters stays empty."""

FORMS = {
    "plain": Form(),
    "lora": Form(ADAPTER, blocks=ENOUGH, adapts=True),
    "ngram": Form(_drafts(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1), drafts=True),
    "draft": Form(_drafts(method="draft_model", model="FOLDER/model"), blocks=ENOUGH, drafts=True),
    "tensor": Form(("--tensor-parallel-size", "2"), blocks=ENOUGH),
    "data": Form(("--data-parallel-size", "2")),
    # On a CPU vLLM 0.32 runs a pipeline only where it compiles the model.
    "pipeline": Form(("--pipeline-parallel-size", "2"), eager=False, blocks=ENOUGH, captures=False),
}
