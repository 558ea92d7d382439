"""Writes the folder v0.1: one small file of every kind that release 0.1 saves. Kept for the record of how they were made.

    python tests/data/write_v0_1.py

Written with steerfast 0.1.0 (commit debec6d), torch 2.13.0, transformers 5.24.0, safetensors 0.8.0 and scikit-learn 1.9.1.
Not to be run with a later release: its files would be of that release. Beside them it leaves what `look` of
tests/test_old_files.py sees of each object before it is saved; what is written for other libraries is read back first.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import test_old_files as old  # noqa: E402

import steerfast as sf  # noqa: E402
from steerfast import fitting  # noqa: E402
from steerfast.sae.formats import save_saelens  # noqa: E402
from steerfast.sae.model import Origin  # noqa: E402

OUT = HERE / "v0.1"
D, F, MODEL = old.D, 20, "LlamaForCausalLM"
CARD = sf.ModelCard(f"{MODEL}:tiny", D, 5)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frame(count: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(D, count, seed=seed))[0].T.contiguous()


def sides() -> tuple[sf.Activations, sf.Activations]:
    """Two clouds that overlap, as `collect` would return them."""
    both = []
    for shift, seed in ((0.8, 1), (-0.8, 2)):
        rows = draw(24, D, seed=seed) + shift * frame(1, 3) + torch.linspace(0, 1, D)
        both.append(
            sf.Activations({3: rows}, model=MODEL, site="resid_post", position="last", text_index=torch.arange(24))
        )
    return both[0], both[1]


@cache
def barriers() -> dict[str, sf.Barrier]:
    pos, neg = sides()
    fitting.COMPONENTS = 256  # of a sketch, instead of 8000: the file is kept small
    fitted = {kind: sf.fit_barrier(pos, neg, kind=kind) for kind in ("linear", "quadratic", "sketch", "rff", "mlp")}
    return {**fitted, "raw": sf.Barrier.linear(draw(D, seed=4), offset=-0.5, raw=True)}


def saes() -> dict[str, sf.SAE]:
    w_enc, w_dec = draw(F, D, seed=10) / 2, draw(F, D, seed=11)
    b_enc, b_dec = draw(F, seed=12) / 4, draw(D, seed=13)
    threshold = draw(F, seed=14).abs() / 2
    tied = draw(F, D, seed=15).bfloat16()
    at = Origin(("resid_post", 3), "", MODEL)
    head = Origin(("head_out", 2), "blocks.2.attn.hook_z", "gpt2-small", "SAELens")
    return {
        "topk": sf.SAE(w_enc, w_dec, b_enc, b_dec, k=3, origin=at),
        "jumprelu": sf.SAE(w_enc, w_dec, b_enc, b_dec, threshold=threshold, origin=at),
        "relu": sf.SAE(w_enc, w_dec, b_enc, b_dec),
        "tied": sf.SAE(tied, tied, b_enc, b_dec, k=2, origin=Origin(None, "blocks.1.hook_mlp_out", "m", "sparsify")),
        "topk-rescaled": sf.SAE(w_enc, w_dec, b_enc, b_dec, k=4, normalisation="constant_norm_rescale", origin=head),
        "jumprelu-layer-norm": sf.SAE(
            w_enc, w_dec, b_enc, b_dec, threshold=threshold, normalisation="layer_norm", origin=at
        ),
    }


def between(direction: Tensor, kind: str) -> float:
    """A threshold in the middle of the widest gap between the similarities of the rows, so that no rounding decides."""
    x = old.rows(D)
    found = sf.ops.similarity(x, direction[None].double() / direction.double().norm(), kind).sort().values
    gap = (found[2:-1] - found[1:-2]).argmax() + 1
    return float((found[gap] + found[gap + 1]) / 2)


def plans() -> dict[str, sf.Plan]:
    v, u, basis = draw(D, seed=20), draw(D, seed=21), frame(2, 22)
    h, fitted = barriers(), saes()
    low = sf.Barrier(frame(3, 23), torch.tensor([0.5, -0.5, 0.25]), torch.ones(3), 0.25)
    condition = sf.Condition(u, between(u, "projection"))
    linear = [
        sf.Add(v, 2.0), sf.Add(sides()[0][3][0], -0.5, keep_norm=True), sf.Ablate(draw(3, D, seed=24)),
        sf.AffineAblate(v, baseline=u, offset=0.25), sf.Clamp(v, -0.5, 0.25), sf.Clamp(u, high=0.0),
        sf.Affine(1 + u / 4, v), sf.LoReFT(basis, draw(2, D, seed=25), torch.tensor([0.5, -1.0])),
    ]  # fmt: skip
    features = [
        sf.Amplify(draw(3, D, seed=26), 0.5), sf.Calibrate(draw(3, D, seed=27), 1.5),
        sf.DeficitPush(draw(3, D, seed=28), 1.5, torch.tensor([0.1, 0.0, -0.1])),
        sf.EditFeatures(fitted["jumprelu"], {3: 0.7, 0: 0.2}, "max"), sf.EditFeatures(fitted["topk"], {5: 2.0, 1: 1.0}),
        sf.EditFeatures(fitted["jumprelu-layer-norm"], {2: 3.0, 4: 1.0}, "add", keep_norm=True),
        sf.EditFeatures(sf.Features(draw(4, D, seed=29), draw(4, D, seed=30)), {2: 0.5, 0: -1.0}, "scale"),
    ]  # fmt: skip
    turns = [
        sf.Rotate(basis, 50.0, adaptive=True), sf.Spherical(v, u, alpha=0.7, beta=-0.3, kappa=6.0),
        sf.Householder(-v, draw(3, D, seed=31), torch.full((3,), 0.1), draw(3, seed=32), -0.5, offset=0.2),
    ]  # fmt: skip
    gated = [
        sf.When(condition, sf.Add(v, 2.0), layer=1),
        sf.WhenToken(sf.Condition(v, between(v, "tanh"), above=False, similarity="tanh"), sf.Flow(low, T=0.5)),
    ]
    flows = [
        sf.Flow(low, angle=0.3, steps=4), sf.Flow(h["linear"], T=0.5, method="geodesic", keep_norm=True),
        sf.Flow(h["quadratic"], angle=0.4, method="rk4", level=1.0), sf.Flow(h["raw"], T=1.0, steps=2),
        sf.Flow(h["mlp"], angle=0.3, steps=20, method="adaptive", tolerance=1e-3), sf.Flow(-low, T=0.5, method="heun"),
    ]  # fmt: skip
    kinds = {
        ("resid_post", 3): features + flows,
        ("resid_pre", 1): turns,
        ("attn_out", -1): gated,
        ("mlp_out", 2): linear,
    }
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    shared, strongest = sf.Add(u, 3.5), int(fitted["topk"].topk(old.rows(D))[1][-1, 0])
    return {
        "kinds": sf.Plan(kinds, positions="last", model=CARD),
        "mask": sf.Plan({0: shared, -1: [shared, sf.Add(v)], ("head_out", 2): sf.Add(draw(old.HEAD, seed=33))}, mask),
        "indices": sf.Plan([sf.EditFeatures(fitted["topk"], {strongest: 0.25}, "min")], positions=[0, -1]),
    }


def directions() -> dict[str, sf.DirectionSet]:
    pos, neg = sides()
    mean, paired = sf.extract.mean_difference(pos, neg), sf.extract.difference(pos, neg, normalize=True)
    logistic = sf.extract.logistic(pos, neg, C=0.1)
    token = sf.Direction(draw(D, seed=40), "given", 2.5, None, site="attn_out", position=-2)
    made = {
        "mean": mean, "paired": paired, "pca": sf.extract.pca(pos, neg, project_out=mean),
        "logistic": logistic, "of tensors": sf.extract.logistic(pos[3], neg[3]), "unit": mean.normalized(),
        "sum": 2 * mean - logistic / 3, "apart": logistic.project_out(mean), "a token + two": token,
    }  # fmt: skip
    return {
        "made": sf.DirectionSet(made, CARD),
        "by-layer": sf.DirectionSet({layer: sf.Direction(draw(D, seed=layer), "m", 1.0, 50.0) for layer in (1, 4)}),
    }


def write_vectors(folder: Path) -> None:
    """The files of other libraries, as we write them."""
    folder.mkdir()
    given = [sf.Direction(draw(D, seed=50 + i), "m", 1.0, 9.0, i, "resid_post", "last", MODEL) for i in (1, 3, 12)]
    sf.integrations.gguf.write(folder / "control.gguf", given)
    sf.integrations.steering_vectors.write(folder / "steering_vectors.pt", given)
    sf.integrations.lm_eval.write(folder / "lm_eval.pt", given)


class Killed(Exception):
    """Stands for what ends a training run in its middle."""


def train(rows: sf.ActivationCache, folder: Path) -> sf.SAE:
    """Leave the checkpoint of step 2; return what the run becomes when nothing ends it."""

    def kill(report: Any) -> None:
        raise Killed

    try:
        sf.train_sae(rows, old.CONFIG, folder, checkpoint_every=2, progress=kill)
    except Killed:
        return sf.train_sae(rows, old.CONFIG)
    raise AssertionError("the training run has not been killed")


def main() -> None:
    if OUT.exists():
        raise SystemExit(f"{OUT} exists; files of a release are written once")
    model, tokenizer = old.tiny_model(), old.Letters()
    seen: dict[str, Any] = {}
    for kind, made in (("plans", plans()), ("barriers", barriers()), ("saes", saes()), ("directions", directions())):
        for name, thing in made.items():
            seen[f"{kind}/{name}"] = thing
            thing.save(OUT / kind / name)
    seen["saes/saelens-jumprelu"] = sf.SAE.load(save_saelens(saes()["jumprelu"], OUT / "saes" / "saelens-jumprelu"))
    write_vectors(OUT / "vectors")
    for path in sorted((OUT / "vectors").iterdir()):
        seen[f"vectors/{path.name}"] = sf.load_directions(path)
    words = ["music", "war", "water", "house", "tree"]
    (OUT / "explanations").mkdir()
    seen["explanations/words.json"] = sf.explain(saes()["topk"], model, tokenizer, words, words=3)
    seen["explanations/words.json"].save(OUT / "explanations" / "words.json")
    rows = sf.cache_activations(model, tokenizer, old.TEXTS, old.PLACE, OUT / "caches" / "letters", context=old.CONTEXT)
    seen["caches/letters"] = rows
    seen["training"] = train(rows, OUT / "training")
    seen["sweep"] = sf.sweep(  # a text at a time: release 0.1 steers no padded batch of transformers 5.24
        model, tokenizer, old.SIDES, old.PROBE, old.GRID, out=OUT / "sweep", batch_size=1, progress=False
    )
    tensors: dict[str, Tensor] = {}
    texts = {name: old.plain(old.look(thing), tensors, name) for name, thing in seen.items()}
    for path, tensor in tensors.items():  # a number that says nothing cannot fail
        if path.endswith("/effect"):
            assert not torch.allclose(tensor, old.rows(tensor.shape[1]), atol=0.01), path
        if path.endswith("/decisions"):
            assert 0 < int(tensor.sum()) < len(tensor), path
    lines = [
        f"{json.dumps(name)}: {json.dumps(text, ensure_ascii=False, allow_nan=False)}" for name, text in texts.items()
    ]
    (OUT / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    (OUT / "expected.safetensors").write_bytes(save(tensors))


if __name__ == "__main__":
    main()
