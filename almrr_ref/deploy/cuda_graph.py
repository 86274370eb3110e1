"""Replay a network's launches on a CUDA GPU as one graph: at batch 1 a GPU waits for the launches, not for the work."""

import torch
from torch import Tensor, nn

from almrr_ref.model import ALMRR

WARM_UP = 3  # runs before the recording, in which Triton compiles and cuDNN chooses


class CudaGraphALMRR(ALMRR):
    """An ALMRR for prediction alone, recorded for one batch size: images (b, 3, s, s) -> maps (b, 1, s, s).

    Batches of another size run without the graph. The network must not be moved or changed afterwards.

    Args:
        model: best a folded one, ``model.fuse(torch.bfloat16)``, on a CUDA GPU.
        batch: images a run.
    Raises:
        ValueError: if the network is not on a CUDA GPU.
    """

    def __init__(self, model: ALMRR, batch: int = 1) -> None:
        nn.Module.__init__(self)
        device = model.feature_mean.device
        if device.type != "cuda":
            raise ValueError(f"the network is on {device}: a CUDA graph needs it on a CUDA GPU; move it there first")
        self.config, self.threshold, self.model = model.config, model.threshold, model.eval()
        self.register_buffer("feature_mean", model.feature_mean)
        size = (self.config.image_size,) * 2
        super().train(False)
        with torch.cuda.device(device), torch.no_grad():
            self.images = torch.zeros(batch, 3, *size, device=device)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    model(self.images)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.maps = model(self.images)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape != self.images.shape:
            return self.model(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.maps.clone()  # the next replay writes over it

    def train(self, mode: bool = True) -> "CudaGraphALMRR":
        """Stay in evaluation mode."""
        return self
