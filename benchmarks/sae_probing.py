"""The protocol of sae-probes on ten of its data sets: how much a few features of an SAE know of a concept.

Kantamneni, Engels et al. 2025, Are Sparse Autoencoders Useful? A Case Study in Sparse Probing (arXiv:2502.16681). Texts and
labels lie in the wheel of sae-probes 0.4.2 (MIT). Its own runner takes models by hub name, from TransformerLens; this one
takes any model of transformers and does the same, setting "normal": the stream at the last token; 1,024 training texts, or
all but 100, classes in halves; the k features whose mean, over their own mean, differs most between the classes; logistic
regression on them with an L1 penalty, chosen on a fifth of the training texts; the area under the ROC curve on the other
texts. Beside it stands the baseline, L2 on all of the stream.
"""

from __future__ import annotations

import csv
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

import steerfast as sf

WHEEL = "sae_probes-0.4.2-py3-none-any.whl"
SETS = (
    "5_hist_fig_ismale", "23_headline_ischina", "36_sciq_tf", "65_high-school", "87_glue_cola",
    "92_glue_sst2", "96_spam_is", "105_click_bait", "120_us_timezone_Chicago", "149_twt_emotion_happiness",
)  # fmt: skip
KS = (1, 16, 128)
SEED = 42
_MOST = 5000  # texts of a set
_STRENGTHS = np.logspace(5, -5, 10)


def probes(
    sae: sf.SAE, model: Any, tokenizer: Any, wheel: Path, ks: tuple[int, ...] = KS, say: Callable[[str], None] = print
) -> dict[str, dict[str, float]]:
    """Set -> {"all": AUC of the baseline, "k=1": AUC of one feature, …}; the last entry is the mean over the sets."""
    found = {}
    for name in SETS:
        texts, labels = read_set(wheel, name)
        x = sf.collect(
            model, tokenizer, texts, [sae.place.layer], "last", sae.place.site, batch_size=32, progress=False
        )
        found[name] = scores(sae, x[sae.place.layer], labels, ks)
        say(f"{name:<28}" + "  ".join(f"{key} {value:.3f}" for key, value in found[name].items()))
    found["mean"] = {key: float(np.mean([one[key] for one in found.values()])) for key in found[SETS[0]]}
    say(f"{'mean':<28}" + "  ".join(f"{key} {value:.3f}" for key, value in found["mean"].items()))
    return found


def scores(sae: sf.SAE, x: torch.Tensor, labels: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """The baseline and the features of one set."""
    size = min(len(labels) - 100, 1024)
    train, test = split(labels, size, len(labels) - size - 1)
    y, features = torch.from_numpy(labels), sae.encode(x.to(sae.w_enc)).float().cpu()
    found = {"all": auc(x[train].numpy(), labels[train], x[test].numpy(), labels[test], "l2")}
    order = by_difference(features[train], y[train])
    for k in ks:
        chosen = features[:, order[:k]].numpy()
        found[f"k={k}"] = auc(chosen[train], labels[train], chosen[test], labels[test], "l1")
    return found


def read_set(wheel: Path, name: str) -> tuple[list[str], np.ndarray]:
    """Texts of a set and their classes, 0 and 1 in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read(f"sae_probes/data/cleaned_data/{name}.csv.zst")
    csv.field_size_limit(1 << 30)
    content = io.TextIOWrapper(pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), "zstd"), "utf-8", newline="")
    rows = list(csv.DictReader(content))
    classes = sorted({row["target"] for row in rows})
    if len(classes) != 2:
        raise ValueError(f"sae_probing: {name} has the classes {classes}; expected two")
    rows = rows[:_MOST]
    return [row["prompt"] for row in rows], np.array([classes.index(row["target"]) for row in rows])


def split(labels: np.ndarray, train: int, test: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the training and of the test texts, half of each class 1."""
    dice = np.random.RandomState(SEED)
    ones, zeros = np.where(labels == 1)[0], np.where(labels == 0)[0]
    in_train, in_test = int(np.ceil(0.5 * train)), int(np.ceil(0.5 * test))
    train_ones = dice.choice(ones, size=in_train, replace=False)
    train_zeros = dice.choice(zeros, size=train - in_train, replace=False)
    test_ones = dice.choice(np.setdiff1d(ones, train_ones), size=in_test, replace=False)
    test_zeros = dice.choice(np.setdiff1d(zeros, train_zeros), size=test - in_test, replace=False)
    return dice.permutation(np.concatenate([train_ones, train_zeros])), dice.permutation(
        np.concatenate([test_ones, test_zeros])
    )


def by_difference(features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Features in the order of the difference of their means, each over its mean where it is active."""
    means = features.abs().sum(0) / ((features != 0).sum(0) + 1e-6)
    scaled = features / (means + 1e-6)
    difference = scaled[labels == 1].mean(0) - scaled[labels == 0].mean(0)
    return difference.abs().argsort(descending=True)


def auc(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, penalty: str) -> float:
    """Area under the ROC curve of a regression; the last fifth of the training texts, at most 100, choose its penalty."""
    held = min(int(0.2 * len(x)), 100)
    kept = len(x) - held
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        chosen = [
            roc_auc_score(y[kept:], classifier(c, penalty).fit(x[:kept], y[:kept]).predict_proba(x[kept:])[:, 1])
            for c in _STRENGTHS
        ]
        order = np.random.RandomState(SEED).permutation(len(x))
        best = classifier(float(_STRENGTHS[int(np.argmax(chosen))]), penalty).fit(x[order], y[order])
    return float(roc_auc_score(y_test, best.predict_proba(x_test)[:, 1]))


def classifier(c: float, penalty: str) -> LogisticRegression:
    if penalty == "l1":
        return LogisticRegression(C=c, l1_ratio=1.0, solver="saga", random_state=SEED, max_iter=1000)
    return LogisticRegression(C=c, random_state=SEED, max_iter=1000)
