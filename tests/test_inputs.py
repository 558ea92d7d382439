"""Ready inputs of a processor, and numbers from NumPy and PyTorch, wherever `collect` and its kin take them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import IMAGE_TOKEN, build, randomise, token_ids
from test_texts import words
from transformers import LlamaConfig

import steerfast as sf
from steerfast.place import Origin
from steerfast.plan import ModelCard
from steerfast.sae.contexts import Contexts

TEXTS = ["w3 w4 w5 w6 w7", "w8 w9", "w10 w11 w12"]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def image_inputs(batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of 4 image tokens and some text, the first padded on the left and the second on the right."""
    ids = torch.randint(3, 90, (batch, 9), generator=torch.Generator().manual_seed(seed))
    ids[:, 3:7] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if batch > 1:
        mask[1, 8:] = 0
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def shown(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return getattr(out, "language_model_outputs", out).hidden_states


@cache
def blip() -> Any:
    """A model that runs on no text alone: its queries stand in the place of the image tokens."""
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    queries = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, vocab_size=101, pad_token_id=0
    )
    config = transformers.Blip2Config(
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        qformer_config={**queries, "encoder_hidden_size": 32, "vocab_size": 101},
        text_config=text.to_dict(), num_query_tokens=4, image_token_index=IMAGE_TOKEN,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration._from_config(config)
    randomise(model)
    return model.float().eval()


@pytest.mark.parametrize("name", ["llava", "gemma3_vl", "blip2"])
def test_inputs_give_what_a_plain_forward_shows(name: str) -> None:
    model = blip() if name == "blip2" else build(name)
    given = [image_inputs(), image_inputs(1, seed=1)]
    if name == "gemma3_vl":
        given = [{**one, "token_type_ids": (one["input_ids"] == IMAGE_TOKEN).long()} for one in given]
    states = [[state for one in given for state in shown(model, one)[layer + 1]] for layer in (0, 1)]
    real = [row.bool() for one in given for row in one["attention_mask"]]
    picks: Any = {
        "all": lambda h: h,
        "last": lambda h: h[-1:],
        "mean": lambda h: h.mean(0, keepdim=True),
        0: lambda h: h[:1],
        -2: lambda h: h[-2:-1],
    }
    for position, pick in picks.items():
        acts = sf.collect(model, inputs=given, layers=[0, 1], position=position, progress=False)
        for layer in (0, 1):
            close(acts[layer], torch.cat([pick(h[mask]) for h, mask in zip(states[layer], real, strict=True)]))
        rows = [int(mask.sum()) if position == "all" else 1 for mask in real]
        assert acts.text_index.tolist() == [i for i, count in enumerate(rows) for _ in range(count)]


def test_what_a_processor_makes_goes_in_as_it_is() -> None:
    image = pytest.importorskip("PIL.Image")
    tokenizer = words()
    tokenizer.add_tokens([f"w{IMAGE_TOKEN}"], special_tokens=True)
    tokenizer.pad_token = "</s>"
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**sizes), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token=f"w{IMAGE_TOKEN}", num_additional_image_tokens=1,
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    ready = processor(images=[image.fromarray(pixels)], text=[f"w{IMAGE_TOKEN} w3 w4"], return_tensors="pt")
    model = build("llava")
    acts = sf.collect(model, None, None, 1, "all", inputs=[ready, dict(ready)], progress=False)
    state = shown(model, ready)[2][0]
    assert len(state) == 1 + 4 + 2
    close(acts[1], torch.cat([state, state]))
    without = shown(model, {name: value for name, value in ready.items() if name != "pixel_values"})[2][0]
    assert (without - state).abs().max() > 0.1  # the image counts
    with pytest.raises(TypeError, match="collect: tokenizer is a LlavaProcessor; pass its"):
        sf.collect(model, processor, TEXTS, 1, progress=False)


def test_ids_alone_and_embeddings_are_inputs_too() -> None:
    model, ids = build("llama"), torch.tensor([[3, 4, 5, 6]])
    state = shown(model, {"input_ids": ids})[1][0]
    for one in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}):
        close(sf.collect(model, inputs=(one for _ in range(2)), layers=0, progress=False)[0], state[[-1, -1]])


def test_a_steered_model_and_every_site() -> None:
    model, given = build("llava"), [image_inputs()]
    v = torch.randn(48)
    for site in ("resid_pre", "attn_out", "mlp_out"):
        plain = sf.collect(model, inputs=given, layers=1, position="all", site=site, progress=False)
        with sf.steer(model, {(site, 1): sf.Add(v)}):
            steered = sf.collect(model, inputs=given, layers=1, position="all", site=site, progress=False)
        close(steered[1], plain[1] + v)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": TEXTS, "tokenizer": words()}, ValueError, "^collect: got texts and inputs; give one of them"),
        ({"inputs": None}, TypeError, "^collect: give tokenizer and texts, or inputs"),
        ({"inputs": None, "texts": TEXTS}, TypeError, "^collect: tokenizer is missing; texts are read with it"),
        ({"inputs": image_inputs()}, TypeError, "inputs must be several dicts, got one dict; put it into a list"),
        ({"inputs": 3}, TypeError, "inputs must be several dicts, in a list or another iterable, got int"),
        ({"inputs": []}, ValueError, "inputs is empty"),
        ({"inputs": ["w3"]}, TypeError, "inputs 0 must be a dict of the forward's arguments, got str"),
        ({"inputs": [{"input_ids": [[3, 4]]}]}, TypeError, "input_ids must be a tensor .* got list; call the processor with"),
        ({"inputs": [{"input_ids": torch.tensor([3])}]}, TypeError, r"\(rows, tokens\), got shape \(1,\)"),
        ({"inputs": [{"pixel_values": torch.ones(1)}]}, TypeError, "inputs 0: input_ids must be a tensor"),
        ({"inputs": [image_inputs() | {"attention_mask": torch.ones(2, 1, 9, 9)}]}, TypeError, r"\(2, 9\) as input_ids, got"),
        ({"inputs": [image_inputs() | {"attention_mask": torch.zeros(2, 9)}]}, ValueError, "inputs 0: row 0 has no tokens"),
        ({"position": 7}, ValueError, "position 7 is out of range for row 0 of inputs 0, which has 7 tokens, -7 to 6"),
        ({"inputs": [{"input_ids": torch.full((1, 129), 5)}]}, ValueError, "inputs 0 has 129 tokens; this model reads at most"),
        ({"inputs": [{"input_ids": torch.ones(1, 3)}]}, TypeError, r"input_ids has dtype torch\.float32; expected int64"),
        ({"inputs": [image_inputs(), {"input_ids": torch.tensor([[3, 101]])}]}, ValueError, "inputs 1: .* the id 101, beyond"),
        ({"inputs": [{"input_ids": torch.tensor([[-3, 5]])}]}, ValueError, "inputs 0: input_ids has the id -3, beyond the model"),
        ({"layers": None}, TypeError, "^collect: layers is missing; name one or several, 0 to 2"),
    ],
)  # fmt: skip
def test_wrong_use(change: Any, error: Any, message: Any) -> None:
    arguments = {"inputs": [image_inputs()], "layers": 0, "progress": False} | change
    with pytest.raises(error, match=message):
        sf.collect(build("llava"), **arguments)


def test_ready_dicts_as_texts_and_models_that_demand_an_image() -> None:
    with pytest.raises(TypeError, match=r"text 0 is a dict with input_ids; pass ready dicts as inputs=\["):
        sf.collect(build("llava"), words(), [image_inputs()], 0, progress=False)
    with pytest.raises(
        ValueError, match=r"^collect: Blip2.* does not run on token ids alone .* with pixel_values, as inputs=\["
    ):
        sf.collect(blip(), words(), TEXTS, 0, progress=False)
    without = {name: value for name, value in image_inputs().items() if name != "pixel_values"}
    with pytest.raises(
        ValueError,
        match=r"^collect: Blip2.* does not run on inputs 0 \(input_ids, attention_mask\) .* makes, with pixel_values, as",
    ):
        sf.collect(blip(), inputs=[without], layers=0, progress=False)


class Letters:
    """A tokenizer: one token per letter, beyond the model's vocabulary for é, and one special token in front."""

    all_special_ids = (1,)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) - 29 for letter in text]}


LONG = "x" * 140
READERS: dict[str, Any] = {
    "collect": lambda model, text: sf.collect(model, Letters(), [text], 1, progress=False),
    "dose": lambda model, text: sf.dose(model, Letters(), sf.Plan({1: sf.Add(torch.ones(48))}), [text]),
    "evaluate_choices": lambda model, text: sf.tools.evaluate_choices(
        model, Letters(), [sf.tools.Choice(text, (" y",), (" n",))]
    ),
    "evaluate_text": lambda model, text: sf.tools.evaluate_text(model, Letters(), [text], tokens=3),
    "sweep": lambda model, text: sf.sweep(
        model,
        Letters(),
        (["ab"], ["ef"]),
        sf.tools.Question(("a",), (" b",), (text,)),
        sf.tools.Grid((1,)),
        progress=False,
    ),
    "sweep ": lambda model, text: sf.sweep(
        model, Letters(), (["a"], ["e"]), sf.tools.Question(("a",), (" b",), (" c",), (text,)), sf.tools.Grid((1,))
    ),
    "fit_loreft": lambda model, text: sf.fit_loreft(model, Letters(), [("b", " c"), (text, " a")], 1),
    "fit_vector": lambda model, text: sf.fit_vector(model, Letters(), [("b", text)], 1),
    "fit_velocity": lambda model, text: sf.fit_velocity(
        model, Letters(), [("a", " b", text)], 1, neutral=["some text"] * 2
    ),
    "fit_velocity ": lambda model, text: sf.fit_velocity(
        model, Letters(), [("a", " b", " c")], 1, neutral=["some text", text]
    ),
    "fit_lineas": lambda model, text: sf.fit_lineas(model, Letters(), ["ab", "cd"], ["ef", text], [1]),
    "select_refusal": lambda model, text: sf.tools.select_refusal(
        model, Letters(), [text] * 9, ["ab"] * 9, template="{instruction}:", progress=False
    ),
}
"""By who reads a text, for the messages."""


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("owner", READERS)
def test_texts_beyond_a_models_context_or_vocabulary_are_refused(owner: str, kind: str) -> None:
    name = owner.strip()
    with pytest.raises(ValueError, match=rf"^{name}: .*has 14\d tokens; this model reads at most 128; shorten it"):
        READERS[owner](build(kind), LONG)
    with pytest.raises(ValueError, match=rf"^{name}: .* has the token id 204, beyond the vocabulary of"):
        READERS[owner](build(kind), "aé")


def test_a_text_and_what_is_written_behind_it_fit_the_model() -> None:
    with pytest.raises(ValueError, match=r"'x+\.\.\. with 40 new tokens has 140 tokens; this model reads at most 128"):
        sf.tools.evaluate_text(build("llama"), Letters(), ["x" * 100], tokens=40)


ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.ones(8, 5)
SEEDED: dict[str, Any] = {
    "fit: add": lambda seed: sf.fit("add", *ROWS, seed=seed),
    "fit_barrier": lambda seed: sf.fit_barrier(*ROWS, seed=seed),
    "fit_probe": lambda seed: sf.fit_probe(*ROWS, seed=seed),
    "fit_condition: layer 1": lambda seed: sf.fit_condition({1: ROWS[0]}, {1: ROWS[1]}, seed=seed),
    "fit_heads: layer 1": lambda seed: sf.fit_heads({1: ROWS[0]}, {1: ROWS[1]}, 1, seed=seed),
    "fit_loreft": lambda seed: sf.fit_loreft(build("llama"), Letters(), [("a", " b")], 1, seed=seed),
    "fit_vector": lambda seed: sf.fit_vector(build("llama"), Letters(), [("a", " b")], 1, seed=seed),
    "fit_lineas": lambda seed: sf.fit_lineas(build("llama"), Letters(), ["a", "b"], ["c", "d"], [1], seed=seed),
    "fit_velocity": lambda seed: sf.fit_velocity(build("llama"), Letters(), [("a", " b", " c")], 1, seed=seed),
    "RefusalRules": lambda seed: sf.tools.RefusalRules(seed=seed),
    "TrainConfig": lambda seed: sf.sae.TrainConfig(seed=seed),
}


@pytest.mark.parametrize("owner", SEEDED)
def test_seeds_are_what_all_that_draws_takes(owner: str) -> None:
    for seed, error, says in (
        (-1, ValueError, "seed is -1; expected a whole number"),
        (2**40, ValueError, rf"seed is {2**40}; expected a whole number from 0 to 2\*\*32 - 1"),
        (1.5, TypeError, "seed"),
    ):
        with pytest.raises(error, match=f"^{owner}: {says}"):
            SEEDED[owner](seed)


def test_a_half_of_a_character_is_named_with_its_text() -> None:
    model, tokenizer = build("llama"), words()
    says = r"the text 'w3 \\ud800 w4' holds '\\ud800' as character 3, half a character \(a lone surrogate\)"
    for owner, run in {
        "collect": lambda text: sf.collect(model, tokenizer, ["w3", text], 1, progress=False),
        "fit_loreft": lambda text: sf.fit_loreft(model, tokenizer, [("w3", " w4"), (text, " w4")], 1),
        "pack": lambda text: Contexts(tokenizer, ["w3", text], 8),
    }.items():
        with pytest.raises(ValueError, match=rf"^{owner}: {says}"):
            run("w3 \ud800 w4")


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([{"content": "w3"}], "message 0 has None as its role; expected a word such as 'user' or 'assistant'"),
        ([{"role": "user", "content": "w3"}, {"role": 7, "content": "w3"}], "message 1 has 7 as its role"),
        (
            [{"role": "martian", "content": "w3"}],
            r"is no chat that this tokenizer's template takes \(TemplateError: who\?\)",
        ),
    ],
)
def test_what_is_no_chat_is_refused_in_our_words(chat: Any, says: str) -> None:
    tokenizer = words()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'martian' %}{{ raise_exception('who?') }}{% endif %}{{ m['content'] }} w9"
        "{% endfor %}"
    )
    with pytest.raises(ValueError, match=f"^collect: text 1.*{says}"):
        sf.collect(build("llama"), tokenizer, ["w3", chat], 1, progress=False)
    with pytest.raises(ValueError, match=f"^evaluate_choices: the prompt .*{says}"):
        sf.tools.evaluate_choices(build("llama"), tokenizer, [sf.tools.Choice(chat, ("w3",), ("w4",))])


def test_a_tokenizer_that_is_larger_than_the_model() -> None:
    """The cause is the text's id, whatever the model says of it; an id that its config names may stand for an image."""
    model = deepcopy(build("llama"))
    model.resize_token_embeddings(20)
    with pytest.raises(
        ValueError, match=r"^collect: text 1 \('w19 w20'\) has the token id 20, beyond the vocabulary of Llama"
    ):
        sf.collect(model, words(), ["w3 w19", "w19 w20"], 1, progress=False)
    assert sf.collect(model, words(), ["w3 w19"], 1, progress=False)[1].shape == (1, 48)
    model.config.image_token_id = 20  # as where an image's mark lies beyond the vocabulary, and is replaced
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: (args[0].where(args[0] < 20, 0),))
    ids = torch.tensor([[3, 20]])
    found = sf.collect(model, inputs=[{"input_ids": ids}], layers=1, progress=False)
    close(found[1][0], shown(model, {"input_ids": ids})[2][0, -1])


@cache
def paligemma() -> Any:
    """Its prefix attends both ways."""
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = {
        "model_type": "gemma",
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "vocab_size": 101,
    }
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, projection_dim=48
    )
    model = transformers.PaliGemmaForConditionalGeneration(config)
    randomise(model)
    return model.float().eval()


@pytest.mark.parametrize("pixels", [False, True])
def test_rows_beside_padding_are_as_alone_without_token_types(pixels: bool) -> None:
    given = image_inputs()
    if not pixels:
        given.pop("pixel_values")
        given["input_ids"] = given["input_ids"].where(given["input_ids"] != IMAGE_TOKEN, 7)
    alone = []
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in given.items() if name != "attention_mask"}
        one["input_ids"] = one["input_ids"][:, given["attention_mask"][row].bool()]
        alone.append(one)
    layers = [0, 1, 2]
    both = sf.collect(paligemma(), inputs=[given], layers=layers, position="all", progress=False)
    single = sf.collect(paligemma(), inputs=alone, layers=layers, position="all", progress=False)
    for layer in layers:
        close(both[layer], single[layer])


def test_a_block_that_sees_more_tokens_than_the_ids_is_refused() -> None:
    model = deepcopy(build("llama"))
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args: (torch.cat([args[0][:, :2], args[0]], 1), *args[1:])
    )
    model.model.layers[1].forward = lambda x, *_, **__: x
    for given in ({"inputs": [{"input_ids": torch.tensor([[3, 4, 5]])}]}, {"tokenizer": words(), "texts": ["w3 w4"]}):
        with pytest.raises(ValueError, match=r"layers\.1 runs 5 tokens where it is given 3"):
            sf.collect(model, layers=1, progress=False, **given)


# --- numbers -------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, Any] = {
    "NumPy integer": (np.int64(1), [1]),
    "array": (np.array([0, -1]), [0, 2]),
    "array of no dimension": (np.array(2), [2]),
    "small array": (np.array([0, 2], dtype=np.int8), [0, 2]),
    "unsigned": (np.arange(2, dtype=np.uint16), [0, 1]),
    "NumPy integers in a list": ([np.int32(0), 1], [0, 1]),
    "tensor": (torch.tensor([2, 0]), [0, 2]),
    "tensor of no dimension": (torch.tensor(1), [1]),
    "tensors in a tuple": ((torch.tensor(1), torch.tensor(2)), [1, 2]),
    "slice": (slice(None), [0, 1, 2]),
    "slice with a step": (slice(None, None, 2), [0, 2]),
    "slice from the end": (slice(-2, None), [1, 2]),
    "slice of NumPy integers": (slice(np.int64(1), np.int64(9)), [1, 2]),
    "range": (range(2), [0, 1]),
    "set": ({1, 2}, [1, 2]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_any_kind_of_number(name: str) -> None:
    given, layers = LAYERS[name]
    model = build("llama")
    acts = sf.collect(model, words(), TEXTS, given, progress=False)
    assert list(acts) == layers
    assert all(type(layer) is int for layer in acts)
    right = sf.collect(model, words(), TEXTS, layers, progress=False)
    assert all(torch.equal(acts[layer], right[layer]) for layer in layers)
    if isinstance(given, slice) or np.ndim(given) == 1:  # a set is no array to NumPy, and a grid has an order
        grid = sf.tools.Grid(layers=given, strengths=np.array([0.5], dtype=np.float32))
        question = sf.tools.Question(("w9 w10",), ("w11",), ("w12",), ("w15 w16",))
        found = sf.sweep(model, words(), (["w3"], ["w4"]), question, grid, batch_size=np.int64(4), progress=False)
        assert sorted(cell.layer for cell in found) == layers
        assert {type(cell.layer) for cell in found} == {int}


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (1.0, TypeError, "layers must be a whole number; got 1.0"),
        (np.float32(1), TypeError, "layers must be a whole number; got 1.0"),
        (torch.tensor([1.0]), TypeError, "layers must be a whole number; got 1.0"),
        (torch.tensor([True, False, True]), TypeError, "layers must be a whole number; got True"),
        (np.array([True]), TypeError, "layers must be a whole number; got True"),
        (np.array([[0, 1]]), TypeError, r"layers has shape \(1, 2\); expected one number or a list"),
        ([None], TypeError, "layers must be a whole number; got None"),
        (np.array([3]), ValueError, "layer 3 is out of range"),
        (torch.tensor([], dtype=torch.int64), ValueError, "layers is empty"),
        (slice(3, None), ValueError, "layers is empty"),
        (slice(0, 1.5), TypeError, "layers must be a whole number; got 1.5"),
        (slice(0, 2, 0), ValueError, "layers is a slice of step 0"),
    ],
)
def test_what_is_no_layer(layers: Any, error: Any, message: Any) -> None:
    with pytest.raises(error, match=f"^collect: {message}"):
        sf.collect(build("llama"), words(), TEXTS, layers, progress=False)


def test_positions_and_sizes_of_collect() -> None:
    model = build("llama")
    right = sf.collect(model, words(), TEXTS, 1, -2, progress=False)
    for position in (np.int64(-2), torch.tensor(-2), np.array(-2)):
        acts = sf.collect(model, words(), TEXTS, 1, position, batch_size=np.int32(2), progress=False)
        close(acts[1], right[1])
        assert type(acts.position) is int
    with pytest.raises(TypeError, match=r"position must be one of .* got True"):
        sf.collect(model, words(), TEXTS, 1, True, progress=False)


def test_caches_take_them_and_save_plain_numbers(tmp_path: Any) -> None:
    model, texts = build("llama"), TEXTS * 4
    right = sf.sae.cache_activations(model, words(), texts, ("resid_post", 2), tmp_path / "a", context=8)
    for number, layer in enumerate((np.int64(-1), torch.tensor(2), np.array(2))):
        folder = tmp_path / str(number)
        found = sf.sae.cache_activations(model, words(), texts, ("resid_post", layer), folder, context=np.int64(8))
        assert found.info == right.info
        assert sf.sae.ActivationCache.open(folder).info == right.info
        assert torch.equal(found.read(0), right.read(0))
    for place in ("resid_post", 2, ("resid_post", 2.0), ("resid_post", True)):
        with pytest.raises(TypeError, match=r"^ActivationStream: "):
            sf.sae.ActivationStream(model, words(), texts, place, context=8)
    with pytest.raises(ValueError, match="pack: context is 4; expected a whole number >= 8"):
        Contexts(words(), texts, np.int64(4))


def test_strengths_and_doses_of_numpy(tmp_path: Any) -> None:
    model, v = build("llama"), torch.randn(48)
    right = sf.dose(model, words(), {1: sf.Add(v, 0.25)}, TEXTS, limit=9)
    for strength in (np.float32(0.25), np.float64(0.25), torch.tensor(0.25), np.array(0.25)):
        plan = sf.Plan({1: sf.Add(v, strength)})
        assert list(sf.dose(model, words(), plan, TEXTS, limit=np.float32(9), batch_size=np.int64(8))) == list(right)
        assert sf.Plan.load(plan.save(tmp_path / str(type(strength)))).edits["resid_post", 1][0].strength == 0.25
    baked = deepcopy(build("gpt2"))
    site = ("mlp_out", 1)
    bias = sf.bake(baked, sf.Plan({site: sf.Add(v, np.float32(2.0))})).transformer.h[1].mlp.c_proj.bias
    torch.testing.assert_close(bias, build("gpt2").transformer.h[1].mlp.c_proj.bias + 2 * v)


def test_layers_and_room_of_a_prepared_model() -> None:
    for given, layers in LAYERS.values():
        model = deepcopy(build("llama"))
        sf.prepare(
            model,
            layers=given,
            room=sf.Room(batch=np.int64(2), length=torch.tensor(8), slots=np.int8(2), directions=4, rank=2),
        )
        for layer in range(3):
            if layer in layers:
                sf.steer(model, sf.Plan({layer: sf.Add(torch.ones(48))}))
                sf.reset(model)
            else:
                with pytest.raises(RuntimeError, match=f"layer {layer} was not prepared"):
                    sf.steer(model, sf.Plan({layer: sf.Add(torch.ones(48))}))


@pytest.mark.filterwarnings("ignore:steer. no token was edited")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": 1.0}, TypeError, "layers must be a whole number; got 1.0"),
        ({"layers": "1"}, TypeError, "layers must be a whole number; got '1'"),
        ({"layers": [True]}, TypeError, "layers must be a whole number; got True"),
        ({"layers": []}, ValueError, r"layers is \[\], which names none of 3; pass None for all"),
        ({"layers": slice(3, None)}, ValueError, "layers is slice.*, which names none of 3"),
        ({"layers": [3]}, ValueError, "layer 3 is out of range"),
        ({"site": "residual"}, ValueError, "unknown site 'residual'"),
        ({"room": {"batch": 2}}, TypeError, "room must be a Room"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a transformers model"),
    ],
)
def test_what_prepare_refuses(change: Any, error: Any, message: Any) -> None:
    with pytest.raises(error, match=f"^prepare: {message}"):
        sf.prepare(**{"model": deepcopy(build("llama"))} | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch is 0; expected a whole number >= 1"),
        ({"length": 2.0}, TypeError, "length must be a whole number >= 1; got 2.0"),
        ({"slots": True}, TypeError, "slots must be a whole number >= 1; got True"),
        ({"columns": 0}, ValueError, "columns is 0; expected a whole number >= 1"),
    ],
)
def test_what_a_room_refuses(change: Any, error: Any, message: Any) -> None:
    with pytest.raises(error, match=f"^Room: {message}"):
        sf.Room(**change)


def test_prepare_refuses_a_compiled_model_in_its_own_name() -> None:
    with pytest.raises(RuntimeError, match=r"^prepare: the model is already compiled"):
        sf.prepare(torch.compile(deepcopy(build("llama"))))


def test_layers_of_conditions() -> None:
    condition, v = sf.Condition(torch.ones(48), 0.1), sf.Add(torch.ones(48))
    for kind in (sf.When, sf.WhenToken):
        for layer in (np.int64(1), torch.tensor(1), np.array(1)):
            edit = kind(condition, v, layer=layer)
            assert (type(edit.layer), edit.layer, repr(edit)) == (int, 1, repr(kind(condition, v, layer=1)))
            json.dumps(edit.numbers())
        for wrong in (1.0, "1", True, torch.tensor([1, 2])):
            with pytest.raises(TypeError, match=f"^{kind.__name__}: layer must be a whole number"):
                kind(condition, v, layer=wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": "w3"}, TypeError, "texts must be several texts, got one str"),
        ({"texts": None}, TypeError, "give tokenizer and texts"),
        ({"texts": []}, ValueError, "texts is empty"),
        ({"texts": ["w3", 5]}, TypeError, "text 1 must be a string or a list of chat messages"),
        ({"texts": ["w3", ""]}, ValueError, r"text 1 \(''\) has no tokens"),
        ({"texts": ["w3 " * 129]}, ValueError, "text 0 .* this model reads at most 128"),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer"),
        (
            {"plan": {1: sf.Add(torch.ones(5))}},
            ValueError,
            "Add.* at resid_post 1 has width 5; this model's resid_post has 48",
        ),
        ({"plan": {3: sf.Add(torch.ones(48))}}, ValueError, "layer 3 is out of range"),
        ({"limit": -1}, ValueError, "limit is -1; expected a relative dose, 0 or more"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a transformers model"),
    ],
)
def test_what_dose_refuses(change: Any, error: Any, message: Any) -> None:
    plan = {1: sf.Add(torch.ones(48))}
    given = {"model": build("llama"), "tokenizer": words(), "plan": plan, "texts": TEXTS} | change
    with pytest.raises(error, match=f"^dose: {message}"):
        sf.dose(**given)


def test_dose_warns_once_of_a_plan_for_another_model() -> None:
    plan = sf.Plan({1: sf.Add(torch.ones(48), 0.01)}, model=ModelCard("GPT2LMHeadModel:", 48, 3))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        sf.dose(build("llama"), words(), plan, TEXTS)
    said = [(str(w.message), w.filename) for w in seen]
    assert said == [("steer: the plan was made for GPT2LMHeadModel:, this model is a LlamaForCausalLM", __file__)]


def test_numbers_of_saes_and_barriers(tmp_path: Any) -> None:
    rows = torch.randn(20, 8)
    sae = sf.SAE(rows, rows, k=np.int64(3), origin=Origin(place=("resid_post", np.int64(1))))
    again = sf.SAE.load(sae.save(tmp_path))
    assert (again.k, again.place) == (3, ("resid_post", 1))
    for indices in (np.array([4, 1]), torch.tensor([4, 1]), [np.int64(4), 1]):
        assert torch.equal(sae.rows(indices).decoder, rows[[4, 1]])
    assert torch.equal(sae.rows(slice(0, 2)).decoder, rows[:2])
    config = sf.sae.TrainConfig(
        features=np.int64(16), k=np.int32(2), tokens=np.int64(64), batch=np.int64(32), lr=np.float32(1e-3)
    )
    assert json.loads(json.dumps(asdict(config)))["features"] == 16
    assert sf.sae.train_sae(torch.randn(40, 8), config).k == 2
    for wrong in (2.0, True, np.bool_(True), "2"):
        with pytest.raises(TypeError, match="k must be a whole number"):
            sf.SAE(rows, rows, k=wrong)
    sides = torch.randn(30, 8) + 1, torch.randn(30, 8) - 1
    assert sf.fit_barrier(*sides, kind="quadratic", rank=np.int64(2)).rank == 2


def test_flows_take_any_kind_of_number_and_keep_plain_ones(tmp_path: Path) -> None:
    barrier = sf.Barrier.linear(torch.randn(48, generator=torch.Generator().manual_seed(0)))
    plain = sf.Flow(barrier, angle=0.5, steps=4)
    for angle, steps in (
        (np.float32(0.5), np.int64(4)),
        (torch.tensor(0.5), torch.tensor(4)),
        (np.array(0.5), np.array(4)),
    ):
        edit = sf.Flow(barrier, angle=angle, steps=steps)
        assert (type(edit.angle), type(edit.steps)) == (float, int)
        assert edit == plain or (edit.angle, edit.steps) == (plain.angle, plain.steps)
    path = sf.Plan({np.int64(1): sf.Flow(barrier, T=np.float64(2.0)), (("resid_pre"), torch.tensor(0)): plain}).save(
        tmp_path / "p"
    )
    loaded = sf.Plan.load(path)
    assert set(loaded.edits) == {("resid_post", 1), ("resid_pre", 0)}
    with pytest.raises(ValueError, match=r"steps is 2\.5"):
        sf.Flow(barrier, angle=0.5, steps=2.5)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_strengths_and_lengths_of_rows_in_any_kind_of_list(kind: Any) -> None:
    model, plan = build("llama"), sf.Plan({1: sf.Add(torch.ones(48))}, "prompt")
    ids = token_ids(2, 6, 0)
    with (
        torch.no_grad(),
        sf.steer(model, [plan, plan], strength=kind([2.0, 0.0]), prompt_length=kind([4, 6])) as handle,
    ):
        model(ids)
        assert handle.strength == [2.0, 0.0]
        assert handle.stats() == [4, 0]
        handle.strength = kind([0.0, 1.0])
        model(ids)
    assert handle.stats() == [4, 6]


def test_the_number_of_features_may_be_of_numpy() -> None:
    x, w = torch.randn(3, 8), torch.randn(16, 8)
    for one, other in zip(sf.ops.sae_encode(x, w, None, np.int64(4)), sf.ops.sae_encode(x, w, None, 4), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(TypeError, match="k must be a whole number"):
        sf.ops.sae_encode(x, w, None, 4.0)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("prompt", "11111"), ("0", "10000"), ("-1", "00001"), ("generated", "00000"), ("last", "00001"), ("all", "11111")],
)
def test_image_tokens_are_tokens_of_a_prompt_that_generate_makes_itself(positions: str, expected: str) -> None:
    """Given pixels alone, BLIP-2 puts the marks of its 4 queries and the first token into the prompt."""
    from test_ways import columns

    model, pixels = blip(), image_inputs()["pixel_values"]
    greedy: Any = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert columns(model, positions, lambda: model.generate(pixel_values=pixels, **greedy)) == expected


def objects_of_another_type() -> dict[str, tuple[Callable[[Any, Any], Any], str]]:
    """What is called with a settings object, an SAE or the like that is none, and how the argument is named."""
    x, question = torch.randn(8, 4), sf.tools.Question(("w3",), (" w4",), (" w5",))
    sae = sf.SAE(torch.randn(6, 4), torch.randn(6, 4), k=2, origin=Origin(place=("resid_post", 0)))
    pair, sides = [("w3", " w4")], (["w3"], ["w4"])
    config = sf.sae.TrainConfig
    return {
        "objective": (
            lambda m, t: sf.fit_vector(m, t, pair, 1, sf.RePS),
            "fit_vector: objective must be one such as sf.LMOb",
        ),
        "settings": (
            lambda m, t: sf.fit_lineas(m, t, *sides, [1], settings={"steps": 3}),
            "fit_lineas: settings is {'steps': 3}",
        ),
        "settings class": (
            lambda m, t: sf.fit_lineas(m, t, *sides, [1], settings=sf.LinEAS),
            "settings is the class LinEAS; expe",
        ),
        "explain": (
            lambda m, t: sf.explain("path", m, t),
            r"explain: sae is 'path'; expected SAE, such as sf.SAE.load\(path\)",
        ),
        "relate": (lambda m, t: sf.sae.relate("path", m, t), "relate: sae is 'path'"),
        "observe": (lambda m, t: sf.sae.observe("path", m, t, ["w3"]), "observe: sae is 'path'"),
        "config": (
            lambda m, t: sf.sae.observe(sae, m, t, ["w3"], {"tokens": 3}),
            "observe: config is {'tokens': 3}; expected ObserveCon",
        ),
        "evaluate": (lambda m, t: sf.sae.evaluate_sae("path", m, t, ["w3"]), "evaluate_sae: sae is 'path'"),
        "use": (lambda m, t: sf.sae.explain_use(sae), r"explain_use: evidence is SAE\(F=6"),
        "detect": (lambda m, t: sf.sae.detect(sae, sae), "detect: explanations is SAE"),
        "page": (lambda m, t: sf.sae.write_page("page.html", sae), "write_page: explanations is SAE"),
        "train": (
            lambda m, t: sf.sae.train_sae(x, {"k": 4}),
            "train_sae: config is {'k': 4}; expected TrainConfig, such",
        ),
        "train class": (lambda m, t: sf.sae.train_sae(x, config), "train_sae: config is the class TrainConfig"),
        "sweep": (
            lambda m, t: sf.sweep(m, t, sides, {"wanted": 1}, sf.tools.Grid((1,))),
            "sweep: question is {'wanted': 1}",
        ),
        "grid": (
            lambda m, t: sf.sweep(m, t, sides, question, [1]),
            r"sweep: grid is \[1\]; expected Grid, such as sf.tools.Grid",
        ),
        "grid's SAE": (
            lambda m, t: sf.tools.Grid((1,), methods=("amplify",), sae="path"),
            "Grid: sae is 'path'; expected SAE",
        ),
        "rules": (
            lambda m, t: sf.tools.select_refusal(m, t, *sides, {"late": 0}),
            "select_refusal: rules is {'late': 0}; expected R",
        ),
        "rates": (lambda m, t: sf.tools.refusal_rates(m, t, ["w3"], [None], {}), "refusal_rates: rules is {}"),
        "choices": (
            lambda m, t: sf.tools.evaluate_choices(m, t, ["w3"]),
            "evaluate_choices: each of choices is 'w3'; expected Choice",
        ),
        "origin": (
            lambda m, t: sf.SAE(x, x, k=2, origin=("resid_post", 1)),
            r"SAE: origin is \('resid_post', 1\); expected Origin",
        ),
        "rows": (lambda m, t: sf.fit_probe("path", x), "fit_probe: pos is 'path'; expected rows"),
    }


@pytest.mark.parametrize("name", objects_of_another_type())
def test_an_object_of_another_type_is_named(name: str) -> None:
    """Before the model runs: a class for its object, its settings in a dict, a path for what is saved there."""
    call, match = objects_of_another_type()[name]
    with pytest.raises(TypeError, match=match):
        call(build("llama"), words())


def test_choices_take_a_plan_as_a_dict() -> None:
    model, asked = build("llama"), [sf.tools.Choice("w3 w4", (" w5",), (" w6",))]
    v = torch.randn(48)
    found = [sf.tools.evaluate_choices(model, words(), asked, plan, draws=2) for plan in (sf.Plan({1: v}), {1: v})]
    assert found[0] == found[1]
