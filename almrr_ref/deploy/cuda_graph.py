"""Replay a network's launches on a CUDA GPU as one graph: at batch 1 a GPU waits for the launches, not for the work."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from almrr_ref.deploy.predictor import DeployedPredictor, Predictor

WARM_UP = 3  # runs before the recording, in which Triton compiles and cuDNN chooses
Result = TypeVar("Result")


def record(run: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record what ``run`` launches on a CUDA GPU, after WARM_UP runs -> the graph, and where it leaves the result."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, run()


class CudaGraph(DeployedPredictor):
    """A network recorded for one batch size: images (b, 3, h, w) -> maps (b, 1, h, w).

    Batches of another size run without the graph. The network must not be moved or changed afterwards.

    Args:
        network: best a folded one, ``model.fuse(torch.bfloat16)``.
    Raises:
        ValueError: if the network is not on a CUDA GPU.
    """

    def __init__(self, network: Predictor, batch: int = 1) -> None:
        super().__init__(network.config, network.threshold, network.outline_offset)
        device = network.device
        if device.type != "cuda":
            raise ValueError(f"the network is on {device}: a CUDA graph needs it on a CUDA GPU; move it there first")
        self.network = network.eval()
        self.train(False)
        self.images = torch.zeros(batch, 3, *self.config.size, device=device)
        with torch.no_grad():
            self.graph, self.recorded = record(lambda: network.maps(self.images), device)

    def maps(self, images: Tensor) -> Tensor:
        if images.shape != self.images.shape:
            return self.network.maps(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.recorded.clone()  # the next replay writes over it
