"""Files of every family: made by the family's own rules, read, and compared with that family's forward pass in float64."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import steerfast as sf
from steerfast.sae.formats import save_saelens

D, F, K = 12, 40, 5
F64 = torch.float64
Forward = Callable[[Tensor], tuple[Tensor, Tensor]]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


@dataclass
class Made:
    """A file of a family: where it lies, what its family computes from a row, and where it belongs."""

    path: Path
    forward: Forward
    place: tuple[str, int] | None
    hook_name: str = ""
    model: str = ""
    scale: float | None = None

    def load(self) -> sf.SAE:
        return sf.SAE.load(self.path, scale=self.scale)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def top_k(h: Tensor, k: int = K) -> Tensor:
    best = h.topk(k, dim=-1)
    return torch.zeros_like(h).scatter(-1, best.indices, best.values)


# --- SAELens -------------------------------------------------------------------------------------------------------------


def saelens(path: Path, architecture: str = "standard", **settings: Any) -> Made:
    """SAELens 6: (x·scale or normalised) - b_dec·[apply] -> W_enc (d, F) + b_enc -> activation -> W_dec (F, d) + b_dec."""
    scale, given = settings.pop("scaling_factor", None), settings.pop("given", None)
    config = {
        "architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float64", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.5.0", "model_name": "m", "hook_name": "blocks.3.hook_resid_pre",
                     "hook_head_index": None},
        **settings,
    }  # fmt: skip
    if architecture == "topk":
        config["k"] = K
    t = {"W_enc": draw(D, F), "W_dec": draw(F, D), "b_dec": draw(D)}
    if architecture == "gated":
        t |= {"b_gate": draw(F), "b_mag": draw(F), "r_mag": draw(F)}
    else:
        t["b_enc"] = draw(F)
    if architecture == "jumprelu":
        t["threshold"] = torch.rand(F, dtype=F64) - 0.2  # a negative one acts as zero
    write_json(path / "cfg.json", config)
    if scale is not None:
        write_json(path / "activation_scaler.json", {"scaling_factor": scale})
    save_file(t, path / "sae_weights.safetensors")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, factor = torch.zeros(()), torch.ones(())
        kind = config["normalize_activations"]
        if kind == "constant_norm_rescale":
            factor = D**0.5 / x.norm(dim=-1, keepdim=True)
            z = x * factor
        elif kind == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            deviation = (x - mean).std(-1, keepdim=True)
            z, factor = (x - mean) / (deviation + 1e-5), 1 / deviation
        else:
            factor = torch.tensor(scale or given or 1.0, dtype=F64)
            z = x * factor
        z = z - t["b_dec"] * config["apply_b_dec_to_input"]
        if architecture == "gated":
            y = z @ t["W_enc"]
            f = (y + t["b_gate"] > 0) * torch.relu(y * t["r_mag"].exp() + t["b_mag"])
        else:
            h = z @ t["W_enc"] + t["b_enc"]
            norm = t["W_dec"].norm(dim=1)
            if config.get("rescale_acts_by_decoder_norm"):
                h = h * norm
            f = {"standard": torch.relu, "topk": lambda h: torch.relu(top_k(h))}.get(
                architecture, lambda h: torch.relu(h) * (h > t["threshold"])
            )(h)
        w_dec = t["W_dec"] / norm[:, None] if config.get("rescale_acts_by_decoder_norm") else t["W_dec"]
        return f, (f @ w_dec + t["b_dec"]) / factor + mean

    return Made(path, forward, ("resid_pre", 3), "blocks.3.hook_resid_pre", "m", given)


def saelens_old(path: Path) -> Made:
    """SAELens 3 to 5: the place at the top level, Top-K as an activation function with arguments."""
    made = saelens(path, "topk")
    config = json.loads((path / "cfg.json").read_text())
    metadata = config.pop("metadata")
    config |= {
        "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": config.pop("k")},
        "model_name": "m", "hook_name": metadata["hook_name"], "hook_layer": 3, "hook_head_index": None,
        "finetuning_scaling_factor": False, "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }  # fmt: skip
    write_json(path / "cfg.json", config)
    return made


def saelens_centred(path: Path) -> Made:
    """Trained on TransformerLens's GPT-2, whose stream has no mean over d: the file is applied to the stream of the model."""
    made = saelens(path)
    config = json.loads((path / "cfg.json").read_text())
    config["metadata"] |= {"model_name": "gpt2-small", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    write_json(path / "cfg.json", config)
    inner = made.forward
    made.forward = lambda x: inner(x - x.mean(-1, keepdim=True))
    made.model = "gpt2-small"
    return made


def saelens_heads(path: Path) -> Made:
    """All heads of an attention side by side, before the output projection."""
    made = saelens(path, "standard", reshape_activations="hook_z")
    config = json.loads((path / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.3.attn.hook_z"
    write_json(path / "cfg.json", config)
    made.place, made.hook_name = ("head_out", 3), "blocks.3.attn.hook_z"
    return made


# --- the others ----------------------------------------------------------------------------------------------------------


def sparsify(path: Path) -> Made:
    path = path / "model.layers.4"
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}
    write_json(
        path / "cfg.json",
        {"activation": "topk", "expansion_factor": 4, "num_latents": F, "k": K, "transcode": False, "d_in": D,
         "skip_connection": False, "multi_topk": False, "normalize_decoder": True},
    )  # fmt: skip
    save_file(t, path / "sae.safetensors")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        f = top_k(torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]))
        return f, f @ t["W_dec"] + t["b_dec"]

    return Made(path, forward, ("resid_post", 4), "model.layers.4")


def _jump(t: dict[str, Tensor], x: Tensor, w_enc: str, w_dec: str) -> tuple[Tensor, Tensor]:
    h = x @ t[w_enc] + t["b_enc"]
    f = torch.relu(h) * (h > t["threshold"])
    return f, f @ t[w_dec] + t["b_dec"]


def gemma_scope(path: Path) -> Made:
    path = path / "gemma-scope-2b-pt-att" / "layer_20" / "width_16k" / "average_l0_71"
    path.mkdir(parents=True)
    t = {"W_enc": draw(D, F), "W_dec": draw(F, D), "b_enc": draw(F), "b_dec": draw(D)}
    t["threshold"] = torch.rand(F, dtype=F64)
    np.savez(path / "params.npz", **{name: value.numpy() for name, value in t.items()})
    forward = lambda x: _jump(t, x, "W_enc", "W_dec")  # noqa: E731
    return Made(path, forward, ("head_out", 20), "layer_20 att", "google/gemma-2-2b")


def gemma_scope_2(path: Path) -> Made:
    point = "model.layers.7.output"
    t = {"w_enc": draw(D, F), "w_dec": draw(F, D), "b_enc": draw(F), "b_dec": draw(D)}
    t["threshold"] = torch.rand(F, dtype=F64)
    write_json(
        path / "config.json",
        {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "hf_hook_point_in": point,
         "hf_hook_point_out": point, "width": F, "l0": 10, "type": "sae"},
    )  # fmt: skip
    save_file(t, path / "params.safetensors")
    return Made(path, lambda x: _jump(t, x, "w_enc", "w_dec"), ("resid_post", 7), point, "google/gemma-3-1b-pt")


def llama_scope(path: Path, include_norm: bool = True, **settings: Any) -> Made:
    hook = "blocks.15.hook_mlp_out"
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "decoder.weight": draw(D, F), "decoder.bias": draw(D)}
    config = {
        "d_model": D, "d_sae": F, "act_fn": "jumprelu", "jump_relu_threshold": 0.6, "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": include_norm, "hook_point_in": hook, "hook_point_out": hook,
        "dataset_average_activation_norm": {"in": 17.0, "out": 9.0}, "use_decoder_bias": True, "top_k": K, **settings,
    }  # fmt: skip
    write_json(path / "hyperparams.json", config)
    (path / "checkpoints").mkdir()
    save_file(t, path / "checkpoints" / "final.safetensors")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        h = (x * D**0.5 / 17.0) @ t["encoder.weight"].T + t["encoder.bias"]
        gate = h * t["decoder.weight"].norm(dim=0) if include_norm else h
        f = top_k(torch.relu(h)) if config["act_fn"] == "topk" else torch.relu(h) * (gate > 0.6 * D**0.5 / 17.0)
        return f, (f @ t["decoder.weight"].T + t["decoder.bias"]) * 9.0 / D**0.5

    return Made(path, forward, ("mlp_out", 15), hook)


def openai(path: Path, activation: str = "TopK") -> Made:
    t = {"pre_bias": draw(D), "encoder.weight": draw(F, D), "latent_bias": draw(F), "decoder.weight": draw(D, F)}
    state: dict[str, Any] = {**t, "stats_last_nonzero": torch.zeros(F, dtype=torch.long), "activation": activation}
    if activation == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    path.mkdir(exist_ok=True)
    torch.save(state, path / "4.pt")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = torch.zeros(()), torch.ones(())
        z = x
        if activation == "TopK":
            mean = x.mean(-1, keepdim=True)
            deviation = (x - mean).std(-1, keepdim=True)
            z = (x - mean) / (deviation + 1e-5)
        h = (z - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
        f = torch.relu(top_k(h)) if activation == "TopK" else torch.relu(h)
        return f, (f @ t["decoder.weight"].T + t["pre_bias"]) * deviation + mean

    return Made(path / "4.pt", forward, None)


def dictionary_learning(path: Path, kind: str) -> Made:
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}.get(
        kind, "b_dec"
    )
    matrices = kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    t = {bias: draw(D)} | (
        {"W_enc": draw(D, F), "W_dec": draw(F, D)}
        if matrices
        else {"encoder.weight": draw(F, D), "decoder.weight": draw(D, F)}
    )
    if kind == "GatedAutoEncoder":
        t |= {"r_mag": draw(F), "mag_bias": draw(F), "gate_bias": draw(F)}
    else:
        t["b_enc" if matrices else "encoder.bias"] = draw(F)
    if kind == "JumpReluAutoEncoder":
        t["threshold"] = torch.rand(F, dtype=F64)
    elif "TopK" in kind:
        t |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.8, dtype=F64)}
    if kind == "MatryoshkaBatchTopKSAE":
        t["group_sizes"] = torch.tensor([10, 30])
    write_json(
        path / "config.json",
        {"trainer": {"dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 8, "lm_name": "EleutherAI/pythia",
                     "submodule_name": "resid_post_layer_8"}, "buffer": {"ctx_len": 128}},
    )  # fmt: skip
    torch.save(t, path / "ae.pt")
    w_enc = t["W_enc"] if matrices else t["encoder.weight"].T
    w_dec = t["W_dec"] if matrices else t["decoder.weight"].T
    b_enc = t.get("b_enc" if matrices else "encoder.bias")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        z = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - t[bias]
        if kind == "GatedAutoEncoder":
            y = z @ w_enc
            f = (y + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * y + t["mag_bias"])
            return f, f @ w_dec + t[bias]
        h = z @ w_enc + b_enc
        if kind == "AutoEncoder":  # the library rescales to decoder rows of length 1 when it loads
            norm = w_dec.norm(dim=1)
            return torch.relu(h) * norm, torch.relu(h) @ w_dec + t[bias]
        if kind == "AutoEncoderTopK":
            f = top_k(torch.relu(h))
        elif kind == "AutoEncoderNew":
            f = torch.relu(h)
        else:
            f = torch.relu(h) * (torch.relu(h) > t["threshold"])
        return f, f @ w_dec + t[bias]

    return Made(path, forward, ("resid_post", 8), "resid_post_layer_8", "EleutherAI/pythia")


MAKERS: dict[str, Callable[[Path], Made]] = {
    "SAELens standard": saelens,
    "SAELens standard, nothing subtracted": lambda path: saelens(path, apply_b_dec_to_input=False),
    "SAELens topk": lambda path: saelens(path, "topk"),
    "SAELens topk by decoder norm": lambda path: saelens(path, "topk", rescale_acts_by_decoder_norm=True),
    "SAELens jumprelu": lambda path: saelens(path, "jumprelu"),
    "SAELens gated": lambda path: saelens(path, "gated"),
    "SAELens scaled": lambda path: saelens(path, normalize_activations="expected_average_only_in", scaling_factor=0.37),
    "SAELens scale given": lambda path: saelens(path, normalize_activations="expected_average_only_in", given=0.37),
    "SAELens scale given, jumprelu": lambda path: saelens(path, "jumprelu", normalize_activations=True, given=2.5),
    "SAELens scale folded": lambda path: saelens(path, normalize_activations="expected_average_only_in", given=1.0),
    "SAELens constant norm": lambda path: saelens(path, "topk", normalize_activations="constant_norm_rescale"),
    "SAELens layer norm": lambda path: saelens(path, "jumprelu", normalize_activations="layer_norm"),
    "SAELens 5": saelens_old,
    "SAELens centred": saelens_centred,
    "SAELens heads": saelens_heads,
    "sparsify": sparsify,
    "Gemma Scope": gemma_scope,
    "Gemma Scope 2": gemma_scope_2,
    "Llama Scope": llama_scope,
    "Llama Scope without decoder norm": lambda path: llama_scope(path, False),
    "Llama Scope topk": lambda path: llama_scope(path, False, act_fn="topk"),
    "OpenAI topk": openai,
    "OpenAI relu": lambda path: openai(path, "ReLU"),
} | {
    f"dictionary_learning {kind}": lambda path, kind=kind: dictionary_learning(path, kind)
    for kind in (
        "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_computes_what_its_family_computes(name, tmp_path):
    made = MAKERS[name](tmp_path / "sae")
    sae = made.load()
    x = 3 * draw(6, 2, D) + 0.5
    features, rebuilt = made.forward(x)
    assert (features > 0).any(-1).all()
    torch.testing.assert_close(sae.encode(x), features, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(sae(x), rebuilt, atol=1e-10, rtol=1e-10)
    assert sae.place == made.place
    assert sae.source.hook_name == made.hook_name
    assert sae.source.model == made.model
    assert name.startswith(sae.source.library)
    again = sf.SAE.load(sae.save(tmp_path / "own"))
    assert torch.equal(again.encode(x), sae.encode(x))
    assert again.origin == sae.origin


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "SAELens centred"])
def test_saelens_writer(name, tmp_path):
    """Whatever was read can be written for SAELens; its reader, ours or theirs, sees the same SAE."""
    sae = MAKERS[name](tmp_path / "sae").load()
    back = sf.SAE.load(save_saelens(sae, tmp_path / "out"))
    x = draw(5, D)
    torch.testing.assert_close(back.encode(x), sae.encode(x), atol=0, rtol=0)
    torch.testing.assert_close(back(x), sae(x), atol=0, rtol=0)
    assert back.k == sae.k
    assert back.normalisation == sae.normalisation


def test_the_file_itself_can_be_named(tmp_path):
    made = llama_scope(tmp_path / "llama")
    x = draw(3, D)
    file = sf.SAE.load(made.path / "checkpoints" / "final.safetensors")
    assert torch.equal(file.encode(x), sf.SAE.load(made.path).encode(x))
    made = gemma_scope(tmp_path / "gemma")
    renamed = made.path / "other.npz"
    os.rename(made.path / "params.npz", renamed)
    assert sf.SAE.load(renamed).place == ("head_out", 20)
    directory = openai(tmp_path / "openai").path.parent
    assert sf.SAE.load(directory).normalisation == "layer_norm"


def test_one_attention_head_alone_has_no_place(tmp_path):
    saelens(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"] |= {"hook_name": "blocks.3.attn.hook_z", "hook_head_index": 2}
    write_json(tmp_path / "cfg.json", config)
    sae = sf.SAE.load(tmp_path)
    assert sae.place is None
    with pytest.raises(ValueError, match="does not know its layer and site"):
        sf.Plan([sf.EditFeatures(sae, {1: 2.0})])


def test_the_threshold_of_llama_scope_is_in_the_unit_of_the_stream(tmp_path):
    """On where h > θ·s, s = √d / average norm, as SAELens reads it: one feature just on, one just off, by hand."""
    made, d, lengths = tmp_path / "sae", 4, {"in": 8.0, "out": 8.0}  # s = 1/4
    write_json(
        made / "hyperparams.json",
        {"d_model": d, "act_fn": "jumprelu", "jump_relu_threshold": 2.0, "dataset_average_activation_norm": lengths,
         "norm_activation": "dataset-wise", "hook_point_in": "blocks.0.hook_resid_post"},
    )  # fmt: skip
    rows = torch.zeros(3, d)
    rows[0, 0], rows[1, 1] = 1.0, 1.0
    t = {"encoder.weight": rows, "encoder.bias": torch.zeros(3), "decoder.weight": rows.T.contiguous()}
    save_file(t | {"decoder.bias": torch.zeros(d)}, made / "final.safetensors")
    sae = sf.SAE.load(made)
    x = torch.tensor([[2.04, 1.96, 9.0, 9.0]])  # h = x/4: 0.51 and 0.49 beside θ·s = 0.5
    torch.testing.assert_close(sae.encode(x), torch.tensor([[0.51, 0.0, 0.0]]))
    torch.testing.assert_close(sae(x), torch.tensor([[2.04, 0.0, 0.0, 0.0]]))


SCALED = {"normalize_activations": "expected_average_only_in"}


@pytest.mark.parametrize(
    ("make", "scale", "message"),
    [
        (lambda p: saelens(p, **SCALED), None, r"activation_scaler.json with s; give SAE.load\(path, scale=s\), s = √d over"),
        (lambda p: saelens(p, normalize_activations=True), None, "trained on s·x"),
        (lambda p: saelens(p, **SCALED, scaling_factor=0.37), 0.37, "activation_scaler.json says scaling_factor 0.37; leave"),
        (lambda p: saelens(p, **SCALED, scaling_factor=-1.0), None, "scaling_factor is -1.0; expected a number > 0"),
        (lambda p: saelens(p, **SCALED, scaling_factor="0.3"), None, "scaling_factor is '0.3'; expected a number > 0"),
        (saelens, 0.37, "normalize_activations is 'none', which needs no scale; leave scale=0.37 away"),
        (gemma_scope_2, 2.0, "a file of Gemma Scope 2 needs no scale; leave scale=2.0 away"),
        (lambda p: saelens(p, **SCALED), 0.0, "scale is 0.0; expected > 0"),
        (lambda p: saelens(p, **SCALED), float("nan"), "scale must be finite"),
    ],
)  # fmt: skip
def test_a_scale_that_is_missing_or_not_wanted_is_refused(make, scale, message, tmp_path):
    path = make(tmp_path / "sae").path
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(path, scale=scale)


def test_a_scaler_that_was_never_estimated_is_none(tmp_path):
    """SAELens writes {"scaling_factor": null} beside a checkpoint whose scale it folded in, or never measured."""
    made = saelens(tmp_path, **SCALED)
    write_json(tmp_path / "activation_scaler.json", {"scaling_factor": None})
    with pytest.raises(ValueError, match=r"scale=1\.0 if you know that the weights have it folded in"):
        sf.SAE.load(made.path)
    assert torch.equal(sf.SAE.load(made.path, scale=np.float32(1)).b_dec, sf.SAE.load(made.path, scale=1).b_dec)


@pytest.mark.parametrize("make", [saelens, gemma_scope, gemma_scope_2])
def test_factors_of_a_finetuned_file_are_not_left_out(make, tmp_path):
    made = make(tmp_path / "sae")
    file = next(f for f in made.path.iterdir() if f.suffix in (".safetensors", ".npz"))

    def add(factors: Tensor) -> None:
        if file.suffix == ".npz":
            np.savez(file, **{**dict(np.load(file)), "scaling_factor": factors.numpy()})
        else:
            save_file({**load_file(file), "scaling_factor": factors}, file)

    before = made.load()
    add(torch.ones(F, dtype=F64))
    assert torch.equal(made.load().w_enc, before.w_enc)
    add(torch.full((F,), 1.1, dtype=F64))
    with pytest.raises(ValueError, match="scaling_factor"):
        made.load()


PEERS_ROOT = Path(__file__).parent / "data" / "saes"
PEERS = sorted(path.parent for path in PEERS_ROOT.rglob("expected.safetensors"))


GIVEN = {"llamascopium-jumprelu-folded": {"scale": 1.0}}
"""What a file does not say."""
HALVES = {"saelens-abstopk"}
"""Features of both signs, of which each is two of ours."""
UNSCALED = {"gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"}
"""SAELens scales the encoder and the decoder of an embedding's SAE by √d, and leaves b_dec, so its reconstruction is another."""


@pytest.mark.parametrize("path", PEERS, ids=lambda path: str(path.relative_to(PEERS_ROOT)))
def test_a_file_that_the_library_wrote_computes_what_the_library_computed(path):
    """Made by tests/data/write_saes_with_peers.py; the features and the reconstruction are the library's own."""
    name, expected = path.relative_to(PEERS_ROOT).as_posix(), load_file(path / "expected.safetensors")
    sae = sf.SAE.load(path, **GIVEN.get(name, {}))
    features, rebuilt = sae.encode(expected["x"]), expected["reconstruction"]
    if name in HALVES:
        features = features[:, : sae.features // 2] - features[:, sae.features // 2 :]
    assert torch.equal(features != 0, expected["features"] != 0)
    assert 0.1 < (features != 0).double().mean() < 0.7
    torch.testing.assert_close(features, expected["features"], atol=1e-5, rtol=1e-6)
    if name in UNSCALED:
        missing = (sae.d**0.5 - 1) * torch.from_numpy(np.load(path / "params.npz")["b_dec"])
        rebuilt = rebuilt + missing
    torch.testing.assert_close(sae(expected["x"]), rebuilt, atol=2e-5, rtol=2e-5)
    site = "mlp_out" if "transcoder" in name else "resid_pre" if "embedding" in name else "resid_post"
    assert (None if sae.place is None else sae.place[0]) == (None if name.startswith("sparsify-") else site)


def test_every_library_that_can_be_had_is_there():
    assert len(PEERS) == 40


# --- what is refused -----------------------------------------------------------------------------------------------------


def settings(made: Made, file: str, **changes: Any) -> Path:
    directory = made.path if made.path.is_dir() else made.path.parent
    content = json.loads((directory / file).read_text())
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            value = {**content[name], **value}
        content[name] = value
    write_json(directory / file, content)
    return directory


def metadata(made: Made, **changes: Any) -> Path:
    return settings(made, "cfg.json", metadata=changes)


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def square(path: Path) -> Path:
    saelens(path)
    t = {"W_enc": draw(D, D), "W_dec": draw(D, D), "b_enc": draw(D), "b_dec": draw(D)}
    save_file(t, path / "sae_weights.safetensors")
    return settings(Made(path, lambda x: (x, x), None), "cfg.json", d_sae=D)


def turned(path: Path) -> Path:
    made = sparsify(path)
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "W_dec": draw(D, F), "b_dec": draw(D)}
    save_file(t, made.path / "sae.safetensors")
    return made.path


def not_a_number(path: Path) -> Path:
    made = sparsify(path)
    t = {"encoder.weight": draw(F, D), "encoder.bias": draw(F), "W_dec": draw(F, D), "b_dec": draw(D)}
    t["W_dec"][3, 2] = torch.nan
    save_file(t, made.path / "sae.safetensors")
    return made.path


def both(path: Path) -> Path:
    saelens(path)
    save_file({"x": draw(1)}, path / "sae.safetensors")  # cfg.json serves SAELens and sparsify
    return path


def two_torch_files(path: Path) -> Path:
    openai(path)
    torch.save({}, path / "5.pt")
    return path


def without(path: Path, made: Made, file: str) -> Path:
    (made.path / file).unlink()
    return made.path


REFUSED: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "square": (square, ValueError, r"'W_enc' is 12×12, so its shape does not show whether features are rows or columns"),
    "turned decoder": (turned, ValueError, r"'W_dec' has shape \(12, 40\); this family keeps \(F, 12\)"),
    "NaN": (not_a_number, ValueError, "w_dec holds NaN or Inf"),
    "two families": (both, ValueError, r"ambiguous, it holds SAELens \(sae_weights.safetensors\) and sparsify"),
    "two .pt files": (two_torch_files, ValueError, r"ambiguous, it holds 2 .pt files"),
    "no config": (lambda p: without(p, saelens(p), "cfg.json"), FileNotFoundError, "there is no cfg.json of SAELens"),
    "no weights": (
        lambda p: without(p, gemma_scope_2(p), "params.safetensors"), FileNotFoundError,
        "nor params.safetensors of Gemma Scope 2",
    ),
    "weights alone": (
        lambda p: without(p, saelens(p), "cfg.json") / "sae_weights.safetensors", FileNotFoundError,
        "needs its configuration beside it: .*cfg.json",
    ),
    "empty directory": (lambda p: p.mkdir() or p, ValueError, "holds no SAE of a known family"),
    "truncated safetensors": (
        lambda p: cut(saelens(p).path / "sae_weights.safetensors"), ValueError, "truncated or damaged",
    ),
    "truncated npz": (lambda p: cut(gemma_scope(p).path / "params.npz"), ValueError, "truncated, damaged or no archive"),
    "truncated pt": (lambda p: cut(openai(p).path), ValueError, "truncated or damaged"),
    "other architecture": (
        lambda p: settings(saelens(p), "cfg.json", architecture="other"), ValueError, "architecture 'other'",
    ),
    "tanh-relu": (lambda p: settings(saelens(p), "cfg.json", activation_fn="tanh-relu"), ValueError, "standard with tanh-relu"),
    "tanh-relu behind a threshold": (
        lambda p: settings(saelens(p, "jumprelu"), "cfg.json", activation_fn_str="tanh-relu"), ValueError,
        "activation_fn is 'tanh-relu' and the architecture 'jumprelu', which is read with 'relu' alone",
    ),
    "top-k behind a gate": (
        lambda p: settings(saelens(p, "gated"), "cfg.json", activation_fn_str="topk", activation_fn_kwargs={"k": 3}), ValueError,
        "activation_fn is 'topk' and the architecture 'gated', which is read with 'relu' alone",
    ),
    "ReLU as top-k": (
        lambda p: settings(saelens(p, "topk"), "cfg.json", activation_fn_str="relu"), ValueError,
        "activation_fn is 'relu' and the architecture 'topk', which is read with 'topk' alone",
    ),
    "signed top-k": (
        lambda p: settings(saelens(p, "topk"), "cfg.json", activation_fn_kwargs={"k": 3, "signed": True}), ValueError,
        "signed is set",
    ),
    "other width": (lambda p: settings(saelens(p), "cfg.json", d_in=99), ValueError, "d_in is 99 in cfg.json and 12"),
    "finetuned": (
        lambda p: settings(saelens(p), "cfg.json", finetuning_scaling_factor=True), ValueError, "finetuning_scaling_factor",
    ),
    "unknown normalisation": (
        lambda p: settings(saelens(p), "cfg.json", normalize_activations="other"), ValueError, "'other', which is not known",
    ),
    "centred, unknown model": (
        lambda p: metadata(saelens(p), model_from_pretrained_kwargs={"center_writing_weights": True}), ValueError,
        "whether that changed the stream of 'm' is not known",
    ),
    "folded values": (
        lambda p: metadata(saelens_heads(p), model_from_pretrained_kwargs={"fold_value_biases": True}), ValueError,
        "fold_value_biases, which changes hook_z",
    ),
    "k missing": (lambda p: settings(saelens(p, "topk"), "cfg.json", k=None), ValueError, "k is None; expected a whole number"),
    "k above F": (lambda p: settings(saelens(p, "topk"), "cfg.json", k=41), ValueError, "k is 41; expected 1 to F = 40"),
    "groupmax": (lambda p: settings(sparsify(p), "cfg.json", activation="groupmax"), ValueError, "activation 'groupmax'"),
    "Llama top-k by norm": (
        lambda p: llama_scope(p, True, act_fn="topk").path, ValueError, "Top-K of h·‖W_dec‖ that returns h itself",
    ),
    "Llama without lengths": (
        lambda p: llama_scope(p, dataset_average_activation_norm={"in": 0}).path, ValueError, "dataset_average_activation_norm",
    ),
    "unset threshold": (
        lambda p: torch.save(
            {**torch.load(dictionary_learning(p, "BatchTopKSAE").path / "ae.pt"), "threshold": torch.tensor(-1.0)}, p / "ae.pt"
        ) or p, ValueError, "its threshold was never set",
    ),
    "other dictionary": (
        lambda p: settings(dictionary_learning(p, "AutoEncoder"), "config.json", trainer={"dict_class": "Mine"}), ValueError,
        "dict_class in config.json is 'Mine'",
    ),
    "ae.pt as OpenAI": (
        lambda p: os.rename(dictionary_learning(p, "AutoEncoderTopK").path / "ae.pt", p / "x.pt") or p / "x.pt", ValueError,
        "a torch file of none of OpenAI, .* .an ae.pt of dictionary_learning needs its config.json",
    ),
    "config is no JSON": (
        lambda p: (saelens(p).path / "cfg.json").write_text("nope") and p, ValueError, "cfg.json is not JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_exactly_is_refused_with_the_reason(case, tmp_path):
    make, error, message = REFUSED[case]
    path = make(tmp_path / "sae")
    with pytest.raises(error, match=message):
        sf.SAE.load(path)


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("file", ["ae.pt", "4.pt", "params.npz"])
def test_code_in_a_file_never_runs(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = dictionary_learning(tmp_path / "sae", "AutoEncoderTopK").path / file
    if file == "params.npz":
        np.savez(path, W_enc=np.array([Attack()], dtype=object))
    else:
        torch.save({"pre_bias": Attack(), "b_dec": Attack()}, path)
    with pytest.raises(ValueError, match=r"cannot be read safely|truncated, damaged or no archive"):
        sf.SAE.load(path)
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        sf.SAE.load(path)
    assert not Path("owned").exists()
