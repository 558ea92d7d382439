#!/usr/bin/env bash
# tensorizer 2.12.1, torch 2.13.0: write_module(include_non_persistent_buffers=False) is to write what state_dict() holds. It names
# tensors of the module itself with a dot in front and then looks for them without: persistent buffers that are not in a submodule,
# as the thresholds of an SAE, are left out without a word, and a module that is loaded keeps those it was made with. For the same
# reason verify_module calls a module wrong that was just written. And load_into_module makes every buffer a persistent one, so that
# the state dict afterwards has keys that it did not have.
#
# Seen: written: .W_enc, decoder.weight, scaler.mean; state_dict(): W_enc, threshold, decoder.weight, scaler.mean
#       loaded, the same: W_enc True, threshold False, decoder.weight True, scaler.mean True
#       verify_module of the module that was written: False
#       all written and loaded: state_dict() has more, cache
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 tensorizer==2.12.1 numpy==2.4.6 2> /dev/null
cd "$folder"
"$folder/env/bin/python" -W ignore 2> /dev/null - << 'PYTHON'
import sys

import torch
from tensorizer import TensorDeserializer, TensorSerializer


class Scaler(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(4))


class Autoencoder(torch.nn.Module):
    """A sparse autoencoder with thresholds for its latents, which are no parameters."""

    def __init__(self):
        super().__init__()
        self.W_enc = torch.nn.Parameter(torch.randn(4, 16))
        self.decoder, self.scaler = torch.nn.Linear(16, 4, bias=False), Scaler()
        self.register_buffer("threshold", torch.rand(16))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


def written(module, **settings):
    serializer = TensorSerializer("module.tensors")
    serializer.write_module(module, **settings)
    serializer.close()


torch.manual_seed(0)
module, loaded, whole = Autoencoder(), Autoencoder(), Autoencoder()
expected = {name: value.clone() for name, value in module.state_dict().items()}
written(module, include_non_persistent_buffers=False)
with TensorDeserializer("module.tensors", device="cpu") as tensors:
    names = list(tensors.keys())
    tensors.load_into_module(loaded)
print(f"written: {', '.join(names)}; state_dict(): {', '.join(expected)}")
same = {name: torch.equal(loaded.state_dict()[name], value) for name, value in expected.items()}
print("loaded, the same:", ", ".join(f"{name} {value}" for name, value in same.items()))
written(module)
with TensorDeserializer("module.tensors", device="cpu", verify_hash=True) as tensors:
    verified = tensors.verify_module(module)[0]
with TensorDeserializer("module.tensors", device="cpu") as tensors:
    tensors.load_into_module(whole)
more = sorted(set(whole.state_dict()) - set(expected))
print("verify_module of the module that was written:", verified)
print("all written and loaded: state_dict() has more,", ", ".join(more))
lost = [name for name, value in same.items() if not value]
sys.exit(0 if lost == ["threshold"] and not verified and more == ["cache"] else 1)
PYTHON
