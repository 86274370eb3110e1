"""Training samples: which image comes when, and the anomaly drawn on it.

A run is one long row of samples, numbered from 0. Sample i belongs to pass i // n over the n images, whose order is a
permutation seeded by (seed, pass); its anomaly is drawn from a generator seeded by (seed, i). Nothing depends on what
was drawn before, so workers cannot change a run, and a resumed run continues exactly by starting at a later i.
"""

import signal
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from almrr_ref.anomalies import TextureSource, textured_anomaly, training_sample
from almrr_ref.config import TrainConfig
from almrr_ref.plus.varied import varied_anomaly
from almrr_ref.report.scores import contact_sheet, save_picture
from almrr_ref.run.distributed import rank, share, world_size

DRAW = {"perlin": textured_anomaly, "varied": varied_anomaly}


def _ignore_stop_signals(_: int) -> None:
    """In a worker: a signal to all processes must not end it before the run has saved; the run ends its workers."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)


def sample_generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A generator for one purpose (stream) and one index, independent of all others.

    The three are hashed, because a PyTorch generator on the CPU takes the lower 32 bits of its seed alone.
    """
    hashed = np.random.SeedSequence((seed, stream, index)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(hashed))


class TrainingSamples(Dataset[tuple[Tensor, ...]]):
    """Sample number -> clean image (3, s, s) in [0, 1], augmented image (3, s, s), mask (1, s, s) in {0, 1}, part ().

    The last says which part the image shows.

    Args:
        images: the good images, uint8 (n, 3, s, s).
        source: where textures for anomalies come from.
        config: seed, share of clean samples, share of rotated images.
        parts: (n,), the part that each image shows; without it each its own.
    """

    def __init__(self, images: Tensor, source: TextureSource, config: TrainConfig, parts: Tensor | None = None) -> None:
        self.images, self.source, self.config = images, source, config
        self.parts = torch.arange(len(images)) if parts is None else parts
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.long))

    def image_index(self, number: int) -> int:
        epoch, position = divmod(number, len(self.images))
        if self._order[0] != epoch:
            generator = sample_generator(self.config.seed, 1, epoch)
            self._order = (epoch, torch.randperm(len(self.images), generator=generator))
        return int(self._order[1][position])

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        generator, index = sample_generator(self.config.seed, 0, number), self.image_index(number)
        clean = self.images[index].float() / 255
        draw = DRAW[self.config.anomaly_style]
        augmented, mask = training_sample(clean, self.source, generator, self.config.clean_probability, draw)
        return clean, augmented, mask, self.parts[index]

    def batches(self, first_step: int, last_step: int) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the optimiser steps first_step .. last_step - 1, in order; of N ranks, each gets every Nth sample.

        Raises:
            ValueError: if the batch size is no multiple of the number of ranks.
        """
        b, workers = self.config.batch_size, self.config.workers
        numbers = range(first_step * b + rank(), last_step * b, world_size())
        return DataLoader(
            self,
            batch_size=share(b),
            sampler=numbers,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator().manual_seed(self.config.seed),  # else it takes a number from the global one
        )


def save_sample_sheet(samples: TrainingSamples, path: Path, count: int = 8) -> None:
    """Draw the first simulated anomalies of the run, as in the paper's Fig. 3: clean | augmented | mask."""
    drawn = (samples[number][:3] for number in range(100 * count))
    rows = list(islice((row for row in drawn if row[2].any() or samples.config.clean_probability == 1), count))
    save_picture(path, contact_sheet(rows, ("clean", "augmented", "mask"), columns=2))
