"""Exported networks: the folded network as an ONNX file, and such a file run by onnxruntime.

A file computes `FusedALMRR.forward` for any number of images. It uses operators of opset 18 only; the selective scan is
ONNX's own Scan.
"""

import copy
import dataclasses
import importlib.util
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from almrr_ref.config import VERSION, ModelConfig
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.deploy.predictor import DeployedPredictor, Predictor
from almrr_ref.run.checkpoint import stored_config
from almrr_ref.run.text import one_line

INPUT = "images"
OUTPUTS = ("anomaly_map", "image_score", "defective")
TOLERANCE = 1e-4  # of `check_export`, on maps and scores in [0, 1]


def metadata(network: FusedALMRR) -> dict[str, str]:
    """What a program needs to know of the network, as text; the whole config as JSON."""
    config = {name: value for name, value in dataclasses.asdict(network.config).items() if name != "weights"}
    names = ("tile", "score_kernel", "score_fraction", "backbone")
    values = {"program": "almrr-ref", "version": VERSION, "threshold": network.threshold}
    values["outline_offset"], values["image_size"] = network.outline_offset, " ".join(map(str, network.config.size))
    values |= {name: config[name] for name in names} | {"model_config": json.dumps(config)}
    return {name: "" if value is None else str(value) for name, value in values.items()}


@torch.no_grad()
def to_onnx(network: FusedALMRR) -> bytes:
    """The content of an ONNX file.

    Raises:
        ValueError: if onnx or onnxscript is not installed.
    """
    require("onnx", "onnxscript", purpose="writing ONNX")
    network = copy.deepcopy(network)  # drops packed weights, which no file can hold
    images = torch.zeros(2, 3, *network.config.size, device=network.device)
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)  # the exporters complain that torchvision is absent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            exported = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                opset_version=18,
                input_names=[INPUT],
                output_names=list(OUTPUTS[: 2 if network.threshold_of_pass is None else 3]),
                dynamic_shapes={INPUT: {0: "batch"}},
                verbose=False,
            )
    finally:
        logging.disable(logged)
    assert exported is not None
    content = exported.model_proto
    for name, value in metadata(network).items():
        content.metadata_props.add(key=name, value=value)
    return content.SerializeToString()


@torch.inference_mode()
def check_export(content: bytes, network: Predictor) -> float:
    """Run a file's content and its network on one and on three images of seeded noise; return the largest difference.

    Raises:
        ValueError: if maps or scores differ by more than TOLERANCE, or a decision that TOLERANCE does not explain.
    """
    generator = torch.Generator().manual_seed(0)
    size, largest = network.config.size, 0.0
    session = open_onnx(content)
    for count in (1, 3):
        coarse = torch.rand(count, 3, size[0] // 8, size[1] // 8, generator=generator)
        images = F.interpolate(coarse, size=size, mode="bilinear")
        images = (0.8 * images + 0.2 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
        outputs, maps = run_onnx(session, images), network.maps(images)
        scores = network.image_scores(maps)
        for name, expected, exported in zip(("maps", "scores"), (maps, scores), outputs):
            difference = float((expected - exported).abs().max())
            if not difference <= TOLERANCE:  # also if it is NaN
                excess = f"{difference:.1e}, more than {TOLERANCE:.0e}"
                raise ValueError(f"the exported {name} differ from the network's by {excess}")
            largest = max(largest, difference)
        if (threshold := network.threshold_of_pass) is not None:
            unsure = (scores - threshold).abs() <= TOLERANCE
            if not bool((outputs[2].eq(scores >= threshold) | unsure).all()):
                raise ValueError("the exported file decides otherwise than the network")
    return largest


def require(*packages: str, purpose: str) -> None:
    """Raise a ValueError with the remedy if a package of the extra ``export`` is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{purpose} needs {" and ".join(missing)}: pip install "almrr-ref[export]"')


def open_onnx(content: bytes, device: str | torch.device = "cpu") -> Any:
    """The onnxruntime session of an ONNX file's content on cpu, cuda, cuda:N or auto, with PyTorch's number of threads.

    Raises:
        ValueError: if onnxruntime is not installed, cannot compute on that device, or cannot read the content.
    """
    require("onnxruntime", purpose="running ONNX")
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as states

    available = onnxruntime.get_available_providers()
    name = str(device)
    if name == "auto":
        name = "cuda" if "CUDAExecutionProvider" in available else "cpu"
    kind, _, index = name.partition(":")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind)
    if provider is None or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device is one of auto, cpu, cuda, cuda:N for an ONNX file; got {name!r}")
    if provider not in available:
        raise ValueError(f"this onnxruntime has no {provider}: install onnxruntime-gpu, or take --device cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(
            content, options, providers=[(provider, {"device_id": index} if index else {})]
        )
    except (states.Fail, states.InvalidArgument, states.InvalidGraph, states.InvalidProtobuf) as error:
        raise ValueError(f"onnxruntime cannot read it ({type(error).__name__})") from error


def run_onnx(session: Any, images: Tensor) -> list[Tensor]:
    """images (b, 3, h, w) -> the outputs named OUTPUTS, as many as the file has, on the CPU.

    Raises:
        MemoryError, RuntimeError: as PyTorch does; onnxruntime's own errors are of no class that a caller could expect.
    """
    try:
        outputs = session.run(None, {INPUT: images.float().cpu().numpy()})
    except Exception as error:
        if "alloc" in str(error):
            raise MemoryError("not enough memory") from error
        raise RuntimeError(str(error)) from error
    return [torch.from_numpy(array) for array in outputs]


class OnnxModel(DeployedPredictor):
    """An exported network computed by onnxruntime: images (b, 3, h, w) -> maps (b, 1, h, w) on the CPU.

    Pickles hold the file's content. A forked process opens a new session: the threads of the old one are gone.

    Raises:
        ValueError: if the content is not one of ours, or onnxruntime is not installed or cannot compute on that device.
    """

    def __init__(self, content: bytes, device: str | torch.device = "cpu") -> None:
        session = open_onnx(content, device)
        stored = session.get_modelmeta().custom_metadata_map
        if stored.get("program") != "almrr-ref":
            raise ValueError("it was not written by python -m almrr_ref.export")
        try:
            config = stored_config(ModelConfig, json.loads(stored["model_config"]))
        except (AttributeError, RecursionError) as error:
            raise ValueError("its model_config is damaged") from error
        threshold = float(stored["threshold"]) if stored["threshold"] else None
        super().__init__(config, threshold, float(stored["outline_offset"]))
        self._content, self._device_name = content, device
        self._sessions = {os.getpid(): session}  # the parent's stays open: closing it would wait for its threads
        self.train(False)

    def maps(self, images: Tensor) -> Tensor:
        process = os.getpid()
        if process not in self._sessions:
            self._sessions[process] = open_onnx(self._content, self._device_name)
        return run_onnx(self._sessions[process], images)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sessions": {}}


def load_onnx(path: Path, device: str | torch.device = "cpu") -> OnnxModel:
    """Load a file that ``python -m almrr_ref.export`` wrote, to run on cpu, cuda, cuda:N or auto.

    Raises:
        ValueError: if it is missing, no ONNX file or not one of ours, or if onnxruntime is not installed.
    """
    if not path.is_file():
        raise ValueError(f"{one_line(path)}: there is no such file; python -m almrr_ref.export writes it")
    try:
        return OnnxModel(path.read_bytes(), device)
    except KeyError as error:
        raise ValueError(f"{one_line(path)} lacks {error}: another version exported it; export it again") from error
    except ValueError as error:
        raise ValueError(f"{one_line(path)}: {error}") from error
