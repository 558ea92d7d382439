"""A plan as a LoRA adapter: base model and edited model side by side in any engine that takes adapters.

What `bake` writes into a weight is a change of low rank, so a file can carry the change alone. An ablation of r directions,
and any chain of them and of additions, maps what a projection writes, Wh + b, to

    M(Wh + b) + t,   M = I - L·C,   L (d, r),  C (r, d)

so the adapter's A = C·W and B = -L give B·A = (M - I)·W exactly, with the factor alpha / r = 1. What is left for a bias,
(M - I)·b + t, is PEFT's `lora_bias`, which PEFT alone reads. An embedding's rows are mapped in the same way, and take an
addition as one more rank: A = 1 for every token, B = t.

The places, and the proof that the weights found are those that write there, are `bake`'s (`steerfast.tools.weights`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from steerfast._checks import one_of
from steerfast.edits.base import Intervention
from steerfast.edits.linear import Ablate, Add
from steerfast.files.replace import replace_file
from steerfast.plan import Plan

from .weights import EMBEDDING, Writer, changes, unwrapped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENGINES = ("any", "peft")
_CHUNK = 1 << 14  # rows of a weight that are multiplied at once
_PREFIX = "base_model.model."
_ONLY_PEFT = 'which PEFT alone reads; write it with engine="peft" (on the command line: --engine peft), or use steer'


def write_lora(
    model: nn.Module, plan: Plan | dict[Any, Any], folder: str | os.PathLike[str], engine: str = "any"
) -> Path:
    """Write a plan as a LoRA adapter of a model, in PEFT's format; the model is not changed.

    With the adapter the logits equal those of the hooked model up to rounding, without it those of the base model. Engines
    that load PEFT's adapters (PEFT, vLLM) serve both at once; the adapter acts at every position of a request that names it.

    Args:
        model: The transformers causal language model that the adapter is for, with its weights.
        plan: As for `bake`: `Ablate` at `attn_out` or `mlp_out` of any layer or at `resid_pre` of layer 0, `everywhere` for
            all of them; `Add` at those and at `resid_post`. positions="all", no keep_norm.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` are written, float32; it must not exist.
        engine: "any": weights alone, which every engine reads; `Add` behind a block, ablations of a projection that has a
            bias, and experts in one tensor are refused. "peft": all of these, for PEFT alone. Beside a bias PEFT takes no
            change of an embedding, so the file then holds the edited embedding whole; so it does, always, where an embedding
            takes other rows than its input names (OPT's positions), which "any" refuses.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
        TypeError, ValueError: what no adapter can say, by name and with the reason: what `bake` refuses, and what an engine
            cannot read.
        RuntimeError: the model is being steered.

    Reference:
        Hu et al. 2021, LoRA (arXiv:2106.09685); Arditi et al. 2024 (arXiv:2406.11717), section 4.1.

    Example:
        >>> plan = sf.tools.everywhere(model, sf.Ablate(r))  # doctest: +SKIP
        >>> sf.tools.write_lora(model, plan, "ablated")  # doctest: +SKIP
    """
    one_of("lora", "engine", engine, ENGINES)
    target = Path(folder)
    if target.exists():
        raise FileExistsError(f"lora: {target} exists; choose another name, or remove it")
    found, stacked = changes("lora", model, plan), _stacked(model)
    parts = [
        _part(place, chain, writer, stacked, first=writer is next((one for one in writers if one.looks_up), writers[0]))
        for place, chain, writers in found
        for writer in _told(place, chain, writers)
    ]
    parts = [part for part in parts if part.rank or not part.embeds]  # one embedding of several carries an addition
    if engine == "any":
        for part in sorted(parts, key=lambda part: part.writer.rows().ndim, reverse=True):  # the experts first
            part.refuse_for_any()
    adapter = _Adapter(parts, any(part.bias is not None for part in parts))
    adapter.refuse_bias_beside_parameters()
    replace_file(target / WEIGHTS, save(adapter.tensors(), {"format": "pt"}))
    replace_file(target / CONFIG, json.dumps(adapter.config(unwrapped(model)), indent=2).encode())
    return target


def describe_lora(folder: str | os.PathLike[str]) -> str:
    """Return what an adapter changes, in a few lines: its base, its rank, the weights, and who reads it.

    Args:
        folder: Of PEFT's two files, by `write_lora` or anyone else.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or is none of PEFT's.
    """
    source = Path(folder)
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        with safe_open(source / WEIGHTS, framework="pt") as file:
            names = [name.removeprefix(_PREFIX) for name in file.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} holds no adapter of PEFT: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ValueError(f"{source} is an adapter of the type {kind!r}; expected LORA")
    changed = sorted({name.partition(".lora_")[0] for name in names})
    alone = config.get("lora_bias") or config.get("modules_to_save") or config.get("target_parameters")
    base = config.get("base_model_name_or_path") or "unknown"
    return "\n".join(
        [
            f"LoRA adapter  rank {config['r']}, {len(changed)} weights, {changed[0]} to {changed[-1]}",
            f"base model    {base}",
            f"read by       {'PEFT alone (biases, whole weights or experts in one tensor)' if alone else 'PEFT, vLLM'}",
        ]
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """The change of one map: W ← W - L·(C·W) along the stream, and what its bias is given."""

    where: str
    writer: Writer
    left: Tensor  # L (d, r), float64
    right: Tensor  # C (r, d)
    shift: Tensor  # t (d,), divided by the writer's scale
    embeds: bool = field(default=False)
    wrapped: bool = field(default=False)  # a target_parameter, no target_module

    @property
    def bias(self) -> Tensor | None:
        """(M - I)·b + t, None where nothing is left for it."""
        if self.embeds:
            return None
        given = self.writer.offset()
        change = self.shift if given is None else self.shift - self.left @ (self.right @ given.to(self.shift))
        return change if bool(change.any()) else None

    def whole(self, biased: bool) -> bool:
        """Whether the file holds the edited weight: of an embedding beside biases, or whose rows its input does not name."""
        return self.embeds and (biased or not self.writer.looks_up)

    def refuse_for_any(self) -> None:
        if self.whole(biased=False):
            raise ValueError(
                f"lora: {self.where}: {self.writer.path} takes other rows than its input names, which an adapter does not; the "
                f"file would hold it whole, {_ONLY_PEFT}"
            )
        if self.writer.rows().ndim > 2:
            raise ValueError(
                f"lora: {self.where}: {self.writer.path} holds all experts in one tensor, whose adapter is a target_parameter, "
                f"{_ONLY_PEFT}"
            )
        if self.wrapped:
            raise ValueError(
                f"lora: {self.where}: PEFT takes {self.writer.path} for a part of the experts, whose tensor has the same name, "
                f"unless it is a target_parameter, {_ONLY_PEFT}"
            )
        if self.bias is not None:
            raise ValueError(
                f"lora: {self.where}: a change of the bias of {self.writer.path} is a lora_bias, {_ONLY_PEFT}"
            )

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (d, r), float64; of experts A (experts, r, in)."""
        rows = self.writer.rows().detach()  # (in, d), of experts (experts, in, d), of an embedding (tokens, d)
        pieces = rows.split(1 if rows.ndim > 2 else _CHUNK)
        a = torch.cat([piece.to(self.right) @ self.right.T for piece in pieces]).transpose(-1, -2)
        b = -self.left
        if self.rank > b.shape[1]:
            a = torch.cat([a, torch.ones(1, a.shape[1]).to(a)])
            b = torch.cat([b, self.shift[:, None]], dim=1)
        return a, b

    def of_experts(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """PEFT's factors of experts in one tensor: A a block of rows for each expert, B's columns with experts fastest.

        PEFT takes such a tensor for (experts, out, in), or for (experts, in, out) where its module says `is_transposed`; where
        the stream lies along what it takes for in, the factors change places.
        """
        b = b.expand(len(a), -1, -1)
        if (self.writer.axis == 2) != bool(getattr(self.writer.module, "is_transposed", False)):
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)

    @property
    def rank(self) -> int:
        return self.left.shape[1] + int(self.embeds and bool(self.shift.any()))


def _stacked(model: nn.Module) -> set[str]:
    """Names of tensors that hold all experts of a layer.

    PEFT moves a target_module of such a name (`down_proj` of a dense layer or a shared expert) to the experts, since it was
    one of theirs before they were stacked.
    """
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.ndim > 2}


def _told(place: tuple[str, int], chain: list[Intervention], writers: list[Writer]) -> list[Writer]:
    """The writers of a place, if the plan's edits there can be told to them."""
    added = [edit for edit in chain if isinstance(edit, Add)]
    if added and place != EMBEDDING and (len(writers) > 1 or writers[0].rows().ndim > 2):
        raise ValueError(
            f"lora: Add at {place[0]} {place[1]}: {writers[0].path} is a part of a mixture of experts, which has no bias of its "
            "own; use steer"
        )
    for writer in writers:
        if writer.rows().ndim > 2 and writer.bias is not None:
            raise ValueError(
                f"lora: {place[0]} {place[1]}: each expert of {writer.path} has a bias ({writer.bias}), which no adapter "
                "changes; use bake, or steer"
            )
    return writers


def _part(
    place: tuple[str, int], chain: list[Intervention], writer: Writer, stacked: set[str], *, first: bool
) -> _Part:
    """The chain as M = I - L·C and t, in float64; of several embeddings the first carries t."""
    d = writer.rows().shape[-1]
    device = writer.rows().device
    left, right = torch.zeros(d, 0, dtype=torch.float64), torch.zeros(0, d, dtype=torch.float64)
    shift = torch.zeros(d, dtype=torch.float64)
    for edit in chain:
        if isinstance(edit, Ablate):
            v = edit.tensors()["direction"].to("cpu", torch.float64)
            left = torch.cat([v.T, left - v.T @ (v @ left)], dim=1)
            right = torch.cat([v, right])
            shift = shift - v.T @ (v @ shift)
        elif isinstance(edit, Add) and first:
            shift = shift + edit.strength * edit.tensors()["vector"].to("cpu", torch.float64)
    where = f"{type(chain[0]).__name__} at {place[0]} {place[1]}"
    wrapped = writer.rows().ndim > 2 or writer.path.rpartition(".")[2] in stacked
    shift = (shift / writer.scale).to(device)
    return _Part(where, writer, left.to(device), right.to(device), shift, place == EMBEDDING, wrapped)


@dataclass(frozen=True, eq=False)
class _Adapter:
    """PEFT's two files of some parts; `biased` where one of them needs a lora_bias, which all of PEFT's then have."""

    parts: list[_Part]
    biased: bool

    @property
    def rank(self) -> int:
        """r of every part; those of less are filled up with zeros."""
        return max(1, *(part.rank for part in self.parts))

    def refuse_bias_beside_parameters(self) -> None:
        biased = [part for part in self.parts if part.bias is not None]
        wrapped = [part.writer.path for part in self.parts if part.wrapped]
        if biased and wrapped:
            raise ValueError(
                f"lora: {biased[0].where}: PEFT takes no lora_bias ({biased[0].writer.path}) beside a target_parameter "
                f"({wrapped[0]}); write two adapters, or use steer"
            )

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        rank = self.rank
        for part in self.parts:
            name = _PREFIX + part.writer.path
            if part.whole(self.biased):
                found[f"{name}.weight"] = self._whole(part)
                continue
            a, b = _filled(*part.factors(), rank)
            if part.embeds:
                found[f"{name}.lora_embedding_A"], found[f"{name}.lora_embedding_B"] = a, b
                continue
            if a.ndim > 2:
                a, b = part.of_experts(a, b)
            found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = a, b
            if self.biased:
                bias = part.bias
                found[f"{name}.lora_B.bias"] = b.new_zeros(len(b)) if bias is None else bias
        return {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in found.items()}

    def _whole(self, part: _Part) -> Tensor:
        a, b = part.factors()
        return part.writer.rows().detach().to(b) + (b @ a).T

    def config(self, model: nn.Module) -> dict[str, Any]:
        wrapped = [part.writer for part in self.parts if part.wrapped]
        kept = [part.writer.path for part in self.parts if part.whole(self.biased)]
        targets = [p.writer.path for p in self.parts if p.writer.path not in kept and not p.wrapped]
        settings: Any = model.config
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": getattr(settings, "_name_or_path", None) or None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "lora_bias": self.biased,
            "fan_in_fan_out": any(hasattr(part.writer.module, "nf") for part in self.parts),
            "target_modules": targets,
            "target_parameters": [f"{writer.path}.{writer.weight}" for writer in wrapped] or None,
            "modules_to_save": kept or None,
        }


def _filled(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - b.shape[1]
    return nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
