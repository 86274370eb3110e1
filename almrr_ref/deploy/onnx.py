"""Exported networks: a torch.export program or an ONNX file out of the folded network, and ONNX run by onnxruntime.

    images (b, 3, s, s), RGB in [0, 1]  ->  anomaly_map (b, 1, s, s) in [0, 1], image_score (b,), defective (b,) bool

b is free, s the network's image size; ``defective`` is left out where there is no threshold. ONNX takes operators of
opset 18 and no others, the selective scan being ONNX's own Scan.
"""

import copy
import dataclasses
import importlib.util
import io
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from almrr_ref.config import VERSION, ModelConfig, from_dict
from almrr_ref.deploy.fused import FusedALMRR
from almrr_ref.deploy.predictor import DeployedPredictor, Predictor
from almrr_ref.run.text import one_line

INPUT = "images"
OUTPUTS = ("anomaly_map", "image_score", "defective")
OPSET = 18
OLDEST_TORCH = "2.8"
TOLERANCE = 1e-4  # of `check_export`, on maps and scores in [0, 1]


class DeployedForm(nn.Module):
    """images (b, 3, s, s) in [0, 1] -> anomaly_map (b, 1, s, s), image_score (b,); with a threshold, defective (b,)."""

    def __init__(self, network: FusedALMRR) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)  # without packed weights, which no file can hold

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.maps(images)
        scores = self.network.image_scores(maps)
        threshold = self.network.threshold
        return (maps, scores) if threshold is None else (maps, scores, scores >= threshold)


def trace(network: FusedALMRR) -> ExportedProgram:
    """The folded network as a torch.export program for any number of images.

    Raises:
        ValueError: if PyTorch is too old to export a scan.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise ValueError(f"export needs torch {OLDEST_TORCH} or newer, this is {torch.__version__}")
    form, size = DeployedForm(network).eval(), network.config.image_size
    images = torch.zeros(2, 3, size, size, device=network.device)
    dynamic = {INPUT: {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(form, (images,), dynamic_shapes=dynamic, strict=False)


def metadata(network: FusedALMRR) -> dict[str, str]:
    """What a program needs to know of the network, as text; the whole config as JSON."""
    whole = {name: value for name, value in dataclasses.asdict(network.config).items() if name != "weights"}
    names = ("image_size", "tile", "score_kernel", "score_fraction", "score_margin", "backbone")
    values = {"threshold": network.threshold, **{name: whole[name] for name in names}}
    return {
        "program": "almrr-ref",
        "version": VERSION,
        **{name: "" if value is None else str(value) for name, value in values.items()},
        "model_config": json.dumps(whole),
    }


def to_onnx(network: FusedALMRR) -> bytes:
    """The content of an ONNX file.

    Raises:
        ValueError: if onnx or onnxscript is not installed.
    """
    require("onnx", "onnxscript", purpose="writing ONNX")
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # they complain that torchvision is absent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            exported = torch.onnx.export(
                trace(network),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS[: 2 if network.threshold is None else 3]),
                dynamic_shapes={INPUT: {0: "batch"}},  # for its name; that it is dynamic says the program
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    assert exported is not None
    content = exported.model_proto
    for name, value in metadata(network).items():
        entry = content.metadata_props.add()
        entry.key, entry.value = name, value
    return content.SerializeToString()


def to_pt2(network: FusedALMRR) -> bytes:
    """The content of a torch.export file."""
    buffer = io.BytesIO()
    extra = {"metadata.json": json.dumps(metadata(network))}
    torch.export.save(trace(network), buffer, extra_files=extra)
    return buffer.getvalue()


WRITERS = {".onnx": to_onnx, ".pt2": to_pt2}


@torch.inference_mode()
def check_export(content: bytes, suffix: str, network: Predictor) -> float:
    """Run a file's content beside its network on seeded noise, once and three times; return the largest difference.

    Raises:
        ValueError: if maps or scores differ by more than TOLERANCE, or a decision by anything but that.
    """
    generator = torch.Generator().manual_seed(0)
    size = network.config.image_size
    session = open_onnx(content) if suffix == ".onnx" else None
    program = None if session else torch.export.load(io.BytesIO(content)).module()
    largest = 0.0
    for count in (1, 3):
        coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator)
        images = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        images = (0.8 * images + 0.2 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
        outputs = run_onnx(session, images) if session else list(program(images))  # type: ignore[misc]
        maps, scores = network.predict(images)
        differences = [float((ours - theirs).abs().max()) for ours, theirs in zip((maps, scores), outputs)]
        if not max(differences) <= TOLERANCE:  # also if one is NaN
            what = "maps" if not differences[0] <= TOLERANCE else "scores"
            raise ValueError(
                f"the exported {what} differ from the network's by {max(differences):.1e}, more than {TOLERANCE:.0e}"
            )
        if network.threshold is not None:
            unsure = (scores - network.threshold).abs() <= TOLERANCE
            if not bool((outputs[2].eq(scores >= network.threshold) | unsure).all()):
                raise ValueError("the exported file decides otherwise than the network")
        largest = max(largest, *differences)
    return largest


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


class OnnxModel(DeployedPredictor):
    """An exported network computed by onnxruntime: images (b, 3, s, s) -> maps (b, 1, s, s) on the CPU.

    Its config and threshold come out of the file.
    """

    def __init__(self, session: Any, config: ModelConfig, threshold: float | None) -> None:
        super().__init__(config, threshold)
        self.session = session
        self.train(False)

    def maps(self, images: Tensor) -> Tensor:
        return run_onnx(self.session, images)[0]


def load_onnx(path: Path, device: str = "cpu") -> OnnxModel:
    """Load a file that ``python -m almrr_ref.export`` wrote, to run on "cpu", "cuda" or "auto".

    Raises:
        ValueError: if it is missing, no ONNX file or not one of ours, or if onnxruntime is not installed.
    """
    if not path.is_file():
        raise ValueError(f"{one_line(path)}: there is no such file; python -m almrr_ref.export writes it")
    try:
        session = open_onnx(path.read_bytes(), device)
        stored = session.get_modelmeta().custom_metadata_map
        if stored.get("program") != "almrr-ref":
            raise ValueError("it was not written by python -m almrr_ref.export")
        config = from_dict(ModelConfig, json.loads(stored["model_config"]))
        return OnnxModel(session, config, float(stored["threshold"]) if stored["threshold"] else None)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{one_line(path)}: {error}") from error
