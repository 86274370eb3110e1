"""Write a trained network for other programs: ``python -m almrr_ref.export --checkpoint RUN/last.pt --out model.onnx``.

The file needs nothing beside it. It holds the folded network (fused.py) with the image's normalisation before it and
the image score and the threshold behind it:

    images (b, 3, s, s), RGB in [0, 1]  ->  anomaly_map (b, 1, s, s) in [0, 1], image_score (b,), defective (b,) bool

b is free, s the network's image size; ``defective`` is left out where training set no threshold. The metadata of the
file (ONNX: metadata_props, .pt2: metadata.json) say the same as text: image_size, threshold, tile, score_kernel,
score_share, score_margin, backbone, version, and model_config, all of it as JSON.

model.onnx takes operators of opset 18 and no others, the selective scan being ONNX's own Scan, so that onnxruntime,
OpenVINO and TensorRT can load it; ``python -m almrr_ref.predict --checkpoint model.onnx`` runs it in onnxruntime.
model.pt2 is a torch.export program: ``torch.export.load("model.pt2").module()(images)``.
"""

import argparse
import copy
import dataclasses
import io
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from almrr_ref import __version__
from almrr_ref.deploy.onnx import INPUT, OUTPUTS, open_onnx, require, run_onnx
from almrr_ref.model import ALMRR
from almrr_ref.run.checkpoint import load_checkpoint
from almrr_ref.run.cli import make_parser, path_argument, run_command
from almrr_ref.run.files import atomic_path
from almrr_ref.run.text import one_line

OPSET = 18
OLDEST_TORCH = "2.8"
TOLERANCE = 1e-4  # of --check, on maps and scores in [0, 1]


class DeployedForm(nn.Module):
    """images (b, 3, s, s) in [0, 1] -> anomaly_map (b, 1, s, s), image_score (b,); with a threshold, defective (b,)."""

    def __init__(self, model: ALMRR) -> None:
        super().__init__()
        fused = model.fuse()
        self.model = copy.deepcopy(fused) if fused is model else fused  # without packed weights, which no file can hold

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.model(images)
        scores = self.model.image_scores(maps)
        threshold = self.model.threshold
        return (maps, scores) if threshold is None else (maps, scores, scores >= threshold)


def trace(model: ALMRR) -> ExportedProgram:
    """The deployed form of a model as a torch.export program for any number of images.

    Raises:
        ValueError: if PyTorch is too old to export a scan.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise ValueError(f"export needs torch {OLDEST_TORCH} or newer, this is {torch.__version__}")
    form = DeployedForm(model).eval()
    images = torch.zeros(2, 3, *(model.config.image_size,) * 2, device=model.feature_mean.device)
    with torch.no_grad():
        return torch.export.export(
            form, (images,), dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}}, strict=False
        )


def metadata(model: ALMRR) -> dict[str, str]:
    """What a program needs to know of the network, as text."""
    config = model.config
    told = {"threshold": model.threshold, "tile": config.tile}
    names = ("image_size", "score_kernel", "score_share", "score_margin", "backbone")
    told |= {name: getattr(config, name) for name in names}
    whole = {name: value for name, value in dataclasses.asdict(config).items() if name != "weights"}
    return {
        "program": "almrr-ref",
        "version": __version__,
        **{name: "" if value is None else str(value) for name, value in told.items()},
        "model_config": json.dumps(whole),
    }


def to_onnx(model: ALMRR) -> bytes:
    """The content of an ONNX file.

    Raises:
        ValueError: if onnx or onnxscript is not installed.
    """
    require("onnx", "onnxscript", purpose="writing ONNX")
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)  # they tell of torchvision, which is not there, and of folding left undone
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the exporter
            exported = torch.onnx.export(
                trace(model),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS[: 2 if model.threshold is None else 3]),
                dynamic_shapes={INPUT: {0: "batch"}},  # for its name; that it is dynamic says the program
                verbose=False,
            )
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
    assert exported is not None
    content = exported.model_proto
    for name, value in metadata(model).items():
        entry = content.metadata_props.add()
        entry.key, entry.value = name, value
    return content.SerializeToString()


def to_pt2(model: ALMRR) -> bytes:
    """The content of a torch.export file."""
    buffer = io.BytesIO()
    torch.export.save(trace(model), buffer, extra_files={"metadata.json": json.dumps(metadata(model))})
    return buffer.getvalue()


WRITERS = {".onnx": to_onnx, ".pt2": to_pt2}


@torch.inference_mode()
def check_export(content: bytes, suffix: str, model: ALMRR) -> float:
    """Run a file's content beside its model on seeded noise, once and three times; return the largest difference.

    Raises:
        ValueError: if maps or scores differ by more than TOLERANCE, or a decision by anything but that.
    """
    generator = torch.Generator().manual_seed(0)
    size = model.config.image_size
    session = open_onnx(content) if suffix == ".onnx" else None
    program = None if session else torch.export.load(io.BytesIO(content)).module()
    largest = 0.0
    for count in (1, 3):
        coarse = torch.rand(count, 3, size // 8, size // 8, generator=generator)
        images = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        images = (0.8 * images + 0.2 * torch.rand(images.shape, generator=generator)).clamp(0, 1)
        found = run_onnx(session, images) if session else list(program(images))  # type: ignore[misc]
        maps, scores = model.predict(images)
        differences = [float((ours - theirs).abs().max()) for ours, theirs in zip((maps, scores), found)]
        if not max(differences) <= TOLERANCE:  # also if one is NaN
            what = "maps" if not differences[0] <= TOLERANCE else "scores"
            raise ValueError(
                f"the exported {what} differ from the network's by {max(differences):.1e}, more than {TOLERANCE:.0e}"
            )
        if model.threshold is not None:
            unsure = (scores - model.threshold).abs() <= TOLERANCE
            if not bool((found[2].eq(scores >= model.threshold) | unsure).all()):
                raise ValueError("the exported file decides otherwise than the network")
        largest = max(largest, *differences)
    return largest


def export(model: ALMRR, out: Path, check: bool = False) -> None:
    """Write a model as ONNX or torch.export program, by the extension of ``out``, whole or not at all.

    Raises:
        ValueError: for another extension, a missing package, or with ``check`` if the file's results differ.
        OutputError: if the file cannot be written.
    """
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"--out {one_line(out)}: the file's name must end in .onnx or .pt2")
    if check and suffix == ".onnx":
        require("onnxruntime", purpose="--check")
    content = WRITERS[suffix](model)
    with atomic_path(out) as temporary:
        temporary.write_bytes(content)
        if check:
            try:
                difference = check_export(temporary.read_bytes(), suffix, model)
            except ValueError as error:
                raise ValueError(f"{out} is not written: {error}") from error
            print(f"checked: maps and scores at most {difference:.1e} from the network's")
    print(f"{out}: {len(content) / 1e6:.1f} MB, images of {model.config.image_size} pixels, any number at a time")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "export",
        __doc__ + "\nexamples:\n"
        "  python -m almrr_ref.export --checkpoint runs/demo/last.pt --out model.onnx --check\n"
        "  python -m almrr_ref.predict --checkpoint model.onnx --input images/ --out found\n"
        "  python -m almrr_ref.export --checkpoint runs/demo/last.pt --out model.pt2",
    )
    parser.add_argument(
        "--checkpoint", type=path_argument, required=True, metavar="FILE", help="last.pt of a training run"
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FILE", help="the file to write, .onnx or .pt2"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"run the file and the network on the same images; write nothing if they differ by more than {TOLERANCE}",
    )
    return parser


def command(arguments: argparse.Namespace) -> int:
    export(load_checkpoint(arguments.checkpoint), arguments.out, arguments.check)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
