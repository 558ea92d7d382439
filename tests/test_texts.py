"""Texts that bring special tokens along: what the tokenizer adds is there once, wherever texts are read."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCAB, build
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import steerfast as sf
from steerfast.cli import shared
from steerfast.cli.refusal import _xstest
from steerfast.directions.extract import _padding_token
from steerfast.directions.fits.lessons import read_lessons
from steerfast.models.texts import TextReader
from steerfast.sae.contexts import Contexts
from steerfast.sae.documents import read_documents
from steerfast.sae.explanation import _word_rows, vocabulary_of
from steerfast.tools.evaluate import Choice, _sequences, read_choices
from steerfast.tools.refusal_scores import RefusalScorer
from steerfast.tools.sweep_scores import Question, sequences_of

TEXTS = ["w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12"]
TEMPLATE = "<s> {% for m in messages %}{{ m['content'] }} w99 {% endfor %}{% if add_generation_prompt %}w98{% endif %}"


def words(single: str = "<s> $A") -> Any:
    """A fast tokenizer, one token per word (w3 is 3); `single` says what it adds: <s> is 1, </s> is 2."""
    names = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def begun(texts: Any) -> Any:
    return [f"<s> {text}" for text in texts]


@pytest.fixture
def model() -> Any:
    return build("llama")


def one_warning(run: Any, says: str) -> Any:
    """What `run` returns; it warned once, at the line of this file that called it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = run()
    assert [(str(w.message).partition(":")[0], w.filename) for w in seen] == [(says, __file__)]
    assert "begins with '<s>', which the tokenizer adds itself" in str(seen[0].message)
    return result


def test_collect_reads_the_token_once(model: Any) -> None:
    acts = one_warning(lambda: sf.collect(model, words(), begun(TEXTS), [0, 2], "all", progress=False), "collect")
    for layer in (0, 2):
        alone = []
        for text in TEXTS:
            ids = torch.tensor([[1, *(int(word[1:]) for word in text.split())]])
            with torch.no_grad():
                alone.append(model(ids, output_hidden_states=True).hidden_states[layer + 1][0])
        if layer == 0:  # the last entry of hidden_states is behind the final norm
            torch.testing.assert_close(acts[layer], torch.cat(alone), rtol=1e-4, atol=1e-4)
        assert len(acts[layer]) == sum(map(len, alone))
    assert torch.equal(acts[2], sf.collect(model, words(), TEXTS, [2], "all", progress=False)[2])


def test_a_chat_as_text_is_the_chat(model: Any) -> None:
    tokenizer = words()
    tokenizer.chat_template = TEMPLATE
    chats = [[{"role": "user", "content": text}] for text in TEXTS]
    written = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = sf.collect(model, tokenizer, chats, 1, "all", progress=False)
    acts = one_warning(lambda: sf.collect(model, tokenizer, written, 1, "all", progress=False), "collect")
    assert torch.equal(acts[1], right[1])


def test_packed_contexts_begin_with_one(model: Any) -> None:
    tokenizer, texts = words(), TEXTS * 3
    right = Contexts(tokenizer, texts, 8)[:]
    assert torch.equal(one_warning(lambda: Contexts(tokenizer, begun(texts), 8), "pack")[:], right)
    assert (right == 1).sum(1).tolist() == [1] * len(right)
    place = ("resid_post", 1)
    stream = one_warning(lambda: sf.sae.ActivationStream(model, tokenizer, begun(texts), place, context=8), "pack")
    assert torch.equal(stream.read(0), sf.sae.ActivationStream(model, tokenizer, texts, place, context=8).read(0))


def test_a_context_of_a_tokenizer_that_adds_none_begins_with_one() -> None:
    """SmolLM2 adds nothing, and its chats begin with the token that packing puts in front of a context."""
    contexts = Contexts(words("$A"), begun(["w3 w4 w5 w6 w7 w8 w9"] * 2), 8)[:]
    assert contexts.tolist() == [[1, 3, 4, 5, 6, 7, 8, 9], [1, 2, 1, 3, 4, 5, 6, 7]]
    again = Contexts(words("$A"), begun(["w3 w4 w5 w6 w7 w8"] * 2), 8)
    assert again[:].tolist() == [[1, 3, 4, 5, 6, 7, 8, 2]] * 2


def test_sweep_measures_the_same_and_warns_once(model: Any) -> None:
    grid, tokenizer = sf.tools.Grid(layers=(0, 2), strengths=(-0.5, 1.0)), words()
    sides = (["w3 w4", "w5"], ["w6 w7", "w8"])

    def swept(change: Any) -> Any:
        question = sf.tools.Question(change(["w9 w10"]), ("w11",), ("w12", "w13 w14"), change(["w15 w16 w17"]))
        return sf.sweep(model, tokenizer, tuple(map(change, sides)), question, grid, progress=False)

    assert list(one_warning(lambda: swept(begun), "sweep")) == list(swept(tuple))


def test_dose_measures_the_same_and_warns_once(model: Any) -> None:
    plan = sf.Plan({1: sf.Add(torch.ones(48), 0.01), ("resid_pre", 1): sf.Add(torch.ones(48), 0.01)})
    table = one_warning(lambda: sf.dose(model, words(), plan, begun(TEXTS), limit=9), "dose")
    assert list(table) == list(sf.dose(model, words(), plan, TEXTS, limit=9))


def test_prompts_of_the_commands(model: Any) -> None:
    inputs = one_warning(lambda: shared.prompt(words(), "<s> w3 w4", model), "prompt")
    assert {name: tensor.tolist() for name, tensor in inputs.items()} == {
        "input_ids": [[1, 3, 4]],
        "attention_mask": [[1, 1, 1]],
    }
    assert shared.prompt(words(), "<s> w3 w4", model, chat=True)["input_ids"].tolist() == [[1, 3, 4]]
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        shared.prompt(words("$A"), "", model)


@pytest.mark.parametrize(
    ("single", "text", "right"),
    [
        ("<s> $A", "w3 <s> w4", [1, 3, 1, 4]),
        ("<s> $A", "<s>", [1]),
        ("<s> $A", "", [1]),
        ("<s> $A", "<s> <s> w3", [1, 1, 3]),
        ("$A </s>", "w3 </s>", [3, 2]),
        ("<s> $A </s>", "<s> w3 </s>", [1, 3, 2]),
        ("<s> $A </s>", "</s> w3 <s>", [1, 2, 3, 1, 2]),
        ("<s> </s> $A", "<s> </s> w3", [1, 2, 3]),
        ("</s> $A </s>", "", [2, 2]),
        ("$A", "<s> w3 </s>", [1, 3, 2]),
        ("$A", "w3 w3", [3, 3]),
    ],
)
@pytest.mark.filterwarnings("ignore:collect")
def test_only_what_the_tokenizer_adds_is_left_out(single: str, text: str, right: list[int]) -> None:
    assert TextReader(words(single), "collect").ids(text) == right


def test_a_text_that_goes_on_has_no_end() -> None:
    reader = TextReader(words("<s> $A </s>"), "generate")
    assert reader.ids("w3 w4") == [1, 3, 4, 2]
    assert reader.beginning("w3 w4") == [1, 3, 4]


def llama_2() -> Any:
    """A tokenizer that puts ▁ in front of what it reads, as that of Llama 2 does."""
    names = ["<unk>", "<s>", "▁", *(f"▁{word}" for word in ("is", "it", "day", "yes", "no")), "no", "?", ":", "[/I]"]
    backend = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")
    made.chat_template = "<s> {{ messages[0]['content'] }}[/I]"
    return made


def test_a_continuation_has_the_tokens_of_running_text() -> None:
    """Also of a tokenizer that reads " yes" alone as "▁", "▁yes"."""
    tokenizer = llama_2()
    reader = TextReader(tokenizer, "sweep")
    prompt = "is it day?:"
    assert tokenizer.convert_ids_to_tokens(reader.bare(" yes")) == ["▁", "▁yes"]
    running = {answer: tuple(tokenizer(prompt + answer)["input_ids"]) for answer in (" yes", " no", "no")}
    assert len(running[" yes"]) == 7
    found = sequences_of(build("llama"), reader, Question((prompt,), (" yes",), (" no", "no"), ("it is",)))
    assert [(one.ids, one.start) for one in found[:3]] == [(ids, 6) for ids in running.values()]
    (lesson,) = read_lessons("fit_loreft", build("llama"), reader, [(prompt, " yes", "no")], contrast=True)
    assert [(*lesson.prompt, *lesson.wanted), (*lesson.prompt, *lesson.unwanted)] == [running[" yes"], running["no"]]
    chat = [{"role": "user", "content": "it is"}]
    for asked, text in ((prompt, prompt), (chat, tokenizer.apply_chat_template(chat, tokenize=False))):
        choice = Choice(asked, (" yes",), ("no",))
        whole = [
            tuple(tokenizer(text + answer, add_special_tokens=text == prompt)["input_ids"]) for answer in (" yes", "no")
        ]
        assert [one.ids for one in _sequences(build("llama"), reader, choice)] == whole
    assert reader.following("is it ", "no") == reader.bare("no")  # one token spans both: "▁no"


def test_what_begins_with_a_space_has_the_tokens_of_running_text() -> None:
    """Of a refusal's first word, whose first token is scored, and of the space that a shorter prompt is filled up with."""
    tokenizer = llama_2()
    ids = tokenizer.convert_tokens_to_ids
    scorer = RefusalScorer(build("llama"), tokenizer, (" yes", "no"), "is it {instruction}?:", 1)
    assert scorer.refusing == sorted([ids("▁yes"), ids("▁no")])
    assert _padding_token(TextReader(tokenizer, "prompt_difference")) == ids("▁")


def test_a_word_is_explained_by_its_tokens_in_running_text() -> None:
    tokenizer, rows = llama_2(), torch.randn(12, 5)
    found = _word_rows(tokenizer, ["yes", "day?"], rows)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("▁yes", "▁day", "?")]
    assert torch.allclose(found, torch.stack([rows[ids[0]], rows[ids[1:]].mean(0)]))
    tokenizer.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    assert tokenizer.decode([tokenizer.convert_tokens_to_ids("▁yes")]) == "yes"
    assert vocabulary_of(tokenizer) == ["day", "yes"]


@pytest.mark.model
def test_continuations_of_smollm2_are_as_they_read_alone() -> None:
    from steerfast.models import demo

    reader = TextReader(demo.load()[1], "sweep")
    chat = reader.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    for before in ("I think people are", "Q: Why?\nA:", "Is it day? (A) Yes (B) No\n\nAnswer:", chat, "so ", "don"):
        for text in (" kind", " (A)", "(A)", " No, it is not.", "Yes", "\n", "'t", " déjà vu", "  two", "<|im_end|>"):
            assert reader.following(before, text) == reader.bare(text)


@pytest.mark.model
def test_smollm2_adds_none_and_nothing_changes() -> None:
    from steerfast.models import demo

    tokenizer = demo.load()[1]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    reader = TextReader(tokenizer, "collect")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in (chat, "<|im_start|><|im_start|>user", "I hate you", " 1234<|im_end|>"):
            assert reader.ids(text) == tokenizer(text)["input_ids"] == reader.beginning(text)
            assert reader.own([text]) == [tokenizer(text)["input_ids"]]


BOM = b"\xef\xbb\xbf"


def test_text_files_are_read_by_one_rule(tmp_path: Path) -> None:
    """Without a byte order mark; a line ends with \\n or \\r\\n and nowhere else, and stands as it is."""
    file = tmp_path / "a.txt"
    for raw, lines in (
        (BOM + b"one\r\ntwo\r\n", ["one", "two"]),
        (b" kind\n good \n \n\nbad", [" kind", " good ", "bad"]),
        ("a\u2028b\nc\x85d\x0ce\rf\n".encode(), ["a\u2028b", "c\x85d\x0ce\rf"]),
    ):
        file.write_bytes(raw)
        assert shared.texts("--wanted", [f"@{file}"]) == lines
        assert next(iter(read_documents(file))).split("\n")[0] == lines[0].strip()
    file.write_bytes(BOM + b"one\r\nmore\r\n\r\ntwo\r\n")
    assert list(read_documents(file)) == ["one\nmore", "two"]
    (tmp_path / "a.jsonl").write_bytes(BOM + '"a\u2028b"\r\n{"text": "c"}'.encode())
    assert list(read_documents(tmp_path / "a.jsonl")) == ["a\u2028b", "c"]
    pair = b'[{"question": "Q", "answer_matching_behavior": "A", "answer_not_matching_behavior": "B"}]'
    (tmp_path / "a.json").write_bytes(BOM + pair)
    assert [one.matching for one in read_choices(tmp_path / "a.json")] == [(" A",)]
    (tmp_path / "a.csv").write_bytes(
        BOM + b'Question,Best Answer,Correct Answers,Incorrect Answers\r\n"two\r\nlines",a,b,c\r\n'
    )
    assert [one.prompt for one in read_choices(tmp_path / "a.csv")] == ["Q: two\nlines\nA:"]
    (tmp_path / "x.csv").write_bytes(BOM + b"prompt,label\r\nhow,safe\r\n")
    assert _xstest(tmp_path / "x.csv") == {"safe": ["how"]}
    (tmp_path / "x.csv").write_text("label,prompt\nsafe,how\nsafe\n")
    with pytest.raises(ValueError, match=r"--xstest: row 2 of .*x\.csv lacks its prompt or its label"):
        _xstest(tmp_path / "x.csv")


@pytest.mark.parametrize("raw", [b"caf\xe9\n", "love".encode("utf-16")])
def test_a_file_that_is_no_utf_8_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    for owner, read in {
        "--wanted": lambda file: shared.texts("--wanted", [f"@{file}"]),
        "--xstest": _xstest,
        "read_choices": read_choices,
        "documents": lambda file: list(read_documents(file)),
    }.items():
        with pytest.raises(ValueError, match=rf"^{owner}: .*a\.csv is not UTF-8 \(.*; save it as UTF-8$"):
            read(tmp_path / "a.csv")
        with pytest.raises(FileNotFoundError, match=rf"^{owner}: .*none\.csv does not exist; .* file"):
            read(tmp_path / "none.csv")


def test_a_processor_is_not_a_tokenizer(model: Any) -> None:
    class Processor(SimpleNamespace):
        def __call__(self, images: Any = None, text: Any = None) -> Any: ...

    with pytest.raises(TypeError, match="collect: tokenizer is a Processor; pass its"):
        sf.collect(model, Processor(image_processor=1, tokenizer=words()), TEXTS, 0, progress=False)
    with pytest.raises(TypeError, match="dose: tokenizer must be a tokenizer of transformers; got str"):
        sf.dose(model, "gpt2", sf.Plan({0: sf.Add(torch.ones(48))}), TEXTS)


def test_one_place_calls_tokenizers() -> None:
    package = Path(sf.__file__).parent
    own = {
        package / "models" / "texts.py",
        package / "cli" / "demo.py",  # its prompts are its own, and its tokenizer adds nothing
        package / "tools" / "check_vllm.py",  # an engine's tokenizer on words of its own
    }
    found = []
    for path in set(package.rglob("*.py")) - own:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if (
                name == "tokenizer"
                or name.endswith(".tokenizer")
                or ("tokenizer" in name and name.endswith(("encode", "encode_plus")))
            ):
                found.append(f"{path.name}: {name}")
    assert not found
