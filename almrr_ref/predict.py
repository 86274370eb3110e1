"""Find defects in new images: ``python -m almrr_ref.predict --checkpoint RUN/last.pt --input FILE|DIR ... --out DIR``.

Writes scores.csv (one line a file), boxes.json (every region of every image, in the form of COCO), an overlay per image
(overlays/), the raw maps as 32-bit float TIFF (maps/), and index.html, which shows all of it, the highest scores first,
and judges anew when its threshold is moved. Images are streamed: a hundred thousand need no more memory than a hundred.
A file that cannot be read is named in scores.csv and on the screen, the others go on, and the exit code is 1. Files of
one --input are named relative to it, those of several relative to the folder that holds all of them.

With --watch DIR in place of --input it does not end: every picture is judged as soon as it is whole, exactly once, also
after a kill or a full disk (watch/station.py). A new start with the same --out goes on.

Decoding, network and writing run side by side, in threads. Under torchrun rank r of N takes the files r, r + N, ... of
the inputs and writes its rows to scores.csv.r; when all are done, rank 0 joins them to scores.csv.
"""

import argparse
import functools
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from glob import escape, glob
from itertools import chain
from pathlib import Path

from PIL import Image

from almrr_ref.calibration.drift import Drift
from almrr_ref.data.folders import find_inputs
from almrr_ref.data.images import ImageError, Remarks
from almrr_ref.detector import Detector
from almrr_ref.report.layers import write_layers
from almrr_ref.report.overlays import save_picture
from almrr_ref.report.page import commands_for, describe_threshold, write_page
from almrr_ref.report.result import Result
from almrr_ref.report.scores import LineFile, ScoresWriter, boxes_line, merge_scores, results_folder, write_boxes
from almrr_ref.run import distributed
from almrr_ref.run.ahead import mapped_ahead
from almrr_ref.run.cli import add_network_flags, finite, make_parser, path_argument, run_command, words_of
from almrr_ref.run.files import BOXES, MAPS, OVERLAYS, SCORES, atomic_path, output_name
from almrr_ref.run.text import counted, decimals, duration, one_line
from almrr_ref.watch.flags import add_station_flags, refuse_station_flags, station_of


def predict(
    detector: Detector,
    sources: list[Path],
    out: Path,
    *,
    overlays: bool,
    maps: bool,
    overwrite: bool,
    checkpoint: Path,
    flags: Sequence[str],
) -> int:
    """Predict every image of the sources, files and folders, and write the results into ``out``.

    Args:
        overwrite: whether earlier results in ``out`` are replaced, all of them.
        checkpoint, flags: of the detector and of this command, for the commands that the page gives.
    Returns:
        Number of files that could not be read, of all ranks.
    Raises:
        ValueError: if a source has no image or lies in another one, or ``out`` holds earlier results or cannot be
            written.
    """
    base, inputs = _inputs(sources)
    ranks = range(distributed.world_size())

    def write(numbered: tuple[int, Result | ImageError]) -> Result | ImageError:
        number, result = numbered
        if not isinstance(result, ImageError):
            assert result.path is not None
            save_pictures(result, result.path.relative_to(base), out, overlays, maps)
            if overlays:
                write_layers(out, len(ranks) * number + distributed.rank(), detector.model, result)
        return result

    counts, remarks = Counts(), Remarks()
    with distributed.entered_by_first(lambda: results_folder(out, overwrite)):
        digest = hashlib.sha256()
        tables, lines = ([out / f"{name}.{r}" for r in ranks] for name in (SCORES, BOXES))
        table = tables[distributed.rank()] if len(ranks) > 1 else out / SCORES
        results = enumerate(detector.stream(_of_this_rank(inputs, digest), remarks))
        written = mapped_ahead(write, results, detector.ahead)
        write_rows(written, base, table, lines[distributed.rank()], counts)
        distributed.check_equal(digest.hexdigest(), f"files in {', '.join(map(one_line, sources))}")
        totals = map(sum, zip(*distributed.gathered((counts.done, counts.defective, counts.unreadable))))
        if distributed.rank() == 0:
            write_boxes(out / BOXES, lines)
            if len(ranks) > 1:
                merge_scores(out / SCORES, tables)
            write_page(
                out,
                f"Defect maps of {base.resolve().name}",
                [describe_threshold(detector.threshold, detector.model.threshold)],
                detector.threshold,
                detector.model.outline_offset,
                pictures=overlays,
                calibration=detector.calibration,
                commands=commands_for(checkpoint, sources, out, flags),
            )
    for remark in remarks.lines():
        print(f"note: {remark}", file=sys.stderr)
    done, defective, unreadable = totals
    seconds = time.monotonic() - counts.start
    print(
        f"{counted(done, 'image')} in {duration(seconds)}, {done / seconds:.1f} a second: {defective} above the "
        f"threshold of {decimals(detector.threshold)}, {unreadable} not read; results in {one_line(out)}"
    )
    return unreadable


def write_rows(results: Iterable[Result | ImageError], base: Path, table: Path, lines: Path, counts: "Counts") -> None:
    """Count every result, and write its row of scores.csv and line of boxes.json; names are relative to ``base``."""
    with ScoresWriter(table) as scores, LineFile(lines) as boxes:
        for result in results:
            assert result.path is not None
            name = result.path.relative_to(base)
            counts.add(result)
            if isinstance(result, ImageError):
                scores.write(name, error=result.reason)
                boxes.append("null\n")
            else:
                scores.write(name, result.score, result.threshold, result.area, result.box)
                boxes.append(boxes_line(name, result.size, result.regions))


class Counts:
    """How many images are done, defective, unreadable: said on the screen every five seconds."""

    def __init__(self) -> None:
        self.done = self.defective = self.unreadable = 0
        self.start = self._shown = time.monotonic()

    def add(self, result: Result | ImageError) -> None:
        if isinstance(result, ImageError):
            self.unreadable += 1
            print(f"not read: {result}", file=sys.stderr)
            return
        self.done += 1
        self.defective += result.defective is True
        if time.monotonic() - self._shown > 5:
            self._shown = time.monotonic()
            speed = self.done / (self._shown - self.start)
            print(
                f"{counted(self.done, 'image')}, {speed:.1f} a second, {self.defective} above the threshold", flush=True
            )


def _matches(source: Path) -> list[Path]:
    """What a name with a star stands for: cmd.exe leaves *.png to the program."""
    starred = "*" in source.name and not source.exists()
    pattern = os.path.join(escape(os.fspath(source.parent)), source.name)  # brackets in a folder's name are its own
    return (starred and sorted(map(Path, glob(pattern)))) or [source]


def _inputs(sources: list[Path]) -> tuple[Path, Iterator[Path | ImageError]]:
    """Files and folders -> the folder that names are relative to, and their images in order.

    Several sources become absolute: from there their names are distinct.
    """
    sources = [path for source in sources for path in _matches(source)]
    if len(sources) > 1:
        sources = [Path(os.path.abspath(source)) for source in sources]
        named = Counter(Path(os.path.realpath(source)) for source in sources)  # a link is what it points to
        for source, times in named.items():
            if times > 1 or not named.keys().isdisjoint(source.parents):
                raise ValueError(f"--input {one_line(source)} is given twice, or lies in another --input")
    inputs = []
    for source in sources:
        pictures = find_inputs(source)
        first = next(pictures, None)
        if first is None:
            raise ValueError(f"--input {one_line(source)}: no image in this folder or below")
        inputs.append(chain([first], pictures))
    folders = [source if source.is_dir() else source.parent for source in sources]
    base = folders[0] if len(folders) == 1 else Path(os.path.commonpath(folders))
    return base, chain.from_iterable(inputs)


def save_pictures(result: Result, name: Path, out: Path, overlays: bool, maps: bool) -> None:
    """Write what is asked for of a result: its overlay, its map."""
    if maps:
        save_map(out / MAPS / output_name(name, ".tiff"), result)
    if overlays:
        save_picture(out / OVERLAYS / output_name(name, ".png"), result.overlay())


def save_map(path: Path, result: Result) -> None:
    """Write a map as a 32-bit float TIFF of one channel, which ImageJ, Halcon and Pillow open."""
    with atomic_path(path) as temporary:
        Image.fromarray(result.network_map[0].numpy()).save(temporary, format="TIFF")


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
        "  python -m almrr_ref.predict --checkpoint runs/demo/last.pt --input monday/ tuesday/ x.png --out found\n"
        "  python -m almrr_ref.predict --checkpoint runs/demo/last.pt --watch camera/ --out found --move-to sorted/",
    )
    add_network_flags(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=path_argument, nargs="+", action="extend", metavar="FILE|DIR",
        help="images, and folders of images, read recursively")  # fmt: skip
    source.add_argument("--watch", type=path_argument, metavar="DIR",
        help="judge every image as soon as it is written whole into this folder, until Ctrl-C; what --out has of an "
        "earlier start is continued")  # fmt: skip
    add_station_flags(parser)
    add("--out", type=path_argument, required=True, metavar="DIR",
        help="folder for index.html, scores.csv, boxes.json, overlays/, layers/, maps/; with --watch for scores.csv, "
        "overlays/, maps/")  # fmt: skip
    add("--threshold", type=finite, metavar="X",
        help="call images with this score or a higher one defective (default: the network's threshold)")  # fmt: skip
    add("--fuse", action=argparse.BooleanOptionalAction, default=True,
        help="fold the network first: the same maps to 1e-5, several times less work (default: yes)")  # fmt: skip
    add("--no-overlays", action="store_true", help="write no pictures, which is faster")
    add("--no-maps", action="store_true", help="write no raw maps")
    add("--overwrite", action="store_true", help="replace the earlier results in --out, all of them")
    return parser


def command(arguments: argparse.Namespace) -> int:
    named = {name: getattr(arguments, name) for name in ("device", "threshold", "dtype", "fuse", "tile", "batch_size")}
    detector = Detector.load(arguments.checkpoint, **named)
    overlays, maps = not arguments.no_overlays, not arguments.no_maps
    out = arguments.out
    if arguments.watch:
        save = functools.partial(save_pictures, out=out, overlays=overlays, maps=maps)
        station_of(arguments, lambda: detector, save, Drift.of(detector.calibration)).run(arguments.overwrite)
        return 0
    refuse_station_flags(arguments)
    others = ("tile", "batch_size", "dtype", "max_pixels", "device", "fuse", "no_overlays", "no_maps")
    flags = words_of(arguments, build_parser(), *others)
    shown = {"overlays": overlays, "maps": maps, "overwrite": arguments.overwrite}
    unreadable = predict(detector, arguments.input, out, **shown, checkpoint=arguments.checkpoint, flags=flags)
    return 1 if unreadable and distributed.rank() == 0 else 0  # one rank says it for all: torchrun ends the others


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv, torchrun=True)


if __name__ == "__main__":
    distributed.end_process(main())
