"""An exported network in onnxruntime, with the interface of the network itself: ``load_onnx()``."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from almrr_ref.config import ModelConfig, from_dict
from almrr_ref.model import ALMRR
from almrr_ref.run.text import one_line

INPUT = "images"
OUTPUTS = ("anomaly_map", "image_score", "defective")


def require(*packages: str, purpose: str) -> None:
    """Raise a ValueError with the remedy if a package of the extra ``export`` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{purpose} needs {" and ".join(missing)}: pip install "almrr-ref[export]"')


def open_onnx(content: bytes, device: str = "cpu") -> Any:
    """The onnxruntime session of an ONNX file's content, with as many threads as PyTorch has.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA if this onnxruntime has it.
    Raises:
        ValueError: if onnxruntime is not installed, cannot compute on that device, or cannot read the content.
    """
    require("onnxruntime", purpose="running ONNX")
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    available = onnxruntime.get_available_providers()
    if device == "auto":
        device = "cuda" if "CUDAExecutionProvider" in available else "cpu"
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in available:
        raise ValueError(f"this onnxruntime has no {provider}: install onnxruntime-gpu, or take --device cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(content, options, providers=[provider])
    except (states.Fail, states.InvalidArgument, states.InvalidGraph, states.InvalidProtobuf) as error:
        raise ValueError(f"onnxruntime cannot read it ({type(error).__name__})") from error


def run_onnx(session: Any, images: Tensor) -> list[Tensor]:
    """images (b, 3, s, s) -> the outputs named OUTPUTS, as many as the file has, on the CPU."""
    return [torch.from_numpy(array) for array in session.run(None, {INPUT: images.float().cpu().numpy()})]


class OnnxModel(ALMRR):
    """An ALMRR for prediction alone, computed by onnxruntime: images (b, 3, s, s) -> maps (b, 1, s, s).

    ``predict``, ``smooth`` and ``image_scores`` are those of ALMRR; config and threshold come out of the file.
    """

    def __init__(self, session: Any, config: ModelConfig, threshold: float | None) -> None:
        nn.Module.__init__(self)
        self.session, self.config, self.threshold = session, config, threshold
        self.register_buffer("feature_mean", torch.zeros(0))  # says where images and maps are: on the CPU
        super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return run_onnx(self.session, images)[0]

    def fuse(self, dtype: torch.dtype | None = None) -> "OnnxModel":
        """It is folded, and has the precision that it was exported with."""
        return self

    def train(self, mode: bool = True) -> "OnnxModel":
        """Stay in evaluation mode."""
        return self


def load_onnx(path: Path, device: str = "cpu") -> OnnxModel:
    """Load a file that ``python -m almrr_ref.export`` wrote, to run on "cpu", "cuda" or "auto".

    Raises:
        ValueError: if it is missing, no ONNX file or not one of ours, or if onnxruntime is not installed.
    """
    if not path.is_file():
        raise ValueError(f"{one_line(path)}: there is no such file; python -m almrr_ref.export writes it")
    try:
        session = open_onnx(path.read_bytes(), device)
        told = session.get_modelmeta().custom_metadata_map
        if told.get("program") != "almrr-ref":
            raise ValueError("it was not written by python -m almrr_ref.export")
        config = from_dict(ModelConfig, json.loads(told["model_config"]))
        return OnnxModel(session, config, float(told["threshold"]) if told["threshold"] else None)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{one_line(path)}: {error}") from error
