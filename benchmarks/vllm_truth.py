"""What a tiny model must compute under random steering and reading, by plain hooks on transformers and the formulas alone.

Plans, conditions and probes are those of `vllm_truth_plans.py`. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm_truth_plans import (
    LAYERS,
    UNSURE,
    WIDTH,
    WORDS,
    ByToken,
    Gate,
    Plan,
    Where,
    plans,
    probes,
    save,
)

CLOSE = 1e-3
"""Scores and rows agree within this, over the largest of them where that is above 1."""

Meaning = Callable[[int, int, Sequence[int]], bool]


def _between(opens: range, closes: range) -> Meaning:
    def inside(p: int, prompt: int, ids: Sequence[int]) -> bool:
        opened = False
        for token in ids[:p]:
            opened = token not in closes if opened else token in opens
        return opened or ids[p] in opens

    return inside


_SPAN = "between:ids:20,21,22,23,24,25..60,61,62,63"
_in_span = _between(range(20, 26), range(60, 64))
POSITIONS: dict[str, Meaning] = {
    "all": lambda p, prompt, ids: True,
    "prompt": lambda p, prompt, ids: p < prompt,
    "generated": lambda p, prompt, ids: p >= prompt,
    "last": lambda p, prompt, ids: p >= prompt - 1,
    "ids:7,9,11,30,31,80": lambda p, prompt, ids: ids[p] in (7, 9, 11, 30, 31, 80),
    "!ids:7,8,9,40 & prompt": lambda p, prompt, ids: p < prompt and ids[p] not in (7, 8, 9, 40),
    "-2:": lambda p, prompt, ids: prompt - 2 <= p < prompt,
    "1:6 | generated": lambda p, prompt, ids: p >= prompt or 1 <= p < 6,
    "0:2 | -3:-1 | ids:44,45,46": lambda p, prompt, ids: (
        p < min(2, prompt) or prompt - 3 <= p < prompt - 1 or ids[p] in (44, 45, 46)
    ),
    "after:ids:17,50,51,90": lambda p, prompt, ids: any(token in (17, 50, 51, 90) for token in ids[:p]),
    "!after:ids:17,50,51,90": lambda p, prompt, ids: not any(token in (17, 50, 51, 90) for token in ids[:p]),
    _SPAN: _in_span,
    f"generated & !{_SPAN}": lambda p, prompt, ids: p >= prompt and not _in_span(p, prompt, ids),
}  # fmt: skip
"""Selectors, and what they mean of position p in a text whose first `prompt` tokens were given."""
PIECES = {"1:6 | generated": 2, "0:2 | -3:-1 | ids:44,45,46": 4}
"""How many pieces of a row table a selector takes at most, where it is more than one."""
TO_CAPTURE = ["all", "prompt", "generated", "last", "ids:7,9,11,30,31,80", "1:6 | generated", "!ids:7,8,9,40 & prompt"]
"""Those that need not know the tokens before each one, and that every prompt has."""


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
    streams: dict[tuple[str, int, bool], Tensor]  # site, layer, behind its edits -> (n, d)
    doubtful: list[int]  # tokens whose edit rounding decides: from there on a text may differ


class Truth:
    """The model, what is loaded beside it, and what transformers computes.

    Args:
        folder: Where model, plans, probes and SAEs are saved.
    """

    def __init__(self, folder: Path) -> None:
        model = _save_model(folder / "model")
        self.models = {False: model, True: _save_adapter(model, folder / "adapter")}
        """Without the adapter, and with it."""
        self.probes = probes()
        self.plans: dict[str, Plan] = {}
        texts = [[5 + (31 * i + 7 * j * j + i * j) % 120 for j in range(50)] for i in range(40)]
        found = [self.run(text, 50, [], {}).scores for text in texts]
        self.spread = {name: torch.cat([one[name] for one in found])[:, 0].sort().values for name in self.probes}
        self.plans = plans(self.probes, self.spread)
        save(folder, self.plans, self.probes)

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
        adapted: bool = False,
    ) -> Found:
        """One pass over a text.

        Args:
            ids: Its tokens.
            prompt: How many of them were given.
            steered: Plans in order, with strengths and the positions that they act on, bool (n,).
            seen: What an engine has decided: gate -> position -> open. A gate is a plan, a place, a number in its list. What it
                says counts where a score is too close to a level, and is compared elsewhere.
            adapted: Whether with the adapter.
        """
        found = Found({}, {}, [], 0, 0, torch.empty(0), {}, [])
        counts, opened, model = [0, 0], found.opened, self.models[adapted]
        gates = {
            f"{plan}/{site}.{layer}/{i}": edit.gate
            for plan, *_ in steered
            for (site, layer), chain in self.plans[plan].edits.items()
            for i, edit in enumerate(chain)
            if edit.gate is not None
        }

        def visit(place: Where, x: Tensor) -> Tensor:
            for after in (False, True):
                if after:
                    x = self._edited(place, x, prompt, steered, found)
                found.streams[(*place, after)] = x
                for name, look in self.probes.items():
                    if (look.place, look.after) == (place, after):
                        found.scores[name] = look.score(x)
                for name, gate in gates.items():
                    if (gate.look.place, gate.look.after) == (place, after):
                        told = seen.get(name, {})
                        opened[name], wrong = _decide(gate, gate.look.score(x)[:, 0].tolist(), prompt, told, counts)
                        found.wrong.extend(f"{name} at {p}" for p in wrong)
            return x

        handles = [hook for i in range(LAYERS) for hook in _hooks(model.model.layers[i], i, visit)]
        try:
            logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return found._replace(logits=logits, decided=counts[0], unsure=counts[1])

    def _edited(
        self, place: Where, x: Tensor, prompt: int, steered: Sequence[tuple[str, float, np.ndarray]], found: Found
    ) -> Tensor:
        for plan, strength, acts in steered:
            for i, edit in enumerate(self.plans[plan].edits.get(place, [])):
                where = torch.from_numpy(acts)
                if isinstance(edit, ByToken):
                    where = where & (torch.arange(len(x)) < prompt)
                if edit.gate is not None:
                    where = where & found.opened[f"{plan}/{place[0]}.{place[1]}/{i}"]
                if strength and (doubt := edit.doubt(x)) is not None:
                    found.doubtful.extend((doubt & where).nonzero()[:1, 0].tolist())
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


def _save_adapter(model: Any, folder: Path) -> Any:
    """An adapter of rank 4 on every linear layer of the blocks, as PEFT writes it; and the model that it makes."""
    import copy
    import json

    from safetensors.torch import save_file

    changed, tensors = copy.deepcopy(model), {}
    draw = torch.Generator().manual_seed(7)
    linear = {name: module for name, module in changed.named_modules() if name.endswith("_proj")}
    for name, module in linear.items():
        rows, width = module.weight.shape
        a, b = torch.randn(4, width, generator=draw) / width**0.5, torch.randn(rows, 4, generator=draw) * 0.1
        tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        module.weight.data += 2.0 * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "task_type": "CAUSAL_LM"}
    names = sorted({name.rpartition(".")[2] for name in linear})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": names}))
    return changed
