"""Find defects in new images: ``python -m almrr_ref.predict --checkpoint RUN/last.pt --input FILE|DIR --out DIR``.

Writes scores.csv (one line a file), an overlay per image (overlays/), and the raw maps as 32-bit float TIFF (maps/).
Images are streamed: a hundred thousand need no more memory than a hundred. A file that cannot be read is named in
scores.csv and on the screen, the others go on, and the exit code is 1.

Decoding, network and writing run side by side, in threads. Under torchrun rank r of N takes the files r, r + N, ... of
the folder and writes its rows to scores.csv.r; when all are done, rank 0 joins them to scores.csv.
"""

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from PIL import Image

from almrr_ref.data.folders import find_inputs
from almrr_ref.data.images import ImageError
from almrr_ref.deploy.inference import Box, Prediction, defect_region, mapped_ahead, predict_files
from almrr_ref.deploy.onnx import load_onnx
from almrr_ref.deploy.predictor import Predictor
from almrr_ref.model import load_checkpoint
from almrr_ref.report.overlays import overlay_row, save_picture
from almrr_ref.report.scores import ScoresWriter, merge_scores, results_folder
from almrr_ref.run import distributed
from almrr_ref.run.cli import add_device_flag, make_parser, path_argument, pick_device, positive, run_command
from almrr_ref.run.files import MAPS, OVERLAYS, SCORES, atomic_path, output_name
from almrr_ref.run.text import duration, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def predict(
    model: Predictor,
    source: Path,
    out: Path,
    batch_size: int = 8,
    overlays: bool = True,
    maps: bool = True,
    overwrite: bool = False,
    tile: int | None = None,
) -> tuple[int, int, int]:
    """Predict every image below ``source`` and write the results into ``out``.

    Args:
        overwrite: whether earlier results in ``out`` are replaced, all of them.
        tile: side of the tiles in pixels, in place of that of the training.
    Returns:
        Number of images predicted, number called defective, number of files that could not be read, of all ranks.
    Raises:
        ValueError: if there is no image, or ``out`` holds earlier results or cannot be written.
    """
    inputs = find_inputs(source)
    first = next(inputs, None)
    if first is None:
        raise ValueError(f"--input {one_line(source)}: no image in this folder or below")
    base = source if source.is_dir() else source.parent

    def write(result: Prediction | ImageError) -> tuple[Prediction | ImageError, int, Box | None]:
        if isinstance(result, ImageError):
            return result, 0, None
        name = result.path.relative_to(base)
        region, area, box = defect_region(model, result)
        if maps:
            save_map(out / MAPS / output_name(name, ".tiff"), result)
        if overlays:
            drawn = overlay_row(result.image, result.anomaly_map, model.threshold, region=region)
            save_picture(out / OVERLAYS / output_name(name, ".png"), drawn)
        return result, area, box

    done = defective = unreadable = 0
    start = shown = time.monotonic()
    ahead = 2 if tile or model.config.tile else 2 * batch_size
    with distributed.entered_by_first(lambda: results_folder(out, overwrite)):
        tables = [out / f"{SCORES}.{r}" for r in range(distributed.world_size())]
        digest = hashlib.sha256()
        with ScoresWriter(tables[distributed.rank()] if len(tables) > 1 else out / SCORES) as scores:
            results = predict_files(model, _of_this_rank(chain([first], inputs), digest), batch_size, tile)
            for result, area, box in mapped_ahead(write, results, ahead):
                name = result.path.relative_to(base)
                if isinstance(result, ImageError):
                    unreadable += 1
                    print(f"not read: {result}", file=sys.stderr)
                    scores.write(name, error=result.reason)
                    continue
                done += 1
                scores.write(name, result.score, model.threshold, area, box)
                defective += box is not None
                if time.monotonic() - shown > 5:
                    shown, speed = time.monotonic(), done / (time.monotonic() - start)
                    print(f"{done} images, {speed:.1f} a second, {defective} above the threshold", flush=True)
        distributed.check_equal(digest.hexdigest(), f"files in {one_line(source)}")
        done, defective, unreadable = map(sum, zip(*distributed.gathered((done, defective, unreadable))))
        if len(tables) > 1 and distributed.rank() == 0:
            merge_scores(out / SCORES, tables)
    seconds = time.monotonic() - start
    threshold = "none" if model.threshold is None else format(model.threshold, ".4f")
    print(
        f"{done} images in {duration(seconds)}, {done / seconds:.1f} a second: {defective} above the threshold of "
        f"{threshold}, {unreadable} not read; results in {one_line(out)}"
    )
    return done, defective, unreadable


def save_map(path: Path, prediction: Prediction) -> None:
    """Write a map as a 32-bit float TIFF of one channel, which ImageJ, Halcon and Pillow open."""
    with atomic_path(path) as temporary:
        Image.fromarray(prediction.anomaly_map[0].float().numpy()).save(temporary, format="TIFF")


def _of_this_rank(inputs: Iterable[Path | ImageError], digest: "hashlib._Hash") -> Iterator[Path | ImageError]:
    """Every Nth of the inputs for each of N ranks; ``digest`` takes up all of them, so that the ranks can compare."""
    for number, entry in enumerate(inputs):
        digest.update(os.fsencode(entry.path if isinstance(entry, ImageError) else entry) + b"\0")
        if number % distributed.world_size() == distributed.rank():
            yield entry


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "predict",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.predict --checkpoint runs/demo/last.pt --input images/ --out found\n"
        "  python -m almrr_ref.predict --checkpoint runs/wide/last.pt --input web.tif --out found --tile 256",
    )
    add = parser.add_argument
    add("--checkpoint", type=path_argument, required=True, metavar="FILE",
        help="last.pt of a training run, or a model.onnx that export wrote")  # fmt: skip
    add("--input", type=path_argument, required=True, metavar="FILE|DIR",
        help="an image, or a folder of images, read recursively")  # fmt: skip
    add("--out", type=path_argument, required=True, metavar="DIR", help="folder for scores.csv, overlays/ and maps/")
    add("--tile", type=positive, metavar="N",
        help="side in pixels of overlapping tiles, for images much larger than the network's input; train with the "
        "same --tile (default: that of the training)")  # fmt: skip
    add("--batch-size", type=positive, default=8, metavar="N", help="images the network sees at a time (default: 8)")
    add("--fuse", action=argparse.BooleanOptionalAction, default=True,
        help="fold the network first: the same maps to 1e-5, several times less work (default: yes)")  # fmt: skip
    add("--dtype", choices=tuple(DTYPES), default="float32",
        help="precision of the folded network's products; 16 bits pay on GPUs, and bfloat16 on CPUs with AMX or "
        "AVX512-BF16, elsewhere they are slower (default: float32)")  # fmt: skip
    add("--no-overlays", action="store_true", help="write no pictures, which is faster")
    add("--no-maps", action="store_true", help="write no raw maps")
    add("--overwrite", action="store_true", help="replace the earlier results in --out, all of them")
    add_device_flag(parser)
    return parser


def load_model(path: Path, device: str, fuse: bool, dtype: str) -> Predictor:
    """A checkpoint's network, folded if asked for; or an exported one (.onnx), which is folded already.

    Raises:
        ValueError: if the file is not usable, or dtype is none that it can have.
    """
    exported = path.suffix.lower() == ".onnx"
    if dtype != "float32" and (exported or not fuse):
        raise ValueError(f"--dtype {dtype} needs a folded checkpoint: no --no-fuse, and no .onnx file")
    if exported:
        return load_onnx(path, device)
    model = load_checkpoint(path, pick_device(device))
    return model.fuse(DTYPES[dtype]) if fuse else model


def command(arguments: argparse.Namespace) -> int:
    model = load_model(arguments.checkpoint, arguments.device, arguments.fuse, arguments.dtype)
    _, _, unreadable = predict(
        model,
        arguments.input,
        arguments.out,
        arguments.batch_size,
        not arguments.no_overlays,
        not arguments.no_maps,
        arguments.overwrite,
        arguments.tile,
    )
    return 1 if unreadable and distributed.rank() == 0 else 0  # one rank says it for all: torchrun ends the others


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv, torchrun=True)


if __name__ == "__main__":
    distributed.leave(main())
