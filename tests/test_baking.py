"""Baked weights against the hook: what equals what, what is refused, and that the checkpoint is an ordinary one."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from families import FAMILIES, MIXTURES, build, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

import steerfast as sf
from steerfast.tools.bake import bake, everywhere

POST_NORM = ("gemma3", "gemma2", "olmo2", "glm4")
ABLATED = [name for name in FAMILIES if name not in (*POST_NORM, "bloom")]
OUTPUT_BIAS = [
    name for name in FAMILIES if name.startswith(("gpt2", "gpt_neo", "falcon")) or name in ("bloom", "phi", "opt")
]
# Of the largest logit, 5: the same sums in another order, through three layers.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def directions(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed))


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 6), use_cache=False, **more).logits


def hooked(model: Any, plan: Any) -> torch.Tensor:
    with sf.steer(model, plan):
        return logits(model)


@pytest.mark.parametrize("name", ABLATED)
def test_an_ablation_everywhere_is_orthogonalised_weights(name: str, tmp_path: Any) -> None:
    model = deepcopy(build(name))
    plan = everywhere(model, sf.Ablate(directions()))
    assert set(plan.edits) == {
        ("resid_pre", 0),
        *((s, i) for s in ("attn_out", "mlp_out") for i in range(_count(model))),
    }
    clean, expected = logits(model), hooked(model, plan)
    assert bake(model, plan) is model
    got = logits(model)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (clean - got).abs().max() > 0.05
    model.save_pretrained(tmp_path)  # an ordinary checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert torch.equal(logits(again.eval()), got)


def _count(model: Any) -> int:
    return model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_autocast_around_it_changes_no_weight(name: str) -> None:
    """Neither the products that are written, nor what is taken for a writer."""
    alone, other = (deepcopy(build(name)) for _ in range(2))
    plan = everywhere(alone, sf.Ablate(directions()))
    bake(alone, plan)
    with torch.autocast("cpu", torch.bfloat16):
        bake(other, plan)
    assert all(torch.equal(weight, other.state_dict()[key]) for key, weight in alone.state_dict().items())


def test_the_direction_never_arises_in_the_stream() -> None:
    model, r = deepcopy(build("gpt2")), directions(1)[0]
    bake(model, everywhere(model, sf.Ablate(r)))
    with torch.no_grad():
        hidden = model(token_ids(2, 6), output_hidden_states=True).hidden_states
    for stream in hidden[:-1]:  # the last is normed
        assert (stream @ (r / r.norm())).abs().max() <= 1e-5 * stream.norm(dim=-1).max()


@pytest.mark.parametrize("name", ["gpt_neox", "phi"])
def test_parallel_blocks_equal_ablation_of_the_stream_itself(name: str) -> None:
    """Where attention and MLP both read the block's input, ablating after every block is the same."""
    model, edit = deepcopy(build(name)), sf.Ablate(directions())
    stream = hooked(model, {("resid_pre", 0): edit, **dict.fromkeys(range(_count(model)), edit)})
    torch.testing.assert_close(logits(bake(model, everywhere(model, edit))), stream, **CLOSE)


def test_sequential_blocks_do_not() -> None:
    """There the MLP reads the stream with the attention's unablated output in it."""
    model, edit = deepcopy(build("llama")), sf.Ablate(directions())
    stream = hooked(model, {("resid_pre", 0): edit, **dict.fromkeys(range(_count(model)), edit)})
    assert (logits(bake(model, everywhere(model, edit))) - stream).abs().max() > 1e-2


@pytest.mark.parametrize("name", OUTPUT_BIAS)
def test_a_vector_is_a_bias(name: str) -> None:
    model = deepcopy(build(name))
    u, v, r = directions(3)
    plan = sf.Plan(
        {
            1: [sf.Add(v, 2.0), sf.Add(u, -0.5)],
            ("attn_out", 0): [sf.Ablate(r), sf.Add(u)],
            ("mlp_out", 1): [sf.Add(r), sf.Ablate(torch.stack([u, r]))],
            ("resid_pre", -1): sf.Add(r, 0.5),
        }
    )
    clean, expected = logits(model), hooked(model, plan)
    torch.testing.assert_close(logits(bake(model, plan)), expected, **CLOSE)
    assert (clean - expected).abs().max() > 0.1


def test_llama_takes_a_vector_where_its_config_has_a_bias(tmp_path: Any) -> None:
    config = deepcopy(build("llama").config)
    config.mlp_bias = config.attention_bias = True
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    plan = {1: sf.Add(directions()[0], 2.0), ("attn_out", 0): sf.Add(directions()[1])}
    expected = hooked(model, plan)
    got = logits(bake(model, plan))
    torch.testing.assert_close(got, expected, **CLOSE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert torch.equal(logits(again.eval()), got)


def test_a_scaled_residual_keeps_the_vector_whole() -> None:
    """Granite multiplies what a block adds by 0.22: the bias carries v / 0.22."""
    config = deepcopy(build("granite").config)
    config.mlp_bias = True
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    plan = {1: sf.Add(directions()[0], 2.0)}
    expected = hooked(model, plan)
    torch.testing.assert_close(logits(bake(model, plan)), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_head_is_untied_first_and_said(name: str, tmp_path: Any) -> None:
    config = deepcopy(build(name).config)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    before = head.weight.detach().clone()
    plan = everywhere(model, sf.Ablate(directions()))
    expected = hooked(model, plan)
    with pytest.warns(UserWarning, match="the head shared the embedding's weights; it now has its own copy"):
        bake(model, plan)
    assert torch.equal(head.weight, before)  # it reads the stream and is left alone
    got = logits(model)
    torch.testing.assert_close(got, expected, **CLOSE)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert torch.equal(logits(again.eval()), got)


def test_a_tied_head_stays_tied_where_the_embedding_is_left_alone() -> None:
    config = deepcopy(build("llama").config)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bake(model, {("attn_out", 1): sf.Ablate(directions())})
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_generation_and_padding_equal_the_hooks() -> None:
    model, ids = deepcopy(build("llama")), token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = ids[1, :3] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    plan = everywhere(model, sf.Ablate(directions()))
    with sf.steer(model, plan):
        expected = model.generate(ids, **settings, output_logits=True, return_dict_in_generate=True)
    got = bake(model, plan).generate(ids, **settings, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)


def test_half_precision_errs_by_the_rounding_of_its_weights() -> None:
    """Against the float32 truth of the same bfloat16 weights, baking errs at most twice what the hook errs."""
    half = deepcopy(build("gpt2")).bfloat16()
    plan = everywhere(half, sf.Ablate(directions()))
    true = hooked(deepcopy(half).float(), plan)
    hook_error = (hooked(half, plan).float() - true).abs().max()
    bake_error = (logits(bake(half, plan)).float() - true).abs().max()
    assert bake_error <= 2 * hook_error


POSITIONS = [
    sf.Plan({("attn_out", 1): sf.Ablate(directions())}, positions=p) for p in ("prompt", "generated", "last", [0])
]


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        *(("llama", plan, "weights act at every position") for plan in POSITIONS),
        ("llama", {1: sf.Ablate(directions())}, r"Ablate at resid_post 1 also removes what earlier layers wrote"),
        ("llama", {("resid_pre", 2): sf.Ablate(directions())}, r"Ablate at resid_pre 2 also removes"),
        ("llama", {1: sf.Amplify(directions(), 0.5)}, r"Amplify at resid_post 1 is not linear"),
        ("llama", {1: sf.Calibrate(directions(), 0.5)}, r"Calibrate at resid_post 1 is not linear"),
        (
            "llama",
            {1: sf.Flow(sf.Barrier(torch.eye(48)[:1], torch.zeros(1), torch.ones(1)), angle=0.3)},
            r"Flow at resid_post 1 is not linear",
        ),
        ("gpt2", {1: sf.Add(directions()[0], keep_norm=True)}, r"keep_norm=True"),
        ("gpt2", {("head_out", 1): sf.Add(directions()[0])}, r"before the attention's output projection"),
        ("gpt2", {("resid_pre", 0): sf.Add(directions()[0])}, r"add at resid_post of a layer"),
        ("llama", {1: sf.Add(directions()[0])}, r"model.layers.1.mlp.down_proj of this LlamaForCausalLM has no bias"),
        ("llama", {("attn_out", 3): sf.Ablate(directions())}, r"bake: layer 3 is out of range"),
        ("llama", {("attn_out", 1): sf.Ablate(torch.ones(50))}, r"width \[50\]; LlamaForCausalLM has 48"),
        ("bloom", {("resid_pre", 0): sf.Ablate(directions())}, r"BloomForCausalLM is not the sum of its embeddings"),
        ("bloom", "nonsense", "expected a Plan or a dict"),
        *((name, {("mlp_out", 0): sf.Ablate(directions())}, "a norm .* stands between") for name in POST_NORM),
        *(
            (name, {1: sf.Add(directions()[0])}, "a part of a mixture of experts, which has no bias")
            for name in MIXTURES
        ),
    ],
)
def test_what_cannot_be_baked_is_refused_and_nothing_changes(name: str, plan: Any, message: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        bake(model, plan)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if _ours(module))


def _ours(module: nn.Module) -> bool:
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any("steerfast" in getattr(hook, "__module__", "") for hook in hooks)


def test_a_plan_is_refused_as_a_whole() -> None:
    """The first edit could be baked, the second cannot: neither is."""
    model = deepcopy(build("llama"))
    before = logits(model)
    with pytest.raises(ValueError, match="has no bias"):
        bake(model, {("attn_out", 0): sf.Ablate(directions()), 1: sf.Add(directions()[0])})
    assert torch.equal(logits(model), before)


def test_a_steered_a_quantised_and_an_adapted_model_are_refused() -> None:
    model, plan = deepcopy(build("llama")), {("mlp_out", 1): sf.Ablate(directions())}
    with sf.steer(model, {1: sf.Add(directions()[0])}):
        logits(model)
        with pytest.raises(RuntimeError, match="is being steered"):
            bake(model, plan)
    model.config.quantization_config = {"quant_method": "some"}
    with pytest.raises(ValueError, match="quantised weights"):
        bake(model, plan)
    del model.config.quantization_config
    projection = model.model.layers[1].mlp.down_proj
    plain = type(projection).forward
    projection.forward = lambda x: plain(projection, x) + 0.1 * x.mean(-1, keepdim=True)  # what an adapter does
    with pytest.raises(ValueError, match="an adapter"):
        bake(model, plan)


def test_weights_that_others_share_are_refused() -> None:
    model = deepcopy(build("llama"))
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj .* shares its weights with model.layers.2.mlp.down_proj"
    ):
        bake(model, {("mlp_out", 1): sf.Ablate(directions())})


def test_embeddings_that_later_blocks_read_too_are_refused_at_the_embedding() -> None:
    """As in Zamba and Gemma 4: a hook on the stream does not reach what the second block reads of them."""
    model, plan = deepcopy(build("llama")), {("resid_pre", 0): sf.Ablate(directions())}
    read: list[torch.Tensor] = []
    model.model.rotary_emb.register_forward_pre_hook(lambda _, args: read.append(args[0]))  # is given the embeddings
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] + 0.1 * read[-1], *args[1:]))
    before = logits(model)
    with pytest.raises(ValueError, match="the embeddings of LlamaForCausalLM reach more than its first block"):
        bake(model, plan)
    assert torch.equal(logits(model), before)


def test_an_embedding_that_norms_its_rows_is_refused() -> None:
    model = deepcopy(build("llama"))
    model.model.embed_tokens.register_forward_hook(lambda _, __, output: nn.functional.normalize(output, dim=-1))
    with pytest.raises(ValueError, match="is not the sum of its embeddings"):
        bake(model, {("resid_pre", 0): sf.Ablate(directions())})


def test_a_model_with_images_is_refused_at_the_embedding() -> None:
    model = build("llava")
    with pytest.raises(ValueError, match="images enter the stream beside the embeddings"):
        bake(model, {("resid_pre", 0): sf.Ablate(directions())})


@pytest.mark.model
def test_a_real_model(smollm: Any) -> None:
    """SmolLM2, whose head is tied: the baked model writes the same text as the hooked one."""
    original, tokenizer = smollm
    model = deepcopy(original)
    r = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plan = everywhere(model, sf.Ablate(r))
    inputs = tokenizer("The weather today is", return_tensors="pt")
    with torch.no_grad(), sf.steer(model, plan):
        expected = model(**inputs).logits
    with pytest.warns(UserWarning, match="its own copy"):
        bake(model, plan)
    with torch.no_grad():
        got = model(**inputs).logits
        clean = original(**inputs).logits
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
    assert (clean - expected).abs().max() > 0.1
