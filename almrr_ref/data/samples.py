"""Training samples: which image comes when, and the anomaly drawn on it.

A run is one sequence of samples, numbered from 0. Sample i belongs to pass i // n over the n images. The order of a
pass is seeded by (seed, pass), an anomaly by (seed, i). Nothing depends on earlier draws, so workers cannot change a
run, and a resumed run continues exactly from a later i.
"""

import functools
import signal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from almrr_ref.config import TrainConfig
from almrr_ref.data.textures import Draw, TextureSource
from almrr_ref.run.distributed import rank, rank_batch_size, world_size
from almrr_ref.run.random import one_thread, sample_generator, uniform


@one_thread()
def training_sample(
    image: Tensor, source: TextureSource, generator: torch.Generator, clean_probability: float, draw: Draw
) -> tuple[Tensor, Tensor]:
    """Leave an image clean or draw an anomaly on it: (3, h, w) in [0, 1] -> augmented (3, h, w), mask (1, h, w)."""
    if uniform(generator) < clean_probability:
        return image, torch.zeros_like(image[:1])
    return draw(image, source, generator)


class TrainingSamples(Dataset[tuple[Tensor, ...]]):
    """Sample number -> augmented image (3, h, w) in [0, 1], mask (1, h, w) in {0, 1}, number of the clean image ().

    Args:
        images: the good images, uint8 (n, 3, h, w).
        config: seed, probability of a clean sample, batch size, workers.
        draw: draws one anomaly.
        part_ids: (n,), the physical part that each image shows; by default each shows a different one.
    """

    def __init__(
        self, images: Tensor, source: TextureSource, config: TrainConfig, draw: Draw, part_ids: Tensor | None = None
    ) -> None:
        self.images, self.source, self.config, self.draw = images, source, config, draw
        self.part_ids = torch.arange(len(images)) if part_ids is None else part_ids

    def image_index(self, number: int) -> int:
        """Number of a sample -> the row of its image."""
        epoch, position = divmod(number, len(self.images))
        return int(_order(self.config.seed, epoch, len(self.images))[position])

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        generator, index = sample_generator(self.config.seed, 0, number), self.image_index(number)
        clean = self.images[index].float() / 255
        augmented, mask = training_sample(clean, self.source, generator, self.config.clean_probability, self.draw)
        return augmented, mask, torch.tensor(index)

    def batches(self, first_step: int, last_step: int) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of the steps first_step .. last_step - 1, in order; of N ranks, each gets every Nth sample."""
        b, workers = self.config.batch_size, self.config.workers
        numbers = range(first_step * b + rank(), last_step * b, world_size())
        return DataLoader(
            self,
            batch_size=rank_batch_size(b),
            sampler=numbers,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator().manual_seed(self.config.seed),  # else it takes a number from the global one
        )


@functools.lru_cache(maxsize=1)  # of a hundred thousand tiles it takes as long as drawing an anomaly
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=sample_generator(seed, 1, epoch))


def _ignore_stop_signals(_: int) -> None:
    """In a worker: a signal to all processes must not end it before the run has saved; the run ends its workers."""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)
