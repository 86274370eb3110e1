"""Write a trained network for other programs: ``python -m almrr_ref.export --checkpoint RUN/last.pt --out model.onnx``.

The file needs nothing beside it. It holds the folded network with the image's normalisation before it and the image
score and the threshold behind it:

    images (b, 3, h, w), RGB in [0, 1]  ->  anomaly_map (b, 1, h, w) in [0, 1], image_score (b,), defective (b,) bool

b is free, h x w the network's image size, floats are float32; ``defective`` is left out where training set no
threshold. NaN or infinity in an image makes its score NaN and the image defective. Gray is three equal channels. 1 is
white: 255 of 8 bits, 2 ** bits - 1 of more, with the bits in model_config (null: 16).
Resize as ``predict`` does, by a bilinear filter that widens where it shrinks (Pillow's BILINEAR, PyTorch's with
antialias=True): OpenCV's INTER_LINEAR does not, which changes the scores.

The metadata of the file (metadata_props) say the same as text: image_size (height and width), threshold,
outline_offset, tile, score_kernel, score_fraction, backbone, version, and model_config, all of it as JSON. A region of
interest is inside, too: the map is 0 outside of it.

The file of a network that was trained with tiles sees one tile: map and score are the tile's, and ``defective`` is left
out, since the threshold is one for the blended map of a whole image. ``predict`` and ``Detector`` cut and blend.

It takes operators of ONNX's opset 18 and no others. onnxruntime and OpenVINO run it; OpenVINO computes in 16 bits on
some CPUs unless INFERENCE_PRECISION_HINT is "f32". It has not been tried in TensorRT.
``python -m almrr_ref.predict --checkpoint model.onnx`` runs it in onnxruntime.
"""

import argparse
import sys
from pathlib import Path

from almrr_ref.deploy.onnx import TOLERANCE, check_export, require, to_onnx
from almrr_ref.model import ALMRR, load_checkpoint
from almrr_ref.run.cli import make_parser, path_argument, run_command
from almrr_ref.run.files import atomic_path
from almrr_ref.run.text import one_line


def export(model: ALMRR, out: Path, check: bool = False) -> None:
    """Write a model as an ONNX file, whole or not at all.

    Raises:
        ValueError: for another extension, a missing package, or with ``check`` if the file's results differ.
        OutputError: if the file cannot be written.
    """
    if out.suffix.lower() != ".onnx":
        raise ValueError(f"--out {one_line(out)}: the file's name must end in .onnx")
    if check:
        require("onnxruntime", purpose="--check")
    content = to_onnx(model.fuse())
    with atomic_path(out) as temporary:
        temporary.write_bytes(content)
        if check:
            try:
                difference = check_export(temporary.read_bytes(), model)
            except ValueError as error:
                raise ValueError(f"{out} is not written: {error}") from error
            print(f"checked: maps and scores at most {difference:.1e} from the network's")
    size = "{} x {}".format(*model.config.size)
    print(f"{out}: {len(content) / 1e6:.1f} MB, images of {size} pixels (height x width), any number at a time")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "export",
        __doc__ + "\nexamples:\n"
        "  python -m almrr_ref.export --checkpoint runs/demo/last.pt --out model.onnx --check\n"
        "  python -m almrr_ref.predict --checkpoint model.onnx --input images/ --out found",
    )
    add = parser.add_argument
    add("--checkpoint", type=path_argument, required=True, metavar="FILE", help="last.pt of a training run")
    add("--out", type=path_argument, required=True, metavar="FILE", help="the .onnx file to write")
    check = f"run the file and the network on the same images; write nothing if they differ by more than {TOLERANCE}"
    add("--check", action="store_true", help=check)
    return parser


def command(arguments: argparse.Namespace) -> int:
    export(load_checkpoint(arguments.checkpoint), arguments.out, arguments.check)
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
