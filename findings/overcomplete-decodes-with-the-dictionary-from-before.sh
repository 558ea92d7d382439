#!/usr/bin/env bash
# overcomplete 0.3.0, torch 2.13.0: eval() of an SAE keeps a finished copy of its dictionary outside of the state dict. A state dict that
# is loaded into a model in eval mode (model.eval(), then load_state_dict) changes the encoder and not that copy, so the codes
# of the new model are decoded by the old dictionary, without a warning; another eval() copies the old copy. train() and then
# eval() puts it right. The package itself asks for torchvision when it is imported; its parts are imported here one by one.
#
# Seen: loaded in eval mode      codes differ by 0, reconstruction by 3.46 where it reaches 2.31
#       and eval() once more     codes differ by 0, reconstruction by 3.46 where it reaches 2.31
#       after train() and eval() codes differ by 0, reconstruction by 2.38e-07 where it reaches 2.31
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1 \
    scikit-learn==1.9.1 einops==0.8.2 pillow==13.0.0 tqdm==4.67.1 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps overcomplete==0.3.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys
import sysconfig
import types

import torch

package = types.ModuleType("overcomplete")
package.__path__ = [sysconfig.get_path("purelib") + "/overcomplete"]
sys.modules["overcomplete"] = package
from overcomplete.sae import TopKSAE  # noqa: E402

torch.manual_seed(0)
x = torch.randn(64, 16)
trained, loaded = TopKSAE(16, 32, top_k=4).eval(), TopKSAE(16, 32, top_k=4).eval()
_, codes, rebuilt = trained(x)
found = []


def look(name):
    _, other, again = loaded(x)
    found.append((float((other - codes).abs().max()), float((again - rebuilt).abs().max())))
    print(f"{name:<24} codes differ by {found[-1][0]:.3g}, reconstruction by {found[-1][1]:.3g} ", end="")
    print(f"where it reaches {float(rebuilt.abs().max()):.3g}")


loaded.load_state_dict(trained.state_dict())
look("loaded in eval mode")
loaded.eval()
look("and eval() once more")
loaded.train().eval()
look("after train() and eval()")
same = all(codes < 1e-5 for codes, _ in found)
sys.exit(0 if same and min(found[0][1], found[1][1]) > 0.5 and found[2][1] < 1e-5 else 1)
PYTHON
