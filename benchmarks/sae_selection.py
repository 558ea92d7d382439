"""Which features a Top-K encoder picks, ours and those of other libraries: the table of docs/sae.md.

    python benchmarks/sae_selection.py [SAE] [--text FILE] [--tokens 8000]

Rows of SmolLM2-135M-Instruct at the place of the SAE, in bfloat16, are encoded with its weights in bfloat16, and the k largest
pre-activations of the same numbers in float64 are what is right. A token counts as wrong where at least one other feature is
picked; as a tie where the k-th and the next value are equal in the numbers that the encoder compares. SAELens and sparsify take
part where they are installed, in both dtypes; b_dec is folded into b_enc for all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import steerfast as sf
from steerfast.models import demo as demo_model

HERE = Path(__file__).parent
Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows to (picked features as a mask, all pre-activations that it compares)."""
BLOCK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sae", nargs="?", type=Path, default=HERE / "sae" / "smollm2-135m-instruct-L7", help="a Top-K SAE"
    )
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: the sentences of quality_data)")
    parser.add_argument("--tokens", type=int, default=8000, help="at most (default: %(default)s)")
    args = parser.parse_args()
    sae = sf.SAE.load(args.sae, dtype=torch.bfloat16)
    x = rows(sae, own_sentences() if args.text is None else list(sf.sae.read_documents(args.text)), args.tokens)
    print(f"{len(x)} tokens, F = {sae.features}, k = {sae.k}, {sae.place}\n")
    print(
        "| encoder | tokens with another feature | tokens with a tie at the k-th place | largest error of a feature |"
    )
    print("|---|---|---|---|")
    for name, encoder in encoders(sae).items():
        wrong, tied, error = compared(sae, encoder, x)
        print(f"| {name} | {wrong:.2%} | {tied:.2%} | {error:.1e} |")


def own_sentences() -> list[str]:
    """Every text of quality_data, a sentence or a prompt each."""

    def walk(value: object) -> Iterator[str]:
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from [one] if isinstance(one, str) else walk(one)

    files = sorted((HERE / "quality_data").glob("*.json"))
    return [text for file in files for text in walk(json.loads(file.read_text())) if text.count(" ") > 2]


def rows(sae: sf.SAE, texts: list[str], tokens: int) -> Tensor:
    """Rows of the stream where the SAE belongs, (n, d) in bfloat16; the first token of a text, enormous, is left out."""
    model, tokenizer = demo_model.load()
    site, layer = sae.place
    found = []
    for start in range(0, len(texts), 32):
        acts = sf.collect(model, tokenizer, texts[start : start + 32], layers=[layer], position="all", site=site)[layer]
        found += [one[1:] for one in (acts if isinstance(acts, list) else [acts])]
        if sum(map(len, found)) >= tokens:
            break
    return torch.cat(found)[:tokens].bfloat16()


def compared(sae: sf.SAE, encoder: Encoder, x: Tensor) -> tuple[float, float, float]:
    """Share of tokens with another feature than the exact k, share with a tie, largest error of a feature that both pick."""
    wrong = tied = 0
    error = 0.0
    for part in x.split(BLOCK):
        exact = part.double() @ sae.w_enc.double().T + sae.b_enc.double()
        best = exact.topk(sae.k, dim=1)
        mask = torch.zeros_like(exact, dtype=torch.bool).scatter(1, best.indices, best.values > 0)
        picked, h = encoder(part)
        wrong += int((picked != mask).any(1).sum())
        top = h.topk(sae.k + 1, dim=1).values
        tied += int(((top[:, -1] == top[:, -2]) & (top[:, -1] > 0)).sum())
        error = max(error, float(torch.where(picked & mask, (h.double() - exact).abs(), 0).max()))
    return wrong / len(x), tied / len(x), error


def encoders(sae: sf.SAE) -> dict[str, Encoder]:
    """Every encoder that can run here, by the name of its row."""
    made: dict[str, Encoder] = {
        "steerfast, bfloat16": lambda x: _ours(sae, x),
        "plain `topk(relu(x @ W.T + b))`, bfloat16": lambda x: _plain(sae, x),
    }
    for dtype in (torch.bfloat16, torch.float32):
        short = str(dtype).removeprefix("torch.")
        if importlib.util.find_spec("sae_lens") is not None:
            made[f"SAELens, {short}"] = _saelens(sae, dtype)
        if importlib.util.find_spec("sparsify") is not None:
            made[f"sparsify, {short}"] = _sparsify(sae, dtype)
    return made


def _mask(indices: Tensor, values: Tensor, features: int) -> Tensor:
    mask = torch.zeros(len(indices), features, dtype=torch.bool)
    return mask.scatter_(1, indices.long(), values > 0) | mask


def _ours(sae: sf.SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    return sae.encode(x) > 0, x.float() @ sae.w_enc.float().T + sae.b_enc


def _plain(sae: sf.SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.relu(x @ sae.w_enc.T + sae.b_enc.bfloat16())
    best = h.topk(sae.k, dim=1)
    return _mask(best.indices, best.values, sae.features), h


def _saelens(sae: sf.SAE, dtype: torch.dtype) -> Encoder:
    theirs = sae.to_saelens().to(dtype=dtype)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        handle = theirs.hook_sae_acts_pre.register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.no_grad():
            features = theirs.encode(x)
        handle.remove()
        return features > 0, seen[0]

    return run


def _sparsify(sae: sf.SAE, dtype: torch.dtype) -> Encoder:
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    with contextlib.redirect_stdout(None):
        from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    # as a transcoder it subtracts no b_dec, which ours has folded in
    config = SparseCoderConfig(num_latents=sae.features, k=sae.k, transcode=True)
    theirs = SparseCoder(sae.d, config, dtype=dtype)
    theirs.encoder.weight.data.copy_(sae.w_enc)
    theirs.encoder.bias.data.copy_(sae.b_enc)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            found = theirs.encode(x.to(dtype))
        return _mask(found.top_indices, found.top_acts, sae.features), found.pre_acts

    return run


if __name__ == "__main__":
    main()
