"""An intervention on activations alone gives what it gives in a steered model, bit for bit; and refuses by name."""

from __future__ import annotations

import pytest
import torch
from places import ROADS, backend
from test_interventions import EXAMPLES, D
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import steerfast as sf

READ, ACT, TOKENS = 1, 2, 7
PLAIN = [name for name, (edit, _) in EXAMPLES.items() if not isinstance(edit, sf.When)]


def model(dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=101, max_position_embeddings=64, tie_word_embeddings=False)
    made = LlamaForCausalLM(config).eval().to(device, dtype)
    made.model.embed_tokens.weight.data.mul_(50)  # so that conditions and thresholds are met by some tokens
    return made


def streams(llama: nn.Module, plan: dict | None = None, strength: float = 1.0) -> list[Tensor]:
    """What leaves every layer, of two texts."""
    kept: list[Tensor] = []
    ids = torch.arange(2 * TOKENS).view(2, TOKENS).to(llama.device)

    def keep(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        kept.append((output if isinstance(output, Tensor) else output[0]).clone())

    def run() -> None:
        hooks = [block.register_forward_hook(keep) for block in llama.model.layers]
        with torch.no_grad():
            llama(ids, use_cache=False)
        for hook in hooks:
            hook.remove()

    if plan is None:
        run()
    else:
        with sf.steer(llama, plan, strength=strength, prompt_length=TOKENS):
            run()
    return kept


def topk_edit() -> sf.EditFeatures:
    torch.manual_seed(1)
    return sf.EditFeatures(sf.SAE(torch.randn(40, D), torch.randn(40, D), k=5), {3: 2.0, 8: 1.0})


EDITS = {**{name: EXAMPLES[name][0] for name in PLAIN}, "Top-K": topk_edit(), "kept": sf.Add(torch.ones(D), 3.0, True)}


@pytest.mark.parametrize("place", ROADS)
@pytest.mark.parametrize("name", EDITS)
def test_it_is_what_a_steered_model_does(place: str, name: str) -> None:
    """Of any dtype and strength, for all tokens of a plan and for a table of single ones."""
    with backend(place) as device:
        for dtype in (torch.float16,) if place == "interpreter" else (torch.float32, torch.bfloat16):
            llama, edit = model(dtype, device), EDITS[name]
            before = streams(llama)[ACT]
            for strength in (1.0,) if place == "interpreter" else (1.0, -0.5):
                after = streams(llama, {ACT: edit}, strength)[ACT]
                got = edit.apply(before, strength)
                assert got.dtype == dtype
                assert torch.equal(got, after)
            assert not torch.equal(after, before)
            assert torch.equal(edit.apply(before, 0.0), before)
            some = sf.Plan({ACT: edit}, positions=[1, 4])
            mask = torch.zeros(2, TOKENS, device=device)
            mask[:, [1, 4]] = -0.5
            assert torch.equal(edit.apply(before, mask), streams(llama, some, -0.5)[ACT])


@pytest.mark.parametrize("place", ROADS)
@pytest.mark.parametrize("then", ["Add", "Rotate", "Top-K"])
def test_conditions_read_what_they_are_given(place: str, then: str) -> None:
    with backend(place) as device:
        llama = model(torch.float32, device)
        before = streams(llama)
        w = torch.randn(2, D, generator=torch.Generator().manual_seed(3))
        similar = sf.ops.similarity(before[READ], torch.linalg.qr(w.T)[0].T.contiguous().to(device))
        condition = sf.Condition(w, float(similar.median()))
        per_token = sf.WhenToken(condition, EDITS[then], layer=READ)
        meets = condition(before[READ])
        assert 0 < int(meets.sum()) < meets.numel()
        after = streams(llama, {ACT: per_token})[ACT]
        got = per_token.apply(before[ACT], read=before[READ])
        assert torch.equal(got, after)
        assert torch.equal(got[~meets], before[ACT][~meets])
        here = sf.WhenToken(condition, EDITS[then])
        assert torch.equal(here.apply(before[ACT]), here.apply(before[ACT], read=before[ACT]))
        theta = float(sf.ops.similarity(before[READ][:, -1], condition.probe.direction.to(device)).mean())
        once = sf.When(sf.Condition(w, theta), EDITS[then], layer=READ)
        after = streams(llama, {ACT: once}, 0.5)[ACT]
        got = once.apply(before[ACT][:, -1:], 0.5, read=before[READ][:, -1])
        torch.testing.assert_close(got, after[:, -1:])  # a BLAS may sum two rows in another order than fourteen
        assert [bool((g != b).any()) for g, b in zip(got, before[ACT][:, -1:], strict=True)].count(True) == 1


def test_a_gradient_reaches_x_and_what_is_trained() -> None:
    v = torch.ones(D, requires_grad=True)
    x = torch.randn(3, D, requires_grad=True)
    strength = torch.tensor([1.0, 0.0, 2.0])
    (sf.Add(v, 2.0).apply(x, strength) ** 2).sum().backward()
    torch.testing.assert_close(v.grad, (2 * (x + 2 * strength[:, None]) * 2 * strength[:, None]).detach().sum(0))
    x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
    for name in ("Amplify", "Flow", "Spherical"):
        assert torch.autograd.gradcheck(EXAMPLES[name][0].apply, x)


@pytest.mark.parametrize("name", EXAMPLES)
def test_float64_stays_float64_and_the_formula_holds(name: str) -> None:
    edit, formula = EXAMPLES[name]
    edit = edit.then if isinstance(edit, sf.When) else edit
    x = torch.randn(2, 3, D, dtype=torch.float64)
    got = edit.apply(x)
    torch.testing.assert_close(got, formula(x.view(6, D)).view_as(x), atol=1e-5, rtol=1e-5)
    assert edit.apply(x[0, 0]).shape == (D,)
    assert edit.apply(x[:0]).shape == (0, 3, D)


ADD, X = sf.Add(torch.ones(D)), torch.zeros(2, 3, D)
WHEN = sf.When(sf.Condition(torch.ones(D), 0.5), ADD, layer=4)
TOKEN = sf.WhenToken(sf.Condition(torch.ones(D), 0.5), ADD, layer=4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ADD.apply([1.0]), TypeError, "Add.apply: x must be a tensor"),
        (lambda: ADD.apply(X.long()), TypeError, "Add.apply: x has dtype torch.int64"),
        (lambda: ADD.apply(X[..., :3]), ValueError, "Add.apply: x has width 3 and .* has 12"),
        (lambda: ADD.apply(X, float("nan")), ValueError, "Add.apply: strength must be finite"),
        (lambda: ADD.apply(X, "much"), TypeError, "Add.apply: strength must be a number"),
        (lambda: ADD.apply(X, torch.ones(3)), ValueError, r"strength is torch.float32 \(3,\) .*expected .*\(2, 3\)"),
        (lambda: ADD.apply(X, torch.ones(2, 3).half()), ValueError, "strength is torch.float16"),
        (lambda: sf.Add(torch.ones(D) * 1e6).apply(X.half()), ValueError, "does not fit torch.float16"),
        (lambda: WHEN.apply(X), ValueError, "When.apply: one token decides for a whole request; give read="),
        (lambda: WHEN.apply(X, read=X), ValueError, r"read has shape \(2, 3, 12\); expected .*\(2, 12\)"),
        (lambda: WHEN.apply(X[0, 0], read=X[0, 0]), ValueError, r"x has shape \(12,\); expected \(..., tokens, d\)"),
        (lambda: WHEN.apply(X, torch.ones(3), X[:, 0]), ValueError, r"When.apply: strength is torch.float32 \(3,\)"),
        (lambda: TOKEN.apply(X, read="here"), ValueError, "read has type str; expected a tensor of shape"),
        (lambda: TOKEN.apply(X), ValueError, "WhenToken.apply: the condition is read at resid_post 4; give read="),
        (lambda: TOKEN.apply(X, read=X[0]), ValueError, r"read has shape \(3, 12\); expected .* \(2, 3, 12\)"),
    ],
)
def test_bad_input_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_row_alone_keeps_its_shape(dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 6, dtype=dtype)
    for edit in (sf.Add(torch.ones(6)), sf.Ablate(torch.ones(6)), sf.Add(torch.ones(6), keep_norm=True)):
        for strength in (1.0, 0.5, 0.0, torch.tensor(0.5)):
            assert edit.apply(x, strength).shape == (6,)


def test_a_strength_that_is_not_finite_is_refused() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            sf.Add(torch.ones(4)).apply(torch.zeros(2, 4), torch.tensor([bad, 1.0]))
        with pytest.raises(ValueError, match="finite"):
            sf.Add(torch.ones(4)).apply(torch.zeros(2, 4), bad)
