"""Writes the SAEs of the folder saes with the libraries that they are named after; run by hand where those are installed.

    SPARSIFY_DISABLE_TRITON=1 python tests/data/write_saes_with_peers.py

Written with sae-lens 6.54.12, eai-sparsify 1.3.3, dictionary-learning 0.1.0 and torch 2.13.0. Beside each file lies
expected.safetensors: a few rows, the features and the reconstruction that the library itself computes from them after it
has read its own file again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

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


if __name__ == "__main__":
    torch.manual_seed(0)
    write_saelens()
    write_sparsify()
    write_dictionary_learning()
