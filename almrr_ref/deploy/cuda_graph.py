"""Replay a network's launches on a CUDA GPU as one graph: at batch 1, launching takes longer than computing."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from almrr_ref.deploy.predictor import DeployedPredictor, Predictor, check_form, check_range, to_8_bits
from almrr_ref.run.text import LOGGER

WARM_UP = 3  # runs before the recording, in which Triton compiles and cuDNN chooses
Result = TypeVar("Result")


def record(run: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record what ``run`` launches on a CUDA GPU, after WARM_UP runs -> the graph, and the tensors it writes."""
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


class Replayed:
    """A function of tensors on a CUDA GPU that becomes one graph after WARM_UP calls; called like the function.

    A replay overwrites the results of the last one, and whatever else the function writes, such as gradients.

    Args:
        run: takes tensors whose shapes never change, or None -> tensors by name. Its work on the host is done in the
            first calls only.
    """

    def __init__(self, run: Callable[..., dict[str, Tensor]], device: torch.device) -> None:
        self.run, self.device, self.calls = run, device, 0
        self.stream = torch.cuda.Stream(device)  # one for all calls: a gradient is summed on its first stream
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | None) -> dict[str, Tensor]:
        if self.calls == WARM_UP:
            self._record(inputs)
        self.calls += 1
        if self.graph is None:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                result = self.run(*inputs)
            current.wait_stream(self.stream)
            return result
        for recorded, new in zip(self.inputs, inputs):
            if recorded is not None and new is not None:
                recorded.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.result

    def _record(self, inputs: tuple[Tensor | None, ...]) -> None:
        self.inputs = [None if tensor is None else tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        try:  # "thread_local": meanwhile the thread that pins samples may allocate
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.run(*self.inputs)
        except RuntimeError as error:
            LOGGER.warning("steps are not replayed as a CUDA graph: %s", str(error).splitlines()[0])
            return
        self.graph = graph


def predict_unchecked(network: Predictor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `Predictor.predict` for images of the network's size, without reading a value on the host.

    Args:
        images: float32 (b, 3, h, w); the caller checks that they are in [0, 1].
    Returns:
        maps (b, 1, h, w), image scores (b,), and the least and the highest value of the images, (2,).
    """
    maps = network.maps(to_8_bits(images) / 255)
    return maps, network.image_scores(maps), torch.stack(images.aminmax())


class CudaGraph(DeployedPredictor):
    """A network's ``predict`` recorded for one batch size: images (b, 3, h, w) -> maps (b, 1, h, w), scores (b,).

    Other batches, and images to be resized or cut into tiles first, are predicted without the graph. The network must
    not be moved or changed afterwards.

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
        self.lock = threading.Lock()  # of the tensors that every replay reads and writes
        self.images = torch.zeros(batch, 3, *self.config.size, device=device)
        with torch.no_grad():
            self.graph, self.recorded = record(lambda: predict_unchecked(network, self.images), device)

    def maps(self, images: Tensor) -> Tensor:
        """As `Predictor.maps`, of images of 8 bits, which is what ``predict`` gives."""
        return self._replay(images)[0] if images.shape == self.images.shape else self.network.maps(images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See `Predictor.predict`. The host waits once, for the range of the values."""
        check_form(images)
        if self.config.tile or images.shape != self.images.shape or images.dtype != self.images.dtype:
            return super().predict(images)
        maps, scores, extrema = self._replay(images)
        check_range(*extrema.tolist())
        return maps, scores

    def _replay(self, images: Tensor) -> list[Tensor]:
        """Run the graph -> copies of its results, which the next replay overwrites."""
        with self.lock:
            self.images.copy_(images, non_blocking=True)
            self.graph.replay()
            return [result.clone() for result in self.recorded]
