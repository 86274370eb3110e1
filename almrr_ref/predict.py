"""Find defects in new images: ``python -m almrr_ref.predict --checkpoint RUN/last.pt --input FILE|DIR --out DIR``.

Writes scores.csv (one line a file), an overlay per image (overlays/), and the raw maps as 32-bit float TIFF (maps/).
Images are streamed: a hundred thousand need no more memory than a hundred. A file that cannot be read is named in
scores.csv and on the screen, the others go on, and the exit code is 1.

Decoding, network and writing run side by side, in threads. Under torchrun rank r of N takes the files r, r + N, ... of
the folder and writes its rows to scores.csv.r; when all are done, rank 0 joins them to scores.csv (distributed.py).
"""

import argparse
import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from almrr_ref.data.images import is_image_file
from almrr_ref.deploy.inference import Box, Broken, Prediction, found_region, mapped_ahead, predict_files
from almrr_ref.deploy.onnx import load_onnx
from almrr_ref.model import ALMRR
from almrr_ref.report.overlays import overlay_row, save_picture
from almrr_ref.report.scores import ScoresWriter, merge_scores, results_folder
from almrr_ref.run import distributed
from almrr_ref.run.checkpoint import load_checkpoint
from almrr_ref.run.cli import add_device_flag, make_parser, path_argument, pick_device, positive, run_command
from almrr_ref.run.files import MAPS, OVERLAYS, SCORES, atomic_path, is_of_results, output_name
from almrr_ref.run.text import duration, one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_inputs(source: Path) -> Iterator[Path | Broken]:
    """The image files of a folder and all folders below it, in a fixed order; or the one file itself.

    What looks like an image or may hold some, but is not read, is named: a folder without permission as Broken; linked
    folders (they may lead in circles) and the pictures of earlier runs in a note on the screen.

    Args:
        source: a file, or a folder. The overlays/ and maps/ of results in it are no inputs.
    Raises:
        ValueError: if there is no such file or folder, or it cannot be read.
    """
    if source.is_file():
        yield source
        return
    if not source.is_dir():
        raise ValueError(f"--input {one_line(source)}: no such file or folder")
    if not os.access(source, os.R_OK | os.X_OK):
        raise ValueError(f"--input {one_line(source)}: no permission to read it")
    yield from _images_below(source)


def _images_below(folder: Path) -> Iterator[Path | Broken]:
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # names: paths need much memory
    except OSError as error:
        yield Broken(folder, f"the folder cannot be read ({error.strerror})")
        return
    others = [name for name in names if not is_image_file(name) and (folder / name).is_file()]
    others = [name for name in others if not name.startswith(SCORES)]
    if others:
        _note(f"{len(others)} files in {one_line(folder)} are not named like images (first: {one_line(others[0])})")
    for path in (folder / name for name in names):
        if is_image_file(path):
            yield path  # also a folder of such a name: reading it says what is wrong
        elif not path.is_dir():
            continue
        elif path.is_symlink():
            _note(f"linked folder {one_line(path)} is not followed")
        elif is_of_results(path):
            _note(f"earlier results in {one_line(path)} are not read as images")
        else:
            yield from _images_below(path)


def _note(text: str) -> None:
    if distributed.rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def save_map(path: Path, prediction: Prediction) -> None:
    """Write a map as a 32-bit float TIFF of one channel, which ImageJ, Halcon and Pillow open."""
    with atomic_path(path) as temporary:
        Image.fromarray(prediction.anomaly_map[0].float().numpy()).save(temporary, format="TIFF")


def save_overlay(path: Path, prediction: Prediction, threshold: float | None, region: Tensor) -> None:
    """Draw image | map | overlay; region (h, w) is what the contour surrounds."""
    save_picture(path, overlay_row(prediction.image, prediction.anomaly_map, threshold, region=region))


def predict(
    model: ALMRR,
    source: Path,
    out: Path,
    batch_size: int = 8,
    overlays: bool = True,
    maps: bool = True,
    overwrite: bool = False,
) -> tuple[int, int, int]:
    """Predict every image below ``source`` and write the results into ``out``.

    Args:
        overwrite: whether earlier results in ``out`` are replaced, all of them.

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

    def write(result: Prediction | Broken) -> tuple[Prediction | Broken, int, Box | None]:
        if isinstance(result, Broken):
            return result, 0, None
        name = result.path.relative_to(base)
        region, area, box = found_region(model, result)
        if maps:
            save_map(out / MAPS / output_name(name, ".tiff"), result)
        if overlays:
            save_overlay(out / OVERLAYS / output_name(name, ".png"), result, model.threshold, region)
        return result, area, box

    done = defective = broken = 0
    start = shown = time.monotonic()
    with ExitStack() as held:
        distributed.from_first(lambda: held.enter_context(results_folder(out, overwrite)))
        shares = [out / f"{SCORES}.{r}" for r in range(distributed.world_size())]
        seen = hashlib.sha256()
        with ScoresWriter(shares[distributed.rank()] if len(shares) > 1 else out / SCORES) as scores:
            results = predict_files(model, _own_share(chain([first], inputs), seen), batch_size)
            for result, area, box in mapped_ahead(write, results, 2 if model.config.tile else 2 * batch_size):
                name = result.path.relative_to(base)
                if isinstance(result, Broken):
                    broken += 1
                    print(f"not read: {one_line(result.path)}: {result.reason}", file=sys.stderr)
                    scores.write(name, error=result.reason)
                    continue
                done += 1
                scores.write(name, result.score, model.threshold, area, box)
                defective += box is not None
                if time.monotonic() - shown > 5:
                    shown, speed = time.monotonic(), done / (time.monotonic() - start)
                    print(f"{done} images, {speed:.1f} a second, {defective} above the threshold", flush=True)
        distributed.check_equal(seen.hexdigest(), f"files in {one_line(source)}")
        done, defective, broken = map(sum, zip(*distributed.gathered((done, defective, broken))))
        if len(shares) > 1 and distributed.rank() == 0:
            merge_scores(out / SCORES, shares)
    seconds = time.monotonic() - start
    threshold = "none" if model.threshold is None else format(model.threshold, ".4f")
    print(
        f"{done} images in {duration(seconds)}, {done / seconds:.1f} a second: {defective} above the threshold of "
        f"{threshold}, {broken} not read; results in {one_line(out)}"
    )
    return done, defective, broken


def _own_share(inputs: Iterable[Path | Broken], seen: "hashlib._Hash") -> Iterator[Path | Broken]:
    """Every Nth of the inputs for each of N ranks; ``seen`` takes up all of them, so that the ranks can compare."""
    for number, entry in enumerate(inputs):
        seen.update(os.fsencode(entry if isinstance(entry, Path) else entry.path) + b"\0")
        if number % distributed.world_size() == distributed.rank():
            yield entry


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "predict",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.predict --checkpoint runs/demo/last.pt --input images/ --out found\n"
        "  python -m almrr_ref.predict --checkpoint runs/wide/last.pt --input web.tif --out found --tile 256",
    )
    parser.add_argument(
        "--checkpoint",
        type=path_argument,
        required=True,
        metavar="FILE",
        help="last.pt of a training run, or a model.onnx that export wrote",
    )
    parser.add_argument(
        "--input",
        type=path_argument,
        required=True,
        metavar="FILE|DIR",
        help="an image, or a folder of images, read recursively",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for scores.csv, overlays/ and maps/"
    )
    parser.add_argument(
        "--tile",
        type=positive,
        metavar="N",
        help="side in pixels of overlapping tiles, for images much larger than the "
        "network's input; train with the same --tile (default: that of the training)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="images the network sees at a time (default: 8)"
    )
    parser.add_argument(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold the network first: the same maps to 1e-5, several times less work (default: yes)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="precision of the folded network's products; 16 bits pay on GPUs, and bfloat16 on CPUs with AMX or "
        "AVX512-BF16, elsewhere they are slower (default: float32)",
    )
    parser.add_argument("--no-overlays", action="store_true", help="write no pictures, which is faster")
    parser.add_argument("--no-maps", action="store_true", help="write no raw maps")
    parser.add_argument("--overwrite", action="store_true", help="replace the earlier results in --out, all of them")
    add_device_flag(parser)
    return parser


def load_model(path: Path, device: str, fuse: bool, dtype: str) -> ALMRR:
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
    if arguments.tile:
        model.config = dataclasses.replace(model.config, tile=arguments.tile)
    _, _, broken = predict(
        model,
        arguments.input,
        arguments.out,
        arguments.batch_size,
        not arguments.no_overlays,
        not arguments.no_maps,
        arguments.overwrite,
    )
    return 1 if broken and distributed.rank() == 0 else 0  # one rank says it for all: torchrun ends the others


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv, several=True)


if __name__ == "__main__":
    distributed.leave(main())
