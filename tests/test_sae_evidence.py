"""What features do on a corpus: sums against the dense features, words by use, scores that can fail, documents, the judge."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from steerfast.place import Origin
from steerfast.sae import evidence as module
from steerfast.sae.counting import Firings, WordCounts
from steerfast.sae.detection import detect
from steerfast.sae.documents import read_documents
from steerfast.sae.evidence import Evidence, ObserveConfig, observe
from steerfast.sae.explanation import Explanations
from steerfast.sae.judge import Judge, judged_detection
from steerfast.sae.model import SAE
from steerfast.sae.relations import relate
from steerfast.sae.use import explain_use
from steerfast.sae.words import Lexicon, names_of, token_words

COLOURS = ("red", "green", "blue", "yellow")
THINGS = [
    "house",
    "river",
    "stone",
    "garden",
    "window",
    "street",
    "letter",
    "market",
    "engine",
    "forest",
    "valley",
    "bridge",
]


def documents(count: int = 240) -> list[str]:
    """Short documents: things, and in every third sentence a colour."""
    draw = np.random.default_rng(3)
    sentences = [
        f"The {draw.choice(THINGS)} stood near a {draw.choice(THINGS)} and we saw "
        + (f"a {draw.choice(COLOURS)} one." if draw.random() < 1 / 3 else "another one.")
        for _ in range(count * 4)
    ]
    return [" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4)]


def colour_sae(model: torch.nn.Module, tokenizer: object) -> SAE:
    """A feature per colour, which fires on its token alone; one that always fires; one that never does."""
    rows = model.get_input_embeddings().weight.detach()
    ids = [tokenizer(f" {colour}")["input_ids"][0] for colour in COLOURS]
    own = torch.linalg.solve(rows.T @ rows / len(rows), rows[ids].T).T  # whitened: other tokens are far away
    w = torch.cat([own, torch.zeros(2, rows.shape[1])])
    b = torch.cat([-0.6 * (own * rows[ids]).sum(1), torch.tensor([1.0, -1.0])])
    return SAE(w, w, b_enc=b, origin=Origin(place=("resid_pre", 0), model=type(model).__name__))


@pytest.fixture(scope="module")
def seen(smollm) -> Evidence:
    model, tokenizer = smollm
    return observe(colour_sae(model, tokenizer), model, tokenizer, documents(), ObserveConfig(passage=12, top=3))


@pytest.mark.model
def test_the_sums_are_those_of_the_dense_features(smollm) -> None:
    """Densities, histogram, word counts, passages and their shading against sae.encode, token by token."""
    model, tokenizer = smollm
    w = torch.randn(40, 576)
    sae = SAE(w, w, k=4, origin=Origin(place=("resid_post", 1)))
    texts = documents(30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FORWARD_TOKENS", 200)
        patch.setattr(module, "_WINDOW", 7)
        config = ObserveConfig(context=40, passage=8, top=2, before=3, after=2)
        evidence = observe(sae, model, tokenizer, texts, config)
    dense, words, held_out = [], [], []
    training = 0
    contexts = list(module._contexts(module.TextReader.of(tokenizer, "test"), texts, config))
    assert "".join(context.text.text for context in contexts if context.document == 0) == texts[0]
    for context in contexts:
        with torch.no_grad():
            hidden = model(torch.tensor([context.ids]), output_hidden_states=True).hidden_states[2][0]
        dense.append(sae.encode(hidden)[1:])
        words += [word.casefold() for word in context.words[1:]]
        held_out += [context.held_out] * (len(context.ids) - 1)
        training += not context.held_out
    full, side = torch.cat(dense), torch.tensor(held_out)
    whole = [(rows, context.held_out) for rows, context in zip(dense, contexts, strict=True)]
    assert 0 < training < len(contexts)
    assert evidence.tokens == len(full)
    assert sum(evidence.documents) == 30
    assert torch.equal(evidence.fired, (full > 0).sum(0))
    assert torch.equal(evidence.histogram.sum(1), evidence.fired)
    value = full[:, 5][full[:, 5] > 0]
    cells = torch.bucketize(value, evidence.edges, right=True) - 1
    assert torch.equal(evidence.histogram[5], torch.bincount(cells, minlength=evidence.histogram.shape[1]))
    for feature, word, count in evidence.word_counts.T[::37].tolist():
        same = torch.tensor([evidence.words[word] == own for own in _as_written(contexts)])
        assert count == int(((full[:, feature] > 0) & same & ~side).sum())
    assert evidence.word_counts[2].sum() == int((full[~side] > 0).sum())
    for feature in range(40):
        best = full[~side, feature].max()
        passages = evidence.passages(feature)
        assert bool(passages) == bool(best > 0)
        if not passages:
            continue
        assert passages[0].activations[passages[0].peak] == pytest.approx(float(best), rel=1e-4)
        assert [max(passage.activations) for passage in passages] == sorted(
            (max(passage.activations) for passage in passages), reverse=True
        )
        own = next(rows for rows, held in whole if not held and rows[:, feature].max() == best)
        first = (
            int(own[:, feature].argmax()) + 1 - passages[0].peak
        )  # counted with the beginning of text, which is dark
        shaded = [0.0, *own[:, feature].tolist()][first : first + len(passages[0].tokens)]
        assert passages[0].activations == pytest.approx(shaded, rel=1e-3, abs=1e-4)
        assert any(str(passage) in text for text in texts for passage in passages[:1])


def _as_written(contexts: list) -> list[str]:
    return [word for context in contexts for word in context.words[1:]]


@pytest.mark.model
def test_words_by_use_are_found_and_foretell(seen: Evidence, smollm) -> None:
    found = explain_use(seen, 3)
    assert [found[i][:1] for i in range(4)] == [(colour,) for colour in COLOURS]
    assert found[5] == ()
    assert float(found.scores[5].abs().sum()) == 0
    assert seen.density[4] == 1
    score = detect(found, seen, least=10)
    assert score.scored.tolist() == [True] * 4 + [False] * 2  # always and never: nothing to tell
    assert float(score.accuracy[:4].min()) > 0.98
    assert float(score.intruder[:4].min()) > 0.95
    assert torch.equal(score.firings, torch.from_numpy(np.diff(seen.held_out.bounds)))
    wrong = dataclasses.replace(found, words=(("green",), ("red",), ("house*",), (), (), ()))
    score = detect(wrong, seen, least=10)
    assert float(score.accuracy[:4].max()) < 0.6  # words that are false, or none, foretell nothing
    assert float(score.intruder[:4].max()) < 0.35
    assert "chance 0.5" in str(score)


@pytest.mark.model
def test_the_scores_by_use_are_their_formula(seen: Evidence) -> None:
    found = explain_use(seen, 2, kinds=("word",))
    names = np.array([word.casefold() for word in seen.words])
    feature, word, count = seen.word_counts
    for number in range(5):
        of_word = np.bincount(word[feature == number], count[feature == number], len(names))
        terms = {}
        for name in set(names[1:]):
            share, half = of_word[names == name].sum() / of_word.sum(), 0.5 / of_word.sum()
            if share > 3 * half:  # fired twice at least
                of_all = seen.word_tokens[names == name].sum() / seen.word_tokens.sum()
                terms[name] = share * np.log((share - half) / of_all)
        best = sorted((score for score in terms.values() if score > 0), reverse=True)[:2]
        assert found.scores[number].tolist() == pytest.approx(best + [0.0] * (2 - len(best)), rel=1e-5)
        assert [terms[name.casefold()] for name in found[number]] == pytest.approx(best, rel=1e-5)


@pytest.mark.model
def test_firings_on_no_word_count_as_firings(smollm) -> None:
    """A feature of line ends that fires now and then on a word is not explained by that word."""
    model, tokenizer = smollm
    rows = model.get_input_embeddings().weight.detach()
    ids = [tokenizer(text)["input_ids"][0] for text in ("\n\n", " red")]
    own = torch.linalg.solve(rows.T @ rows / len(rows), rows[ids].T).T
    own /= (own * rows[ids]).sum(1, keepdim=True)  # 1 on its token, and far less on others
    w, b = torch.stack([own[0] + own[1], 0 * own[0]]), torch.tensor([-0.6, 1.0])
    sae = SAE(w, w, b_enc=b, origin=Origin(place=("resid_pre", 0)))
    texts = [text.replace(". ", ".\n\n") for text in documents(60)]
    evidence = observe(sae, model, tokenizer, texts, ObserveConfig(passage=12, top=3))
    feature, word, count = evidence.word_counts
    ends, all_fired = (count[(feature == 0) & (word < most)].sum() for most in (1, 1 << 18))
    assert 0.5 < ends / all_fired < 1
    found = explain_use(evidence, 1)
    red = list(evidence.words).index("red")
    share, of_all = 1 - ends / all_fired, evidence.word_tokens[red] / evidence.word_tokens.sum()
    assert found[0] == ("red",)
    assert float(found.scores[0, 0]) == pytest.approx(share * np.log(share / of_all), rel=0.05)
    assert found[1] == ()  # what always fires says no word more than another


@pytest.mark.model
def test_the_sides_are_disjoint_and_do_not_depend_on_the_order(smollm) -> None:
    model, tokenizer = smollm
    sae, config = colour_sae(model, tokenizer), ObserveConfig(passage=12, sample=50)
    texts = documents(60)
    forward = observe(sae, model, tokenizer, texts + texts[:20], config)
    back = observe(sae, model, tokenizer, (texts + texts[:20])[::-1], config)
    assert forward.documents == back.documents
    reader = module.TextReader.of(tokenizer, "test")
    sides = {texts[context.document]: context.held_out for context in module._contexts(reader, texts, config)}
    for side, sample in ((False, forward.training), (True, forward.held_out)):
        own = [text for text in texts if sides[text] == side]
        assert all(any(passage in text for text in own) for passage in sample.texts)
    assert sorted(forward.held_out.texts) == sorted(back.held_out.texts)  # the sample is drawn by the texts alone
    assert forward.training.passages == 50
    w = torch.randn(200, 576)
    many = SAE(w, w, threshold=torch.full((200,), 4.0), origin=Origin(place=("resid_pre", 0)))
    one, other = (explain_use(observe(many, model, tokenizer, order, config), 5) for order in (texts, texts[::-1]))
    assert one.words == other.words  # words that tell as much as each other stand by the alphabet
    assert max(map(len, one.words)) == 5
    assert all(any(str(passage) in text for text in texts if not sides[text]) for passage in forward.passages(0))


def test_counts_within_a_bound() -> None:
    """What is forgotten are the rarest pairs; the commonest are counted exactly."""
    draw = np.random.default_rng(0)
    counts = WordCounts(pairs=40)
    words = counts.number([f"w{i}" for i in draw.zipf(1.5, 4000).clip(max=60)])
    features = draw.integers(0, 3, 4000)
    for start in range(0, 4000, 500):
        part = slice(start, start + 500)
        fired = Firings(np.arange(500), features[part], np.ones(500))
        counts.add(fired, words[part], np.ones(500, dtype=bool))
    feature, word, count = counts.done()
    assert (word > 0).sum() <= 40
    assert counts.forgotten > 0
    assert [count[feature == i].sum() for i in range(3)] == np.bincount(features).tolist()  # nothing is lost
    for often in np.bincount(words).argsort()[-5:]:
        expected = np.bincount(features[words == often], minlength=3)
        assert [count[(feature == i) & (word == often)].sum() for i in range(3)] == expected.tolist()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("I don't know.", ["I", "don't", "know", "."]),
        ("x_1 = π²", ["x", "_", "1", "=", "π²"]),
        ("東京は", ["東京は"]),
        ("", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    spans = [(i, i + 1) for i in range(len(text))]
    found = token_words(text, spans)
    assert list(dict.fromkeys(word for word in found if word)) == words
    assert [bool(word) for word in found] == [not letter.isspace() for letter in text]


def test_families_of_words() -> None:
    assert names_of("1984") == ["1984", "[4 digits]", "[number]"]
    assert "[CAPITALS]" in names_of("NASA")
    assert names_of("ran") == ["ran"]
    lexicon = Lexicon.of(["", "Walking", "walked", "talking"])
    members = {name: sorted(lexicon.words_of(i).tolist()) for i, name in enumerate(lexicon.names)}
    assert members["*ing"] == [1, 3]
    assert members["walk*"] == [1, 2]
    assert members["walking"] == [1]


@pytest.mark.model
def test_a_tokenizer_may_have_more_tokens_than_the_model(smollm) -> None:
    """Such as that of Gemma 3, whose last one stands for an image: what occurs counts."""
    model, tokenizer = smollm
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<extra>"], special_tokens=True)
    assert len(longer) > model.get_input_embeddings().weight.shape[0]
    sae, config = colour_sae(model, tokenizer), ObserveConfig(passage=12)
    one, other = (observe(sae, model, which, documents(5), config) for which in (tokenizer, longer))
    assert torch.equal(one.fired, other.fired)
    with pytest.raises(
        ValueError, match=r"^observe: document 5 has the token id 49152, beyond the vocabulary of Llama"
    ):
        observe(sae, model, longer, [*documents(5), "A red <extra> one."], config)


@pytest.mark.model
def test_bad_input(smollm, seen: Evidence) -> None:
    model, tokenizer = smollm
    sae = colour_sae(model, tokenizer)
    with pytest.raises(TypeError, match="put it into a list"):
        observe(sae, model, tokenizer, "one text")
    with pytest.raises(TypeError, match="document 1 is int"):
        observe(sae, model, tokenizer, ["A text.", 7])
    with pytest.raises(ValueError, match="no token that counts"):
        observe(sae, model, tokenizer, [""])
    with pytest.raises(ValueError, match="does not know the place that it reads"):
        observe(dataclasses.replace(sae, origin=Origin()), model, tokenizer, documents(1))
    other = dataclasses.replace(sae, origin=Origin(place=("resid_pre", 0), model="GPT2LMHeadModel"))
    with pytest.warns(UserWarning, match="comes from activations of GPT2LMHeadModel; this model is a LlamaForCausalLM"):
        observe(other, model, tokenizer, documents(2))
    with pytest.raises(ValueError, match="passage is 200"):
        ObserveConfig(passage=200)
    few = observe(sae, model, tokenizer, documents(12), ObserveConfig(passage=12))
    with pytest.raises(ValueError, match="held-out passages no feature fires in 20 and not in 20; read more"):
        detect(explain_use(few), few)
    with pytest.raises(ValueError, match="3 features are explained, 6 were observed"):
        detect(Explanations((("a",),) * 3, torch.ones(3, 1), "use", 1), few)
    with pytest.raises(ValueError, match="count is 6; expected 1 to 5"):
        relate(sae, model, tokenizer, 6)
    weight = model.get_input_embeddings().weight
    kept = weight[tokenizer(" river")["input_ids"][0]].clone()
    with torch.no_grad():
        weight[tokenizer(" river")["input_ids"][0]] = torch.nan
    try:
        with pytest.raises(ValueError, match=r"activations of document \d+ are NaN or Inf"):
            observe(sae, model, tokenizer, documents(10))
    finally:
        with torch.no_grad():
            weight[tokenizer(" river")["input_ids"][0]] = kept


@pytest.mark.model
def test_relations(smollm) -> None:
    model, tokenizer = smollm
    music, rain = (tokenizer(f" {word}")["input_ids"][0] for word in ("music", "rain"))
    rows = model.get_output_embeddings().weight.detach()[[music, rain, music]] / model.model.norm.weight.detach()
    rows[2] += 0.1 * rows[1]
    found = relate(SAE(rows, -rows, k=1), model, tokenizer, count=2)
    z = model.model.norm(rows) @ model.get_output_embeddings().weight.detach().T
    assert [tokenizer.decode([token]) for token in (-z).argmin(1).tolist()] == [row[0] for row in found.lowered]
    assert found.lowered[0][0] == " music"
    assert found.neighbours[0].tolist()[0] == 2
    cosine = torch.nn.functional.cosine_similarity(rows[0], rows[2], dim=0)
    assert float(found.cosines[0, 0]) == pytest.approx(float(cosine), abs=1e-5)
    assert float(found.raised_by.min()) > float(found.lowered_by.max())


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\nStill one.\n\n \nTwo.\n", encoding="utf-8")
    lines = [json.dumps({"text": "Three.", "id": 1}), "", json.dumps("Four.")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "c.csv").write_text("not read")
    assert list(read_documents(tmp_path)) == ["One.\nStill one.", "Two.", "Three.", "Four."]
    assert list(read_documents(tmp_path / "a.txt", title="^Two")) == ["One.\nStill one.", "Two."]
    with pytest.raises(ValueError, match=r"line 1 of .* has no text under 'body'; its keys are 'text', 'id'"):
        list(read_documents(tmp_path / "b.jsonl", key="body"))
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, message in {"bad.jsonl": "is no JSON", "latin.txt": "is not UTF-8", "empty.txt": "holds no text"}.items():
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_documents(tmp_path / "nothing.txt")
    with pytest.raises(ValueError, match="no regular expression"):
        read_documents(tmp_path / "a.txt", title="(")


def test_documents_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ImportError, match="needs pyarrow"):
            list(read_documents(file))
    with pytest.raises(ValueError, match="is no Parquet file"):
        list(read_documents(file))
    parquet.write_table(pyarrow.table({"text": ["One.", None, "Two."]}), file)
    assert list(read_documents(file)) == ["One.", "Two."]
    with pytest.raises(ValueError, match="has no column 'body', but text"):
        list(read_documents(file, key="body"))


class _Answering(BaseHTTPRequestHandler):
    """An endpoint that reads the explanation and the texts in what it is asked, and finds the word by looking."""

    asked: list[dict] = []  # noqa: RUF012

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        if body["model"] == "broken":
            self.send_error(503)
            return
        text = body["messages"][0]["content"]
        word = next(colour for colour in COLOURS if f": {colour}" in text.split("\n\n")[0])
        numbers = [line.split(".")[0] for line in text.splitlines() if line[:1].isdigit() and word in line]
        content = json.dumps({"choices": [{"message": {"content": ", ".join(numbers) or "none"}}]})
        self.send_response(200)
        self.end_headers()
        others = {"odd": "{}", "thinking": '{"choices": [{"message": {"content": null}}]}'}
        others["chatty"] = '{"choices": [{"message": {"content": "Hard to say."}}]}'
        self.wfile.write((content if body["model"] == "good" else others[body["model"]]).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), _Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.model
def test_a_judge(seen: Evidence, endpoint: str) -> None:
    found = explain_use(seen, 3)
    judge = Judge(endpoint, "good", key="secret")
    assert "secret" not in repr(judge)
    assert judged_detection(judge, found, seen, [0, 2]) == {0: 1.0, 2: 1.0}
    asked = _Answering.asked[-1]
    assert (asked["path"], asked["key"], asked["temperature"]) == ("/v1/chat/completions", "Bearer secret", 0)
    wrong = dataclasses.replace(found, words=(("green",), *found.words[1:]))
    assert judged_detection(judge, wrong, seen, [0])[0] < 0.8
    with pytest.raises(ValueError, match="feature 5 fires in 0 held-out passages"):
        judged_detection(judge, found, seen, [5])
    with pytest.raises(ConnectionError, match="answered 503"):
        judged_detection(Judge(endpoint, "broken"), found, seen, [0])
    with pytest.raises(ValueError, match="sent no chat completion"):
        judged_detection(Judge(endpoint, "odd"), found, seen, [0])
    with pytest.raises(ValueError, match="thinking answered nothing in 64 tokens"):
        judged_detection(Judge(endpoint, "thinking"), found, seen, [0])
    with pytest.raises(ValueError, match=r"chatty neither named texts nor said none for feature 0: 'Hard to say.'"):
        judged_detection(Judge(endpoint, "chatty"), found, seen, [0])
    with pytest.raises(ValueError, match="tokens"):
        Judge(endpoint, "good", tokens=0)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        Judge("http://127.0.0.1:9/v1", "good", timeout=2).ask("Hello")
    with pytest.raises(ValueError, match="begins with http"):
        Judge("file:///etc/passwd", "good")


@pytest.mark.model
def test_tokens_at_most(smollm) -> None:
    tokenizer = smollm[1]
    texts = documents(20)
    sizes = [len(tokenizer(text)["input_ids"]) for text in texts]
    reader = module.TextReader.of(tokenizer, "test")
    read = list(module._contexts(reader, texts, ObserveConfig(context=40, passage=8, tokens=sum(sizes[:3]) + 5)))
    assert sum(len(context.ids) - 1 for context in read) == sum(sizes[:3]) + 5  # one of them is the beginning of text
    assert [context.document for context in read][-1] == 3
