"""Steering with SAEs: exact edits of Top-K and normalised SAEs, where they land, and a real SAE file on a real model."""

from __future__ import annotations

import pytest
import torch
from places import PLACES, backend
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import steerfast as sf
from steerfast.place import Origin
from steerfast.sae.formats import save_saelens

MODES = ("set", "add", "scale", "min", "max")
CHANGES = {3: 2.5, 50: 0.25, 7: 1.0}


def make(k: int | None = 5, normalisation: str = "none", place=("resid_pre", 1), width: int = 48) -> sf.SAE:
    w_enc, w_dec, b_enc = torch.randn(200, width) / 7, torch.randn(200, width), torch.randn(200) / 3
    threshold = None if k is not None else 0.3 * torch.rand(200)
    return sf.SAE(w_enc, w_dec, b_enc, torch.randn(width), k, threshold, normalisation, Origin(place=place))


def by_decoding(sae: sf.SAE, x: Tensor, changes: dict[int, float], mode: str) -> Tensor:
    """The definition, with the dense features: what changed is decoded, and the reconstruction error stays."""
    before = sae.encode(x)
    after = before.clone()
    for feature, value in changes.items():
        f = before[..., feature]
        after[..., feature] = {
            "set": torch.full_like(f, value), "add": f + value, "scale": f * value, "min": f.clamp(max=value),
            "max": f.clamp(min=value),
        }[mode]  # fmt: skip
    error = x - sae.decode(before, x)
    return sae.decode(after, x) + error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalisation", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("k", [5, 200, None])
def test_an_edit_is_the_dense_one(k, normalisation, mode):
    sae = make(k, normalisation).to(dtype=torch.float64)
    x = torch.randn(4, 10, 48, dtype=torch.float64)
    changes = {**CHANGES, int(sae.topk(x)[1][0, 0, 0]): 0.5}  # one that is surely selected somewhere
    edit = sf.EditFeatures(sae, changes, mode)
    got = edit.apply(x)
    wide = k is not None and normalisation == "none"  # a bank keeps its tensors in float32, and an op its scales
    tolerance = 1e-10 if wide else 1e-5
    torch.testing.assert_close(got, by_decoding(sae, x, changes, mode), atol=tolerance, rtol=tolerance)
    assert (got - x).abs().max() > 0.1


@pytest.mark.parametrize("place", PLACES)
def test_the_exact_edit_runs_on_every_backend(place):
    with backend(place) as device:
        for normalisation in ("none", "layer_norm"):
            sae = make(5, normalisation).to(device)
            x = torch.randn(6, 48, device=device)
            scale = torch.tensor([1.0, 0.0, 1, 1, 0, 1], device=device)
            got = sf.EditFeatures(sae, CHANGES).apply(x, scale)
            wanted = by_decoding(sae, x, CHANGES, "set")
            torch.testing.assert_close(got[scale > 0], wanted[scale > 0], atol=2e-5, rtol=2e-5)
            assert torch.equal(got[scale == 0], x[scale == 0])


def test_a_top_k_edit_sees_the_selection_and_the_approximation_does_not():
    """A feature that is positive and not among the k counts as off in the exact form only."""
    sae = sf.SAE(torch.eye(4), torch.eye(4), k=1)
    x = torch.tensor([[3.0, 2.0, 0.0, 0.0]])
    assert sf.EditFeatures(sae, {1: 1.0}, "add").apply(x).tolist() == [[3, 3, 0, 0]]
    assert sf.EditFeatures(sae, {1: 1.0}).apply(x).tolist() == [[3, 3, 0, 0]]  # from 0, not from 2
    assert sf.EditFeatures(sae.approximate(), {1: 1.0}).apply(x).tolist() == [[3, 1, 0, 0]]
    assert sf.EditFeatures(sae.approximate(2.5), {1: 1.0}).apply(x).tolist() == [[3, 3, 0, 0]]


def test_the_norm_can_be_kept():
    sae, x = make(), torch.randn(6, 48)
    scale = torch.tensor([1.0, 0.0, 1, 1, 0, 1])
    free = sf.EditFeatures(sae, CHANGES).apply(x, scale)
    kept = sf.EditFeatures(sae, CHANGES, keep_norm=True).apply(x, scale)
    torch.testing.assert_close(kept, free * (x.norm(dim=1) / free.norm(dim=1))[:, None])
    assert torch.equal(kept[scale == 0], x[scale == 0])


def test_a_program_fits_no_slot_and_says_what_does():
    edit = sf.EditFeatures(make(), CHANGES)
    with pytest.raises(TypeError, match=r"fits no slot; use sae.approximate\(threshold\)"):
        sf.Bank(48, 4).register(edit)
    assert edit.width == 48
    sf.Bank(48, 4).register(sf.EditFeatures(make().approximate(0.2), CHANGES))


# --- in a model ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
    )
    return LlamaForCausalLM(config).eval()


def streams(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The input of block 1 after every hook before it, and its output."""
    found: dict[str, Tensor] = {}
    block = model.model.layers[1]
    inside = block.input_layernorm.register_forward_pre_hook(lambda _, args: found.update(inside=args[0].clone()))
    after = block.register_forward_hook(
        lambda _, args, out: found.update(after=(out[0] if isinstance(out, tuple) else out).clone())
    )
    with torch.no_grad():
        found["logits"] = model(ids, attention_mask=mask, use_cache=False).logits
    inside.remove()
    after.remove()
    return found


IDS = torch.randint(0, 90, (3, 9))


@pytest.mark.parametrize("k", [5, None])
def test_an_sae_of_a_blocks_input_edits_that_input(llama, k):
    """resid_pre 1 is what block 1 reads: one layer late, and its attention would not see the edit."""
    sae = make(k)
    plain = streams(llama, IDS)
    with sf.steer(llama, sf.Plan([sf.EditFeatures(sae, CHANGES)])):
        steered = streams(llama, IDS)
    wanted = by_decoding(sae, plain["inside"], CHANGES, "set")
    torch.testing.assert_close(steered["inside"], wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(steered["logits"], plain["logits"])
    assert torch.equal(streams(llama, IDS)["logits"], plain["logits"])


def test_a_plan_that_puts_an_sae_elsewhere_warns():
    edit = sf.EditFeatures(make(place=("resid_pre", 2)), CHANGES)
    with pytest.warns(UserWarning, match=r"belongs to resid_pre 2 and is put at resid_post 2"):
        sf.Plan({2: edit})
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sf.Plan({1: edit})  # resid_post 1 is resid_pre 2
        sf.Plan({("resid_pre", 2): edit, -1: sf.EditFeatures(make(place=None), CHANGES)})
        assert set(sf.Plan([edit, edit]).edits) == {("resid_pre", 2)}
    for bad, error, message in (
        ([], ValueError, "edits is empty"),
        ([sf.Add(torch.ones(48))], ValueError, "does not know its layer and site; pass a dict"),
        ([edit, 3], TypeError, "a list must hold interventions; got 3"),
    ):
        with pytest.raises(error, match=message):
            sf.Plan(bad)


def test_programs_and_slots_apply_in_order_and_each_row_keeps_its_own(llama):
    """Rows with another chain each, at one place: program between slots, program alone, slots alone, nobody."""
    sae, other = make(place=("resid_post", 1)), make(3, place=("resid_post", 1))
    edit, second = sf.EditFeatures(sae, CHANGES), sf.EditFeatures(other, {9: 1.5}, "add")
    v, r = torch.randn(48), torch.randn(48)
    chains = [[sf.Ablate(r), edit, sf.Add(v, 2.0)], [edit, second], [sf.Add(v), sf.Ablate(r)], None]
    plans = [None if chain is None else {1: chain} for chain in chains]
    ids = torch.randint(0, 90, (4, 7))
    plain = streams(llama, ids)

    unit = r / r.norm()
    steps = {
        0: lambda x: by_decoding(sae, x - (x @ unit)[:, None] * unit, CHANGES, "set") + 2 * v,
        1: lambda x: by_decoding(other, by_decoding(sae, x, CHANGES, "set"), {9: 1.5}, "add"),
        2: lambda x: (x + v) - ((x + v) @ unit)[:, None] * unit,
    }
    with sf.steer(llama, plans) as handle:
        steered = streams(llama, ids)
        assert handle.stats() == [7, 7, 7, 0]
    for row, step in steps.items():
        torch.testing.assert_close(steered["after"][row], step(plain["after"][row]), atol=2e-4, rtol=2e-4)
    assert torch.equal(steered["after"][3], plain["after"][3])


def test_padding_and_positions_hold_for_programs(llama):
    sae = make(place=("resid_post", 1))
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    plan = sf.Plan([sf.EditFeatures(sae, CHANGES)], positions=[-1])
    plain = streams(llama, IDS[:2, :6], mask)["after"]
    with sf.steer(llama, plan):
        steered = streams(llama, IDS[:2, :6], mask)["after"]
    assert torch.equal(steered[:, :-1], plain[:, :-1])
    torch.testing.assert_close(steered[:, -1], by_decoding(sae, plain[:, -1], CHANGES, "set"), atol=1e-4, rtol=1e-4)


def test_two_handles_with_programs_come_and_go(llama):
    sae, other = make(place=("resid_post", 1)), make(3, place=("resid_post", 1))
    plain = streams(llama, IDS)["after"]
    first = sf.steer(llama, sf.Plan([sf.EditFeatures(sae, CHANGES)]), strength=0.5)
    second = sf.steer(llama, [None, sf.Plan([sf.EditFeatures(other, {9: 1.5})]), None])
    both = streams(llama, IDS)["after"]
    half = plain + 0.5 * (by_decoding(sae, plain, CHANGES, "set") - plain)
    torch.testing.assert_close(both[[0, 2]], half[[0, 2]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[1], by_decoding(other, half[1], {9: 1.5}, "set"), atol=1e-3, rtol=1e-3)
    first.remove()
    alone = streams(llama, IDS)["after"]
    torch.testing.assert_close(alone[1], by_decoding(other, plain[1], {9: 1.5}, "set"), atol=1e-4, rtol=1e-4)
    assert torch.equal(alone[[0, 2]], plain[[0, 2]])
    second.remove()
    assert torch.equal(streams(llama, IDS)["after"], plain)


def test_a_prepared_model_refuses_a_program_and_takes_the_approximation(llama):
    config = llama.config
    model = LlamaForCausalLM(config).eval()
    sf.prepare(model, layers=[1])
    sae = make(place=("resid_post", 1))
    with pytest.raises(ValueError, match="fits no slot, so a prepared model cannot take it up"):
        sf.steer(model, sf.Plan([sf.EditFeatures(sae, CHANGES)]))
    with sf.steer(model, sf.Plan([sf.EditFeatures(sae.approximate(0.2), CHANGES)])) as handle:
        model(IDS)
        assert handle.stats() == [27]


@pytest.mark.parametrize(("k", "normalisation"), [(5, "none"), (5, "layer_norm"), (None, "layer_norm"), (None, "none")])
def test_a_plan_with_an_sae_survives_its_file(tmp_path, llama, k, normalisation):
    sae = make(k, normalisation)
    plan = sf.Plan([sf.EditFeatures(sae, CHANGES, "add", keep_norm=True)])
    back = sf.Plan.load(plan.save(tmp_path), sae)
    assert repr(back) == repr(plan)
    logits = []
    for one in (plan, back):
        with sf.steer(llama, one):
            logits.append(streams(llama, IDS)["logits"])
    assert torch.equal(*logits)


# --- a real SAE file on a real model -------------------------------------------------------------------------------------

LAYER, F, K = 14, 256, 8


@pytest.fixture(scope="module")
def file(smollm, tmp_path_factory):
    """An SAE of SmolLM2's layer 14 in SAELens's format: Top-K, fitted for a minute to the activations of a few texts."""
    model, tokenizer = smollm
    topics = {
        "love": [
            "I love you with all my heart",
            "She kissed him tenderly",
            "Their wedding was full of joy and affection",
        ],
        "war": ["The army attacked the city at dawn", "Soldiers died in the trenches", "Bombs fell on the harbour"],
        "food": [
            "Stir the soup and add some salt",
            "The bread was baked in the oven",
            "He ate a bowl of rice with fish",
        ],
        "code": ["def main(): return sum(range(10))", "The compiler reports a type error", "import numpy as np"],
    }
    texts = [text for group in topics.values() for text in group]
    x = torch.cat([sf.collect(model, tokenizer, [text], layers=[LAYER], position="all")[LAYER][1:] for text in texts])
    torch.manual_seed(0)
    mean = x.mean(0)
    w = (x - mean)[torch.randint(0, len(x), (F,))] + 0.1 * x.std() * torch.randn(F, x.shape[1])
    w_dec = (w / w.norm(dim=1, keepdim=True)).requires_grad_()
    w_enc, b_enc = w_dec.detach().clone().requires_grad_(), torch.zeros(F).requires_grad_()
    optimiser = torch.optim.Adam([w_enc, w_dec, b_enc], lr=3e-3)
    for _ in range(150):
        values, indices = sf.ops.sae_encode(x - mean, w_enc, b_enc, K)
        loss = (sf.ops.sae_decode(values, indices, w_dec, mean) - x).square().sum() / (x - mean).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=1, keepdim=True)
    bias = (b_enc - w_enc @ mean).detach()
    sae = sf.SAE(w_enc.detach(), w_dec.detach(), bias, mean, k=K, origin=Origin("SmolLM2-135M", ("resid_post", LAYER)))
    path = save_saelens(sae, tmp_path_factory.mktemp("sae"))
    return path, topics, float(loss)


def activations(model, tokenizer, text: str) -> Tensor:
    return sf.collect(model, tokenizer, [text], layers=[LAYER], position="all")[LAYER]


def top_features(sae: sf.SAE, model, tokenizer, texts: list[str], others: list[str], count: int) -> list[int]:
    """The features that are most active on these texts and not on the others."""
    mine, rest = (
        torch.cat([sae.encode(activations(model, tokenizer, t)[1:]) for t in group]).mean(0)
        for group in (texts, others)
    )
    return (mine - rest).topk(count).indices.tolist()


def continuation(model, tokenizer, prompt: str, plan=None, tokens: int = 12) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    if plan is None:
        out = model.generate(**inputs, **settings)
    else:
        with sf.steer(model, plan):
            out = model.generate(**inputs, **settings)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


@pytest.mark.model
@pytest.mark.slow
def test_a_real_file_steers_a_real_model(smollm, file):
    model, tokenizer = smollm
    path, topics, loss = file
    assert loss < 0.1  # it explains the activations that it was fitted to
    sae = sf.SAE.load(path)
    assert (sae.place, sae.k, sae.source.library) == (("resid_post", LAYER), K, "SAELens")
    love, rest = topics["love"], [text for name, group in topics.items() if name != "love" for text in group]
    chosen = top_features(sae, model, tokenizer, love, rest, 6)
    text = love[0]
    plain = activations(model, tokenizer, text)
    rows = sae.w_dec[chosen]

    def steered(plan: sf.Plan) -> Tensor:
        with sf.steer(model, plan):
            return activations(model, tokenizer, text)

    # what the stream becomes, by the formulas of the seed, S = rows.T
    y = torch.relu(plain @ rows.T)
    got = steered(sf.Plan({LAYER: sf.Amplify(rows, alpha=1.5)}))
    torch.testing.assert_close(got, plain + 1.5 * y @ rows, atol=2e-3, rtol=1e-3)
    got = steered(sf.Plan({LAYER: sf.Calibrate(rows, beta=4.0)}))
    torch.testing.assert_close(got, plain - y @ rows + 4.0 * rows.mean(0), atol=2e-3, rtol=1e-3)
    # and by the SAE itself: exact on a Top-K SAE, the error kept
    off = sf.Plan([sf.EditFeatures(sae, dict.fromkeys(chosen, 0.0))])
    assert (sae.encode(plain)[:, chosen] > 0).any()
    torch.testing.assert_close(
        steered(off), by_decoding(sae, plain, dict.fromkeys(chosen, 0.0), "set"), atol=2e-3, rtol=1e-3
    )

    # every token that is generated is steered, and the model says something else; removed, it is itself again
    prompt = "The two of them"
    size = float(plain[1:].norm(dim=1).mean())
    on = sf.Plan([sf.EditFeatures(sae, dict.fromkeys(chosen, 0.4 * size), mode="max")])
    before = continuation(model, tokenizer, prompt)
    assert continuation(model, tokenizer, prompt, on) != before
    assert continuation(model, tokenizer, prompt) == before
    with sf.steer(model, on) as handle:
        inputs = tokenizer(prompt, return_tensors="pt")
        model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        assert handle.stats() == [inputs["input_ids"].shape[1] + 4]

    # the features mean what they were chosen for: raised, the next words lean to the topic
    words = ["love", "kiss", "heart", "romance", "happy"], ["war", "army", "soldiers", "bombs", "attack"]
    ids = [[tokenizer(" " + word, add_special_tokens=False)["input_ids"][0] for word in group] for group in words]

    def lean(plan: sf.Plan | None) -> float:
        inputs = tokenizer("When I think about it, I think of", return_tensors="pt")
        with torch.no_grad():
            if plan is None:
                logits = model(**inputs).logits[0, -1]
            else:
                with sf.steer(model, plan):
                    logits = model(**inputs).logits[0, -1]
        scores = logits.log_softmax(-1)
        return float(scores[ids[0]].mean() - scores[ids[1]].mean())

    assert lean(on) > lean(None) + 0.5


@pytest.mark.parametrize("k", [5, None])
def test_an_edit_knows_its_place_and_model_after_saving_too(tmp_path, llama, k):
    sae = make(k)
    home = Origin("GPT2LMHeadModel", ("resid_post", 1))
    foreign = sf.SAE(sae.w_enc, sae.w_dec, sae.b_enc, sae.b_dec, k, sae.threshold, origin=home)
    edit = sf.EditFeatures(foreign, CHANGES)
    inside = sf.When(sf.Condition(torch.ones(48), 0.0), edit)
    for one in (edit, inside):
        assert (one.origin.place, one.origin.model, one.width) == (("resid_post", 1), "GPT2LMHeadModel", 48)
        plan = sf.Plan([one])
        plan.save(tmp_path / type(one).__name__)
        again = sf.Plan.load(tmp_path / type(one).__name__, sae)
        assert again.edits[("resid_post", 1)][0].origin.place == ("resid_post", 1)
        for given in (plan, again):
            with pytest.warns(UserWarning, match="activations of GPT2LMHeadModel; this model is a LlamaForCausalLM"):
                sf.steer(llama, given).remove()
        with pytest.warns(UserWarning, match="belongs to resid_post 1 and is put at resid_post 3"):
            sf.Plan({3: one})


@pytest.mark.model
def test_the_dose_of_an_edit_that_fits_no_slot(smollm):
    model, tokenizer = smollm
    torch.manual_seed(0)
    sae = sf.SAE(torch.randn(100, 576), torch.randn(100, 576), k=8, origin=Origin(place=("resid_post", 3)))
    plan = sf.Plan([sf.EditFeatures(sae, {5: 1e-3, 9: 1e-3}, mode="add")])
    row = sf.dose(model, tokenizer, plan, ["I went to the market."])[0]
    assert row.change == pytest.approx(float((1e-3 * sae.w_dec[[5, 9]].sum(0)).norm()), rel=0.05)
    assert row.accumulated == pytest.approx(row.dose, rel=1e-3)
