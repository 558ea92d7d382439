#!/usr/bin/env bash
# eai-delphi 0.1.3, transformers 5.23.0, torch 2.13.0: center_examples of ConstructorConfig, True by default, is documented to put the
# activation into the middle of its example, and otherwise to take windows in which it may stand anywhere. It does the opposite: True
# takes the windows, False puts the strongest token at one place of its example. (faiss and sentence-transformers, which it
# imports, are not needed here.)
#
# Seen: center_examples=True:  the strongest token of 24 examples stands at 8 of 8 places, 3 times at the most usual one
#       center_examples=False: the strongest token of 24 examples stands at 1 of 8 places, 24 times at the most usual one
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 transformers==5.23.0 simple-parsing==0.1.9 \
    jaxtyping==0.3.11 blobfile==3.3.0 orjson==3.13.0 asyncer==0.0.18 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps eai-delphi==0.1.3 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys
import types

import torch

sys.modules["faiss"] = types.SimpleNamespace()  # for examples by embedding, which are not made here
sys.modules["sentence_transformers"] = types.SimpleNamespace(SentenceTransformer=None)
from delphi.config import ConstructorConfig  # noqa: E402
from delphi.latents import Latent, LatentRecord, constructor  # noqa: E402
from delphi.latents.latents import ActivationData  # noqa: E402

tokens = torch.arange(8 * 64).reshape(8, 64) % 40
# one active token in every window of eight but the first and the last of a text, and not near another one
where = [(text, 8 * window + (text + 3 * window) % 8) for text in range(8) for window in (1, 3, 5)]
locations = torch.tensor([[text, place, 0] for text, place in where])
strengths = torch.arange(1.0, len(where) + 1)
places = {}
for center in (True, False):
    config = ConstructorConfig(example_ctx_len=8, n_non_activating=0, min_examples=1, center_examples=center)
    record = LatentRecord(Latent("layer", 0))
    constructor(record, ActivationData(locations, strengths), config, tokens, None)
    places[center] = [int(example.activations.argmax()) for example in record.examples]
    count = len(set(places[center])), max(places[center].count(place) for place in range(8))
    print(f"center_examples={center}:".ljust(22), end=" ")
    print(f"the strongest token of {len(places[center])} examples stands at {count[0]} of 8 places, {count[1]} times at the most usual one")
sys.exit(0 if len(set(places[True])) == 8 and len(set(places[False])) == 1 else 1)
PYTHON
