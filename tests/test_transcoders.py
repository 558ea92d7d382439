"""Transcoders: read at one place, written at another; steered by their directions, refused where that is not enough."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import steerfast as sf
from steerfast.cli import main as cli
from steerfast.place import Origin
from steerfast.sae.evaluate import evaluate_sae
from steerfast.sae.formats import save_saelens
from steerfast.sae.model import Source

SAES = Path(__file__).parent / "data" / "saes"
F64 = torch.float64


def make(skip: bool = True, k: int | None = None, out: int = 9, dtype: torch.dtype = F64) -> sf.sae.Transcoder:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype)

    return sf.sae.Transcoder(
        draw(40, 12),
        draw(40, out),
        draw(40),
        draw(out),
        k,
        None if k else torch.rand(40, dtype=dtype),
        origin=Origin(place=("mlp_out", 2)),
        source=Source("SAELens", "blocks.2.hook_mlp_in", "m", "blocks.2.hook_mlp_out"),
        w_skip=draw(out, 12) if skip else None,
        reads=Origin(place=("resid_pre", 2)),
    )


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("k", [4, None])
def test_both_roads_follow_the_definition(skip, k):
    made, x = make(skip, k), torch.randn(3, 5, 12, dtype=F64)
    h = x @ made.w_enc.T + made.b_enc
    f = (
        torch.where(h > made.threshold, h, 0)
        if k is None
        else torch.relu(torch.zeros_like(h).scatter(-1, (b := h.topk(k)).indices, b.values))
    )
    expected = f @ made.w_dec + made.b_dec + (x @ made.w_skip.T if skip else 0)
    torch.testing.assert_close(made.encode(x), f, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(made(x), expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(made.decode(f, x), expected, atol=1e-12, rtol=1e-12)
    assert made(x).shape == (3, 5, 9)


def test_a_skip_connection_needs_the_rows_that_were_read():
    made, x = make(), torch.randn(2, 12, dtype=F64)
    for call in (lambda: made.decode(made.encode(x)), lambda: made.decode_topk(*made.topk(x))):
        with pytest.raises(ValueError, match="this transcoder has a skip connection; pass the rows that it read as x="):
            call()
    plain = make(skip=False)
    assert torch.equal(plain.decode_topk(*plain.topk(x)), plain(x))


@pytest.mark.parametrize("skip", [True, False])
def test_the_form_of_saelens_round_trip(skip, tmp_path):
    made = make(skip)
    back = sf.SAE.load(save_saelens(made, tmp_path))
    assert (back.fingerprint, back.place, type(back)) == (made.fingerprint, made.place, type(made))
    assert back.reads.place == made.reads.place


def test_a_transcoder_is_another_than_the_sae_of_the_same_tensors():
    made = make(skip=False, out=12)
    same = sf.SAE(made.w_enc, made.w_dec, made.b_enc, made.b_dec, threshold=made.threshold)
    assert same.fingerprint != made.fingerprint
    assert same.tensors().keys() == made.tensors().keys()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_own_file_round_trip(skip, dtype, tmp_path):
    made = make(skip, dtype=torch.float32).to(dtype=dtype)
    back = sf.SAE.load(made.save(tmp_path))
    assert isinstance(back, sf.sae.Transcoder)
    for name, tensor in made.tensors().items():
        assert torch.equal(back.tensors()[name], tensor)
        assert back.tensors()[name].dtype == (dtype if tensor.dim() == 2 else torch.float32)
    assert ("w_skip" in back.tensors()) == skip
    assert (back.origin, back.reads, back.source, back.fingerprint) == (
        made.origin,
        made.reads,
        made.source,
        made.fingerprint,
    )
    assert repr(back) == repr(made)
    assert repr(made).startswith("Transcoder(skip, F=40, d=12->9" if skip else "Transcoder(F=40, d=12->9")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda text: text["transcoder"].update(width_out=10),
            r"'w_dec' has shape \(40, 9\); sae.json says \(40, 10\)",
        ),
        (lambda text: text["transcoder"].update(skip=False), "holds the tensor 'w_skip', which sae.json does not name"),
        (lambda text: text["transcoder"].pop("reads"), "does not describe an SAE"),
        (lambda text: text.update(transcoder=3), "does not describe an SAE"),
    ],
)
def test_a_damaged_own_file_is_refused(damage, message, tmp_path):
    file = make().save(tmp_path) / "sae.json"
    text = json.loads(file.read_text())
    damage(text)
    file.write_text(json.dumps(text))
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(tmp_path)


def test_its_directions_steer_where_it_writes_and_leave_what_it_does_not_explain():
    """A real block: the MLP's input is read, its output steered; y minus the prediction changes by nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=90,
        eos_token_id=None,
    )
    model, tokens = LlamaForCausalLM(config).eval(), torch.arange(12)[None]
    mlp, seen = model.model.layers[1].mlp, {}
    w_enc, w_dec = torch.randn(100, 48), torch.randn(100, 48)
    made = sf.sae.Transcoder(w_enc, w_dec, k=6, w_skip=torch.randn(48, 48), origin=Origin(place=("mlp_out", 1)))

    def read(strength: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        handle = mlp.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
        plan = sf.Plan({made.place: sf.Add(made.w_dec[7], strength or 1.0)})
        if strength is None:
            model(tokens)
        else:
            with sf.steer(model, plan):
                model(tokens)
        handle.remove()
        return seen["x"], seen["y"]

    with torch.no_grad():
        x, y = read(None)
        steered_x, steered_y = read(3.0)
        assert torch.equal(steered_x, x)  # what is read lies before what is written
        error = y - made(x)
        moved = made.decode(made.encode(x) + 3.0 * torch.nn.functional.one_hot(torch.tensor(7), 100), x)
        torch.testing.assert_close(steered_y - moved, error, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [4, None])
def test_the_roads_that_cannot_be_right_are_refused_by_name(k):
    made = make(k=k)
    with pytest.raises(
        ValueError, match=r"EditFeatures: a transcoder reads blocks.2.hook_mlp_in and writes mlp_out 2, so the stream"
    ):
        sf.EditFeatures(made, {3: 1.0})
    with pytest.raises(ValueError, match=r"evaluate_sae: Transcoder.* predicts what it writes from another place"):
        evaluate_sae(made, torch.nn.Linear(2, 2), None, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w_dec": torch.ones(39, 9)}, r"w_dec has shape \(39, 9\) and w_enc \(40, 12\); expected \(F, d_out\)"),
        ({"w_skip": torch.ones(12, 9)}, r"w_skip has shape \(12, 9\); expected \(9, 12\)"),
        ({"b_dec": torch.ones(12)}, r"b_dec has shape \(12,\); expected \(9,\)"),
        ({"normalisation": "layer_norm"}, "normalisation is 'layer_norm'; expected 'none'"),
        ({"w_skip": torch.full((9, 12), torch.nan)}, "w_skip holds NaN or Inf"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {"w_enc": torch.ones(40, 12), "w_dec": torch.ones(40, 9), **changes}
    with pytest.raises(ValueError, match=message):
        sf.sae.Transcoder(**given)


AFFINE = SAES / "gemma-scope-2-1b-pt" / "transcoder_all" / "layer_7_width_16k_l0_big_affine"
SKIP = SAES / "saelens-skip_transcoder"


def changed(source: Path, target: Path, weights: str, drop: str = "", **settings: object) -> Path:
    """A copy of a file, without a tensor, and with other settings."""
    target.mkdir()
    tensors = {name: value for name, value in load_file(source / weights).items() if name != drop}
    save_file(tensors, target / weights)
    config = "config.json" if (source / "config.json").is_file() else "cfg.json"
    (target / config).write_text(json.dumps({**json.loads((source / config).read_text()), **settings}))
    return target


@pytest.mark.parametrize(
    ("make_file", "message"),
    [
        (lambda p: changed(AFFINE, p, "params.safetensors", "affine_skip_connection"), "the file has no affine_skip_connection"),
        (lambda p: changed(AFFINE, p, "params.safetensors", "b_dec"), "has no tensor 'b_dec'"),
        (lambda p: changed(SKIP, p, "sae_weights.safetensors", "W_skip"), "has no tensor 'W_skip'"),
        (lambda p: changed(SKIP, p, "sae_weights.safetensors", d_out=12), "d_out is 12 in cfg.json and 11 in the weights"),
        (lambda p: changed(SKIP, p, "sae_weights.safetensors", normalize_activations="layer_norm"),
         "a transcoder with normalize_activations 'layer_norm', which says nothing of what it writes"),
    ],
)  # fmt: skip
def test_half_a_transcoder_is_not_read(make_file, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(make_file(tmp_path / "made"))


def test_a_layer_of_a_cross_layer_transcoder_is_refused(tmp_path):
    tensors = {**load_file(AFFINE / "params.safetensors"), "w_dec": torch.ones(20, 3, 8)}
    (tmp_path / "config.json").write_text((AFFINE / "config.json").read_text())
    save_file(tensors, tmp_path / "params.safetensors")
    with pytest.raises(ValueError, match=r"w_dec has shape \(20, 3, 8\): a cross-layer transcoder or a crosscoder"):
        sf.SAE.load(tmp_path)


def test_the_command_shows_both_places_and_saves(tmp_path, capsys):
    assert cli.main(["sae", "info", str(SKIP), "--dtype", "bfloat16", "--save", str(tmp_path / "own")]) == 0
    shown = capsys.readouterr().out
    for part in (
        "20 of width 8, bfloat16",
        "writes width 11",
        "mlp_out of layer 4",
        "blocks.4.hook_mlp_in",
        "skip           yes",
        "rounding",
    ):
        assert part in shown
    assert sf.SAE.load(tmp_path / "own").source.rounding > 0
    file = SAES / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3" / "layer5.sae.pt"
    assert cli.main(["sae", "info", str(file), "--k", "4"]) == 2
    assert "its name says k = 3; leave k=4 away" in capsys.readouterr().err


@pytest.mark.model
def test_a_transcoder_is_explained_by_what_it_writes(smollm):
    model, tokenizer = smollm
    words = ["music", "London", "because", "war", "love", "rain"]
    w_enc, w_dec, place = torch.randn(20, 576), torch.randn(20, 576), Origin(place=("mlp_out", 7))
    made = sf.sae.Transcoder(w_enc, w_dec, k=3, w_skip=torch.randn(576, 576), origin=place)
    found = sf.explain(made, model, tokenizer, words, words=3)
    same = sf.explain(sf.SAE(w_dec, w_dec, k=3, origin=place), model, tokenizer, words, words=3)
    assert [found[i] for i in range(20)] == [same[i] for i in range(20)]
    plan = sf.Plan({made.place: sf.DeficitPush(made.w_dec[found.find("music")[:1]], target=3.0)})
    inputs = tokenizer("She sang", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        with sf.steer(model, plan):
            assert not torch.equal(model(**inputs).logits, before)


@pytest.mark.model
def test_what_a_transcoder_does_on_a_corpus_is_seen_where_it_reads(smollm):
    model, tokenizer = smollm
    w = torch.nn.functional.normalize(torch.randn(6, 576), dim=1)
    both = {"threshold": torch.full((6,), 0.5), "reads": Origin(place=("resid_pre", 3))}
    made = sf.sae.Transcoder(w, torch.randn(6, 20), origin=Origin(place=("mlp_out", 3)), **both)
    texts = ["A river runs through the valley, and nobody knows its name."] * 6
    config = sf.sae.ObserveConfig(passage=4)
    seen = sf.sae.observe(made, model, tokenizer, texts, config)
    plain = sf.SAE(w, w, threshold=made.threshold, origin=made.reads)
    assert seen.fired.sum() > 0
    assert torch.equal(seen.fired, sf.sae.observe(plain, model, tokenizer, texts, config).fired)
    with pytest.raises(ValueError, match="place that it reads"):
        sf.sae.observe(dataclasses.replace(made, reads=Origin()), model, tokenizer, texts, config)
    with pytest.raises(ValueError, match="writes rows of width 20"):
        sf.explain(made, model, tokenizer)
