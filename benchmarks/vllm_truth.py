"""What a tiny model must compute under random steering and reading, by plain hooks on transformers and the formulas alone.

Plans, conditions and probes are stated here as plain data. The library only saves them, for an engine that is under test; nothing
of it takes part in what is expected. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WIDTH, LAYERS, WORDS = 64, 3, 128
CLOSE = 1e-3
"""Scores agree within this, over the largest of them where that is above 1."""
UNSURE = 1e-4
"""A score so close to a threshold may fall on either side, since the sum of a product has no one order."""

Where = tuple[str, int]


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


class Edit(NamedTuple):
    """x + c·v, the same with its norm restored, or x − c·v(v·x), where its gate is open."""

    kind: str  # "add", "norm" or "ablate"
    vector: Tensor
    strength: float
    gate: Gate | None = None

    def of(self, x: Tensor, strength: float) -> Tensor:
        """What becomes of x (n, d)."""
        if self.kind == "ablate":
            return x - strength * (x @ self.vector)[:, None] * self.vector
        moved = x + strength * self.strength * self.vector
        return moved * (x.norm(dim=-1) / moved.norm(dim=-1))[:, None] if self.kind == "norm" else moved


Plan = dict[Where, list[Edit]]

POSITIONS: dict[str, Callable[[int, int, Sequence[int]], bool]] = {
    "all": lambda p, prompt, ids: True,
    "prompt": lambda p, prompt, ids: p < prompt,
    "generated": lambda p, prompt, ids: p >= prompt,
    "last": lambda p, prompt, ids: p >= prompt - 1,
    "ids:7,9,11,30,31,80": lambda p, prompt, ids: ids[p] in (7, 9, 11, 30, 31, 80),
    "!ids:7,8,9,40 & prompt": lambda p, prompt, ids: p < prompt and ids[p] not in (7, 8, 9, 40),
    "1:6 | generated": lambda p, prompt, ids: p >= prompt or 1 <= p < 6,
    "-2:": lambda p, prompt, ids: prompt - 2 <= p < prompt,
    "after:ids:17,50,51,90": lambda p, prompt, ids: any(token in (17, 50, 51, 90) for token in ids[:p]),
}
"""Selectors, and what they mean of position p in a text whose first `prompt` tokens were given."""
TO_STEER = [*POSITIONS][:6]
"""Those that take one piece of a row table, whatever the prompt."""


def chosen(positions: str, prompt: int, ids: Sequence[int]) -> np.ndarray:
    """bool (n,): the positions of a text that a selector means."""
    return np.array([POSITIONS[positions](p, prompt, ids) for p in range(len(ids))], dtype=bool)


class Found(NamedTuple):
    """What a text must have given."""

    scores: dict[str, Tensor]  # probe -> (n, m)
    opened: dict[str, Tensor]  # gate -> bool (n,)
    wrong: list[str]  # gates that decided otherwise
    decided: int
    unsure: int
    logits: Tensor  # (n, words)


class Truth:
    """The model, what is loaded beside it, and what transformers computes.

    Args:
        folder: Where model, plans, probes and SAEs are saved.
    """

    def __init__(self, folder: Path) -> None:
        self.model = _save_model(folder / "model")
        self.probes = _probes()
        self.plans: dict[str, Plan] = {}
        texts = [[5 + (31 * i + 7 * j * j + i * j) % 120 for j in range(50)] for i in range(40)]
        found = [self.run(text, 50, [], {}).scores for text in texts]
        self.spread = {name: torch.cat([one[name] for one in found])[:, 0].sort().values for name in self.probes}
        self.plans = _plans(self.probes, self.spread)
        _save(folder, self.plans, self.probes)

    def level(self, name: str, share: float) -> float:
        """A number that this share of the scores of a probe on unsteered texts is below."""
        return round(float(self.spread[name][int(share * (len(self.spread[name]) - 1))]), 4)

    @torch.inference_mode()
    def run(
        self,
        ids: Sequence[int],
        prompt: int,
        steered: Sequence[tuple[str, float, np.ndarray]],
        seen: Mapping[str, Mapping[int, bool]],
    ) -> Found:
        """One pass over a text.

        Args:
            ids: Its tokens.
            prompt: How many of them were given.
            steered: Plans in order, with strengths and the positions that they act on, bool (n,).
            seen: What an engine has decided: gate -> position -> open. A gate is a plan, a place, a number in its list. What it
                says counts where a score is too close to a level, and is compared elsewhere.
        """
        found = Found({}, {}, [], 0, 0, torch.empty(0))
        counts, opened = [0, 0], found.opened
        gates = {
            f"{plan}/{site}.{layer}/{i}": edit.gate
            for plan, *_ in steered
            for (site, layer), chain in self.plans[plan].items()
            for i, edit in enumerate(chain)
            if edit.gate is not None
        }

        def visit(place: Where, x: Tensor) -> Tensor:
            for after in (False, True):
                if after:
                    x = self._edited(place, x, steered, opened)
                for name, look in self.probes.items():
                    if (look.place, look.after) == (place, after):
                        found.scores[name] = look.score(x)
                for name, gate in gates.items():
                    if (gate.look.place, gate.look.after) == (place, after):
                        told = seen.get(name, {})
                        opened[name], wrong = _decide(gate, gate.look.score(x)[:, 0].tolist(), prompt, told, counts)
                        found.wrong.extend(f"{name} at {p}" for p in wrong)
            return x

        handles = [hook for i in range(LAYERS) for hook in _hooks(self.model.model.layers[i], i, visit)]
        try:
            logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return found._replace(logits=logits, decided=counts[0], unsure=counts[1])

    def _edited(
        self, place: Where, x: Tensor, steered: Sequence[tuple[str, float, np.ndarray]], opened: Mapping[str, Tensor]
    ) -> Tensor:
        for plan, strength, acts in steered:
            for i, edit in enumerate(self.plans[plan].get(place, [])):
                where = torch.from_numpy(acts)
                if edit.gate is not None:
                    where = where & opened[f"{plan}/{place[0]}.{place[1]}/{i}"]
                x = torch.where(where[:, None], edit.of(x, strength), x)
        return x


def _decide(
    gate: Gate, scores: list[float], prompt: int, seen: Mapping[int, bool], counts: list[int]
) -> tuple[Tensor, list[int]]:
    """Which tokens a gate is open for, and where an engine says otherwise."""
    side = 1.0 if gate.above else -1.0
    near = UNSURE * max(1.0, abs(gate.level))
    opened, wrong, state = [], [], False
    for p, score in enumerate(scores):
        score, level = side * score, side * gate.level
        unsure = abs(score - level) < near
        if not gate.each:
            now = p >= prompt - 1 and (score > level if p == prompt - 1 else state)
            unsure = unsure and p == prompt - 1
        elif gate.release is None:
            now = score > level
        else:
            now = score > level or (state and not score < side * gate.release)
            unsure = unsure or abs(score - side * gate.release) < near
        if p in seen:
            counts[0] += 1
            counts[1] += unsure
            if unsure:
                now = seen[p]
            elif seen[p] != now:
                wrong.append(p)
        opened.append(now)
        state = now
    return torch.tensor(opened), wrong


def _hooks(block: Any, layer: int, visit: Callable[[Where, Tensor], Tensor]) -> list[Any]:
    def hook(site: str) -> Callable[..., Any]:
        def run(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (visit((site, layer), output[0][0])[None], *output[1:])
            return visit((site, layer), output[0])[None]

        return run

    parts = {"attn_out": block.self_attn, "mlp_out": block.mlp, "resid_post": block}
    return [module.register_forward_hook(hook(site)) for site, module in parts.items()]


def _unit(seed: int, rows: int = 1) -> Tensor:
    found = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return found / found.norm(dim=-1, keepdim=True)


def _probes() -> dict[str, Look]:
    """Every kind; several at a place, before and behind its edits, and at every site."""
    zero = torch.zeros(1)
    return {
        "lean": Look("linear", _unit(101), zero, ("resid_post", 0)),
        "leant": Look("linear", _unit(101), zero, ("resid_post", 0), after=True),
        "other": Look("linear", _unit(102), torch.tensor([0.3]), ("resid_post", 1)),
        "late": Look("linear", _unit(103), zero, ("resid_post", 2), after=True),
        "sure": Look("logistic", 2 * _unit(104), torch.tensor([-0.2]), ("mlp_out", 1)),
        "turned": Look("linear", _unit(105), zero, ("attn_out", 2)),
        "alike": Look("similarity", _unit(106), zero, ("resid_post", 1)),
        "several": Look("linear", _unit(107, 3), torch.tensor([0.0, 1.0, -1.0]), ("resid_post", 2)),
        "top": Look("top", _unit(108, 96), torch.zeros(96), ("resid_post", 1), k=8),
    }


def _plans(probes: Mapping[str, Look], spread: Mapping[str, Tensor]) -> dict[str, Plan]:
    """24 of edits alone, and 16 behind conditions: two of the latter are equal, so that they share their slots."""
    made: dict[str, Plan] = {}
    for i in range(24):
        v = _unit(i)[0]
        edit = [Edit("add", v, 2.0), Edit("ablate", v, 1.0), Edit("norm", v, 3.0)][i % 3]
        site = ("mlp_out", "attn_out")[i % 2] if i % 8 == 7 else "resid_post"
        made[f"plan{i}"] = {(site, i % LAYERS): [edit, Edit("add", v, 1.0)] if i % 5 == 0 else [edit]}

    def gate(i: int, name: str, **more: Any) -> Gate:
        scores = spread[name]
        return Gate(probes[name], float(scores[int((0.35 + 0.3 * (i % 7) / 6) * len(scores))]), i % 3 != 0, **more)

    for i in range(15):
        v = _unit(200 + i)[0]
        edit = [Edit("add", v, 4.0), Edit("norm", v, 5.0), Edit("ablate", v, 1.0)][i % 3]
        name = ["lean", "leant", "other", "alike", "sure"][i % 5]
        chosen = gate(i, name, each=i % 2 == 1)
        if i % 4 == 3:  # held: half a deviation lower, or higher where it acts below
            width = float(spread[name].std()) / 2
            low, high = probes[name].kind in ("similarity", "logistic"), 1.0
            release = chosen.level - width if chosen.above else chosen.level + width
            chosen = chosen._replace(release=min(max(release, 0.0), high) if low else release)
        acts = [2, 1, 2, 1, 2][i % 5]
        made[f"gated{i}"] = {("resid_post", acts): [edit._replace(gate=chosen)]}
        if i % 3 == 0:  # one that acts always, and one at another place
            made[f"gated{i}"][("resid_post", acts)].append(Edit("add", _unit(300 + i)[0], 1.0))
        if i % 5 == 0:
            other = gate(i + 1, "lean", each=True)
            made[f"gated{i}"][("resid_post", 1)] = [Edit("add", _unit(400 + i)[0], 3.0, other)]
    made["gated15"] = made["gated1"]
    return made


def _save_model(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=32, initializer_range=0.2)
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    return model


def _save(folder: Path, plans: Mapping[str, Plan], probes: Mapping[str, Look]) -> None:
    import steerfast as sf

    (top,) = (look for look in probes.values() if look.kind == "top")
    sae = sf.SAE(top.rows, top.rows, k=top.k)
    sae.save(folder / "saes" / "sae")

    def probe(look: Look) -> Any:
        where = {"place": look.place, "after": look.after}
        if look.kind == "linear":
            one = len(look.rows) == 1
            return sf.probes.LinearProbe(
                look.rows[0] if one else look.rows, float(look.bias) if one else look.bias, **where
            )
        if look.kind == "logistic":
            return sf.probes.LogisticProbe(look.rows[0], float(look.bias), **where)
        if look.kind == "similarity":
            return sf.probes.SimilarityProbe(look.rows[0], **where)
        return sf.probes.TopKProbe(sae, **where)

    def edit(one: Edit) -> Any:
        then = sf.Ablate(one.vector) if one.kind == "ablate" else None
        then = then or sf.Add(one.vector, one.strength, keep_norm=one.kind == "norm")
        if one.gate is None:
            return then
        condition = sf.Condition(probe(one.gate.look), one.gate.level, above=one.gate.above, release=one.gate.release)
        return (sf.WhenToken if one.gate.each else sf.When)(condition, then)

    for name, look in probes.items():
        probe(look).save(folder / "probes" / name)
    for name, plan in plans.items():
        sf.Plan({place: [*map(edit, chain)] for place, chain in plan.items()}).save(folder / "plans" / name)
