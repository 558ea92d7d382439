"""Explanations: the ranking against its formula, planted features, how features are used, files and the page."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
import torch
from families import build

from steerfast.place import Origin
from steerfast.sae import explanation as module
from steerfast.sae.cache import cache_activations
from steerfast.sae.explanation import Explanations, explain, observe, vocabulary_of
from steerfast.sae.model import SAE

TEXTS = [
    "The orchestra played a slow piece of music while the rain fell on the roof of the old theatre.",
    "Taxes pay for roads, schools and hospitals, and people argue about them in every election.",
    "A red fox crossed the frozen river at night and left a line of small prints in the snow.",
] * 4


@pytest.mark.parametrize("ranking", module.RANKINGS)
def test_the_ranking_is_its_formula(ranking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    features, meanings = torch.randn(37, 12), torch.randn(53, 12)
    z = features.double() @ meanings.double().T
    p_w, p_c = z.softmax(1), z.softmax(0)
    terms = p_w * (p_c * len(z)).log() if ranking == "information" else p_w * p_c.log()
    expected = terms.topk(7, dim=1)
    for elements in (1 << 24, 53 * 5, 1):  # all at once, five features at a time, one
        monkeypatch.setattr(module, "_ELEMENTS", elements)
        scores, places = module._rank(features, meanings, 7, ranking)
        assert torch.equal(places, expected.indices)
        assert torch.allclose(scores.double(), expected.values, rtol=1e-4, atol=1e-7)


@pytest.mark.model
def test_planted_words_are_found(smollm) -> None:
    """Decoder rows that point at one word each, half of their length noise, are explained by that word."""
    model, tokenizer = smollm
    words = vocabulary_of(tokenizer)
    assert {"music", "London", "because"} <= set(words)
    assert len(words) == 10_000
    chosen = [words[i] for i in torch.randperm(len(words))[:400].tolist()]
    output, norm = module._head(model)
    rows = module._word_rows(tokenizer, chosen, output) / norm.weight.detach()
    rows = torch.nn.functional.normalize(rows, dim=1)
    noise = torch.nn.functional.normalize(torch.randn_like(rows), dim=1)
    planted = rows + 0.5 * noise
    sae = SAE(planted, planted, k=8, origin=Origin(place=("resid_post", 7)))

    found = explain(sae, model, tokenizer)
    in_ten = sum(word in found[i] for i, word in enumerate(chosen)) / len(chosen)
    assert in_ten >= 0.99
    assert sum(i in found.find(word) for i, word in enumerate(chosen)) / len(chosen) >= 0.99

    released = explain(sae, model, tokenizer, ranking="released")
    assert sum(word in released[i] for i, word in enumerate(chosen)) / len(chosen) < 0.25  # why it is not the default
    assert float(released.scores.max()) <= 0


@pytest.mark.model
def test_a_vocabulary_of_ones_own(smollm) -> None:
    model, tokenizer = smollm
    words = ["antidisestablishment", "love", "love", "Massachusetts", "war"]
    rows = module._word_rows(tokenizer, ["antidisestablishment"], module._head(model)[0])
    tokens = tokenizer(" antidisestablishment", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 1  # a word of several tokens is their mean
    assert torch.allclose(rows[0], model.get_output_embeddings().weight[tokens].mean(0))
    sae = SAE(torch.randn(6, 576), torch.randn(6, 576), k=1)
    found = explain(sae, model, tokenizer, words, words=4)
    assert found.vocabulary == 4
    assert all(sorted(row) == ["Massachusetts", "antidisestablishment", "love", "war"] for row in found.words)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        explain(sae, model, tokenizer, words, words=5)
    with pytest.raises(ValueError, match="ranking"):
        explain(sae, model, tokenizer, words, words=1, ranking="best")
    with pytest.raises(ValueError, match="has width 12"):
        explain(SAE(torch.eye(12), torch.eye(12), k=1), model, tokenizer, words, words=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox", "falcon", "bloom", "olmo2"])
def test_the_final_norm_is_found_by_structure(family: str) -> None:
    """norm and output embedding are right if they turn the last block's output into the logits."""
    model = build(family)
    output, norm = module._head(model)
    ids = torch.tensor([[5, 9, 30, 77, 12]])
    found = module.find_layers(model)
    kept: list[torch.Tensor] = []
    handle = found.point(-1, "resid_post").attach(lambda x: kept.append(x.clone()))
    try:
        with torch.no_grad():
            logits = model(ids).logits
            expected = norm(kept[0]) @ output.T
    finally:
        handle.remove()
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def explanations() -> Explanations:
    words = (("love", "hate"), ("War", "peace"), ("music", "Love"), ("<b>", "a&b"))
    scores = torch.tensor([[0.5, 0.1], [0.9, 0.2], [0.4, 0.3], [0.05, 0.01]])
    return Explanations(words, scores, "information", 100, {"model": "Tiny", "place": ("resid_post", 7), "d": 4})


def test_find_and_table() -> None:
    found = explanations()
    assert found.find("love") == [0, 2]
    assert found.find(["LOVE", "war"]) == [1, 0, 2]
    assert found.find(["love", "hate"], least=2) == [0]
    assert found.find("absent") == []
    lines = found.table([2, 1]).splitlines()
    assert lines[1].split() == ["2", "0.4000", "music,", "Love"]
    assert [line.split()[0] for line in found.table().splitlines()[1:]] == ["1", "0", "2", "3"]
    with pytest.raises(ValueError, match="give at least one word"):
        found.find(" ")


def test_files(tmp_path: Path) -> None:
    found = explanations()
    again = Explanations.load(found.save(tmp_path / "words.json"))
    assert again.words == found.words
    assert torch.allclose(again.scores, found.scores)
    assert (again.ranking, again.vocabulary, again.about["model"]) == ("information", 100, "Tiny")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Explanations.load(tmp_path / "nothing.json")
    for content in ("", "[]", '{"schema": 9}', '{"schema": 1, "words": [["a"], []], "scores": [[1.0], []]}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="is no file of explanations"):
            Explanations.load(tmp_path / "bad.json")


@pytest.mark.model
def test_how_features_are_used(smollm, tmp_path: Path) -> None:
    """Densities, histogram and contexts against the dense features, on several shards."""
    model, tokenizer = smollm
    import steerfast.sae.cache as cache_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD_TOKENS", 128)
        cache = cache_activations(model, tokenizer, TEXTS, ("resid_post", 1), tmp_path / "cache", context=32)
    assert len(cache.counts) > 1
    w = torch.randn(40, 576)
    sae = SAE(w, w, k=4, origin=Origin(place=("resid_post", 1)))
    usage = observe(sae, cache, tokenizer, contexts=3, bins=8)

    dense = torch.cat([sae.encode(cache.read(shard).float()) for shard in range(len(cache.counts))])
    words = []
    for shard in range(len(cache.counts)):
        tokens, positions = cache.contexts(shard)
        words += [tokenizer.decode([token]) for token in tokens.flatten()[positions.long()].tolist()]
    assert torch.allclose(usage.density, (dense > 0).float().mean(0))
    assert torch.equal(usage.histogram.sum(1), (dense > 0).sum(0))
    for feature in range(40):
        best = dense[:, feature].topk(3)
        strongest = [value for value in best.values.tolist() if value > 0]
        assert [context[0] for context in usage.contexts[feature]] == pytest.approx(strongest, rel=1e-5)
        if strongest and len(set(strongest)) == len(strongest):
            assert usage.contexts[feature][0][2] == words[int(best.indices[0])]

    found = explain(sae, model, tokenizer, ["music", "rain", "taxes", "fox", "snow"], words=2)
    text = found.to_html(tmp_path / "page.html", usage, limit=10).read_text(encoding="utf-8")
    shown = [int(number) for number in re.findall(r'<article id="(\d+)"', text)]
    order = [f for f in found.scores[:, 0].argsort(descending=True).tolist() if usage.density[f] > 0]
    assert shown == order[:10]
    first = usage.contexts[shown[0]][0]
    assert f"<b>{html.escape(first[2])}</b>" in text
    assert text.count("<svg") == len(shown)
    assert "http://" not in text
    assert "https://" not in text


def test_the_page_escapes_what_it_shows(tmp_path: Path) -> None:
    text = explanations().to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<span class="word">&lt;b&gt;</span>' in text
    assert "a&amp;b" in text
    assert "<b>" not in text
    assert re.findall(r'<article id="(\d+)"', text) == ["1", "0", "2", "3"]
