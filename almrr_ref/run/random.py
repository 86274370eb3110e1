"""Random numbers from explicit generators only: they depend on the seed, not on what was drawn elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def sample_generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A generator for one purpose (stream) and one index, independent of all others.

    The three are hashed, since a PyTorch generator on the CPU uses the lower 32 bits of its seed only.
    """
    hashed = np.random.SeedSequence((seed, stream, index)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(hashed))


def uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    """Draw one number from U(low, high)."""
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """Draw one integer from low .. high - 1."""
    return int(torch.randint(low, high, (), generator=generator, device=generator.device).item())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one CPU thread of torch, then restore the number of threads.

    Drawing a sample takes many operations on one image, each too short to divide. If another process uses a core,
    waiting for the second thread after each operation costs up to forty times as much as the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
