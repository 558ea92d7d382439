"""Writes the SAEs of the folder saes with the libraries that they are named after; run by hand where those are installed.

    SPARSIFY_DISABLE_TRITON=1 python tests/data/write_saes_with_peers.py

Written with sae-lens 6.54.12, eai-sparsify 1.3.3, dictionary-learning 0.1.0, llamascopium 2.0.0b34 and torch 2.13.0. Beside
each file lies expected.safetensors: a few rows, the features and the reconstruction that the library itself computes from them
after it has read its own file again. The files of Gemma Scope, Qwen-Scope, Goodfire and qresearch have the shape that SAELens
reads, and what is expected is what SAELens computes by its loader of that family. llamascopium needs another transformer-lens
than the one that sae-lens takes, so each part runs only where its library can be imported:

    SPARSIFY_DISABLE_TRITON=1 python tests/data/write_saes_with_peers.py write_llamascopium
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent / "saes"
D, F, K = 8, 20, 3


def fill(module: torch.nn.Module) -> None:
    """Numbers that leave some features on and some off, in every parameter and in the thresholds."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape))
            if name == "threshold":
                parameter.abs_()
    for name, buffer in module.named_buffers():
        if name == "threshold":
            buffer.fill_(0.7)


def keep(path: Path, features: Callable[[Tensor], Tensor], rebuild: Callable[[Tensor], Tensor]) -> None:
    x = 2 * torch.randn(6, D) + 0.3
    with torch.no_grad():
        tensors = {"x": x, "features": features(x), "reconstruction": rebuild(x)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "expected.safetensors")


def write_saelens() -> None:
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    kinds: dict[str, dict[str, object]] = {
        "standard": {},
        "topk": {"k": K},
        "topk-rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
        "jumprelu": {"normalize_activations": "layer_norm"},
        "gated": {},
    }
    for name, settings in kinds.items():
        kind = name.partition("-")[0]
        made = SAE.from_dict(
            {
                "architecture": kind, "d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu",
                "apply_b_dec_to_input": kind != "jumprelu", "normalize_activations": "none", "reshape_activations": "none",
                **settings,
            }
        )  # fmt: skip
        made.cfg.metadata = SAEMetadata(
            model_name="pythia-70m", hook_name="blocks.4.hook_resid_post", hook_head_index=None
        )
        fill(made)
        path = HERE / f"saelens-{name}"
        path.mkdir(parents=True, exist_ok=True)
        made.save_model(path)
        again = SAE.load_from_disk(path)
        keep(path, again.encode, again)


def write_sparsify() -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    made = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K))
    fill(made)
    path = HERE / "sparsify" / "layers.5"
    made.save_to_disk(path)
    again = SparseCoder.load_from_disk(path)

    def features(x: Tensor) -> Tensor:
        found = again.encode(x)
        return torch.zeros(len(x), F).scatter_(1, found.top_indices, found.top_acts)

    keep(path, features, lambda x: again(x).sae_out)


def write_dictionary_learning() -> None:
    from dictionary_learning import dictionary
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    made = {
        "AutoEncoder": dictionary.AutoEncoder(D, F),
        "AutoEncoderNew": dictionary.AutoEncoderNew(D, F),
        "GatedAutoEncoder": dictionary.GatedAutoEncoder(D, F),
        "JumpReluAutoEncoder": dictionary.JumpReluAutoEncoder(D, F),
        "AutoEncoderTopK": AutoEncoderTopK(D, F, K),
        "BatchTopKSAE": BatchTopKSAE(D, F, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, K, [8, 12]),
    }
    for kind, module in made.items():
        fill(module)
        path = HERE / f"dictionary_learning-{kind}"
        path.mkdir(parents=True, exist_ok=True)
        trainer = {
            "dict_class": kind, "activation_dim": D, "dict_size": F, "k": K, "layer": 2, "lm_name": "EleutherAI/pythia-70m",
            "submodule_name": "resid_post_layer_2",
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
        torch.save(module.state_dict(), path / "ae.pt")
        again, _ = load_dictionary(str(path), "cpu")
        keep(path, again.encode, lambda x, again=again: again.decode(again.encode(x)))


def keep_saelens(folder: str, made: Any) -> Path:
    path = HERE / folder
    path.mkdir(parents=True, exist_ok=True)
    made.save_model(path)
    return path


def write_saelens_kinds() -> None:
    """AbsTopK, and the transcoders."""
    from sae_lens import SAE
    from sae_lens.saes.sae import SAEMetadata

    base = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": False}
    kinds: dict[str, dict[str, Any]] = {
        "abstopk": {"k": K, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True},
        "transcoder": {"d_out": D + 3},
        "skip_transcoder": {"d_out": D + 3},
        "jumprelu_transcoder": {"d_out": D},
        "jumprelu_skip_transcoder": {"d_out": D},
    }
    for kind, settings in kinds.items():
        made = SAE.from_dict({**base, **settings, "architecture": kind})
        hooks = {"hook_name": "blocks.4.hook_resid_post"} if kind == "abstopk" else {
            "hook_name": "blocks.4.hook_mlp_in", "hook_name_out": "blocks.4.hook_mlp_out",
        }  # fmt: skip
        made.cfg.metadata = SAEMetadata(model_name="pythia-70m", hook_head_index=None, **hooks)
        fill(made)
        path = keep_saelens(f"saelens-{kind}", made)
        again = SAE.load_from_disk(path)
        keep(path, again.encode, again)


def write_saelens_training() -> None:
    """Checkpoints of SAEs in training; expected is what SAELens computes from its own inference file of the same SAE."""
    import tempfile

    from sae_lens import SAE
    from sae_lens.saes import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

    base = {
        "d_in": D, "d_sae": F, "k": float(K), "dtype": "float32", "device": "cpu",
        "metadata": SAEMetadata(model_name="pythia-70m", hook_name="blocks.4.hook_resid_post", hook_head_index=None),
    }  # fmt: skip
    matrix = torch.randn(D, D)
    whitening = ActivationWhitening(mean=torch.randn(D), matrix=matrix, inverse_matrix=torch.linalg.inv(matrix))
    scalers = {
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}, ActivationScaler()),
        "batchtopk-scaled": (
            BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig,
            {"normalize_activations": "expected_average_only_in", "rescale_acts_by_decoder_norm": True}, ActivationScaler(0.37),
        ),
        "batchtopk-whitened": (
            BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig,
            {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True},
            ActivationScaler(whitening=whitening),
        ),
        "matryoshka": (
            MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": [8, F]},
            ActivationScaler(),
        ),
    }  # fmt: skip
    for name, (kind, config, settings, scaler) in scalers.items():
        made = kind(config(**base, **settings))
        fill(made)
        made.topk_threshold = torch.tensor(0.7, dtype=torch.float64)
        path = keep_saelens(f"saelens-{name}", made)
        if settings.get("normalize_activations"):
            scaler.save(str(path / "activation_scaler.json"))
        with tempfile.TemporaryDirectory() as folder:
            made.save_inference_model(folder)
            again = SAE.load_from_disk(folder)
        keep(
            path,
            lambda x, again=again, scaler=scaler: again.encode(scaler.scale(x)),
            lambda x, again=again, scaler=scaler: scaler.unscale(again(scaler.scale(x))),
        )


def write_sparsify_transcoders() -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    for name, skip in (("transcoder", False), ("skip-transcoder", True)):
        made = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, transcode=True, skip_connection=skip))
        fill(made)
        path = HERE / f"sparsify-{name}" / "layers.5.mlp"
        made.save_to_disk(path)
        again = SparseCoder.load_from_disk(path)

        def features(x: Tensor, again: Any = again) -> Tensor:
            found = again.encode(x)
            return torch.zeros(len(x), F).scatter_(1, found.top_indices, found.top_acts)

        keep(path, features, lambda x, again=again: again(x).sae_out)


def write_through_saelens() -> None:
    """Files of other families, read by SAELens's loader of each from a cache of the hub."""
    import os
    import shutil
    import tempfile
    from unittest import mock

    import numpy as np

    hub = tempfile.mkdtemp()
    os.environ |= {"HF_HUB_CACHE": hub, "HF_HUB_OFFLINE": "1"}  # before huggingface_hub is imported
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def matrix(*shape: int) -> Tensor:
        return torch.randn(*shape)

    def torch_file(**tensors: Tensor) -> Callable[[Path], None]:
        return lambda path: torch.save({name.replace("__", "."): value for name, value in tensors.items()}, path)

    scope = {"b_enc": matrix(F), "b_dec": matrix(D), "threshold": torch.rand(F)}
    first = {"W_enc": matrix(D, F), "W_dec": matrix(F, D), **scope}
    second = {"w_enc": matrix(D, F), "w_dec": matrix(F, D), **scope}

    def second_file(affine: bool) -> Callable[[Path], None]:
        skip = {"affine_skip_connection": matrix(D, D)} if affine else {}
        return lambda path: save_file({**second, **skip}, path)

    def second_config(out: str, **settings: bool) -> Callable[[Path], None]:
        point_in = "model.layers.7.output" if out == "output" else "model.layers.7.pre_feedforward_layernorm.output"
        config = {
            "architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": point_in,
            "hf_hook_point_out": f"model.layers.7.{out}", **settings,
        }  # fmt: skip
        return lambda path: path.write_text(json.dumps(config))  # type: ignore[return-value]

    written = "post_feedforward_layernorm.output"
    families: dict[str, tuple[str, str, dict[str, Callable[[Path], None]]]] = {
        "qwen_scope": ("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", "layer5.sae.pt", {
            "layer5.sae.pt": torch_file(W_enc=matrix(F, D), W_dec=matrix(D, F), b_enc=matrix(F), b_dec=matrix(D))}),
        "goodfire": ("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth", {
            "Llama-3.1-8B-Instruct-SAE-l19.pth": torch_file(
                encoder_linear__weight=matrix(F, D), encoder_linear__bias=matrix(F),
                decoder_linear__weight=matrix(D, F), decoder_linear__bias=matrix(D))}),
        "deepseek_r1": ("qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", {
            "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt": torch_file(
                encoder__weight=matrix(F, D), encoder__bias=matrix(F), decoder__weight=matrix(D, F), decoder__bias=matrix(D))}),
        "gemma_2": ("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", {
            "params.npz": lambda path: np.savez(path, **{name: value.numpy() for name, value in first.items()})}),
        "gemma_2 embedding": ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", {
            "params.npz": lambda path: np.savez(path, **{name: value.numpy() for name, value in first.items()})}),
        "gemma_2_transcoder": ("google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_5", {
            "params.npz": lambda path: np.savez(path, **{name: value.numpy() for name, value in first.items()})}),
        "gemma_3": ("google/gemma-scope-2-1b-pt", "resid_post/layer_7_width_16k_l0_big", {
            "config.json": second_config("output"), "params.safetensors": second_file(False)}),
        "gemma_3 transcoder": ("google/gemma-scope-2-1b-pt", "transcoder_all/layer_7_width_16k_l0_big", {
            "config.json": second_config(written), "params.safetensors": second_file(False)}),
        "gemma_3 affine": ("google/gemma-scope-2-1b-pt", "transcoder_all/layer_7_width_16k_l0_big_affine", {
            "config.json": second_config(written, affine_connection=True), "params.safetensors": second_file(True)}),
    }  # fmt: skip
    shapes = {name: list(value.shape) for name, value in second.items()}
    for loader, (repository, folder, files) in families.items():
        here = HERE / repository.partition("/")[2] / ("" if folder in files else folder)
        snapshot = Path(hub, f"models--{repository.replace('/', '--')}", "snapshots", "0" * 40)
        (snapshot.parents[1] / "refs").mkdir(parents=True, exist_ok=True)
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
        cached = snapshot / ("" if folder in files else folder)
        for place in (here, cached):
            place.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            write(here / name)
            shutil.copy(here / name, cached / name)
        size = {"d_in": D, "d_sae": F} | ({"d_out": D} if "transcoder" in folder or "transcoder" in repository else {})
        # the only part that asks the network, for sizes that are in the file
        with mock.patch.object(loaders, "get_safetensors_tensor_shapes", return_value=shapes):
            read = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader.partition(" ")[0]]
            config, state, _ = read(repository, folder, "cpu", False, {**size, "dtype": "float32"})
        again = SAE.from_dict(loaders.handle_config_defaulting(config))
        again.process_state_dict_for_loading(state)
        again.load_state_dict(state)
        keep(here, again.encode, again)
    shutil.rmtree(hub)


def write_llamascopium() -> None:
    from llamascopium import SAEConfig, SparseAutoEncoder

    hook, out = "blocks.4.hook_resid_post", "blocks.4.hook_mlp_out"
    kinds: dict[str, dict[str, Any]] = {
        "jumprelu": {"act_fn": "jumprelu"},
        "jumprelu-without-decoder-norm": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
        "jumprelu-token-wise": {"act_fn": "jumprelu", "norm_activation": "token-wise"},
        "jumprelu-folded": {"act_fn": "jumprelu"},
        "relu": {"act_fn": "relu", "use_decoder_bias": False},
        "topk": {"act_fn": "topk", "top_k": K, "sparsity_include_decoder_norm": False},
        "transcoder": {"act_fn": "jumprelu", "hook_point_in": "blocks.4.hook_resid_mid", "hook_point_out": out},
    }
    for name, settings in kinds.items():
        config = {"hook_point_in": hook, "hook_point_out": hook, "d_model": D, "expansion_factor": F / D, **settings}
        made = SparseAutoEncoder.from_config(SAEConfig(**config, dtype=torch.float32, device="cpu"))
        fill(made)
        with torch.no_grad():
            for parameter in [p for n, p in made.named_parameters() if "log_jumprelu_threshold" in n]:
                parameter.copy_(torch.rand(F) - 0.5)
        if made.cfg.norm_activation == "dataset-wise":
            made.set_dataset_average_activation_norm({made.cfg.hook_point_in: 5.0, made.cfg.hook_point_out: 7.0})
            if name != "transcoder":
                made.set_dataset_average_activation_norm({hook: 5.0})
        path = HERE / f"llamascopium-{name}"
        path.mkdir(parents=True, exist_ok=True)
        made.save_pretrained(path, fold_activation_scale=name.endswith("folded"))
        made.cfg.save_hyperparameters(path)
        again = SparseAutoEncoder.from_pretrained(str(path))

        def features(x: Tensor, again: Any = again) -> Tensor:
            return again.encode(again.normalize_activations({again.cfg.hook_point_in: x})[again.cfg.hook_point_in])

        def rebuild(x: Tensor, again: Any = again, features: Any = features) -> Tensor:
            return again.decode(features(x)) / again.compute_norm_factor(x, again.cfg.hook_point_out)

        keep(path, features, rebuild)


PARTS = (
    write_saelens, write_sparsify, write_dictionary_learning, write_saelens_kinds, write_saelens_training,
    write_sparsify_transcoders, write_through_saelens, write_llamascopium,
)  # fmt: skip

if __name__ == "__main__":
    chosen = sys.argv[1:] or [part.__name__ for part in PARTS]
    for part in PARTS:
        torch.manual_seed(0)
        if part.__name__ in chosen:
            part()
