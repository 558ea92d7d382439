#!/usr/bin/env bash
# zennit 0.5.1, torch 2.13.0: Occlusion slides a window over the input. Where the window reaches over the edge it goes on at the
# opposite edge, so with a row of 10 pixels and windows of 4 the last one is made of the last two pixels and the first two: the
# first two get the score of an object at the far end. This is so whenever the size is no multiple of the stride, or the stride is
# smaller than the window. Also, occlude_independent is to occlude where the mask is set, or outside of it with invert=True, and
# does the opposite.
#
# Seen: model: sum of the pixels; the last of 10 pixels is 1, the others are 0; only the window is kept
#       window 4, stride 4: zennit 1 1 0 0 0 0 0 0 1 1; without wrapping 0 0 0 0 0 0 0 0 1 1
#       window 4, stride 1: zennit 3 2 1 0 0 0 1 2 3 4; without wrapping 0 0 0 0 0 0 1 2 3 4
#       occlude_independent, mask on the first pixel of 7 7 7: 7 0 0; invert=True: 0 7 7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps zennit==0.5.1 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys
import sysconfig
import types

import torch

# the package asks for torchvision when it is imported; its parts are imported here one by one
package = types.ModuleType("zennit")
package.__path__ = [sysconfig.get_path("purelib") + "/zennit"]
sys.modules["zennit"] = package
from zennit.attribution import Occlusion, occlude_independent  # noqa: E402

model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 1, bias=False))
model[1].weight.data.fill_(1)
x = torch.zeros(1, 1, 1, 10)
x[..., 9] = 1


def text(values):
    return " ".join(f"{value:.0f}" for value in values.flatten())


found = []
print("model: sum of the pixels; the last of 10 pixels is 1, the others are 0; only the window is kept")
for stride in (4, 1):
    with Occlusion(model, attr_output=lambda output: output, window=(1, 4), stride=(1, stride)) as attributor:
        _, scores = attributor(x)
    reference = torch.zeros(10)
    for start in range(0, 10, stride):
        reference[start : start + 4] += x[0, 0, 0, start : start + 4].sum()
    print(f"window 4, stride {stride}: zennit {text(scores)}; without wrapping {text(reference)}")
    found.append((scores.flatten() - reference)[:2].min() > 0 and torch.equal(scores.flatten()[4:], reference[4:]))
mask = torch.tensor([True, False, False])
plain, inverted = (occlude_independent(torch.full((3,), 7.0), mask, invert=invert) for invert in (False, True))
print(f"occlude_independent, mask on the first pixel of 7 7 7: {text(plain)}; invert=True: {text(inverted)}")
sys.exit(0 if all(found) and plain.tolist() == [7, 0, 0] and inverted.tolist() == [0, 7, 7] else 1)
PYTHON
