"""Activations against the model run on one text at a time; directions against float64 NumPy."""

from __future__ import annotations

import doctest
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import CORE, VOCAB, build
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

import steerfast as sf
from steerfast.barriers import kernels
from steerfast.directions import extract
from steerfast.directions.direction import Direction
from steerfast.directions.extract import difference, logistic, mean_difference, pca
from steerfast.models.collect import _WINDOW, Activations, collect
from steerfast.models.layers import find_layers
from steerfast.place import SITES, Origin, Place
from steerfast.plan import card
from steerfast.tools.sweep_scores import Dose, Scored, log_likelihoods

METHODS = (difference, mean_difference, pca, logistic)
TEXTS = ["w3 w4 w5 w6 w7 w8 w9", "w10", "w11 w12 w13", "w14 w15 w16 w17 w18", "w19 w20", "w21 w22 w23 w24"]


def make_tokenizer(bos: Any = False, **kwargs: Any) -> Any:
    """One token per word; w3 … w100 are ids 3 … 100; no pad token unless asked for."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs
    )


TOKENIZER = make_tokenizer()


def hidden_states(model: Any, text: Any, tokenizer: Any = TOKENIZER) -> Any:
    """What the model shows for one text alone: entry L + 1 is resid_post of layer L, (tokens, d)."""
    with torch.no_grad():
        outputs = model(torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False, output_hidden_states=True)
    return [h[0] for h in outputs.hidden_states]


def close(actual: Any, expected: Any) -> None:
    """A batch is multiplied in other tile shapes than a text alone: float32 rounding through two layers of width 48."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=CORE)
def model(request: Any) -> Any:
    return build(request.param)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_position_is_that_of_the_text_alone(model: Any, batch_size: Any) -> None:
    alone = [hidden_states(model, text) for text in TEXTS]
    position: Any
    for position, rows in {
        "last": lambda h: h[-1:],
        "mean": lambda h: h.mean(0, keepdim=True),
        "all": lambda h: h,
        0: lambda h: h[:1],
        -1: lambda h: h[-1:],
    }.items():
        acts = collect(model, TOKENIZER, TEXTS, [0, 1], position, batch_size=batch_size, progress=False)
        assert list(acts) == [0, 1]
        assert acts.position == position
        assert acts.model == type(model).__name__
        for layer in acts:
            assert acts[layer].dtype == torch.float32
            assert not acts[layer].requires_grad
            close(acts[layer], torch.cat([rows(h[layer + 1]) for h in alone]))
    assert acts.text_index.tolist() == list(range(len(TEXTS)))


def test_text_index_counts_tokens_for_all() -> None:
    acts = collect(build("llama"), TOKENIZER, TEXTS[:3], [0], "all", progress=False)
    assert acts.text_index.tolist() == [0] * 7 + [1] + [2] * 3


def test_the_tokenizers_padding_does_not_matter_and_is_left_alone(model: Any) -> None:
    reference = collect(model, TOKENIZER, TEXTS, [-1], progress=False)
    for tokenizer in (
        make_tokenizer(padding_side="left", pad_token="</s>"),
        make_tokenizer(padding_side="right", pad_token="</s>"),
    ):
        side = tokenizer.padding_side
        acts = collect(model, tokenizer, TEXTS, [-1], progress=False)
        assert torch.equal(acts[2], reference[2])
        assert (tokenizer.padding_side, tokenizer.pad_token) == (side, "</s>")
    assert TOKENIZER.pad_token is None


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llama", "falcon", "bloom", "opt", "granite"])
def test_every_site_in_a_batch(family: Any, site: Any) -> None:
    """The hook runs on a padded batch; the reference is one hook on one text. Falcon edits its MLP's output later,
    OPT flattens it."""
    model = build(family)
    acts = collect(model, TOKENIZER, TEXTS, [0, 2], "all", site, batch_size=3, progress=False)
    point = find_layers(model).point(2, site)
    alone = []
    handle = point.attach(lambda x: alone.append(x.clone().reshape(-1, x.shape[-1])))
    try:
        for text in TEXTS:
            hidden_states(model, text)
    finally:
        handle.remove()
    assert acts.site == site
    assert acts[2].shape[1] == point.width
    close(acts[2], torch.cat(alone))


def test_layers_negative_repeated_single_and_generator() -> None:
    model = build("llama")
    reference = collect(model, TOKENIZER, TEXTS, [0, 2], progress=False)
    for layers in ([2, 0], [-1, 0, 2, -3], (layer for layer in (0, 2))):
        acts = collect(model, TOKENIZER, (text for text in TEXTS), layers, progress=False)
        assert list(acts) == [0, 2]
        assert torch.equal(acts[0], reference[0])
        assert torch.equal(acts[2], reference[2])
    assert list(collect(model, TOKENIZER, TEXTS, -1, progress=False)) == [2]
    median = reference[2].norm(dim=1).quantile(0.5)
    assert reference.norms[2] == pytest.approx(median.item())
    assert (
        repr(reference) == "Activations(LlamaForCausalLM, resid_post, position 'last', layers {0: (6, 48), 2: (6, 48)})"
    )


def test_more_texts_than_a_window_in_their_own_order_and_read_lazily() -> None:
    model, batch_size = build("llama"), 2
    read: list[int] = []
    texts = [" ".join(f"w{3 + (7 * i + j) % 98}" for j in range(1 + i % 5)) for i in range(75)]
    shapes, ahead, given = [], [], 0

    def stream() -> Any:
        nonlocal given
        for text in texts:
            given += 1
            yield text

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        shapes.append(kwargs["input_ids"].shape)
        ahead.append(given - sum(read))
        read.append(len(kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        acts = collect(model, TOKENIZER, stream(), [1], batch_size=batch_size, progress=False)
    finally:
        handle.remove()
    close(acts[1], torch.stack([hidden_states(model, text)[2][-1] for text in texts]))
    assert sum(read) == len(texts)
    assert max(shape[0] for shape in shapes) == batch_size
    assert max(ahead) <= batch_size * _WINDOW
    assert acts[1].untyped_storage().nbytes() == acts[1].numel() * 4  # no view keeps a batch alive
    assert (
        sum(a * b for a, b in shapes) - sum(len(t.split()) for t in texts) <= 10
    )  # sorted by length: hardly any padding


def test_the_forward_stops_after_the_deepest_layer() -> None:
    model, ran = build("llama"), []
    handles = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(model.model.layers)]
    handles.append(model.lm_head.register_forward_hook(lambda *_: ran.append("head")))
    try:
        collect(model, TOKENIZER, TEXTS[:2], [0, 1], progress=False)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0, 1]


def hooks_of(model: Any) -> Any:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_is_left_behind() -> None:
    """Neither after success nor after an error inside the model; not even by a capture of hidden states that was
    interrupted."""
    model = build("llama")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        before, hooks = model(ids).logits, hooks_of(model)
    model.train()
    model.model.layers[1].eval()
    model.config.output_hidden_states = True
    training = [m.training for m in model.modules()]
    forwards = [m.forward for m in model.modules()]

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    try:
        collect(model, TOKENIZER, TEXTS, [0, 1], progress=False)
        handle = model.model.layers[1].mlp.register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            collect(model, TOKENIZER, TEXTS, [0, 1], progress=False)
        handle.remove()
        assert [m.training for m in model.modules()] == training
        assert [m.forward for m in model.modules()] == forwards
        assert hooks_of(model) == hooks
    finally:
        model.config.output_hidden_states = False
        model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_dropout_is_off_and_gradients_are_not_recorded() -> None:
    model = build("gpt2")
    reference = collect(model, TOKENIZER, TEXTS, [2], progress=False)
    model.train()
    try:
        assert torch.equal(collect(model, TOKENIZER, TEXTS, [2], progress=False)[2], reference[2])
        assert model.training
    finally:
        model.eval()


def test_a_steered_model_gives_steered_activations() -> None:
    model = build("llama")
    plain = collect(model, TOKENIZER, TEXTS, [1], progress=False)
    handle = model.model.layers[1].register_forward_hook(lambda m, a, out: out + 3.0, prepend=True)
    try:
        steered = collect(model, TOKENIZER, TEXTS, [1], progress=False)
    finally:
        handle.remove()
    close(steered[1], plain[1] + 3.0)


def test_texts_keep_the_order_of_the_rows_that_have_plans() -> None:
    """A batch is a batch of the caller's then: its rows are not sorted by length."""
    model, v = build("llama"), 3 * torch.randn(48, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, max(len(TOKENIZER(text)["input_ids"]) for text in TEXTS[:4]), dtype=torch.bool)
    mask[2] = True
    plain = collect(model, TOKENIZER, TEXTS[:4], [1], progress=False)[1]
    close(collect(model.model, TOKENIZER, TEXTS[:4], [1], progress=False)[1], plain)
    for steered in (
        lambda: sf.steer(model, [None, None, {1: sf.Add(v)}, None]),
        lambda: sf.steer(model, sf.Plan({1: sf.Add(v)}, mask)),
    ):
        with steered():
            found = collect(model, TOKENIZER, TEXTS[:4], [1], progress=False)[1]
            with pytest.raises(ValueError, match="steered or read row by row"):
                log_likelihoods(model, [Scored((5, 6, 7), 1)], [Dose()], 1)
        close(found[2], plain[2] + v)
        close(found[[0, 1, 3]], plain[[0, 1, 3]])
    with sf.steer(model, [None, None, {1: sf.Add(v)}, None]):  # a part of the model, or a wrapper, has the same rows
        found = collect(model.model, TOKENIZER, TEXTS[:4], [1], progress=False)[1]
    close(found[2], plain[2] + v)


def test_half_precision_is_stored_as_float32() -> None:
    model = build("qwen3")
    reference = collect(model, TOKENIZER, TEXTS, [1], "mean", progress=False)
    acts = collect(deepcopy(model).to(torch.bfloat16), TOKENIZER, TEXTS, [1], "mean", progress=False)
    assert acts[1].dtype == torch.float32
    torch.testing.assert_close(acts[1], reference[1], rtol=0.1, atol=0.1 * reference[1].abs().max().item())


def test_chats_go_through_the_template() -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} w99 {% endfor %}{% if add_generation_prompt %}w100{% endif %}"
    )
    user, assistant = {"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}
    model = build("llama")
    acts = collect(model, tokenizer, [[user], [user, assistant], "w3 w4"], [0], "all", progress=False)
    alone = ["w3 w4 w99 w100", "w3 w4 w99 w5 w99", "<s> w3 w4"]  # a template brings its own special tokens
    close(acts[0], torch.cat([hidden_states(model, text)[1] for text in alone]))


def test_progress_bar(capsys: Any) -> None:
    collect(build("llama"), TOKENIZER, TEXTS, [0], progress=True)
    assert "6/6" in capsys.readouterr().err
    collect(build("llama"), TOKENIZER, TEXTS, [0], progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"layers": [3]},
            ValueError,
            r"^collect: layer 3 is out of range; this model \(LlamaForCausalLM\) has 3 layers, 0 to 2$",
        ),
        ({"layers": []}, ValueError, "layers is empty"),
        ({"layers": "1"}, TypeError, "a layer is an integer, 0 to 2, got '1'"),
        ({"site": "residual"}, ValueError, "^collect: unknown site 'residual'"),
        ({"position": "first"}, ValueError, "unknown position 'first'; use last, mean, all or an integer"),
        ({"position": 1.0}, TypeError, "position must be one of"),
        ({"position": 3}, ValueError, r"position 3 is out of range for text 1 \('w10'\), which has 1 tokens, -1 to 0"),
        ({"texts": "w3"}, TypeError, "texts must be several texts, got one str; put it into a list"),
        ({"texts": []}, ValueError, "texts is empty"),
        ({"texts": ["w3", ""]}, ValueError, r"text 1 \(''\) has no tokens"),
        ({"texts": ["w3", []]}, ValueError, "text 1 is a chat without messages"),
        ({"texts": ["w3", 5]}, TypeError, "text 1 must be a string or a list of chat messages, got int"),
        (
            {"texts": [[{"role": "user", "content": "w3"}]]},
            ValueError,
            "text 0 is a chat, but the tokenizer has no chat template",
        ),
        (
            {"texts": ["w3 " * 129]},
            ValueError,
            r"text 0 \('w3 w3 .*\.\.\.\) has 129 tokens; this model reads at most 128",
        ),
        ({"batch_size": 0}, ValueError, "batch_size must be a positive integer, got 0"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a transformers model"),
    ],
)
def test_collect_errors(change: Any, error: Any, message: Any) -> None:
    arguments = {
        "model": build("llama"),
        "tokenizer": TOKENIZER,
        "texts": TEXTS,
        "layers": [0],
        "progress": False,
    } | change
    hooks = hooks_of(arguments["model"])
    with pytest.raises(error, match=message):
        collect(**arguments)
    assert hooks_of(arguments["model"]) == hooks


def test_a_text_of_special_tokens_only_counts_only_if_it_was_written() -> None:
    tokenizer = make_tokenizer(bos=True)
    with pytest.raises(ValueError, match=r"text 0 \(''\) has no tokens"):
        collect(build("llama"), tokenizer, [""], [0], progress=False)
    assert collect(build("llama"), tokenizer, ["</s>"], [0], "all", progress=False)[0].shape == (2, 48)


# Directions


def sides(n: Any = 40, m: Any = 40, d: Any = 19, seed: Any = 0, strength: Any = 3.0) -> Any:
    """Two sides along a planted unit direction, on top of noise with unequal variances; (pos, neg, direction)."""
    rng = np.random.default_rng(seed)
    planted = rng.normal(size=d)
    planted /= np.linalg.norm(planted)
    spread = rng.uniform(0.2, 0.6, size=d)
    pos = rng.normal(size=(n, d)) * spread + strength * planted + 5.0
    neg = rng.normal(size=(m, d)) * spread - strength * planted + 5.0
    return torch.tensor(pos).float(), torch.tensor(neg).float(), planted


def reference_pca(pos: Any, neg: Any) -> Any:
    delta = pos - neg
    component = np.linalg.svd(delta)[2][0]
    return component * np.sign(delta.mean(0) @ component)


def reference_logistic(pos: Any, neg: Any, C: Any = 1.0) -> Any:
    """Newton's method on the stated objective: Σ log(1 + exp(−t(w·z + b))) + ‖w‖²/2C, z = (x − mean)/s, v = w/s."""
    x = np.concatenate([pos, neg])
    x = x - x.mean(0)
    scale = np.sqrt((x**2).mean())
    z = np.concatenate([x / scale, np.ones((len(x), 1))], axis=1)
    t = np.array([1.0] * len(pos) + [0.0] * len(neg))
    penalty = np.diag([1 / C] * x.shape[1] + [0.0])
    w = np.zeros(z.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-z @ w))
        w -= np.linalg.solve(z.T @ (z * (p * (1 - p))[:, None]) + penalty, z.T @ (p - t) + penalty @ w)
    return w[:-1] / scale


REFERENCES = {
    difference: lambda p, n: (p - n).mean(0),
    mean_difference: lambda p, n: p.mean(0) - n.mean(0),
    pca: reference_pca,
    logistic: reference_logistic,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(40, 19), (7, 19), (19, 7)])
def test_methods_against_float64(method: Any, shape: Any) -> None:
    pos, neg, _ = sides(shape[0], shape[0], shape[1])
    expected = REFERENCES[method](pos.double().numpy(), neg.double().numpy())
    direction = method(pos, neg)
    # they differ by the final rounding to float32
    np.testing.assert_allclose(direction.vector.numpy(), expected, rtol=0, atol=2e-7 * np.linalg.norm(expected))
    assert direction.norm == pytest.approx(np.linalg.norm(expected), rel=2e-7)
    assert direction.vector.dtype == torch.float32
    assert direction.method == method.__name__
    assert direction.origin.typical_norm == pytest.approx(torch.cat([pos, neg]).norm(dim=1).quantile(0.5).item())
    assert replace(direction.origin, typical_norm=None) == Origin()


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_recovered_with_its_sign(method: Any) -> None:
    pos, neg, planted = sides(200, 200)
    for a, b, sign in ((pos, neg, 1), (neg, pos, -1)):
        vector = method(a, b, normalize=True).vector.numpy()
        assert vector @ (sign * planted) > 0.98
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_project_out_and_normalize(method: Any) -> None:
    pos, neg, _ = sides()
    plain = method(pos, neg)
    remove = torch.randn(3, 19, generator=torch.Generator().manual_seed(2))
    remove = torch.cat([remove, remove[:1] - 2 * remove[1:2]])  # rank 3 in four rows
    q = np.linalg.qr(remove[:3].double().numpy().T)[0]
    v = plain.vector.double().numpy()
    expected = v - q @ (q.T @ v)
    rest = method(pos, neg, project_out=remove)
    np.testing.assert_allclose(rest.vector.numpy(), expected, rtol=0, atol=1e-6 * plain.norm)
    assert rest.norm == pytest.approx(np.linalg.norm(expected), rel=1e-5)
    unit = method(pos, neg, project_out=remove, normalize=True)
    np.testing.assert_allclose(unit.vector.numpy(), expected / np.linalg.norm(expected), rtol=0, atol=1e-5)
    assert unit.norm == pytest.approx(rest.norm)
    one = method(pos, neg, project_out=remove[0])
    assert abs(float(one.vector @ remove[0])) < 1e-5 * plain.norm * float(remove[0].norm())
    assert torch.equal(method(pos, neg, project_out=Direction(remove[0], "given", 1.0)).vector, one.vector)


def test_unequal_counts() -> None:
    pos, neg, _ = sides(11, 30)
    for method in (mean_difference, logistic):
        expected = REFERENCES[method](pos.double().numpy(), neg.double().numpy())
        np.testing.assert_allclose(
            method(pos, neg).vector.numpy(), expected, rtol=0, atol=2e-3 * np.linalg.norm(expected)
        )
    for method in (difference, pca):
        with pytest.raises(
            ValueError,
            match=f"{method.__name__}: needs pairs, got 11 rows in pos and 30 in neg; use mean_difference or logistic",
        ):
            method(pos, neg)


def test_one_pair_is_activation_addition() -> None:
    pos, neg, _ = sides(1, 1)
    for a, b in ((pos, neg), (pos[0], neg[0])):
        assert torch.allclose(difference(a, b).vector, (pos - neg)[0], rtol=0, atol=1e-6)
        assert torch.allclose(pca(a, b).vector * (pos - neg).norm(), (pos - neg)[0], rtol=0, atol=1e-5)


def test_pca_does_not_subtract_the_mean_difference() -> None:
    """Pairs that all differ by the same vector: a centred PCA would see nothing but noise."""
    base = torch.randn(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.arange(9.0, dtype=torch.float64)
    torch.testing.assert_close(pca(base + shift, base).vector.double(), shift / shift.norm(), rtol=0, atol=1e-6)


def activations(rows: Any, **kwargs: Any) -> Any:
    count = len(next(iter(rows.values())))
    return Activations(
        rows, **{"model": "M", "site": "resid_post", "position": "last", "text_index": torch.arange(count)} | kwargs
    )


def test_activations_give_a_direction_per_layer_that_knows_its_origin() -> None:
    pos, neg, _ = sides()
    single = mean_difference(activations({14: pos}), activations({14: neg}))
    typical = torch.cat([pos, neg]).norm(dim=1).quantile(0.5).item()
    assert single.method == "mean_difference"
    assert single.origin.typical_norm == pytest.approx(typical)
    assert replace(single.origin, typical_norm=None) == Origin("M", Place("resid_post", 14), "last")
    assert torch.equal(single.vector, mean_difference(pos, neg).vector)
    several = mean_difference(activations({14: pos, 3: 2 * pos}), activations({14: neg, 3: 2 * neg}))
    assert list(several) == [14, 3]
    assert several[3].origin.place.layer == 3
    torch.testing.assert_close(several[3].vector, 2 * single.vector)
    np.testing.assert_array_equal(np.asarray(single), single.vector.numpy())
    assert np.asarray(single, dtype=np.float64).dtype == np.float64
    assert repr(single).startswith("Direction(mean_difference of M, layer 14, resid_post: d 19, norm ")
    plain = mean_difference({14: pos}, {14: neg})  # any dict of layer -> tensor
    assert plain.origin.place == ("resid_post", 14)
    assert plain.origin.model is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("pos", "neg", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), "pos has width 4 and neg 5"),
        (torch.ones(0, 4), torch.ones(0, 4), r"pos has no rows, shape \(0, 4\)"),
        (torch.ones(3, 4), torch.ones(3, 4), r"pos and neg do not differ \(by 0 at a typical norm of 2\)"),
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), torch.ones(2, 2), "pos has NaN or Inf in 1 of 2 rows"),
        (torch.ones(2, 2), torch.full((2, 2), float("inf")), "neg has NaN or Inf in 2 of 2 rows"),
        (
            torch.ones(2, 2, dtype=torch.int64),
            torch.ones(2, 2),
            r"pos must be floating point of shape .* got torch.int64 \(2, 2\)",
        ),
        (torch.ones(2, 2, 2), torch.ones(2, 2), r"got torch.float32 \(2, 2, 2\)"),
        ({0: torch.ones(2, 2)}, torch.ones(2, 2), "give both as activations or both as tensors"),
        ({}, {}, "pos holds no layers"),
        ({0: torch.ones(2, 2)}, {1: torch.ones(2, 2)}, r"pos has layers \[0\] and neg \[1\]"),
        ({5: torch.ones(2, 2)}, {5: torch.ones(2, 2)}, "layer 5: pos and neg do not differ"),
        (
            activations({0: torch.ones(2, 2)}),
            activations({0: torch.ones(2, 2)}, site="attn_out"),
            "pos has site 'resid_post' and neg 'attn_out'",
        ),
        (
            activations({0: torch.ones(2, 2)}),
            activations({0: torch.ones(2, 2)}, model="N"),
            "pos has model 'M' and neg 'N'",
        ),
        (
            activations({0: torch.ones(2, 2)}),
            activations({0: torch.ones(2, 2)}, position=-1),
            "pos has position 'last' and neg -1",
        ),
    ],
)
def test_direction_errors(method: Any, pos: Any, neg: Any, message: Any) -> None:
    with pytest.raises(ValueError, match=f"^{method.__name__}: .*{message}"):
        method(pos, neg)


@pytest.mark.parametrize("exact", [2000, 5])  # columns up to which the Hessian is factored
@pytest.mark.parametrize("C", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("shape", [(40, 19), (7, 19)])
def test_logistic_is_at_its_minimum_whatever_the_penalty(
    C: float, shape: tuple[int, int], exact: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(kernels, "EXACT", exact)
    pos, neg, _ = sides(shape[0], shape[0] + 3, shape[1])
    pos[:, 4] *= 30  # one entry outweighs the others
    expected = reference_logistic(pos.double().numpy(), neg.double().numpy(), C)
    found = logistic(pos, neg, C=C).vector.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.linalg.norm(expected))


def test_more_direction_errors(monkeypatch: Any) -> None:
    pos, neg, _ = sides()
    with pytest.raises(ValueError, match=r"^pca: project_out has width 5, pos and neg 19"):
        pca(pos, neg, project_out=torch.ones(5))
    with pytest.raises(ValueError, match=r"^mean_difference: nothing is left after project_out"):
        mean_difference(pos, neg, project_out=torch.eye(19))
    with pytest.raises(
        TypeError, match=r"^pca: project_out must be numbers of shape \(n, d\) or \(d,\), got list; several"
    ):
        pca(pos, neg, project_out=[torch.ones(19), torch.ones(19)])
    opposite = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"^difference: the differences of pos and neg cancel to zero; try pca"):
        difference(opposite, opposite.flip(0))
    for C in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^logistic: C must be (positive|finite)"):
            logistic(pos, neg, C=C)
    for word in ("auto", None):
        with pytest.raises(TypeError, match=rf"^logistic: C must be a number; got {word!r}"):
            logistic(pos, neg, C=word)
    ragged = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    tokens = [activations({0: pos[:3] + i}, position="all", text_index=index) for i, index in enumerate(ragged)]
    with pytest.raises(ValueError, match=r"^difference: needs pairs, but the texts of pos and neg differ in length"):
        difference(*tokens)
    assert mean_difference(*tokens).origin.position == "all"
    monkeypatch.setitem(__import__("sys").modules, "sklearn.linear_model", None)
    with pytest.raises(ModuleNotFoundError, match="logistic needs scikit-learn: pip install"):
        logistic(pos, neg)


@pytest.mark.model
def test_love_minus_hate_on_a_real_model(smollm: Any) -> None:
    """One real vector: each way of extracting it tells love from hate on prompts that it was not made from."""
    model, tokenizer = smollm
    made = [("I love you", "I hate you"), ("I love this film", "I hate this film"), ("She loves it", "She hates it")]
    unseen = [("They love the sea", "They hate the sea"), ("What a lovely day", "What a hateful day")]
    layer = 14

    def read(texts: Any) -> Activations:
        return collect(model, tokenizer, texts, layer, progress=False)

    pos, neg = (read(texts) for texts in zip(*made, strict=True))
    test_pos, test_neg = (read(texts) for texts in zip(*unseen, strict=True))
    assert pos[layer].shape == (3, 576)
    for method in METHODS:
        direction = method(pos, neg)
        assert (direction.origin.place.layer, direction.origin.model) == (layer, type(model).__name__)
        assert ((test_pos[layer] - test_neg[layer]) @ direction.vector > 0).all()


@pytest.mark.model
def test_the_docstrings_examples_run(smollm: Any) -> None:
    model, tokenizer = smollm
    names = dict(
        sf=SimpleNamespace(collect=collect, extract=extract, Plan=dict, Add=lambda direction, strength: direction),
        model=model,
        tokenizer=tokenizer,
        **{
            f"{word}_{kind}": [f"a {word} day", f"so {word}"]
            for word in ("kind", "rude", "happy", "sad")
            for kind in ("texts",)
        },
        true_statements=["Paris is in France.", "Two and two make four."],
        false_statements=["Paris is in Japan.", "Two and two make nine."],
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for function in (collect, *METHODS):
        for example in doctest.DocTestFinder().find(function, globs=names.copy()):
            assert example.examples
            runner.run(example)
    assert runner.summarize().failed == 0


def test_pairs_become_directions_in_one_call() -> None:
    model, tokenizer = build("llama"), TOKENIZER
    pairs = [("w3 w4 w5", "w6 w7"), ("w8 w9", "w10 w11 w12")]
    found = sf.directions_from(model, tokenizer, pairs, [0, -1], "pca", position="mean", site="mlp_out", normalize=True)
    sides = [
        sf.collect(model, tokenizer, list(side), [0, -1], "mean", "mlp_out", progress=False)
        for side in zip(*pairs, strict=True)
    ]
    expected = pca(*sides, normalize=True)
    assert list(found) == ["mlp_out.0", "mlp_out.2"]
    for one, two in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(one.vector, two.vector)
        assert one.origin == two.origin
    assert found.model == card(model)
    assert len(sf.directions_from(model, tokenizer, pairs)) == 3  # every layer


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([], ValueError, "pairs is empty"),
        ("love", TypeError, "expected a list of"),
        (3, TypeError, "expected a list of"),
        (["love", "hate"], TypeError, "'love' is no pair"),
        ([("a", "b", "c")], TypeError, "is no pair"),
    ],
)
def test_what_is_no_pair_is_refused(pairs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"directions_from: .*{message}"):
        sf.directions_from(None, None, pairs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is 'magic'; expected one of"):
        sf.directions_from(None, None, [("a", "b")], method="magic")  # type: ignore[arg-type]
