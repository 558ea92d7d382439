"""Explanations by the embedding: the ranking against its formula, planted features, and files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from families import build

from steerfast.place import Origin
from steerfast.sae import explanation as module
from steerfast.sae.explanation import Explanations, explain, vocabulary_of
from steerfast.sae.model import SAE
from steerfast.sae.relations import relate


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
    output, norm = module.final_head("explain", model)
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
    rows = module._word_rows(tokenizer, ["antidisestablishment"], module.final_head("explain", model)[0])
    tokens = tokenizer(" antidisestablishment", add_special_tokens=False)["input_ids"]
    assert len(tokens) > 1  # a word of several tokens is their mean
    assert torch.allclose(rows[0], model.get_output_embeddings().weight[tokens].mean(0))
    sae = SAE(torch.randn(6, 576), torch.randn(6, 576), k=1)
    found = explain(sae, model, tokenizer, words, words=4)
    assert found.vocabulary == 4
    assert all(sorted(row) == ["Massachusetts", "antidisestablishment", "love", "war"] for row in found.words)
    for empty in ("", " "):
        with pytest.raises(ValueError, match="explain: word 2 of the vocabulary is empty; leave it out"):
            explain(sae, model, tokenizer, [*words[:2], empty, *words[2:]], words=1)
    with pytest.raises(ValueError, match="expected 1 to 4"):
        explain(sae, model, tokenizer, words, words=5)
    with pytest.raises(ValueError, match="ranking"):
        explain(sae, model, tokenizer, words, words=1, ranking="best")
    with pytest.raises(ValueError, match="width 12"):
        explain(SAE(torch.eye(12), torch.eye(12), k=1), model, tokenizer, words, words=1)


@pytest.mark.model
def test_a_model_in_16_bits_explains_as_the_same_numbers_in_32(smollm) -> None:
    """The decoder rows are not rounded on their way to the words, nor are their norms."""
    model, tokenizer = smollm
    narrow = copy.deepcopy(model).bfloat16()
    wide = copy.deepcopy(narrow).float()
    rows = torch.randn(60, 576)
    sae = SAE(rows, rows, k=1)
    a, b = (explain(sae, network, tokenizer, vocabulary_of(tokenizer, 500), words=5) for network in (narrow, wide))
    assert a.words == b.words
    assert torch.equal(a.scores, b.scores)
    a, b = (relate(sae, network, tokenizer, 5) for network in (narrow, wide))
    assert (a.raised, a.lowered) == (b.raised, b.lowered)
    assert torch.equal(a.raised_by, b.raised_by)
    assert torch.equal(a.lowered_by, b.lowered_by)
    assert next(narrow.model.norm.parameters()).dtype == torch.bfloat16  # the model is as it was


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox", "falcon", "bloom", "olmo2"])
def test_the_final_norm_is_found_by_structure(family: str) -> None:
    """norm and output embedding are right if they turn the last block's output into the logits."""
    model = build(family)
    output, norm = module.final_head("explain", model)
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
    families = Explanations((("publ*",), ("*ing", "[Capital]"), ()), torch.tensor([[1.0, 0], [2, 1], [0, 0]]), "use", 9)
    assert families.find("Publishing") == [1, 0]
    assert families.find("London") == []  # a shape says too little to be found by
    assert "publ*" in families.table()
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
    for content in (
        "",
        "[]",
        '{"schema": 9}',
        '{"schema": 1, "words": [["a"], []], "scores": [[1.0], []]}',
        '{"schema": 1, "words": [["a"]], "scores": []}',
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="is no file of explanations"):
            Explanations.load(tmp_path / "bad.json")
