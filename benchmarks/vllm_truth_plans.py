"""Plans, conditions and probes as plain data, and their formulas: what a soak of vLLM asks for and what it must give.

The library only saves them, for an engine that is under test; nothing of it takes part in what is expected. Everything is float32
but flows, which are integrated in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDTH, LAYERS, WORDS = 64, 3, 128
UNSURE = 1e-4
"""A score so close to a threshold may fall on either side, since the sum of a product has no one order."""

Where = tuple[str, int]


class Dictionary(NamedTuple):
    """An SAE: encoder and decoder rows (F, d), bias (F,), k of Top-K or thresholds (F,), and what is done to a row first."""

    encoder: Tensor
    decoder: Tensor
    bias: Tensor
    k: int = 0
    threshold: Tensor | None = None
    norm: str = "none"

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (n, d): all features (n, F), where rounding may decide whether a feature is on, and what one is worth (n, 1)."""
        size = torch.ones(len(x), 1)
        if self.norm == "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5
            x = x / size
        elif self.norm == "layer_norm":
            size = x.std(dim=-1, keepdim=True)
            x = (x - x.mean(-1, keepdim=True)) / (size + 1e-5)
        h = x @ self.encoder.T + self.bias
        if self.threshold is not None:
            on, edge = h > self.threshold, self.threshold.expand(h.shape)
        else:
            best = h.topk(self.k + 1).values
            on = h >= best[:, self.k - 1 : self.k]
            edge = torch.where(on, best[:, self.k :], best[:, self.k - 1 : self.k])
        unsure = ((h - edge).abs() < UNSURE * edge.abs().clamp(min=1)) & (torch.maximum(h, edge) > 0)
        return torch.where(on, h, 0).clamp(min=0), unsure, size


class Look(NamedTuple):
    """A probe: kind, rows (m, d), bias (m,), and where it is read."""

    kind: str  # "linear", "logistic", "similarity" or "top"
    rows: Tensor
    bias: Tensor
    place: Where
    after: bool = False
    k: int = 0

    def score(self, x: Tensor) -> Tensor:
        """float32 (n, m) of x (n, d); of "top" the pre-activations of all features, those above 0."""
        found = x @ self.rows.T + self.bias
        if self.kind == "logistic":
            return 1 / (1 + torch.exp(-found))
        if self.kind == "similarity":
            return found.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True)
        return found.clamp(min=0) if self.kind == "top" else found

    @property
    def single(self) -> bool:
        """Whether it has one number per token."""
        return self.kind == "similarity" or (self.kind != "top" and len(self.rows) == 1)


class Gate(NamedTuple):
    """A condition: above or below a level, for each token or at the last prompt token; with a release it is held."""

    look: Look
    level: float
    above: bool
    each: bool
    release: float | None = None


@dataclass(frozen=True, eq=False)
class Edit:
    """What becomes of a text's stream x (n, d), where its gate is open."""

    gate: Gate | None = field(default=None, kw_only=True)

    def of(self, x: Tensor, strength: float) -> Tensor:
        """The rows, edited."""
        raise NotImplementedError

    def doubt(self, x: Tensor) -> Tensor | None:
        """bool (n,): tokens whose edit rounding may decide; None: of none."""
        return None

    def saved(self) -> Any:
        """The same as the library says it, without its gate."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """x + c·v, or the same with its norm restored."""

    vector: Tensor
    strength: float = 1.0
    keep_norm: bool = False

    def of(self, x: Tensor, strength: float) -> Tensor:
        moved = x + strength * self.strength * self.vector
        return moved * (x.norm(dim=-1) / moved.norm(dim=-1))[:, None] if self.keep_norm else moved

    def saved(self) -> Any:
        import steerfast as sf

        return sf.Add(self.vector, self.strength, keep_norm=self.keep_norm)


@dataclass(frozen=True, eq=False)
class Ablate(Edit):
    """x - v(v·x)."""

    vector: Tensor

    def of(self, x: Tensor, strength: float) -> Tensor:
        return x - strength * (x @ self.vector)[:, None] * self.vector

    def saved(self) -> Any:
        import steerfast as sf

        return sf.Ablate(self.vector)


@dataclass(frozen=True, eq=False)
class ByToken(Edit):
    """x + V_i for the prompt's token i, and nothing behind."""

    rows: Tensor

    def of(self, x: Tensor, strength: float) -> Tensor:
        count = min(len(x), len(self.rows))
        return torch.cat([x[:count] + strength * self.rows[:count], x[count:]])

    def saved(self) -> Any:
        import steerfast as sf

        return sf.Add(self.rows)


@dataclass(frozen=True, eq=False)
class Flow(Edit):
    """Euler steps along the gradient of h = Σ λz² + b·z, z = Q·x/‖x‖, each an angle of ‖x‖ at the start."""

    basis: Tensor  # orthonormal rows (k, d)
    eigenvalues: Tensor
    bias: Tensor
    angle: float = 0.5
    steps: int = 4

    def of(self, x: Tensor, strength: float) -> Tensor:
        a, basis = x.double(), self.basis.double()
        step = strength * self.angle * a.norm(dim=-1, keepdim=True) / self.steps
        for _ in range(self.steps):
            unit = a / a.norm(dim=-1, keepdim=True)
            slope = (2 * self.eigenvalues.double() * (unit @ basis.T) + self.bias.double()) @ basis
            slope = slope - (slope * unit).sum(-1, keepdim=True) * unit
            a = a + step * slope / slope.norm(dim=-1, keepdim=True)
        return a.float()

    def saved(self) -> Any:
        import steerfast as sf

        barrier = sf.Barrier(self.basis, self.eigenvalues, self.bias)
        return sf.Flow(barrier, angle=self.angle, steps=self.steps)


@dataclass(frozen=True, eq=False)
class Features(Edit):
    """x + (t(f) - f)·W_dec of a few features of an SAE, the rest of the row left as it is."""

    sae: Dictionary
    values: tuple[tuple[int, float], ...]
    mode: str = "set"

    def of(self, x: Tensor, strength: float) -> Tensor:
        features, _, size = self.sae.read(x)
        for number, value in self.values:
            f = features[:, number]
            wanted = {
                "set": torch.full_like(f, value), "add": f + value, "scale": f * value,
                "min": f.clamp(max=value), "max": f.clamp(min=value),
            }[self.mode]  # fmt: skip
            x = x + strength * size * (wanted - f)[:, None] * self.sae.decoder[number]
        return x

    def doubt(self, x: Tensor) -> Tensor | None:
        return self.sae.read(x)[1][:, [number for number, _ in self.values]].any(-1)

    def saved(self) -> Any:
        import steerfast as sf

        return sf.EditFeatures(library_sae(self.sae), dict(self.values), mode=self.mode)


class Plan(NamedTuple):
    """What acts where, and the positions that hold where a request names none."""

    edits: Mapping[Where, Sequence[Edit]]
    positions: str = "all"

    @property
    def columns(self) -> int:
        """At most so many of its edits act on a token in one place, those behind gates and by token each for itself."""
        apart = [
            one for chain in self.edits.values() for one in chain if one.gate is not None or isinstance(one, ByToken)
        ]
        return len(apart) + max(sum(one not in apart for one in chain) for chain in self.edits.values())

    @property
    def by_token(self) -> int:
        """For how many of a prompt's first tokens alone it acts; 0: wherever its positions say."""
        every = [one for chain in self.edits.values() for one in chain]
        alone = all(isinstance(one, ByToken) for one in every)
        return max(len(one.rows) for one in every if isinstance(one, ByToken)) if alone else 0

    @property
    def takes_positions(self) -> bool:
        """Whether a request may name others."""
        return not any(isinstance(one, ByToken) for chain in self.edits.values() for one in chain)


def unit(seed: int, rows: int = 1) -> Tensor:
    """Random rows (rows, d) of length 1."""
    found = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return found / found.norm(dim=-1, keepdim=True)


READ = Dictionary(unit(108, 96), unit(108, 96), torch.zeros(96), k=8)
"""An SAE that a probe reads and that plans edit in the same place, too."""
SAES = {
    "read": READ,
    "alone": Dictionary(unit(111, 70), unit(112, 70), 0.1 * unit(113)[0].repeat(2)[:70], k=5),
    "scaled": Dictionary(unit(114, 80), unit(115, 80), torch.zeros(80), k=6, norm="constant_norm_rescale"),
    "layered": Dictionary(unit(116, 50), unit(117, 50), torch.zeros(50), k=4, norm="layer_norm"),
    "above": Dictionary(unit(118, 40), unit(119, 40), torch.zeros(40), threshold=torch.full((40,), 0.4)),
    "scaled above": Dictionary(
        unit(120, 40), unit(121, 40), torch.zeros(40), threshold=torch.full((40,), 0.6), norm="constant_norm_rescale"
    ),
}


def probes() -> dict[str, Look]:
    """Every kind; several at a place, before and behind its edits, and at every site."""
    zero = torch.zeros(1)
    return {
        "lean": Look("linear", unit(101), zero, ("resid_post", 0)),
        "leant": Look("linear", unit(101), zero, ("resid_post", 0), after=True),
        "other": Look("linear", unit(102), torch.tensor([0.3]), ("resid_post", 1)),
        "late": Look("linear", unit(103), zero, ("resid_post", 2), after=True),
        "sure": Look("logistic", 2 * unit(104), torch.tensor([-0.2]), ("mlp_out", 1)),
        "turned": Look("linear", unit(105), zero, ("attn_out", 2)),
        "alike": Look("similarity", unit(106), zero, ("resid_post", 1)),
        "several": Look("linear", unit(107, 3), torch.tensor([0.0, 1.0, -1.0]), ("resid_post", 2)),
        "top": Look("top", READ.encoder, READ.bias, ("resid_post", 1), k=READ.k),
    }


def plans(looks: Mapping[str, Look], spread: Mapping[str, Tensor]) -> dict[str, Plan]:
    """Of edits alone, behind conditions, with features, flows, rows by token, and long lists in every layer."""
    made = {**_plain(), **_gated(looks, spread), **_features(looks, spread), **_others()}
    made["gated15"] = made["gated1"]  # equal, so that they share their slots
    return made


def _plain() -> dict[str, Plan]:
    made = {}
    for i in range(24):
        v = unit(i)[0]
        edit = [Add(v, 2.0), Ablate(v), Add(v, 3.0, keep_norm=True)][i % 3]
        site = ("mlp_out", "attn_out")[i % 2] if i % 8 == 7 else "resid_post"
        chain = [edit, Add(v)] if i % 5 == 0 else [edit]
        made[f"plan{i}"] = Plan({(site, i % LAYERS): chain}, ["all", "all", "generated", "last"][i % 4])
    return made


def _gated(looks: Mapping[str, Look], spread: Mapping[str, Tensor]) -> dict[str, Plan]:
    made = {}
    for i in range(15):
        v = unit(200 + i)[0]
        edit = [Add(v, 4.0), Add(v, 5.0, keep_norm=True), Ablate(v)][i % 3]
        name = ["lean", "leant", "other", "alike", "sure"][i % 5]
        chosen = gate(looks, spread, i, name, each=i % 2 == 1)
        if i % 4 == 3:  # held: half a deviation lower, or higher where it acts below
            width = float(spread[name].std()) / 2
            release = chosen.level - width if chosen.above else chosen.level + width
            bounded = looks[name].kind in ("similarity", "logistic")
            chosen = chosen._replace(release=min(max(release, 0.0), 1.0) if bounded else release)
        acts = [2, 1, 2, 1, 2][i % 5]
        chains: dict[Where, list[Edit]] = {("resid_post", acts): [replace(edit, gate=chosen)]}
        if i % 3 == 0:  # one that acts always, and one at another place
            chains["resid_post", acts].append(Add(unit(300 + i)[0]))
        if i % 5 == 0:
            other = gate(looks, spread, i + 1, "lean", each=True)
            chains["resid_post", 1] = [Add(unit(400 + i)[0], 3.0, gate=other)]
        made[f"gated{i}"] = Plan(chains)
    return made


def gate(looks: Mapping[str, Look], spread: Mapping[str, Tensor], i: int, name: str, *, each: bool) -> Gate:
    """A condition that about half of the scores of a probe meet."""
    scores = spread[name]
    return Gate(looks[name], float(scores[int((0.35 + 0.3 * (i % 7) / 6) * len(scores))]), i % 3 != 0, each)


def _features(looks: Mapping[str, Look], spread: Mapping[str, Tensor]) -> dict[str, Plan]:
    """In a place where the SAE is read as well, in others, several SAEs at once, many features, each mode, behind a condition."""
    read, alone = ("resid_post", 1), ("resid_post", 0)
    few = ((3, 2.5), (9, 1.5))
    many = tuple((number, 0.4) for number in range(11))
    modes = [("set", few), ("add", few), ("scale", ((5, 3.0), (7, 0.0))), ("min", ((2, 0.3), (4, 0.5))), ("max", few)]
    made = {}
    for i, (mode, values) in enumerate(modes):
        made[f"features{i}"] = Plan({read: [Features(READ, values, mode)]})
        made[f"alone{i}"] = Plan({alone: [Features(SAES["alone"], values, mode)]}, ["all", "generated"][i % 2])
    made["many"] = Plan({read: [Features(READ, many, "add")]})
    for i, name in enumerate(("scaled", "layered", "above", "scaled above")):
        chain = [Ablate(unit(130)[0]), Features(SAES[name], few, ["add", "set"][i % 2])]
        made[f"normal{i}"] = Plan({("resid_post", i % LAYERS): chain})
    made["both"] = Plan(
        {
            read: [Features(READ, few, "set"), Features(SAES["alone"], few, "add")],
            ("resid_post", 2): [Features(SAES["scaled"], few, "add")],
        }
    )
    shut = gate(looks, spread, 2, "lean", each=True)
    made["gated features"] = Plan({read: [Features(READ, few, "set", gate=shut)]})
    return made


def _others() -> dict[str, Plan]:
    plane = torch.linalg.qr(unit(140, 2).T)[0].T.contiguous()
    one = Flow(unit(141), torch.zeros(1), torch.ones(1), angle=0.6)
    two = Flow(plane, torch.tensor([1.0, -0.5]), torch.tensor([0.3, 0.2]), angle=0.4, steps=6)
    long = {
        ("resid_post", layer): [
            Add(unit(150 + layer)[0], 0.8), Ablate(unit(160 + layer)[0]),
            Add(unit(170 + layer)[0], 1.5, keep_norm=True), Add(unit(180 + layer)[0], -0.5),
        ]
        for layer in range(LAYERS)
    }  # fmt: skip
    rows = [2 * unit(190, 4), 1.5 * unit(191, 11)]
    return {
        "flow": Plan({("resid_post", 1): [one]}),
        "flow at the end": Plan({("resid_post", 2): [one, Add(unit(142)[0])]}, "last"),
        "flow of two": Plan({("resid_post", 0): [two], ("mlp_out", 1): [one]}),
        "long": Plan(long),
        "long here": Plan({("resid_post", 1): [*long["resid_post", 0], *long["resid_post", 1][:1]]}, "generated"),
        "everywhere": Plan({(site, n): [Ablate(unit(143)[0])] for site in SITES for n in range(LAYERS)}),
        "by token": Plan({("resid_post", 0): [ByToken(rows[0])]}),
        "by token, long": Plan({("resid_post", 1): [ByToken(rows[1])], ("resid_post", 2): [ByToken(rows[0])]}),
        "by token and on": Plan({("resid_post", 1): [ByToken(rows[0]), Add(unit(144)[0], 2.0)]}),
    }


SITES = ("attn_out", "mlp_out", "resid_post")


def library_sae(sae: Dictionary) -> Any:
    """The same as the library says it."""
    import steerfast as sf

    chosen = {"threshold": sae.threshold} if sae.threshold is not None else {"k": sae.k}
    return sf.SAE(sae.encoder, sae.decoder, sae.bias, normalisation=sae.norm, **chosen)


def save(folder: Path, made: Mapping[str, Plan], looks: Mapping[str, Look]) -> None:
    """Write them as an engine reads them."""
    import steerfast as sf

    for name, sae in SAES.items():
        if sae.k:
            library_sae(sae).save(folder / "saes" / name)

    def edit(one: Edit) -> Any:
        then = one.saved()
        if one.gate is None:
            return then
        condition = sf.Condition(_probe(one.gate.look), one.gate.level, above=one.gate.above, release=one.gate.release)
        return (sf.WhenToken if one.gate.each else sf.When)(condition, then)

    for name, look in looks.items():
        _probe(look).save(folder / "probes" / name)
    for name, plan in made.items():
        chains = {place: [*map(edit, chain)] for place, chain in plan.edits.items()}
        sf.Plan(chains, positions=plan.positions).save(folder / "plans" / name)


def _probe(look: Look) -> Any:
    from steerfast.probes import LinearProbe, LogisticProbe, SimilarityProbe, TopKProbe

    where = {"place": look.place, "after": look.after}
    if look.kind == "linear":
        one = len(look.rows) == 1
        return LinearProbe(look.rows[0] if one else look.rows, float(look.bias) if one else look.bias, **where)
    if look.kind == "logistic":
        return LogisticProbe(look.rows[0], float(look.bias), **where)
    if look.kind == "similarity":
        return SimilarityProbe(look.rows[0], **where)
    return TopKProbe(library_sae(READ), **where)
