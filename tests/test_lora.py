"""Adapters against the hook, by PEFT itself: what equals what, and what is refused by name."""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

import steerfast as sf
from steerfast.cli.main import main
from steerfast.tools.convert import convert, show
from steerfast.tools.lora import describe_lora, write_lora

peft = pytest.importorskip("peft")

POST_NORM = ("gemma3", "gemma2", "olmo2", "glm4")
STACKED = ("mixtral", "qwen2_moe", "gpt_oss")
BIASED = [name for name in FAMILIES if name.startswith(("gpt2", "gpt_neo", "falcon", "gptj")) or name in ("phi", "opt")]
PLAIN = [name for name in FAMILIES if name not in (*POST_NORM, *STACKED, *BIASED, "bloom")]
CLOSE = {"atol": 5e-5, "rtol": 2e-5}


def directions(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 48, generator=torch.Generator().manual_seed(seed))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(2, 6), use_cache=False).logits


def hooked(model: Any, plan: Any) -> torch.Tensor:
    with sf.steer(model, plan):
        return logits(model)


def adapted(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of base layers without a bias, and of tied embeddings, when merged
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return peft.PeftModel.from_pretrained(deepcopy(model), folder).eval()


def check(model: Any, plan: Any, folder: Path, engine: str) -> Any:
    """With the adapter the hooked model, without it the base, bit for bit."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clean, expected = logits(model), hooked(model, plan)
    assert write_lora(model, plan, folder, engine) == folder
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    both = adapted(model, folder)
    torch.testing.assert_close(logits(both), expected, **CLOSE)
    assert (clean - expected).abs().max() > 0.05
    with both.disable_adapter():
        assert torch.equal(logits(both), clean)
    return both


@pytest.mark.parametrize("name", PLAIN)
def test_an_ablation_everywhere_is_an_adapter_of_its_rank(name: str, tmp_path: Path) -> None:
    model = build(name)
    check(model, sf.tools.everywhere(model, sf.Ablate(directions())), tmp_path / "adapter", "any")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_bias"], config["modules_to_save"]) == (2, 2, False, None)
    assert len(config["target_modules"]) == 1 + 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", BIASED)
def test_where_projections_have_biases_peft_alone_reads_it(name: str, tmp_path: Path) -> None:
    model = build(name)
    plan = sf.tools.everywhere(model, sf.Ablate(directions()))
    check(model, plan, tmp_path / "adapter", "peft")


def test_a_plan_of_every_kind_of_edit_is_one_adapter(tmp_path: Path) -> None:
    """Llama has no biases: PEFT adds one behind each projection. Chains, ranks of all sizes, an addition to the embedding."""
    model = build("llama")
    u, v, r = directions(3)
    plan = {
        1: [sf.Add(v, 2.0), sf.Add(u, -0.5)],
        ("attn_out", 0): [sf.Ablate(r), sf.Add(u), sf.Ablate(torch.stack([u, v]))],
        ("mlp_out", 0): [sf.Ablate(u), sf.Ablate(r)],
        ("resid_pre", 0): [sf.Ablate(torch.stack([u, v, r])), sf.Add(r, 0.5)],
        ("resid_pre", -1): sf.Add(r, 0.5),
    }
    both = check(model, plan, tmp_path / "adapter", "peft")
    saved = both.state_dict()
    assert any(name.endswith("embed_tokens.modules_to_save.default.weight") for name in saved)
    assert "PEFT alone" in describe_lora(tmp_path / "adapter")


def test_an_addition_at_the_embedding_is_one_more_rank(tmp_path: Path) -> None:
    model = build("llama")
    u, r = directions()
    check(model, {("resid_pre", 0): [sf.Add(u, 3.0), sf.Ablate(r), sf.Add(u)]}, tmp_path / "adapter", "any")
    assert "rank 2, 1 weights" in describe_lora(tmp_path / "adapter")
    check(
        build("gpt2"), {("resid_pre", 0): sf.Add(u)}, tmp_path / "alone", "any"
    )  # one of its two embeddings carries it


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "granite", "opt"])
def test_an_embedding_that_multiplies_or_counts_by_itself_is_written_as_it_reaches_the_stream(
    name: str, tmp_path: Path
) -> None:
    """Gemma's multiplies its rows, and PEFT what it adds to them; Granite's are multiplied outside; OPT's count positions."""
    model, (u, r) = build(name), directions()
    check(model, {("resid_pre", 0): [sf.Add(u, 3.0), sf.Ablate(r), sf.Add(u)]}, tmp_path / "both", "peft")
    check(model, {("resid_pre", 0): sf.Add(u, 2.0)}, tmp_path / "added", "any")
    if name != "opt":
        check(model, {("resid_pre", 0): sf.Ablate(r)}, tmp_path / "ablated", "any")


def test_a_scaled_residual_keeps_the_vector_whole(tmp_path: Path) -> None:
    check(build("granite"), {1: sf.Add(directions()[0], 2.0)}, tmp_path / "adapter", "peft")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tied_head_reads_the_stream_as_before(name: str, tmp_path: Path) -> None:
    config = deepcopy(build(name).config)
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plan = sf.tools.everywhere(model, sf.Ablate(directions()))
    check(model, plan, tmp_path / "adapter", "any" if name == "llama" else "peft")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_in_one_tensor_are_peft_s_alone(name: str, tmp_path: Path) -> None:
    model = build(name)
    plan = sf.tools.everywhere(model, sf.Ablate(directions()))
    with pytest.raises(ValueError, match=r"mlp_out .*experts holds all experts in one tensor.* engine=\"peft\""):
        write_lora(model, plan, tmp_path / "adapter")
    check(model, plan, tmp_path / "adapter", "peft")


_ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
_ONE = {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
SHARED: dict[str, dict[str, Any]] = {
    "glm4_moe": {**_ROUTED, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "llama4_text": {**_ONE, "intermediate_size_mlp": 40},
    "llama4_text square": {**_ONE, "intermediate_size": 48},
}
"""Mixtures with a dense projection or a shared expert of the experts' name, or with the stream along their last axis."""


def mixture(name: str) -> Any:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.for_model(
        name.split()[0], **{**shape, "vocab_size": 101, "head_dim": 8, "pad_token_id": 0, **SHARED[name]}
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", SHARED)
def test_what_has_the_name_of_the_experts_is_not_moved_to_them(name: str, tmp_path: Path) -> None:
    """PEFT does that to target_modules, and only warns of what it then misses."""
    model = mixture(name)
    check(model, sf.tools.everywhere(model, sf.Ablate(directions())), tmp_path / "adapter", "peft")
    check(model, {("mlp_out", 0): sf.Ablate(directions())}, tmp_path / "one", "peft")


def test_a_dense_layer_beside_experts_is_no_module_for_any_engine(tmp_path: Path) -> None:
    plan = {("mlp_out", 0): sf.Ablate(directions())}
    with pytest.raises(ValueError, match=r"PEFT takes model.layers.0.mlp.down_proj for a part of the experts"):
        write_lora(mixture("glm4_moe"), plan, tmp_path / "adapter")


def test_a_bias_beside_experts_is_refused(tmp_path: Path) -> None:
    plan = {("mlp_out", 1): sf.Ablate(directions()), ("attn_out", 1): sf.Add(directions()[0])}
    with pytest.raises(ValueError, match=r"PEFT takes no lora_bias .*o_proj\) beside a target_parameter .*experts\)"):
        write_lora(build("mixtral"), plan, tmp_path / "adapter", "peft")
    assert not (tmp_path / "adapter").exists()


REFUSED = [
    *((name, {("mlp_out", 0): sf.Ablate(directions())}, "any", "a norm .* stands between") for name in POST_NORM),
    ("bloom", {("resid_pre", 0): sf.Ablate(directions())}, "any", "not the sum of its embeddings"),
    (
        "llama",
        {1: sf.Ablate(directions())},
        "any",
        r"lora: Ablate at resid_post 1 also removes what earlier layers wrote",
    ),
    ("llama", {1: sf.Amplify(directions(), 0.5)}, "any", "lora: Amplify at resid_post 1 is not linear"),
    ("llama", {1: sf.Add(directions()[0], keep_norm=True)}, "peft", "lora: .* keep_norm=True"),
    ("llama", sf.Plan({1: sf.Add(directions()[0])}, positions="last"), "peft", "lora: weights act at every position"),
    ("llama", {1: sf.Add(directions()[0])}, "any", r"Add at mlp_out 1: .*down_proj is a lora_bias.*engine=\"peft\""),
    ("gpt2", {("attn_out", 1): sf.Ablate(directions())}, "any", r"Ablate at attn_out 1: .*c_proj is a lora_bias"),
    ("mixtral", {1: sf.Add(directions()[0])}, "peft", "Add at mlp_out 1: .* has no bias of its own"),
    ("gpt_oss", {("mlp_out", 1): sf.Ablate(directions())}, "peft", r"each expert of .* has a bias \(down_proj_bias\)"),
    ("llava", {("resid_pre", 0): sf.Ablate(directions())}, "any", "images enter the stream"),
    ("llama", {("attn_out", 1): sf.Ablate(directions())}, "vllm", "engine"),
    (
        "opt",
        {("resid_pre", 0): sf.Ablate(directions())},
        "any",
        "embed_positions takes other rows than its input names",
    ),
]


@pytest.mark.parametrize(("name", "plan", "engine", "message"), REFUSED)
def test_what_no_adapter_says_is_refused_by_name(
    name: str, plan: Any, engine: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_lora(build(name), plan, tmp_path / "adapter", engine)
    assert not (tmp_path / "adapter").exists()


def test_a_plan_is_converted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = deepcopy(build("llama"))
    model.save_pretrained(tmp_path / "model")
    plan = sf.tools.everywhere(model, sf.Ablate(directions(1))).save(tmp_path / "plan")
    with pytest.raises(ValueError, match="an adapter is a change of weights, made from them; give the model"):
        convert(plan, tmp_path / "adapter", "lora")
    folder = convert(plan, tmp_path / "adapter", "lora", model=model)
    torch.testing.assert_close(logits(adapted(model, folder)), hooked(model, sf.Plan.load(plan)), **CLOSE)
    assert show(folder).splitlines()[0] == (
        "LoRA adapter  rank 1, 7 weights, model.embed_tokens to model.layers.2.self_attn.o_proj"
    )
    assert show(folder).endswith("read by       PEFT, vLLM")
    with pytest.raises(FileExistsError, match="adapter exists"):
        write_lora(model, sf.Plan.load(plan), folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="adapter of the type 'IA3'; expected LORA"):
        show(folder)
    assert main(["plan", "convert", str(plan), str(tmp_path / "none"), "--to", "lora"]) != 0
    assert "--model" in capsys.readouterr().err


@pytest.mark.model
def test_a_real_model(smollm: Any, tmp_path: Path) -> None:
    """SmolLM2, whose head is tied: adapter and hook write the same text, and one batch asks for both."""
    model, tokenizer = smollm
    r = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    plan = sf.tools.everywhere(model, sf.Ablate(r))
    inputs = tokenizer(["The weather today is", "The weather today is"], return_tensors="pt")
    with torch.no_grad():
        clean = model(**inputs).logits
        with sf.steer(model, plan):
            expected = model(**inputs).logits
    both = adapted(model, write_lora(model, plan, tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(both(**inputs).logits, expected, atol=1e-3, rtol=1e-4)
        got = both(**inputs, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(got[0], expected[0], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(got[1], clean[1], atol=1e-3, rtol=1e-4)
    assert (clean - expected).abs().max() > 0.1
