"""Ways people run models, and models that run their blocks in a way of their own: right, or refused by name."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from families import build, token_ids

import steerfast as sf
from steerfast.models.layers import find_layers

V5 = int(transformers.__version__.split(".")[0]) >= 5
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None}
TOKENS = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 80}


def v(seed: int = 0, width: int = 48) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def tiny(name: str, **settings: Any) -> Any:
    """A tiny model of a configuration class, with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**TOKENS | settings)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


@pytest.fixture
def llama() -> Any:
    return copy.deepcopy(build("llama"))


@contextmanager
def moved(model: Any, layer: int) -> Iterator[list[torch.Tensor]]:
    """The stream behind a block, once per pass, as a plain hook sees it."""
    seen: list[torch.Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, (tuple, list)) else output).detach().clone())

    hook = find_layers(model).blocks[layer].register_forward_hook(read)
    try:
        yield seen
    finally:
        hook.remove()


def columns(model: Any, positions: Any, run: Callable[[], Any], layer: int = 1) -> str:
    """Which columns of row 0 the first pass edited, as 0s and 1s."""
    with moved(model, layer) as clean:
        run()
    with sf.steer(model, sf.Plan({layer: sf.Add(v(), 3.0)}, positions)), moved(model, layer) as seen:
        run()
    return "".join(str(int(bit)) for bit in (seen[0][0] != clean[0][0]).any(-1))


# --- streams that are not (batch, tokens, width) ------------------------------------------------------------------------


@pytest.fixture
def cpmant() -> Any:
    return tiny(
        "CpmAntConfig",
        hidden_size=48,
        num_attention_heads=4,
        dim_head=12,
        dim_ff=80,
        num_hidden_layers=3,
        prompt_length=8,
    )


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("prompt", "000000001111"),
        ("generated", "000000000000"),
        ("last", "000000000001"),
        ([0], "000000001000"),
        ([-1], "000000000001"),
        (torch.tensor([True, False, True, False]), "000000001010"),
        ("all", "111111111111"),
    ],
)
def test_virtual_tokens_in_front_are_no_part_of_the_prompt(cpmant: Any, positions: Any, expected: str) -> None:
    ids = token_ids(1, 4, 0)
    for run in (lambda: cpmant(ids, use_cache=False), lambda: cpmant.generate(ids, **GREEDY)):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # "no token was edited", of a bare pass
            assert columns(cpmant, positions, run) == expected


def test_virtual_tokens_are_not_counted(cpmant: Any) -> None:
    ids = token_ids(1, 4, 0)
    with sf.steer(cpmant, sf.Plan({1: sf.Add(v())}, "prompt")) as handle:
        cpmant.generate(ids, **GREEDY)
    assert handle.stats() == [4]


@pytest.mark.skipif(not V5, reason="these came with transformers 5")
@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("XLNetConfig", {"d_model": 48, "n_layer": 3, "n_head": 4, "d_inner": 80}, "runs tokens first"),
        ("T5Config", {"d_model": 48, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 12}, "is an encoder-decoder"),
        ("BartConfig", {"d_model": 48, "encoder_layers": 2, "decoder_layers": 2}, "is an encoder-decoder"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_own_name(name: str, settings: dict, reason: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**TOKENS | settings)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with pytest.raises(TypeError, match=f"^steer: .*{reason}"):
        sf.steer(model, {1: sf.Add(v())})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def mllama() -> Any:
    """Text does not run its second block."""
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    config = MllamaTextConfig(
        **TOKENS | SMALL,
        num_key_value_heads=2,
        cross_attention_layers=[1],
        rope_theta=1e4,
        rope_scaling={"rope_type": "default"},
    )
    return transformers.MllamaForCausalLM(config).eval()


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "head_out"])
def test_a_block_that_is_never_run_cannot_be_read(mllama: Any, site: str) -> None:
    given: Any = {"inputs": [{"input_ids": token_ids(1, 5, 0)}], "site": site, "progress": False}
    with pytest.raises(
        ValueError, match=r"^collect: .* layer 1 cannot be read; text does not run that block: leave"
    ) as said:
        sf.collect(mllama, layers=[0, 1], **given)
    assert "resid_post" not in str(said.value)
    assert list(sf.collect(mllama, layers=[0, 2], **given)) == [0, 2]


def test_a_block_that_is_never_run_edits_nothing_and_says_so(mllama: Any) -> None:
    ids = token_ids(1, 5, 0)
    handle = sf.steer(mllama, {1: sf.Add(v())})
    with torch.no_grad():
        mllama(ids)
    with pytest.warns(RuntimeWarning, match="no token was edited"):
        handle.remove()
    assert handle.stats() == [0]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("OpenAIGPTConfig", {"n_embd": 48, "n_layer": 3, "n_head": 4}),
        ("DbrxConfig", {"d_model": 48, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    ],
)
def test_sites_that_are_no_parts_of_the_sum_are_refused(name: str, settings: dict) -> None:
    if name == "DbrxConfig":
        from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig, DbrxFFNConfig

        settings |= {
            "attn_config": DbrxAttentionConfig(kv_n_heads=2, clip_qkv=8, rope_theta=1e4),
            "ffn_config": DbrxFFNConfig(ffn_hidden_size=40, moe_num_experts=4, moe_top_k=2),
        }
    model = tiny(name, **settings)
    for site in ("attn_out", "mlp_out"):
        with pytest.raises(ValueError, match=r"^steer: cannot (steer or read|locate)"):
            sf.steer(model, {(site, 1): sf.Add(v())})
    with torch.no_grad(), sf.steer(model, {1: sf.Add(v())}) as handle:
        model(token_ids(1, 5, 0))
    assert handle.stats() == [5]


@pytest.fixture
def prompt_tuned(llama: Any) -> Any:
    """Three virtual tokens in front."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(llama, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("prompt", "000111111"),
        ("generated", "000000000"),
        ("last", "000000001"),
        ([0], "000100000"),
        ([-1], "000000001"),
        ("all", "111111111"),
    ],
)
@pytest.mark.parametrize("inner", [False, True])
def test_soft_prompts_are_no_part_of_the_prompt(prompt_tuned: Any, positions: Any, expected: str, inner: bool) -> None:
    """Whether the wrapper is steered or the model in it; a bare pass of the latter shows nothing but embeddings."""
    ids, steered = token_ids(1, 6, 0), prompt_tuned.base_model if inner else prompt_tuned
    runs = [lambda: prompt_tuned.generate(input_ids=ids, **GREEDY)]
    runs += [] if inner else [lambda: prompt_tuned(input_ids=ids)]
    for run in runs:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert columns(steered, positions, run) == expected


def test_padding_behind_soft_prompts_is_left_alone(prompt_tuned: Any) -> None:
    ids, mask = token_ids(2, 6, 0), torch.ones(2, 6, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    for run in (
        lambda: prompt_tuned.generate(input_ids=ids, attention_mask=mask, **GREEDY),
        lambda: prompt_tuned(input_ids=ids, attention_mask=mask),
    ):
        with torch.no_grad():
            assert columns(prompt_tuned, "prompt", run) == "000001111"
            assert columns(prompt_tuned, [0], run) == "000001000"


def test_a_condition_behind_soft_prompts_is_decided_at_the_last_token_of_the_text(prompt_tuned: Any) -> None:
    ids = token_ids(1, 6, 0)
    with torch.no_grad(), moved(prompt_tuned, 1) as seen:
        prompt_tuned(input_ids=ids)
    last = seen[0][0, -1]
    for above, expected in ((True, True), (False, False)):
        condition = sf.Condition(last, 0.99, above=above)
        with sf.steer(prompt_tuned, {2: sf.When(condition, sf.Add(v()), layer=1)}) as handle, torch.no_grad():
            prompt_tuned.generate(input_ids=ids, **GREEDY)
            assert handle.decisions()[0][0].tolist() == [expected]


def test_a_prefix_in_the_cache_is_no_part_of_the_prompt(llama: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for positions, expected in (("prompt", "111111"), ("generated", "000000"), ("last", "000001"), ([0], "100000")):
            assert columns(model, positions, lambda: model.generate(input_ids=token_ids(1, 6, 0), **GREEDY)) == expected


# --- models without a cache of keys and values ---------------------------------------------------------------------------

STATES = {
    "mamba": ("MambaConfig", {"hidden_size": 48, "num_hidden_layers": 3, "state_size": 4}),
    "openai-gpt": ("OpenAIGPTConfig", {"n_embd": 48, "n_layer": 3, "n_head": 4}),
}


@pytest.mark.skipif(not V5, reason="transformers 4 asks a hub for Mamba's kernels")
@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize(("positions", "count"), [("all", 9), ("prompt", 6), ("generated", 3), ("last", 4)])
def test_models_without_a_cache_are_followed_in_generate(kind: str, positions: str, count: int) -> None:
    """Against an uncached loop with a hook of one's own; each token is counted once, however often it runs."""
    name, settings = STATES[kind]
    model, ids = tiny(name, **settings), token_ids(1, 6, 0)
    with sf.steer(model, sf.Plan({1: sf.Add(v(), 3.0)}, positions)) as handle:
        out = model.generate(ids, **GREEDY, output_logits=True, return_dict_in_generate=True)
    assert handle.stats() == [count]
    for step in range(4):
        text = out.sequences[:, : 6 + step]
        here = torch.arange(text.shape[1])
        chosen = {"all": here >= 0, "prompt": here < 6, "generated": here >= 6, "last": here >= 5}[positions]

        def add(module: Any, args: Any, output: Any, chosen: Any = chosen) -> Any:
            x = output[0] if isinstance(output, (tuple, list)) else output
            new = x + 3.0 * v() * chosen[:, None]
            return type(output)((new, *output[1:])) if isinstance(output, (tuple, list)) else new

        hook = find_layers(model).blocks[1].register_forward_hook(add)
        with torch.no_grad():
            expected = model(text).logits[0, -1]
        hook.remove()
        torch.testing.assert_close(out.logits[step][0], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not V5, reason="transformers 4 asks a hub for Mamba's kernels")
def test_padding_of_a_model_without_a_cache_is_left_alone() -> None:
    name, settings = STATES["mamba"]
    model = tiny(name, **settings)
    ids, mask = token_ids(2, 6, 0), torch.ones(2, 6, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    with torch.no_grad(), moved(model, 1) as clean:
        model(ids, attention_mask=mask)
    with torch.no_grad(), sf.steer(model, {1: sf.Add(v())}) as handle, moved(model, 1) as seen:
        model(ids, attention_mask=mask)
    assert (seen[0] != clean[0]).any(-1).tolist() == mask.bool().tolist()
    assert handle.stats() == [10]
    with sf.steer(model, sf.Plan({1: sf.Add(v())}, "generated")) as handle:
        model.generate(ids, attention_mask=mask, **GREEDY)
    assert handle.stats() == [6]
    bare = sf.steer(model, sf.Plan({1: sf.Add(v())}, "generated"))
    with pytest.raises(ValueError, match="a bare pass does not show where it begins"), torch.no_grad(), bare:
        model(ids)


@pytest.mark.skipif(not V5, reason="the state of transformers 4's RWKV is a list of another kind")
def test_a_mask_that_only_the_outer_model_sees_leaves_padding_alone() -> None:
    model = tiny("RwkvConfig", hidden_size=48, attention_hidden_size=48, num_hidden_layers=3, intermediate_size=80)
    ids, mask = token_ids(2, 6, 0), torch.ones(2, 6, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    with torch.no_grad(), moved(model, 1) as clean:
        model(ids, attention_mask=mask)
    with torch.no_grad(), sf.steer(model, {1: sf.Add(v())}) as handle, moved(model, 1) as seen:
        model(ids, attention_mask=mask)
    assert (seen[0] != clean[0]).any(-1).tolist() == mask.bool().tolist()
    assert handle.stats() == [10]


# --- models that generate nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", "111111"),
        ("prompt", "111111"),
        ("generated", "000000"),
        ("last", "000001"),
        ("0", "100000"),
        ("-2", "000010"),
    ],
)
def test_a_head_of_another_kind_shows_its_prompt_in_a_bare_pass(head: str, positions: str, expected: str) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, f"LlamaFor{head}")(copy.deepcopy(build("llama").config)).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert columns(model, positions, lambda: model(token_ids(1, 6, 0))) == expected
    with pytest.raises(ValueError, match=r"on a bare decoder .* steer that model instead"):
        sf.steer(model.base_model, sf.Plan({1: sf.Add(v())}, "last"))


# --- threads, and what outlives a block ---------------------------------------------------------------------------------


def test_two_plain_passes_at_once_with_other_padding(llama: Any) -> None:
    """Each thread has a pass of its own: 100 passes in each give the logits that they give alone."""
    inputs = []
    for seed, pads in ((0, 1), (1, 4)):
        ids, mask = token_ids(2, 6 + seed, seed), torch.ones(2, 6 + seed, dtype=torch.long)
        ids[0, :pads], mask[0, :pads] = 0, 0
        inputs.append({"input_ids": ids, "attention_mask": mask})
    wrong: list[int] = []
    with sf.steer(llama, sf.Plan({1: sf.Add(v(), 3.0), 2: sf.Ablate(v(1))}, "prompt")), torch.no_grad():
        alone = [llama(**given).logits for given in inputs]

        def run(which: int) -> None:
            with torch.no_grad():
                for _ in range(100):
                    if not torch.equal(llama(**inputs[which]).logits, alone[which]):
                        wrong.append(which)

        threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_blocks_in_two_threads_leave_the_model_as_it_was(llama: Any) -> None:
    errors: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            for _ in range(20):
                with torch.no_grad(), sf.steer(llama, {1: sf.Add(v(seed))}):
                    llama(token_ids(1, 4, seed))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert "generate" not in vars(llama)
    assert "_steerfast" not in vars(llama)
    assert llama.generate(token_ids(1, 4, 0), **GREEDY).shape == (1, 8)


def test_generate_kept_from_inside_a_block(llama: Any) -> None:
    ids = token_ids(1, 5, 0)
    clean = llama.generate(ids, **GREEDY)
    with sf.steer(llama, {1: sf.Add(v(), 5.0)}):
        kept, steered = llama.generate, llama.generate(ids, **GREEDY)
    assert not torch.equal(clean, steered)
    assert torch.equal(kept(ids, **GREEDY), clean)
    with sf.steer(llama, {1: sf.Add(v(), 5.0)}) as later:
        assert torch.equal(kept(ids, **GREEDY), steered)
    assert later.stats() == [8]


def test_a_streamer_whose_block_is_left_says_so(llama: Any) -> None:
    begun, left = threading.Event(), threading.Event()

    class Slow:
        def put(self, value: Any) -> None:
            begun.set()
            left.wait(20)

        def end(self) -> None:
            pass

    handle = sf.steer(llama, {1: sf.Add(v())})
    thread = threading.Thread(target=lambda: llama.generate(token_ids(1, 5, 0), **GREEDY, streamer=Slow()))
    thread.start()
    assert begun.wait(20)
    with pytest.warns(RuntimeWarning, match="still running in another thread"):
        handle.remove()
    left.set()
    thread.join()
    assert "generate" not in vars(llama)


def test_reset_and_active(llama: Any) -> None:
    assert sf.active(llama) == []
    hooks = sum(len(module._forward_hooks) for module in llama.modules())
    first, second = sf.steer(llama, {1: sf.Add(v())}), sf.steer(llama, {2: sf.Add(v())})
    assert sf.active(llama) == [first, second]
    with pytest.warns(RuntimeWarning, match="no token was edited"):
        sf.reset(llama)
    assert sf.active(llama) == []
    assert sum(len(module._forward_hooks) for module in llama.modules()) == hooks
    sf.reset(llama)


# --- the second turn of a chat -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last", [0], [-1], [6]])
def test_only_the_new_tokens_beside_a_cache_are_as_the_whole_prompt(llama: Any, positions: Any) -> None:
    ids, mask = token_ids(1, 9, 0), torch.ones(1, 9, dtype=torch.long)
    plan = sf.Plan({1: sf.Add(v(), 3.0)}, positions)
    name = "cache" if "cache" in inspect.signature(llama.forward).parameters else "past_key_values"

    def generate(given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            cache = llama(ids[:, :5], use_cache=True)[1]
        with warnings.catch_warnings(), sf.steer(llama, plan):
            warnings.simplefilter("ignore", RuntimeWarning)
            return llama.generate(given, attention_mask=mask, **{name: cache}, **GREEDY)[:, -4:]

    assert torch.equal(generate(ids[:, 5:]), generate(ids))


def test_a_prompt_that_a_cache_does_not_explain_is_refused(llama: Any) -> None:
    ids = token_ids(1, 9, 0)
    with torch.no_grad():
        cache = llama(ids[:, :5], use_cache=True)[1]
    with sf.steer(llama, sf.Plan({1: sf.Add(v())})):
        for given in ({"attention_mask": torch.ones(1, 7, dtype=torch.long)}, {}):
            with pytest.raises(ValueError, match="steer: generate was given a cache of 5 tokens"):
                llama.generate(ids[:, 5:], past_key_values=cache, **given, **GREEDY)
        sf.reset(llama)
