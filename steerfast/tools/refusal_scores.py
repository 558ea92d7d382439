"""How much the beginning of an answer looks like a refusal: the first token after an instruction, under any plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.hooks.steer import steer
from steerfast.models.collect import Activations, collect
from steerfast.models.layers import home, refuse_rows
from steerfast.models.limits import Limits
from steerfast.models.texts import TextReader, short_text
from steerfast.plan import Plan

EPSILON, EPSILON_KL = 1e-8, 1e-6
"""Of the logarithms of the score and of the divergence, as in the released code of Arditi et al. 2024."""
_PROBES = ("a", "Why is the sky blue?", "0", "List three. ")


class RefusalScorer:
    """A model's first token after an instruction, and how much it looks like a refusal."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, words: Sequence[str], template: str | None, batch_size: int
    ) -> None:
        self.model, self.batch_size = model, batch_size
        self.reader = TextReader.of(tokenizer, "select_refusal")
        if template is None and not getattr(self.reader.tokenizer, "chat_template", None):
            raise ValueError(
                'select_refusal: the tokenizer has no chat template; give template=, such as "Q: {instruction}\\nA:"'
            )
        if template is not None and "{instruction}" not in template:
            raise ValueError(f'select_refusal: template is {template!r}; it must hold "{{instruction}}"')
        self.template = template
        self.refusing = sorted({self._first(word) for word in words})
        self.tokens = self._behind()

    def _first(self, word: str) -> int:
        ids = self.reader.inside(word)
        if not ids:
            raise ValueError(f"select_refusal: the word {word!r} has no tokens; give another")
        return ids[0]

    def _behind(self) -> dict[int, str]:
        """Position to token, of all positions behind the instruction: where prompts of any instruction agree."""
        probes = self.ids(_PROBES)
        shared = 0
        while shared < min(map(len, probes)) and len({ids[-1 - shared] for ids in probes}) == 1:
            shared += 1
        if not shared:
            raise ValueError(
                "select_refusal: no token follows the instruction in the template; give one that ends with some"
            )
        decode = getattr(self.reader.tokenizer, "decode", str)
        return {at: decode([probes[0][at]]) for at in range(-shared, 0)}

    def ids(self, instructions: Iterable[str]) -> list[list[int]]:
        """Token ids of whole prompts, behind which the answer begins; what the model cannot read is refused."""
        found, limits = [], Limits(self.reader.owner, self.model)
        for instruction in instructions:
            if self.template is None:
                chat = [{"role": "user", "content": instruction}]
                found.append(self.reader.bare(self.reader.chat(chat, f"the instruction {short_text(instruction)}")))
            else:
                found.append(self.reader.beginning(self.template.replace("{instruction}", instruction)))
            limits.check(short_text(instruction), found[-1])
        return found

    def collect(self, instructions: Iterable[str], layers: Any, position: int, progress: bool) -> Activations:
        """The blocks' input at a position of whole prompts, by layer."""
        prompts = self.ids(instructions)
        parts = [_padded(prompts[i : i + self.batch_size]) for i in range(0, len(prompts), self.batch_size)]
        return collect(self.model, self.reader, None, layers, position, "resid_pre", inputs=parts, progress=progress)

    def logits(self, prompts: Sequence[Sequence[int]], plan: Plan | None = None) -> Tensor:
        """Logits of the first token of each answer, float64 (n, V) on the CPU."""
        return self._read(prompts, plan, lambda rows: rows)

    def scores(self, prompts: Sequence[Sequence[int]], plan: Plan | None = None) -> Tensor:
        """`refusal` of each answer's first token, (n,); no logits are kept."""
        return self._read(prompts, plan, self.refusal)

    @torch.no_grad()
    def _read(self, prompts: Sequence[Sequence[int]], plan: Plan | None, read: Callable[[Tensor], Tensor]) -> Tensor:
        found: list[Tensor] = [torch.empty(0, device="cpu")] * len(prompts)
        refuse_rows(self.model, "refusal")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for first in range(0, len(order), self.batch_size):
            part = order[first : first + self.batch_size]
            rows = read(self._forward([prompts[i] for i in part], plan).double().cpu())
            for i, row in zip(part, rows, strict=True):
                found[i] = row
        return torch.stack(found)

    def _forward(self, prompts: list[Sequence[int]], plan: Plan | None) -> Tensor:
        device = home(self.model)
        inputs = {name: part.to(device) for name, part in _padded(prompts).items()}
        if plan is None:
            logits = self.model(**inputs, use_cache=False).logits
        else:
            with steer(self.model, plan):
                logits = self.model(**inputs, use_cache=False).logits
        last = torch.tensor([len(row) - 1 for row in prompts], device="cpu")
        return logits[torch.arange(len(prompts), device="cpu"), last]

    def refusal(self, logits: Tensor) -> Tensor:
        """log Σ p(refusing) - log (1 - Σ p(refusing)) of each row, (n,)."""
        share = logits.softmax(-1)[:, self.refusing].sum(-1)
        return torch.log(share + EPSILON) - torch.log(1 - share + EPSILON)


def _padded(prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """What a forward takes, on the CPU: prompts with padding on the right."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row, device="cpu") for row in prompts], batch_first=True)
    lengths = torch.tensor([len(row) for row in prompts], device="cpu")
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1], device="cpu") < lengths[:, None]).long()}


def divergence(unsteered: Tensor, steered: Tensor) -> float:
    """Mean KL(unsteered ‖ steered) of rows of logits (n, V), in nats."""
    p, q = unsteered.softmax(-1), steered.softmax(-1)
    return float((p * (torch.log(p + EPSILON_KL) - torch.log(q + EPSILON_KL))).sum(-1).mean())
