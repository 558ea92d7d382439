#!/usr/bin/env bash
# eai-delphi 0.1.3, transformers 5.23.0, torch 2.13.0: the sampler is documented to divide a latent's contexts into a training set, from
# which an explanation is written, and a testing set, on which it is scored. It draws both from all contexts, and with the same
# seed: the two share examples, and are one and the same where they have the same size and type. A score then says little of new
# texts. (faiss and sentence-transformers, which it imports, are not needed here.)
#
# Seen: default settings, 300 contexts:      40 to explain, 50 to score, 12 of the 50 are among the 40
#       n_examples_train=50, 300 contexts:   50 to explain, 50 to score, 50 of the 50 are among the 50
#       train_type='top', 300 contexts:      40 to explain, 50 to score, 7 of the 50 are among the 40
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
from delphi.config import SamplerConfig  # noqa: E402
from delphi.latents import ActivatingExample, Latent, LatentRecord, sampler  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *(f"w{i}" for i in range(40))])}, unk_token="?"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", pad_token="?")
torch.manual_seed(0)
shared = []
for name, how in {
    "default settings": {},
    "n_examples_train=50": {"n_examples_train": 50},
    "train_type='top'": {"train_type": "top"},
}.items():
    contexts = [  # from the strongest to the weakest, as they are stored
        ActivatingExample(tokens=torch.randint(0, 41, (8,)), activations=torch.rand(8) + 300 - i) for i in range(300)
    ]
    record = LatentRecord(Latent("layer", 0), examples=contexts)
    sampler(record, SamplerConfig(**how), tokenizer)
    known = {id(example) for example in record.train}
    shared.append(sum(id(example) in known for example in record.test))
    print(f"{name}, 300 contexts:".ljust(36), end=" ")
    print(f"{len(record.train)} to explain, {len(record.test)} to score, {shared[-1]} of the 50 are among the {len(record.train)}")
sys.exit(0 if shared[0] > 0 and shared[1] == 50 and shared[2] > 0 else 1)
PYTHON
