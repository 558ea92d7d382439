"""The methods that `quality.py` compares, each a function from activations to a plan at strength 1.

Strengths are in units that make one grid serve a family: a vector is scaled to the stream's typical length, so its strength is
‖δ‖/‖x‖; a flow's is its angle T/‖a‖ in radians, or T in that typical length, or the time of a velocity field; an ablation's the
share of the projection that is taken away; ITI's α counts standard deviations. Methods are compared at equal damage, not at equal
strength.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from quality_concepts import Pair
from torch import Tensor

import steerfast as sf
from steerfast.barriers.fit import PUBLISHED
from steerfast.directions.fits.lessons import split
from steerfast.directions.fits.natural import Gradients
from steerfast.directions.fits.velocity import natural_field

Edits = dict[tuple[str, int], sf.Intervention]
ANGLES = (0.1, 0.18, 0.28, 0.45)
SHARES = (0.5, 1.0, 2.0, 4.0)
DEVIATIONS = (2.5, 5.0, 10.0, 20.0)
TIMES = (0.4, 0.8, 1.3, 2.0, 3.0)  # a time of 1 is paced to cost 0.1 nats
GAINS = (0.25, 0.5, 1.0, 2.0)
FEATURES = 8  # of an SAE that are amplified


@dataclass(frozen=True, eq=False)
class Sample:
    """Training pairs, and the activations of their last tokens, a row per pair, at one layer and of every head."""

    layer: int
    pos: Tensor  # (n, d) resid_post
    neg: Tensor
    heads_pos: dict[int, Tensor]  # layer -> (n, heads, width) head_out
    heads_neg: dict[int, Tensor]
    pairs: Sequence[Pair]
    seed: int
    model: Any
    tokenizer: Any
    beside: tuple[Sample, ...] = ()  # the same pairs at the other layers that are edited with this one
    whole: Sample | None = None  # of a null: the sample whose labels were shuffled, and of each of its pairs
    signs: Sequence[float] = ()  # 1, -1 if its sides are exchanged, 0 if it is left out

    @property
    def groups(self) -> list[str]:
        """The group of each pair."""
        return [pair.group for pair in self.pairs]

    @property
    def typical(self) -> float:
        """Typical (median) length of a row."""
        return float(torch.cat([self.pos, self.neg]).norm(dim=1).median())

    @property
    def mean_difference(self) -> Tensor:
        """CAA's vector, at length 1."""
        return torch.nn.functional.normalize(self.pos.mean(0) - self.neg.mean(0), dim=0)

    def take(self, index: Sequence[int], seed: int) -> Sample:
        """Some of the pairs."""
        rows = torch.tensor(index)
        heads = ({layer: x[rows] for layer, x in side.items()} for side in (self.heads_pos, self.heads_neg))
        pairs = [self.pairs[i] for i in index]
        beside = tuple(one.take(index, seed) for one in self.beside)
        return Sample(
            self.layer, self.pos[rows], self.neg[rows], *heads, pairs, seed, self.model, self.tokenizer, beside
        )

    def shuffled(self, draw: int) -> Sample:
        """The same texts with the sides of a random half of the groups exchanged: labels that mean nothing.

        Of an odd number of groups one is left out. Were more of them kept as they are than exchanged, their mean difference
        would still point as the true one does, however small it is, and at equal damage the length of a vector does not matter.
        """
        groups = sorted(set(self.groups))
        drawn = random.Random(f"{self.seed} {draw}").sample(groups, len(groups))
        half = len(drawn) // 2
        turned, kept = set(drawn[:half]), set(drawn[: 2 * half])
        part = self.take([i for i, group in enumerate(self.groups) if group in kept], self.seed)
        swap = torch.tensor([group in turned for group in part.groups])
        pairs = [
            replace(pair, wanted=pair.unwanted, unwanted=pair.wanted) if turn else pair
            for pair, turn in zip(part.pairs, swap.tolist(), strict=True)
        ]
        signs = [(group in kept) * (-1.0 if group in turned else 1.0) for group in self.groups]
        pos, neg = _exchanged(part.pos, part.neg, swap)
        heads = {at: _exchanged(x, part.heads_neg[at], swap) for at, x in part.heads_pos.items()}
        sides = ({at: both[i] for at, both in heads.items()} for i in (0, 1))
        beside = tuple(one.shuffled(draw) for one in self.beside)
        return Sample(self.layer, pos, neg, *sides, pairs, self.seed, self.model, self.tokenizer, beside, self, signs)

    @property
    def contrasts(self) -> list[tuple[str, str, str]]:
        """Prompt, wanted and unwanted continuation of each pair."""
        return [(pair.prompt, pair.wanted, pair.unwanted) for pair in self.pairs]

    @functools.cached_property
    def velocity(self) -> sf.VelocityField:
        """The natural gradient of an edit of low rank, with neutral texts that the model writes itself.

        Of shuffled labels it is the very field that `fit_velocity` makes of them, from the gradients of the true ones: an
        exchanged pair has the same with the other sign.
        """
        if self.whole is None:
            given = (self.model, self.tokenizer, self.contrasts, self.layer)
            return sf.fit_velocity(*given, seed=self.seed, draws=0)
        gradients, signs = self.whole.gradients, self.signs
        taught = set(split([i for i, sign in enumerate(signs) if sign])[0])
        signs = [sign if i in taught else 0.0 for i, sign in enumerate(signs)]
        with gradients.pupil.taught():
            return natural_field(gradients, signs)[0]

    @functools.cached_property
    def gradients(self) -> Gradients:
        """What the model's gradients say of the pairs and of neutral text, for all labels that they may be given."""
        return Gradients.of("quality", self.model, self.tokenizer, self.contrasts, self.layer, seed=self.seed)

    def barrier(self, kind: str, **choices: Any) -> sf.Barrier:
        """A barrier fitted with the groups held out together."""
        groups = [*self.groups, *self.groups]
        return sf.fit_barrier(self.pos, self.neg, kind=kind, groups=groups, seed=self.seed, **choices)

    def at(self, edit: sf.Intervention) -> Edits:
        """One edit, at the layer of the activations."""
        return {("resid_post", self.layer): edit}


def _exchanged(x: Tensor, y: Tensor, swap: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of the same rows with some of the rows exchanged."""
    swap = swap.view(-1, *[1] * (x.ndim - 1))
    return torch.where(swap, y, x), torch.where(swap, x, y)


def random_direction(sample: Sample, draw: int) -> Edits:
    """A direction that knows nothing, scaled as the mean difference is; at each layer another."""
    generator, found = torch.Generator().manual_seed(draw), {}
    for one in (sample, *sample.beside):
        vector = torch.nn.functional.normalize(torch.randn(one.pos.shape[1], generator=generator), dim=0)
        found |= one.at(sf.Add(vector, strength=one.typical))
    return found


def actadd(sample: Sample) -> Edits:
    """The difference of one pair."""
    one = random.Random(sample.seed).randrange(len(sample.pos))
    vector = torch.nn.functional.normalize(sample.pos[one] - sample.neg[one], dim=0)
    return sample.at(sf.Add(vector, strength=sample.typical))


def caa(sample: Sample) -> Edits:
    """The difference of the means."""
    return sample.at(sf.Add(sample.mean_difference, strength=sample.typical))


def iti(sample: Sample) -> Edits:
    """The heads that tell the sides apart best, of any layer, each along its own mean difference in standard deviations."""
    width = next(iter(sample.heads_pos.values())).shape[1]
    sides = [{layer: x.flatten(1) for layer, x in side.items()} for side in (sample.heads_pos, sample.heads_neg)]
    groups = [*sample.groups, *sample.groups]
    found = sf.fit_heads(*sides, width, alpha=1.0, groups=groups, seed=sample.seed, draws=0)
    return {place: edit for place, (edit,) in found.plan.edits.items()}


def ablate(sample: Sample) -> Edits:
    """The mean difference taken out of the stream, whatever its sign."""
    return sample.at(sf.Ablate(sample.mean_difference))


def affine_ablate(sample: Sample) -> Edits:
    """The projection on the mean difference moved to that of the wanted side."""
    return sample.at(sf.AffineAblate(sample.mean_difference, baseline=sample.pos.mean(0)))


def spherical(sample: Sample) -> Edits:
    """The linear barrier along great circles."""
    return sample.at(sf.Flow(sample.barrier("linear", kernel="likelihood"), angle=1.0, method="geodesic"))


def one_step(sample: Sample) -> Edits:
    """The quadratic barrier in a single Euler step."""
    return sample.at(sf.Flow(sample.barrier("quadratic", kernel="likelihood"), angle=1.0, method="one-step"))


def ode(kind: str, **choices: Any) -> Callable[[Sample], Edits]:
    """Ten Euler steps along a barrier of that kind."""
    return lambda sample: sample.at(sf.Flow(sample.barrier(kind, **choices), angle=1.0, steps=10, method="euler"))


def default(kind: str, **choices: Any) -> Callable[[Sample], Edits]:
    """What `fit_barrier` makes where rows keep their lengths; ten Euler steps over as long a path for each."""
    return lambda sample: sample.at(sf.Flow(sample.barrier(kind, **choices), T=sample.typical, steps=10))


def natural(method: str) -> Callable[[Sample], Edits]:
    """The velocity field of the natural gradient."""
    return lambda sample: sample.at(sf.Flow(sample.velocity, T=1.0, method=method))


def sae(path: str) -> Callable[[Sample], Edits]:
    """The features of an SAE that the wanted side activates most beyond the other, amplified."""
    dictionary = sf.SAE.load(path)

    def build(sample: Sample) -> Edits:
        gain = dictionary.encode(sample.pos).float().mean(0) - dictionary.encode(sample.neg).float().mean(0)
        return sample.at(sf.Amplify(dictionary.w_dec[gain.topk(FEATURES).indices].float(), alpha=1.0))

    return build


@dataclass(frozen=True)
class Method:
    """A method by the name that tables show."""

    label: str
    build: Callable[[Sample], Edits]
    strengths: tuple[float, ...] = ANGLES

    def edits(self, sample: Sample) -> Edits:
        """At the layer of a sample, and at those beside it."""
        found: Edits = {}
        for one in (sample, *sample.beside):
            found |= self.build(one)
        return found


METHODS = {
    "caa": Method("CAA (mean difference)", caa),
    "actadd": Method("ActAdd (one pair)", actadd),
    "iti": Method("ITI (heads)", iti, DEVIATIONS),
    "ablate": Method("ablation", ablate, SHARES),
    "affine": Method("affine ablation", affine_ablate, SHARES),
    "default": Method("ODE quadratic, default", default("quadratic")),
    "default-linear": Method("ODE linear, default", default("linear")),
    "spherical": Method("ODE linear (spherical)", spherical),
    "one-step": Method("ODE quadratic on the sphere, one step", one_step),
    "quadratic": Method("ODE quadratic on the sphere", ode("quadratic", kernel="likelihood")),
    "published": Method("ODE quadratic on the sphere, published constants", ode("quadratic", kernel=PUBLISHED)),
    "sketch": Method("ODE sketch (ODESteer)", ode("sketch")),
    "rff": Method("ODE random features", ode("rff")),
    "rff-raw": Method("ODE random features, raw", default("rff", raw=True)),
    "mlp": Method("ODE network", ode("mlp")),
    "mlp-raw": Method("ODE network, raw", default("mlp", raw=True)),
    "natural": Method("flow of the natural gradient", natural("euler"), TIMES),
    "natural-one": Method("the same in one step", natural("one-step"), TIMES),
}
FIELDS = ("natural", "natural-one")
"""Velocity fields: a fit takes minutes."""
ONE_LAYER = ("iti", *FIELDS)
"""Methods that are not fitted to every layer: ITI chooses its own, and a natural gradient of all of them is a joint fit."""
SPREAD = {ANGLES: 0.04, SHARES: 0.3}
"""What a family's strengths are multiplied by where every layer is edited, so that the damage is as large: it adds up."""


def everywhere(methods: dict[str, Method]) -> dict[str, Method]:
    """Those that can be fitted to every layer, at such strengths."""
    return {
        key: replace(method, strengths=tuple(round(SPREAD[method.strengths] * s, 6) for s in method.strengths))
        for key, method in methods.items()
        if key not in ONE_LAYER and method.strengths in SPREAD
    }
