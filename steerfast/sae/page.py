"""The HTML page of explanations: one file without scripts from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .explanation import Explanations, Usage

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8882;--mark:#f5b83d}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.4rem;margin-bottom:.2rem}p.about{opacity:.7;margin-top:0}
input{font:inherit;padding:.4rem .6rem;width:100%;max-width:24rem;border:1px solid var(--line);border-radius:.4rem}
article{border-top:1px solid var(--line);padding:1rem 0;display:grid;grid-template-columns:minmax(14rem,1fr) 2fr;gap:1.5rem}
h2{font-size:1rem;margin:0 0 .3rem}h2 small{font-weight:400;opacity:.7}
.word{display:inline-block;background:var(--soft);border-radius:.3rem;padding:0 .4rem;margin:.1rem .2rem .1rem 0}
svg{display:block;margin-top:.6rem}rect{fill:currentColor;opacity:.55}
.use{font-size:.85rem;opacity:.75}ol{margin:0;padding:0;list-style:none;font-size:.9rem}
li{padding:.15rem 0}li b{background:var(--mark);color:#000;border-radius:.2rem;font-weight:500;white-space:pre-wrap}
li i{font-style:normal;opacity:.6;font-variant-numeric:tabular-nums;display:inline-block;width:3.5rem}
@media(max-width:50rem){article{grid-template-columns:1fr}}
"""
_SEARCH = """
const box=document.querySelector("input"),all=[...document.querySelectorAll("article")];
box.addEventListener("input",()=>{const q=box.value.trim().toLowerCase();
for(const a of all)a.hidden=q!==""&&a.id!==q&&!a.dataset.words.includes(q)});
"""
_WIDTH, _HEIGHT = 240, 48


def page(found: Explanations, usage: Usage | None, limit: int) -> str:
    """The page as text; features in the order of their best score, unused ones left out where usage is known."""
    order = found.scores[:, 0].argsort(descending=True).tolist()
    if usage is not None:
        order = [feature for feature in order if usage.density[feature] > 0]
    order = order[:limit]
    place = found.about.get("place")
    about = [f"{len(found)} features, {len(order)} shown, ranked by {found.ranking}", str(found.about.get("model", ""))]
    about += [f"{place[0]} of layer {place[1]}"] if place else []
    about += [f"activations on {usage.tokens} tokens"] if usage else []
    articles = "\n".join(_article(found, usage, feature) for feature in order)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>SAE features</title><style>{_STYLE}</style>\n<h1>What the features of this SAE mean</h1>\n"
        f'<p class="about">{escape(" · ".join(part for part in about if part))}</p>\n'
        f'<input type="search" placeholder="word or number of a feature" aria-label="search">\n'
        f"{articles}\n<script>{_SEARCH}</script></html>\n"
    )


def _article(found: Explanations, usage: Usage | None, feature: int) -> str:
    words = found.words[feature]
    spans = "".join(f'<span class="word">{escape(word)}</span>' for word in words)
    score = f"{float(found.scores[feature, 0]):.3g} nats"
    left = f"<h2>Feature {feature} <small>{score}</small></h2>{spans}"
    right = ""
    if usage is not None:
        left += f'<p class="use">active on {float(usage.density[feature]):.3%} of tokens</p>{_bars(usage, feature)}'
        rows = (
            f"<li><i>{value:.3g}</i>{escape(before)}<b>{escape(token)}</b>{escape(after)}</li>"
            for value, before, token, after in usage.contexts[feature]
        )
        right = f"<ol>{''.join(rows)}</ol>"
    data = escape(" ".join(words).lower(), quote=True)
    return f'<article id="{feature}" data-words="{data}"><div>{left}</div><div>{right}</div></article>'


def _bars(usage: Usage, feature: int) -> str:
    """The histogram; the height of a bar is the square root of its count, so that rare strong activations are seen."""
    heights = usage.histogram[feature].double().sqrt()
    heights = (heights / heights.max().clamp(min=1)) * _HEIGHT
    step = _WIDTH / len(heights)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT - height:.1f}" width="{step - 1:.1f}" height="{height:.1f}"/>'
        for i, height in enumerate(heights.tolist())
        if height
    )
    title = f"activations from 0 to {float(usage.edges[-1]):.3g}"
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><title>{title}</title>{bars}</svg>'
