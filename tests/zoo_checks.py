"""The checks of the zoo: steerfast on a tiny model, against the oracle (`zoo_oracle`).

`examine(kind, class_name)` runs every check on one model. An outcome is a string:

    right                 as the oracle says
    refused: ...          steerfast's own error, which names the function that was called
    wrong: ...            silently something else
    raised: ...           an error that is not steerfast's
    not comparable: ...   the unsteered model does not do it either
    does not build: ...   there is no tiny model
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
import zoo
from torch import Tensor
from zoo_oracle import (
    EVERYWHERE,
    FIRST_ROW,
    NEW,
    NOT_PADS,
    PADS,
    POSITIONS,
    PROMPT,
    NotComparable,
    Subject,
    Where,
    Wrong,
    added,
    clamping,
    compare,
    differ,
    generate,
    loop,
    moved,
    plainly,
    recording,
    shortly,
    unsteered,
)  # fmt: skip

import steerfast as sf
from steerfast.tools.check import check as prove

OWN = re.compile(r"^(steer|collect|check|prepare|stats): ")


def _steer(subject: Subject, plan: Any, **more: Any) -> Any:
    return sf.steer(subject.model, plan, **more)


def _add(vector: Tensor) -> Any:
    return sf.Add(vector)


def _plan(edits: dict[Any, Any], positions: str) -> Any:
    return sf.Plan(edits, positions=positions)


class Layered:
    """Outcomes by layer: one wrong layer is wrong; refused only if all are."""

    def __init__(self) -> None:
        self.right: list[int] = []
        self.refused: dict[int, str] = {}
        self.unclear: dict[int, str] = {}

    def run(self, layer: int, check: Callable[[int], None]) -> None:
        try:
            check(layer)
            self.right.append(layer)
        except NotComparable as reason:
            self.unclear[layer] = str(reason)
        except Exception as error:
            if not is_refusal(error):
                raise
            self.refused[layer] = str(error)

    def outcome(self) -> str:
        if self.right:
            rest = len(self.refused)
            return f"right: {len(self.right)} of {len(self.right) + rest} layers" if rest else "right"
        if self.refused:
            return f"refused: {next(iter(self.refused.values()))}"
        return f"not comparable: {next(iter(self.unclear.values()), 'no layer')}"


def is_refusal(error: BaseException) -> bool:
    return isinstance(error, (TypeError, ValueError, RuntimeError)) and OWN.match(str(error)) is not None


def _moves(subject: Subject, layer: int, site: str, key: Any) -> None:
    """Steer at `key`, which names a site of a layer: the logits are the oracle's."""
    vector = subject.vector(layer)
    with _steer(subject, {key: _add(vector)}) as handle:
        got = subject.logits(subject.ids)
        counted = handle.stats()
    if subject.blocks[layer].argument is None:  # never runs: nothing to edit, and nothing counted
        if counted != [0] or not torch.equal(got, subject.clean):
            raise Wrong(f"layer {layer} never runs, but {counted[0]} tokens are counted")
        return
    subject.one_stream()
    with plainly(subject, [(layer, site, vector)]):
        wanted = subject.logits(subject.ids)
    compare(got, wanted, subject.clean, f"layer {layer}")


def _resid(subject: Subject, site: str) -> str:
    found = Layered()
    for layer in subject.layers:
        found.run(layer, lambda one: _moves(subject, one, site, one if site == "resid_post" else (site, one)))
    return found.outcome()


def resid_post(subject: Subject) -> str:
    return _resid(subject, "resid_post")


def resid_pre(subject: Subject) -> str:
    return _resid(subject, "resid_pre")


def _added(subject: Subject, site: str) -> str:
    found = Layered()

    def one(layer: int) -> None:
        vector = subject.vector(layer)
        value = float(vector.norm())
        direction = vector / value
        with _steer(subject, {(site, layer): sf.Clamp(direction, low=value, high=value)}):
            got = subject.logits(subject.ids)
        subject.one_stream()
        try:
            term = added(subject, layer)[site == "mlp_out"]
        except NotComparable as reason:
            if subject.blocks[layer].argument is None:
                return
            raise Wrong(f"layer {layer}: {site} is offered, but {reason}") from None
        if term is None:
            raise Wrong(f"layer {layer}: {site} is offered, but the block has none")
        with clamping(subject, layer, term, direction, value):
            wanted = subject.logits(subject.ids)
        compare(got, wanted, subject.clean, f"layer {layer}")

    for layer in subject.layers:
        found.run(layer, one)
    return found.outcome()


def attn_out(subject: Subject) -> str:
    return _added(subject, "attn_out")


def mlp_out(subject: Subject) -> str:
    return _added(subject, "mlp_out")


WITHIN = "right: within generate, which differs, unsteered, from the uncached loop"


def generated(subject: Subject, name: str, plan: Any, where: Where, mask: Tensor | None = None) -> str:
    """Steer, generate, compare; what was counted is kept by `name`.

    The oracle is the uncached loop over the first row alone; where the model's own generate is something else, the same
    generate with plain hooks, which count the tokens as they pass.
    """
    ids = subject.ids if mask is None else subject.two.where(mask == 1, torch.tensor(zoo.PAD))
    edits = [(layer, "resid_post", v) for layer, v in edits_of(subject).items()]
    unclear: NotComparable | None = None
    as_loop = False
    try:
        as_loop = unsteered(subject, ids, mask)
    except NotComparable as reason:
        unclear = reason
    try:
        with _steer(subject, plan) as handle:
            new, got = generate(subject, ids, mask)
            subject.counts[name] = handle.stats()[0]
    except Exception as error:
        if unclear is not None and not is_refusal(error):
            raise unclear from None
        raise
    if unclear is not None:
        raise unclear
    subject.one_stream()
    if as_loop:
        alone = ids[:1] if mask is None else ids[:1, mask[0].bool()]
        clean = loop(subject, alone, new[:1])
        with plainly(subject, edits, where if mask is None else EVERYWHERE):
            wanted = loop(subject, alone, new[:1])
        compare(got[:1], wanted, clean, "generate")
        return "right"
    clean = generate(subject, ids, mask)[1]
    with plainly(subject, edits, where):
        wanted = generate(subject, ids, mask)[1]
    compare(got, wanted, clean, "within generate")
    return WITHIN


def edits_of(subject: Subject) -> dict[int, Tensor]:
    """Two layers at once: the first, and the last but one that runs."""
    run = [layer for layer in subject.layers if subject.blocks[layer].argument is not None]
    return {layer: subject.vector(layer) for layer in (run[0], run[-2])}


def _generate(positions: str) -> Callable[[Subject], str]:
    def check(subject: Subject) -> str:
        edits = {layer: _add(v) for layer, v in edits_of(subject).items()}
        return generated(subject, positions, _plan(edits, positions), POSITIONS[positions][0])

    return check


def stats(subject: Subject) -> str:
    """The numbers of the four generate checks; a token counts once, whatever the cache."""
    if not subject.counts:
        raise NotComparable("no generate check ran to its end")
    for positions, count in subject.counts.items():
        wanted = POSITIONS[positions][1]
        if count != wanted and not (positions == "all" and count == wanted + subject.front):
            raise Wrong(f"positions {positions}: {count} tokens are counted, not {wanted}")
    return "right"


def rows(subject: Subject) -> str:
    """A plan for row 0 of two leaves row 1 alone."""
    edits = edits_of(subject)
    with _steer(subject, [_plan({layer: _add(v) for layer, v in edits.items()}, "all"), None]):
        got = subject.logits(subject.two)
    subject.one_stream()
    clean = subject.logits(subject.two)
    with plainly(subject, [(layer, "resid_post", v) for layer, v in edits.items()], FIRST_ROW):
        wanted = subject.logits(subject.two)
    compare(got, wanted, clean, "a plan for row 0")
    return "right"


def pads_of(ids: Tensor) -> Tensor:
    """The mask of two rows of which the first is padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :PADS] = 0
    return mask


def padding(subject: Subject) -> str:
    """Row 0 of two is padded on the left: its pads keep their bits, and it generates what it generates alone."""
    edits = edits_of(subject)
    layer, mask = min(edits), pads_of(subject.two)
    ids = torch.where(mask == 1, subject.two, torch.tensor(zoo.PAD))
    plan = {layer: _add(v) for layer, v in edits.items()}
    try:
        before = _block_output(subject, layer, ids, mask)
    except Exception as error:
        raise NotComparable(f"the model does not take a mask: {shortly(error)}") from None
    with _steer(subject, plan):
        after = _block_output(subject, layer, ids, mask)
    subject.one_stream()
    wanted = moved(before, edits[layer], NOT_PADS, 2, PROMPT, subject.front)
    off = float((after - wanted).abs().nan_to_num().max())
    if off > 1e-4 * max(1.0, float(wanted.abs().nan_to_num().max())):
        raise Wrong(f"one pass: block {layer} is off by {off:.2g}")
    outcome = generated(subject, "padded", plan, NOT_PADS, mask)
    count, wanted = subject.counts["padded"], 2 * (subject.front + PROMPT + NEW - 1) - PADS
    if count != wanted:
        raise Wrong(f"{count} tokens of a padded batch are counted, not {wanted}")
    return outcome


def _block_output(subject: Subject, layer: int, ids: Tensor, mask: Tensor) -> Tensor:
    with recording([subject.blocks[layer].module]) as calls:
        subject.forward(ids, attention_mask=mask)
    tensor = next(iter(calls.values())).tensor
    assert tensor is not None
    return tensor


SENTENCE = "The quick brown fox jumps over the lazy dog"


def tokenizer() -> Any:
    """A word a token: ids 3 and up."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *SENTENCE.split(), "one", "two", "three"]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def collect(subject: Subject) -> str:
    """Texts of two lengths in one batch: each as the oracle reads it alone."""
    texts = ["one quick fox", SENTENCE]
    encode = tokenizer()
    layers = list(subject.layers) if _has_blocks(subject) else [0, 1]
    layers = [layer for layer in layers if not _has_blocks(subject) or subject.blocks[layer].argument is not None]
    got = sf.collect(subject.model, encode, texts, layers=layers, position="all", progress=False)
    subject.one_stream()
    for number, text in enumerate(texts):
        ids = encode(text, return_tensors="pt")["input_ids"]
        with recording([block.module for block in subject.blocks]) as calls:
            subject.forward(ids)
        for layer in layers:
            wanted = calls[subject.blocks[layer].module].tensor
            assert wanted is not None
            wanted = wanted.reshape(-1, wanted.shape[-1])[-ids.shape[1] :]
            have = got[layer][got.text_index == number]
            off = differ(have, wanted)
            if off is not None:
                raise Wrong(f"layer {layer} of text {number} is off by {off:.2g} of {float(wanted.abs().max()):.2g}")
    return "right"


def _has_blocks(subject: Subject) -> bool:
    try:
        return bool(subject.blocks)
    except NotComparable:
        return False


def removal(subject: Subject) -> str:
    """The same bits as before, no hook left, and the model's own generate."""

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.model.modules())

    before = hooks()
    with _steer(subject, {layer: _add(v) for layer, v in edits_of(subject).items()}):
        subject.logits(subject.ids)
    if hooks() != before:
        raise Wrong(f"{hooks() - before} hooks are left")
    if "generate" in vars(subject.model):
        raise Wrong("generate is still replaced")
    if not torch.equal(subject.logits(subject.ids), subject.clean):
        raise Wrong("the logits are not those of before")
    return "right"


def negative(subject: Subject) -> str:
    """Layer −1 is the last block."""
    _moves(subject, subject.layers[-1], "resid_post", -1)
    return "right"


_REPORTED = re.compile(r"edited|was edited|keep|did not move|changed by|the logits")


def check(subject: Subject) -> str:
    """`steerfast check` reports; where it fails, in its own words."""
    failed = [finding for finding in prove(subject.model, tokenizer()) if finding.outcome == "failed"]
    for finding in failed:
        if OWN.match(finding.detail):
            return f"refused: {finding.name}: {finding.detail}"
        if _REPORTED.search(finding.detail):
            raise Wrong(f"reports a failure: {finding.name}: {finding.detail}")
        return f"raised: {finding.name}: {finding.detail}"
    return "right"


CHECKS: dict[str, Callable[[Subject], str]] = {
    "resid_post": resid_post,
    "resid_pre": resid_pre,
    "attn_out": attn_out,
    "mlp_out": mlp_out,
    "rows": rows,
    "generate all": _generate("all"),
    "generate prompt": _generate("prompt"),
    "generate generated": _generate("generated"),
    "generate last": _generate("last"),
    "stats": stats,
    "padding": padding,
    "collect": collect,
    "negative layer": negative,
    "removal": removal,
    "check": check,
}


def outcome_of(check: Callable[[Subject], str], subject: Subject) -> str:
    """One check, as a string."""
    try:
        return check(subject)
    except NotComparable as reason:
        return f"not comparable: {reason}"
    except Wrong as how:
        return f"wrong: {how}"
    except Exception as error:
        text = " ".join(str(error).split())
        return f"refused: {text}" if is_refusal(error) else f"raised: {shortly(error)}"


def refused_at_once(subject: Subject) -> str | None:
    """What steer says before anything runs, if it refuses the model; needs nothing of the oracle."""
    try:
        with _steer(subject, {0: _add(torch.ones(subject.width))}):
            return None
    except Exception as error:
        text = " ".join(str(error).split())
        return f"refused: {text}" if is_refusal(error) else f"raised: {shortly(error)}"


def examine(kind: str, class_name: str) -> dict[str, Any]:
    """Every check on one model, and the facts of its blocks."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        subject = Subject(kind, class_name)
    except Exception as error:
        return {"outcomes": dict.fromkeys(CHECKS, f"does not build: {shortly(error)}")}
    outcomes: dict[str, str] = {}
    refusal = refused_at_once(subject)
    for name, one in CHECKS.items():
        at_once = refusal is not None and name not in ("collect", "check")
        outcomes[name] = refusal if at_once and refusal is not None else outcome_of(one, subject)
    return {"outcomes": outcomes, "facts": facts_of(subject)}


def facts_of(subject: Subject) -> Any:
    """What a plain hook sees of each block on ids of shape (2, 3), and what the unsteered model does by itself."""
    try:
        ids = subject.two[:, :3]
        with recording([block.module for block in subject.blocks]) as calls:
            subject.forward(ids)
    except Exception as error:
        return f"none: {shortly(error)}"
    found: list[dict[str, Any]] = []
    for block in subject.blocks:
        name = type(block.module).__name__
        if block.module in calls:
            call = calls[block.module]
            shape = None if call.tensor is None else tuple(call.tensor.shape)
            found.append({"block": name, "output": call.kind, "tensor": shape, "calls": call.times})
        else:
            found.append({"block": name, "calls": 0})
    mask = pads_of(subject.two)
    padded = subject.two.where(mask == 1, torch.tensor(zoo.PAD))
    alone = {"generate": _by_itself(subject, subject.ids), "padding": _by_itself(subject, padded, mask)}
    return {"shown by hidden_states": subject.shown, "width": subject.width, "blocks": found, "unsteered": alone}


def _by_itself(subject: Subject, ids: Tensor, mask: Tensor | None = None) -> str:
    try:
        return "as the uncached loop" if unsteered(subject, ids, mask) else "otherwise than the uncached loop"
    except NotComparable as reason:
        return str(reason)
