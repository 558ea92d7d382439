"""Training of a Top-K SAE on activations: Adam on hand-written sparse gradients, with exact resume.

    c = (x - b_dec)/s,  f = top-k of relu(W_enc c + b_enc),  ĉ = W_decᵀ f,  loss = ‖ĉ - c‖² + α·‖ê - (c - ĉ)‖²

where ê is what the best latents among the dead ones make of the error that is left (AuxK), and s makes rows of mean square 1.
Decoder rows have length 1. Only k of F latents have a gradient in a row, so none of the products behind the encoder is dense:
with one bag of rows per feature, `embedding_bag` sums Σ weight·row without an (n, k, d) tensor, in a fixed order. One step
costs the dense product c·W_encᵀ and about as much again for everything else.

Nothing is drawn at random once training runs: the order of the rows follows from seed and step, so a run that is killed and
goes on from its checkpoint gives the same bits as one that was not.

Reference: Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from torch import Tensor

from steerfast._checks import whole_number
from steerfast.place import Origin
from steerfast.sae.model import SAE

from .checkpoints import Checkpoints
from .config import TrainConfig, TrainReport
from .distributed import Alone
from .rows import Rows, Whole, fingerprint_of, origin_of, stream
from .trainer import Trainer


def train_sae(
    source: Rows | Tensor,
    config: TrainConfig,
    directory: str | os.PathLike[str] | None = None,
    *,
    split: Alone | None = None,
    origin: Origin | None = None,
    checkpoint_every: int = 250,
    progress: Callable[[TrainReport], None] | None = None,
) -> SAE:
    """Train a Top-K SAE; with a directory, a run that was interrupted goes on from its last checkpoint.

        loss = ‖x̂ - x‖² + α·‖ê - (x - x̂)‖², ê from the best of the dead latents

    Args:
        source: Rows of activations: a tensor (n, d), an `ActivationStream`, what `open_rows` returns, or anything with `counts`,
            `fingerprint` and `read(shard)` (see `Rows`). Every replica reads its own shards.
        config: See `TrainConfig`.
        directory: For checkpoints, each written whole or not at all; the newest is kept. None: no checkpoints.
        split: `SplitData()` or `SplitFeatures()` when several processes train one SAE; None: one process.
        origin: Where the SAE belongs; None: what a cache or stream says.
        checkpoint_every: Steps between checkpoints and between reports.
        progress: Called with a `TrainReport` at every checkpoint.

    Returns:
        The SAE, float32, on the device of the rows; in every process.

    Raises:
        ValueError: NaN or Inf in the rows; k > F; the directory holds checkpoints of another run; training diverged.
        OSError: a checkpoint cannot be written; the one before it stays valid.

    Reference:
        Gao et al. 2024 (arXiv:2406.04093).

    Example:
        >>> import torch, steerfast as sf
        >>> x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
        >>> sf.sae.train_sae(x, sf.sae.TrainConfig(features=64, k=4, tokens=20_000, batch=512)).features
        64
    """
    if not isinstance(source, Tensor) and not (hasattr(source, "counts") and hasattr(source, "read")):
        raise TypeError(
            f"train_sae: source must be a tensor (n, d), what open_rows returns, or other rows; got {type(source).__name__}"
        )
    data: Rows = Whole(source) if isinstance(source, Tensor) else source
    split = split or Alone()
    checkpoint_every = whole_number("train_sae", "checkpoint_every", checkpoint_every, 1)
    if sum(data.counts) < 2:
        raise ValueError(f"train_sae: source has {sum(data.counts)} rows; expected 2 at least")
    if origin is None:
        origin = origin_of(data)
    folder = None if directory is None else Checkpoints(Path(directory), fingerprint_of(config, data), split)
    trainer = Trainer(config, data, split)
    if folder is not None:
        folder.load(trainer)
    clock, seen = time.perf_counter(), trainer.step
    replica = (split.replica, split.replicas)
    batches = stream(data, config.batch, config.seed, trainer.step, steps=config.steps, replica=replica)
    with closing(batches):
        while trainer.step < config.steps:
            trainer.train_on(next(batches))
            if trainer.step % checkpoint_every and trainer.step < config.steps:
                continue
            report = trainer.report((trainer.step - seen) * config.batch / (time.perf_counter() - clock))
            if folder is not None:
                folder.save(trainer)
            if progress is not None:
                progress(report)
            clock, seen = time.perf_counter(), trainer.step
    return trainer.sae(origin)
