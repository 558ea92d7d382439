#!/usr/bin/env bash
# pytorch-ood 0.4.0, torch 2.13.0: ViM.fit_features(features, labels) is to ignore rows that the labels mark as out of
# distribution (a label below zero), as do GMM, KNN and the others. It never looks at the labels: outliers are part of the
# principal subspace and of the scale of the virtual logit. With 20 labelled outliers among 400 rows, the subspace contains the
# direction of the outliers, and many of their kind are no longer told from the rest. The package asks for torchvision when it is
# imported; its parts are imported here one by one.
#
# Seen: ViM  area under the curve: fitted on rows of the distribution 1.000, with outliers labelled -1 beside them 0.839
#            scores differ by 370.82, alpha 20.46 and 8.47
#       GMM  area under the curve: fitted on rows of the distribution 1.000, with outliers labelled -1 beside them 1.000
#            scores differ by 0.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --no-compile torch==2.13.0 numpy==2.4.6 scipy==1.17.1 \
    typing_extensions==4.16.0 2> /dev/null
"$folder/env/bin/python" -m pip install --quiet --no-compile --no-deps pytorch-ood==0.4.0 2> /dev/null
"$folder/env/bin/python" -W ignore - << 'PYTHON'
import sys
import sysconfig
import types

import torch

for name in ("pytorch_ood", "pytorch_ood.detector"):
    package = types.ModuleType(name)
    package.__path__ = [sysconfig.get_path("purelib") + "/" + name.replace(".", "/")]
    sys.modules[name] = package
from pytorch_ood.detector.gmm import GMM  # noqa: E402
from pytorch_ood.detector.vim import ViM  # noqa: E402

torch.manual_seed(0)
dim, classes, axes = 16, 4, 6
weight, bias = torch.randn(classes, dim), torch.randn(classes)


def rows(n, outlier=False):
    """Features that vary along six axes and hardly along the others; outliers are far out on one of the others."""
    features = 0.1 * torch.randn(n, dim)
    features[:, :axes] += 3 * torch.randn(n, axes)
    if outlier:
        features[:, -1] += 20
    return features


inliers, outliers = rows(380), rows(20, outlier=True)
labels = (inliers @ weight.T + bias).argmax(1)
both, both_labels = torch.cat([inliers, outliers]), torch.cat([labels, torch.full((20,), -1)])
test = torch.cat([rows(300), rows(300, outlier=True)])

found = {}
for name, make in {"ViM": lambda: ViM(None, d=axes + 1, w=weight, b=bias), "GMM": lambda: GMM(None)}.items():
    clean, mixed = make().fit_features(inliers, labels), make().fit_features(both, both_labels)
    scores = [detector.predict_features(test) for detector in (clean, mixed)]
    areas = [float((score[300:, None] > score[None, :300]).float().mean()) for score in scores]
    off = float((scores[0] - scores[1]).abs().max())
    print(
        f"{name}  area under the curve: fitted on rows of the distribution {areas[0]:.3f}, "
        f"with outliers labelled -1 beside them {areas[1]:.3f}"
    )
    alphas = f", alpha {clean.alpha:.2f} and {mixed.alpha:.2f}" if name == "ViM" else ""
    print(f"     scores differ by {off:.2f}{alphas}")
    found[name] = areas, off
(vim, vim_off), (_, gmm_off) = found["ViM"], found["GMM"]
sys.exit(0 if vim[0] > 0.95 and vim[1] < 0.9 and vim_off > 1 and gmm_off == 0 else 1)
PYTHON
