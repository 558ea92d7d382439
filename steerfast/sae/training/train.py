"""Training of SAEs on activations: Adam on hand-written sparse gradients, with exact resume.

    c = (x - b_dec)/s,  f = select(W_enc c + b_enc),  ĉ = W_decᵀ f,  loss = ‖ĉ - c‖² + α·‖ê - (c - ĉ)‖² + …

where the objective selects (the k largest of a row or of the batch, those above a threshold) and may add to the loss; ê is what
the best latents among the dead ones make of the error that is left (AuxK), and s makes rows of mean square 1. Decoder rows have
length 1. One step costs the product c·W_encᵀ and somewhat more than half of that again for everything else, see
`steerfast.sae.training.selection` and `gradients`.

Nothing is drawn at random once training runs: the order of the rows follows from seed and step, so a run that is killed and
goes on from its checkpoint gives the same bits as one that was not, on as many processes.

Reference: Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import torch
from torch import Tensor

from steerfast._checks import instance_of, whole_number
from steerfast.place import Origin, Place
from steerfast.sae.model import SAE

from .checkpoints import Checkpoints
from .config import TrainConfig, TrainReport
from .distributed import Alone
from .objectives import Transcode
from .rows import Rows, as_rows, beginning, fingerprint_of, origin_of, stream
from .sources import PlacesStream, SideBySide
from .trainer import SAMPLE, Trainer

_ALIKE = (
    "rows or settings ({} and {}); give all the same: what a process reads of them follows from its place in the mesh"
)
Progress = Callable[[TrainReport], None]


_SUCH = "sf.sae.TrainConfig(features=4096, k=32, tokens=1_000_000)"


def train_sae(
    source: Rows | Tensor | tuple[Rows | Tensor, Rows | Tensor],
    config: TrainConfig,
    directory: str | os.PathLike[str] | None = None,
    *,
    split: Alone | None = None,
    origin: Origin | None = None,
    checkpoint_every: int = 250,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """Train an SAE; with a directory, an interrupted run goes on from its last checkpoint, with any number of processes.

        loss = ‖x̂ - x‖² + α·‖ê - (x - x̂)‖² + what the objective adds, ê from the best of the dead latents

    Args:
        source: Rows of activations: a tensor (n, d), an `ActivationStream`, what `open_rows` returns, or anything with `counts`,
            `fingerprint` and `read(shard)` (see `Rows`); the same in every process, of which each replica reads its own part.
            For a transcoder a pair of sources, what is read and what is written, with the same tokens.
        config: See `TrainConfig`.
        directory: For checkpoints, each whole or not there; the newest is kept. None: no checkpoints.
        split: `Mesh(mesh)` when several processes train one SAE; None: one process.
        origin: Where the SAE belongs; None: what a cache or stream says.
        checkpoint_every: Steps between checkpoints and between reports.
        progress: Called with a `TrainReport` at every checkpoint.
        device: Where to train; None: where the rows are.

    Returns:
        The SAE, float32, on the device that it was trained on; in every process. A `Transcoder` from `Transcode`.

    Raises:
        ValueError: NaN or Inf in the rows; k > F; the directory holds checkpoints of another run; training diverged.
        OSError: a checkpoint cannot be written; the one before it stays valid.
        RuntimeError: another process of the run has left.

    Reference:
        Gao et al. 2024 (arXiv:2406.04093).

    Example:
        >>> import torch, steerfast as sf
        >>> x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
        >>> sf.sae.train_sae(x, sf.sae.TrainConfig(features=64, k=4, tokens=20_000, batch=512)).features
        64
    """
    instance_of("train_sae", "config", config, TrainConfig, _SUCH)
    transcodes = isinstance(config.objective, Transcode)
    if isinstance(source, tuple | list) != transcodes:
        wanted = "a pair (what is read, what is written)" if transcodes else "one source of rows"
        kind = config.objective.kind
        raise TypeError(f"train_sae: source is {type(source).__name__}; expected {wanted} for the objective {kind}")
    data: Rows
    if isinstance(source, tuple | list):
        if len(source) != 2:
            raise ValueError(f"train_sae: source has {len(source)} parts; expected 2, what is read and what is written")
        both = SideBySide(source)
        data, origins = both, both.origins
    else:
        data = as_rows(source)
        origins = (origin_of(data),)
    run = _Run(data, [config], [len(origins)], split or Alone(), device)
    run.go(directory, checkpoint_every, progress)
    return run.trainers[0].sae(origins[-1] if origin is None else origin, origins[0])


def train_saes(
    source: PlacesStream | SideBySide,
    configs: Sequence[TrainConfig],
    directory: str | os.PathLike[str] | None = None,
    *,
    split: Alone | None = None,
    checkpoint_every: int = 250,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
) -> list[SAE]:
    """Train several SAEs on the same tokens, one for each place of the source, so that the model runs once for all.

    Args:
        source: Rows of several places.
        configs: One for each place, with the same tokens, batch and seed.
        directory: As of `train_sae`; one checkpoint holds all.
        split: As of `train_sae`.
        checkpoint_every: As of `train_sae`.
        progress: Called with a `TrainReport` for each SAE at every checkpoint; its `place` says which.
        device: As of `train_sae`.

    Returns:
        The SAEs, in the order of the places: each what `train_sae` makes of the rows of its place.

    Raises:
        TypeError, ValueError, OSError, RuntimeError: as of `train_sae`; the configurations do not fit.

    Example:
        >>> stream = sf.sae.PlacesStream(model, tokenizer, texts, [("resid_post", 10), ("resid_post", 20)])  # doctest: +SKIP
        >>> first, second = sf.sae.train_saes(stream, [config, config])  # doctest: +SKIP
    """
    configs = list(configs)
    if not hasattr(source, "widths") or len(configs) != len(source.widths):
        places = len(source.widths) if hasattr(source, "widths") else type(source).__name__
        raise ValueError(
            f"train_saes: {len(configs)} configurations for a source of {places} places; give one for each"
        )
    for config in configs:
        instance_of("train_saes", "a configuration", config, TrainConfig, _SUCH)
    if len({(config.tokens, config.batch, config.seed) for config in configs}) > 1:
        raise ValueError("train_saes: the configurations differ in tokens, batch or seed; all see the same rows")
    if any(isinstance(config.objective, Transcode) for config in configs):
        raise ValueError("train_saes: a transcoder reads two places; train it with train_sae((reads, writes), config)")
    run = _Run(source, configs, [1] * len(configs), split or Alone(), device)
    run.names = [origin.place for origin in source.origins]
    run.go(directory, checkpoint_every, progress)
    return [trainer.sae(origin) for trainer, origin in zip(run.trainers, source.origins, strict=True)]


class _Run:
    """Trainers over one stream of rows; each takes some of the places that stand side by side in it."""

    def __init__(
        self,
        data: Rows,
        configs: Sequence[TrainConfig],
        places: Sequence[int],
        split: Alone,
        device: torch.device | str | None,
    ) -> None:
        if sum(data.counts) < 2:
            raise ValueError(f"train_sae: source has {sum(data.counts)} rows; expected 2 at least")
        if split.world > 1:
            about = hashlib.sha256(_fingerprint(configs, data).encode())
            split.agreed(int(about.hexdigest()[:15], 16), _ALIKE)
        self.data, self.configs, self.split = data, configs, split
        self.names: Sequence[Place | None] = [None] * len(configs)
        first = beginning(data, SAMPLE).to(device=device)
        widths = list(getattr(data, "widths", (first.shape[1],)))
        self.parts = [[widths.pop(0) for _ in range(count)] for count in places]
        with _plain(first):
            self.trainers = [Trainer(c, rows, split) for c, rows in zip(configs, self._taken(first), strict=True)]

    def go(self, directory: str | os.PathLike[str] | None, checkpoint_every: int, progress: Progress | None) -> None:
        """Train to the end, from the last checkpoint on."""
        every = whole_number("train_sae", "checkpoint_every", checkpoint_every, 1)
        if directory is None:
            self._steps(None, every, progress)
            return
        with closing(Checkpoints(Path(directory), _fingerprint(self.configs, self.data), self.split)) as folder:
            folder.load(self.trainers)
            try:
                self._steps(folder, every, progress)
            except BaseException:
                with suppress(OSError, RuntimeError):  # what stopped the run says more
                    folder.finish()
                raise
            folder.finish()

    def _steps(self, folder: Checkpoints | None, every: int, progress: Progress | None) -> None:
        config, lead = self.configs[0], self.trainers[0]
        replica = (self.split.replica, self.split.replicas)
        batches = stream(self.data, config.batch, config.seed, lead.step, steps=config.steps, replica=replica)
        clock, seen = time.perf_counter(), lead.step
        with closing(batches):
            while lead.step < config.steps:
                for trainer, rows in zip(self.trainers, self._taken(next(batches)), strict=True):
                    with _plain(rows[0]):
                        trainer.train_on(*rows)
                if lead.step % every and lead.step < config.steps:
                    continue
                speed = (lead.step - seen) * config.batch / (time.perf_counter() - clock)
                reports = [trainer.report(speed, name) for trainer, name in zip(self.trainers, self.names, strict=True)]
                if folder is not None:
                    folder.save(self.trainers)
                if progress is not None:
                    for report in reports:
                        progress(report)
                clock, seen = time.perf_counter(), lead.step

    def _taken(self, rows: Tensor) -> list[tuple[Tensor, ...]]:
        """The columns of each trainer."""
        columns = iter(rows.split([width for part in self.parts for width in part], dim=1))
        return [tuple(next(columns) for _ in part) for part in self.parts]


def _plain(rows: Tensor) -> torch.autocast:
    """Without the autocast that a model's forward may stand in: a step takes float32."""
    return torch.autocast(rows.device.type, enabled=False)


def _fingerprint(configs: Sequence[TrainConfig], data: Rows) -> str:
    """What must be equal for a run to go on: the configurations and the data."""
    each = [fingerprint_of(config, data) for config in configs]
    return each[0] if len(each) == 1 else json.dumps(each)
