"""Writes the files of this folder with the libraries that they are named after; run by hand where those are installed.

    python tests/data/write_with_peers.py

Written with repeng 0.4.0, dialz 1.1.4, steering-vectors 0.12.2, gguf 0.19.0 and torch 2.13.0.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

HERE = Path(__file__).parent
LAYERS, WIDTH = (1, 3, 12), 8


def row(layer: int) -> np.ndarray:
    """Numbers with full mantissas, the same on every machine."""
    return (((np.arange(WIDTH) * 7 + layer * 13) % 17 + 1) / 3).astype(np.float32)


def write_gguf(path: Path, architecture: str, dtype: type) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(LAYERS))
    for layer in LAYERS:
        writer.add_tensor(f"direction.{layer}", row(layer).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((3, WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    from dialz.vector import SteeringVector as DialzVector
    from repeng import ControlVector
    from steering_vectors import SteeringVector

    write_gguf(HERE / "gguf_float32.gguf", "controlvector", np.float32)
    write_gguf(HERE / "gguf_float16.gguf", "controlvector", np.float16)
    write_model(HERE / "gguf_model.gguf")
    ControlVector("llama", {layer: row(layer) for layer in LAYERS}).export_gguf(HERE / "repeng.gguf")
    DialzVector("llama", {layer: row(layer) for layer in LAYERS}).export_gguf(HERE / "dialz.gguf")
    tensors = {layer: torch.from_numpy(row(layer)) for layer in LAYERS}
    torch.save(SteeringVector(tensors, "decoder_block"), HERE / "steering_vectors.pt")
    torch.save(SteeringVector(tensors, "mlp"), HERE / "steering_vectors_mlp.pt")
    entries = {
        f"layers.{layer}": {
            "steering_vector": tensors[layer],
            "steering_coefficient": 2.0,
            "action": "add",
            "bias": None,
        }
        for layer in LAYERS
    }
    torch.save(entries, HERE / "lm_eval.pt")
    clamp = {"steering_vector": tensors[1], "steering_coefficient": 2.0, "action": "clamp", "bias": tensors[3]}
    torch.save({"layers.1": clamp}, HERE / "lm_eval_clamp.pt")


if __name__ == "__main__":
    main()
