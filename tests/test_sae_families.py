"""Files that say less than they need, or something else than they compute: by their family's formula, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import steerfast as sf

D, F, K = 12, 40, 5
F64 = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def top_k(h: Tensor, k: int = K) -> Tensor:
    best = h.topk(k, dim=-1)
    return torch.zeros_like(h).scatter(-1, best.indices, best.values)


def write_torch(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


# --- Qwen-Scope ----------------------------------------------------------------------------------------------------------


def qwen(path: Path) -> tuple[Path, dict[str, Tensor]]:
    t = {"W_enc": draw(F, D), "W_dec": draw(D, F), "b_enc": draw(F), "b_dec": draw(D)}
    return write_torch(path / "layer11.sae.pt", t), t


@pytest.mark.parametrize(
    ("folder", "k"),
    [("plain", K), ("SAE-Res-Qwen3-8B-Base-W64K-L0_5", None),
     ("models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_5/snapshots/0a", None),
     ("SAE-Res-Qwen3-8B-Base-W64K-L0_5", K)],
)  # fmt: skip
def test_qwen_scope_takes_k_from_the_name_of_its_repository_or_as_an_argument(tmp_path, folder, k):
    file, t = qwen(tmp_path / folder)
    for path in (file, file.parent):
        sae = sf.SAE.load(path, k=k)
        x = draw(6, D)
        features = torch.relu(top_k(x @ t["W_enc"].T + t["b_enc"]))
        torch.testing.assert_close(sae.encode(x), features, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(sae(x), features @ t["W_dec"].T + t["b_dec"], atol=1e-12, rtol=1e-12)
        assert sae.place == ("resid_post", 11)
        assert sae.source.model == ("" if folder == "plain" else "Qwen/Qwen3-8B-Base")


# --- Goodfire ------------------------------------------------------------------------------------------------------------


def goodfire(path: Path) -> tuple[Path, dict[str, Tensor]]:
    t = {"encoder_linear.weight": draw(F, D), "encoder_linear.bias": draw(F)}
    t |= {"decoder_linear.weight": draw(D, F), "decoder_linear.bias": draw(D)}
    return write_torch(path / "Llama-3.3-70B-Instruct-SAE-l50.pt", t), t


def goodfire_topk(path: Path, name: str = "topk_sae_l15_exp16_k5.pt") -> tuple[Path, dict[str, Tensor]]:
    t = {"encoder_linear.weight": draw(F, D), "decoder.weight": draw(F, D), "decoder_bias": draw(D)}
    return write_torch(path / name, t), t


@pytest.mark.parametrize("k", [None, 7])
def test_goodfire_is_relu_unless_k_is_given(tmp_path, k):
    file, t = goodfire(tmp_path)
    sae, x = sf.SAE.load(file, k=k), draw(6, D)
    h = torch.relu(x @ t["encoder_linear.weight"].T + t["encoder_linear.bias"])
    features = h if k is None else top_k(h, k)
    torch.testing.assert_close(sae.encode(x), features, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sae(x), features @ t["decoder_linear.weight"].T + t["decoder_linear.bias"])
    assert (sae.place, sae.source.model) == (("resid_post", 50), "Llama-3.3-70B-Instruct")


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_top_k_file_of_goodfire_needs_the_scale_of_its_rows(tmp_path, scale):
    file, t = goodfire_topk(tmp_path)
    sae, x = sf.SAE.load(file, scale=scale), draw(6, D)
    features = top_k(torch.relu((scale * x - t["decoder_bias"]) @ t["encoder_linear.weight"].T))
    torch.testing.assert_close(sae.encode(x), features, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sae(x), (features @ t["decoder.weight"] + t["decoder_bias"]) / scale)
    assert (sae.place, sae.k) == (("resid_post", 15), K)


# --- the mutual-information paper ----------------------------------------------------------------------------------------


def mutual(path: Path, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    t = {"mask": torch.ones(F), "W_enc": draw(D, F), "b_enc": draw(F), "b_dec": draw(D)}
    config = {"d_inp": D, "d_hide": F, "topK": K, **config}
    return write_torch(path / "TopK7_l8_h65k_epoch5.pth", {"weight": t, "config": config}), t


@pytest.mark.parametrize("k", [K, None])
def test_the_saes_of_the_mutual_information_paper_are_tied(tmp_path, k):
    file, t = mutual(tmp_path, topK=k)
    sae, x = sf.SAE.load(tmp_path), draw(6, D)
    h = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    features = h if k is None else top_k(h)
    torch.testing.assert_close(sae.encode(x), features, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(sae(x), features @ t["W_enc"].T + t["b_dec"], atol=1e-12, rtol=1e-12)
    assert sae.w_dec.data_ptr() == sae.w_enc.data_ptr()
    assert sae.place == ("resid_post", 7)  # its code counts blocks from 1
    assert sf.SAE.load(file).k == k


# --- llamascopium --------------------------------------------------------------------------------------------------------

HOOK = "blocks.3.hook_resid_post"


def llamascopium(
    path: Path, norms: tuple[float, float] = (5.0, 5.0), **settings: Any
) -> tuple[Path, dict[str, Tensor]]:
    t = {"W_E": draw(D, F), "W_D": draw(F, D), "b_E": draw(F), "b_D": draw(D)}
    t["activation_function.log_jumprelu_threshold"] = draw(F)
    config = {
        "sae_type": "sae", "d_model": D, "expansion_factor": F / D, "act_fn": "jumprelu", "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True, "use_decoder_bias": True, "use_glu_encoder": False, "top_k": K,
        "hook_point_in": HOOK, "hook_point_out": HOOK, **settings,
    }  # fmt: skip
    for hook, norm in zip((config["hook_point_in"], config["hook_point_out"]), norms, strict=True):
        t[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm, dtype=F64)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(t, path / "sae_weights.safetensors")
    return path, t


@pytest.mark.parametrize("by_norm", [True, False])
def test_what_llamascopium_folds_itself_is_read_as_trained_or_as_it_is(tmp_path, by_norm):
    """Its fold scales b_E and W_D and leaves the threshold; scale=s restores which features are on, 1.0 follows the file."""
    path, t = llamascopium(tmp_path / "trained", sparsity_include_decoder_norm=by_norm)
    trained, s = sf.SAE.load(path), D**0.5 / 5
    folded = {name: value for name, value in t.items() if "." not in name}
    folded |= {"b_E": t["b_E"] / s, "b_D": t["b_D"] / s}
    log = "activation_function.log_jumprelu_threshold"
    path, _ = llamascopium(tmp_path / "folded", sparsity_include_decoder_norm=by_norm, norm_activation="inference")
    save_file({**folded, log: t[log]}, path / "sae_weights.safetensors")
    x = 3 * draw(50, D)
    with pytest.raises(ValueError, match="folded the lengths of its data set into the weights and left the threshold"):
        sf.SAE.load(path)
    right = sf.SAE.load(path, scale=s)
    torch.testing.assert_close(right.encode(x), trained.encode(x) / s, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(right(x), trained(x), atol=1e-10, rtol=1e-10)
    as_it_is = sf.SAE.load(path, scale=1.0).encode(x)
    h = x @ t["W_E"] + t["b_E"] / s
    gate = h * t["W_D"].norm(dim=1) if by_norm else h
    torch.testing.assert_close(as_it_is, torch.relu(h) * (gate > t[log].exp()), atol=1e-10, rtol=1e-10)
    assert not torch.equal(as_it_is > 0, trained.encode(x) > 0)


def test_a_transcoder_of_llamascopium_folds_the_lengths_of_both_places(tmp_path):
    hooks = {"hook_point_in": "blocks.3.hook_resid_pre", "hook_point_out": "blocks.3.hook_mlp_out"}
    path, t = llamascopium(tmp_path, (5.0, 9.0), **hooks)
    made, x = sf.SAE.load(path), draw(20, D)
    h = x * D**0.5 / 5 @ t["W_E"] + t["b_E"]
    threshold = t["activation_function.log_jumprelu_threshold"].exp()
    features = torch.relu(h) * (h * t["W_D"].norm(dim=1) > threshold)
    torch.testing.assert_close(made.encode(x), features, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(made(x), (features @ t["W_D"] + t["b_D"]) * 9 / D**0.5, atol=1e-10, rtol=1e-10)
    assert isinstance(made, sf.sae.Transcoder)
    assert (made.reads.place, made.place) == (("resid_pre", 3), ("mlp_out", 3))


def test_an_unused_length_of_llamascopium_is_never_read(tmp_path):
    """Where rows are normalised otherwise it holds memory that was never written."""
    path, t = llamascopium(tmp_path, (float("nan"), float("nan")), norm_activation="token-wise")
    sae, x = sf.SAE.load(path), draw(9, D)
    factor = D**0.5 / x.norm(dim=-1, keepdim=True)
    h = x * factor @ t["W_E"] + t["b_E"]
    gate = h * t["W_D"].norm(dim=1) > t["activation_function.log_jumprelu_threshold"].exp()
    torch.testing.assert_close(sae.encode(x), torch.relu(h) * gate, atol=1e-10, rtol=1e-10)


# --- what the file does not say ------------------------------------------------------------------------------------------


def test_a_site_is_taken_where_the_file_says_none(tmp_path):
    t = {"pre_bias": draw(D), "encoder.weight": draw(F, D), "latent_bias": draw(F), "decoder.weight": draw(D, F)}
    file = write_torch(tmp_path / "4.pt", {**t, "activation": "ReLU"})
    assert sf.SAE.load(file).place is None
    for site in (("mlp_out", 4), "blocks.4.hook_mlp_out"):
        sae = sf.SAE.load(file, site=site)
        assert sae.place == ("mlp_out", 4)
        assert [place for place, _ in sf.Plan([sf.EditFeatures(sae, {1: 2.0})]).edits.items()] == [("mlp_out", 4)]
    qwen_file, _ = qwen(tmp_path / "qwen")
    assert sf.SAE.load(qwen_file, k=K, site=("resid_pre", 12)).place == ("resid_post", 11)  # the same stream
    with pytest.raises(
        ValueError, match=r"it says that it belongs to resid_post 11; leave site=\('mlp_out', 11\) away"
    ):
        sf.SAE.load(qwen_file, k=K, site=("mlp_out", 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_chosen_and_what_it_costs_is_told(tmp_path, dtype):
    file, t = goodfire(tmp_path)
    sae = sf.SAE.load(file, dtype=dtype)
    assert (sae.w_enc.dtype, sae.w_dec.dtype, sae.b_enc.dtype) == (dtype, dtype, torch.float32)
    rows = torch.cat([t["encoder_linear.weight"], t["decoder_linear.weight"].T])
    errors = (rows.to(dtype).double() - rows).norm(dim=1) / rows.norm(dim=1)
    assert sae.source.rounding == pytest.approx(float(errors.max()))
    assert 0 < sae.source.rounding <= torch.finfo(dtype).eps / 2
    again = sf.SAE.load(sae.save(tmp_path / "own"))
    assert again.source == sae.source
    assert sf.SAE.load(tmp_path / "own", dtype=dtype).source.rounding == sae.source.rounding  # nothing more is rounded
    assert sf.SAE.load(file).source.rounding == 0


def test_weights_that_a_dtype_cannot_hold_are_refused(tmp_path):
    file, t = goodfire(tmp_path)
    t["decoder_linear.weight"][1, 2] = 1e5
    torch.save(t, file)
    with pytest.raises(ValueError, match=r"w_dec holds 1e\+05, and torch.float16 ends at 6.55e\+04; choose another"):
        sf.SAE.load(file, dtype=torch.float16)
    assert sf.SAE.load(file, dtype=torch.bfloat16).w_dec.isfinite().all()
    with pytest.raises(TypeError, match=r"dtype is torch.int8; expected a floating dtype"):
        sf.SAE.load(file, dtype=torch.int8)


# --- what is refused -----------------------------------------------------------------------------------------------------


def damaged(make: Callable[..., tuple[Path, dict[str, Tensor]]], **changes: Tensor | None) -> Callable[[Path], Path]:
    """A torch file with some tensors changed, or taken away."""

    def write(path: Path) -> Path:
        file, t = make(path)
        t = {name: value for name, value in t.items() if changes.get(name, 0) is not None} | {
            name: value for name, value in changes.items() if value is not None
        }
        torch.save(t, file)
        return file

    return write


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-300])
    return file


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "Qwen-Scope without k": (lambda p: qwen(p)[0], {}, r"neither the file nor its name says k; give SAE.load\(path, k=…\)"),
    "Qwen-Scope, two names": (
        lambda p: qwen(p / "SAE-Res-Qwen3-8B-Base-W64K-L0_50" / "SAE-Res-Qwen3-8B-Base-W64K-L0_100")[0], {}, "give SAE.load",
    ),
    "Qwen-Scope, another k": (
        lambda p: qwen(p / "SAE-Res-Qwen3-8B-Base-W64K-L0_50")[0], {"k": 5}, "its name says k = 50; leave k=5 away",
    ),
    "Qwen-Scope, k above F": (lambda p: qwen(p)[0], {"k": 41}, "k is 41; expected 1 to F = 40"),
    "Qwen-Scope, k of none": (lambda p: qwen(p)[0], {"k": 0}, "k is 0; expected >= 1"),
    "Qwen-Scope cut off": (lambda p: cut(qwen(p)[0]), {"k": 5}, "truncated or damaged"),
    "Qwen-Scope, NaN": (damaged(qwen, b_enc=torch.full((F,), torch.nan)), {"k": 5}, "b_enc holds NaN or Inf"),
    "Qwen-Scope, another width": (
        damaged(qwen, b_dec=torch.zeros(D + 1)), {"k": 5}, r"'W_enc' has shape \(40, 12\); this family keeps \(F, 13\)",
    ),
    "Qwen-Scope turned": (
        damaged(qwen, W_dec=torch.ones(F, D)), {"k": 5}, r"'W_dec' has shape \(40, 12\); this family keeps \(12, F\)",
    ),
    "Qwen-Scope with scale": (lambda p: qwen(p)[0], {"k": 5, "scale": 2.0}, "a file of Qwen-Scope needs no scale"),
    "Goodfire with scale": (lambda p: goodfire(p)[0], {"scale": 2.0}, "with decoder_linear needs no scale"),
    "Goodfire cut off": (lambda p: cut(goodfire(p)[0]), {}, "truncated or damaged"),
    "Goodfire without bias": (
        damaged(goodfire, **{"encoder_linear.bias": None}), {}, "has no tensor 'encoder_linear.bias'",
    ),
    "Goodfire Top-K without scale": (
        lambda p: goodfire_topk(p)[0], {}, r"trained on s·x, and s is not in it; give SAE.load\(path, scale=s\)",
    ),
    "Goodfire Top-K without k": (lambda p: goodfire_topk(p, "topk.pt")[0], {"scale": 1.0}, "nor its name says k"),
    "MI-SAE, another width": (lambda p: mutual(p, d_inp=13)[0], {}, "d_inp is 13 in its config and 12 in its weights"),
    "MI-SAE, no width": (lambda p: mutual(p, d_hide=None)[0], {}, "d_hide is None; expected a whole number"),
    "MI-SAE, another k": (lambda p: mutual(p)[0], {"k": 6}, "it says k = 5; leave k=6 away"),
    "MI-SAE cut off": (lambda p: cut(mutual(p)[0]), {}, "truncated or damaged"),
    "k of a threshold": (lambda p: llamascopium(p)[0], {"k": 5}, "it selects by a threshold; leave k=5 away"),
    "llamascopium with scale": (lambda p: llamascopium(p)[0], {"scale": 2.0}, "it needs no scale; leave scale=2.0 away"),
    "llamascopium, no length": (lambda p: llamascopium(p, (float("nan"),) * 2)[0], {}, "is nan; expected a number > 0"),
    "llamascopium by batch": (
        lambda p: llamascopium(p, norm_activation="batch-wise")[0], {}, "a length of the batch that no single row shows",
    ),
    "llamascopium, two encoders": (lambda p: llamascopium(p, use_glu_encoder=True)[0], {}, "product of two encoders"),
    "llamascopium across layers": (lambda p: llamascopium(p, sae_type="clt")[0], {}, "'clt': a cross-layer transcoder"),
    "llamascopium attention": (lambda p: llamascopium(p, sae_type="lorsa")[0], {}, "a low-rank sparse attention"),
    "llamascopium across the batch": (
        lambda p: llamascopium(p, act_fn="batchtopk")[0], {}, "act_fn 'batchtopk', which selects across a batch",
    ),
    "llamascopium Top-K by norm": (lambda p: llamascopium(p, act_fn="topk")[0], {}, r"Top-K of h·‖W_D‖ that returns h itself"),
    "llamascopium, another width": (lambda p: llamascopium(p, d_model=13)[0], {}, "d_model is 13 in config.json"),
    "llamascopium cut off": (lambda p: cut(llamascopium(p)[0] / "sae_weights.safetensors").parent, {}, "truncated or damaged"),
    "its checkpoint": (lambda p: write_torch(p / "a.pt", {"sae": {}, "version": "2"}), {}, "a checkpoint of llamascopium"),
    "unknown tensors": (lambda p: write_torch(p / "a.pt", {"w": torch.ones(2)}), {}, "a torch file of none of OpenAI"),
    "a .pt and a .pth": (lambda p: (qwen(p), goodfire(p))[0][0].parent, {"k": 5}, r"ambiguous, it holds 2 .pt files"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_file_cannot_say_or_hold_is_refused_by_its_name(case, tmp_path):
    make, given, message = REFUSED[case]
    path = make(tmp_path / "sae")
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(path, **given)


# --- SAELens: checkpoints and kinds --------------------------------------------------------------------------------------

SAES = Path(__file__).parent / "data" / "saes"


def copied(name: str, target: Path, drop: str = "", **settings: Any) -> Path:
    """A committed file of SAELens, without a file, and with other settings."""
    target.mkdir()
    for file in (SAES / name).iterdir():
        if file.name not in (drop, "expected.safetensors"):
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "cfg.json").read_text())
    (target / "cfg.json").write_text(json.dumps({**config, **settings}))
    return target


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (lambda p: copied("saelens-batchtopk-whitened", p, "activation_whitening.safetensors"), {},
         "'covariance_whitening', and there is no activation_whitening.safetensors beside it with the matrices"),
        (lambda p: copied("saelens-batchtopk-whitened", p), {"scale": 2.0}, "'covariance_whitening', which needs no scale"),
        (lambda p: copied("saelens-batchtopk-scaled", p), {"scale": 0.5}, "activation_scaler.json says scaling_factor 0.37"),
        (lambda p: copied("saelens-jumprelu", p, architecture="batchtopk"), {}, "has no tensor 'topk_threshold'"),
        (lambda p: copied("saelens-standard", p, architecture="matching_pursuit"), {}, "it finds its features one after another"),
        (lambda p: copied("saelens-standard", p, architecture="temporal"), {}, "it attends across the tokens before a row"),
        (lambda p: copied("saelens-abstopk", p, k=None), {}, "k is None; expected a whole number"),
        (lambda p: copied("saelens-standard", p, activation_fn="topk", activation_fn_kwargs={"k": 3, "signed": True}), {},
         "signed is set, so its features may be negative"),
    ],
)  # fmt: skip
def test_what_saelens_does_besides_is_refused_by_its_name(make, given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sf.SAE.load(make(tmp_path / "made"), **given)


def test_a_whitening_of_another_width_is_refused(tmp_path):
    path = copied("saelens-batchtopk-whitened", tmp_path / "made")
    save_file(
        {"mean": torch.ones(8), "matrix": torch.eye(7), "inverse_matrix": torch.eye(7)},
        path / "activation_whitening.safetensors",
    )
    with pytest.raises(ValueError, match=r"its matrices have shapes \[\(7, 7\), \(7, 7\)\]; expected \(8, 8\)"):
        sf.SAE.load(path)


def test_a_feature_of_both_signs_is_edited_on_its_side():
    """AbsTopK: i where h > 0, F + i where h < 0; setting one of them to 0 takes its part of the sum away."""
    sae = sf.SAE.load(SAES / "saelens-abstopk")
    x = 2 * torch.randn(30, 8) + 0.3
    values, half = sae.encode(x), sae.features // 2
    assert not ((values[:, :half] > 0) & (values[:, half:] > 0)).any()
    feature = half + int((values[:, half:] > 0).sum(0).argmax())
    edited = sf.EditFeatures(sae, {feature: 0.0}).apply(x)
    torch.testing.assert_close(edited, x - values[:, feature : feature + 1] * sae.w_dec[feature], atol=1e-5, rtol=1e-5)
    assert (values[:, feature] > 0).any()
