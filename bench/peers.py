"""PatchCore, PaDiM and our checkpoints in one table: same images, features, test part and metrics.

    python bench/peers.py --data mt_defect --weights resnet18.pth --coreset 0.01 0.1 --seeds 0 1 2 --without uneven \\
        --checkpoint runs/plus-*/last.pt --checkpoint runs/paper-*/last.pt --json peers.json

peer_methods.py says what the peers are and where they differ from their authors' code. They train on all good training
images. A row with several seeds, or a --checkpoint with several files, is mean ± standard deviation (n - 1). Metrics
are those of ``almrr_ref.evaluate``; "without TYPE" is the whole test part less the images of that type. --json is
written after every run.

Training time is that of features and fit. Time per image is the median over batches, from an 8-bit image in memory to
map and score, after one batch to warm up; our networks run as trained, or in the deployed form with --fuse.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import as_line, environment, markdown_table, measuring_parser, spread, write_json
from peer_methods import Predict, fit_padim, fit_patchcore
from torch import Tensor

from almrr_ref import ModelConfig, load_checkpoint
from almrr_ref.data.folders import DataError, DataSet, Sample, describe
from almrr_ref.data.images import ImageError, Levels, load_image
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.loading import load_images
from almrr_ref.data.masks import load_mask
from almrr_ref.data.recognise import recognise_levels
from almrr_ref.features import FeatureExtractor
from almrr_ref.metrics import METRICS, AnomalyMetrics
from almrr_ref.run.cli import path_argument, pick_device, positive, run_command
from almrr_ref.run.files import make_folder
from almrr_ref.run.text import Countdown, duration, one_line

Run = dict[str, Any]  # one training: seed or checkpoint, training_s, ms_per_image, and what AnomalyMetrics returns
Loaded = tuple[Tensor, Tensor | None, Sample]  # image uint8 (3, h, w), mask (1, h, w)
METHODS = ("patchcore", "padim")


def load_test(samples: Sequence[Sample], size: tuple[int, int], levels: Levels) -> tuple[list[Loaded], list[str]]:
    """Decode the test part once -> what can be read, and a line for each file that cannot.

    Raises:
        DataError: if nothing can be read.
    """
    loaded: list[Loaded] = []
    unreadable = []
    progress = Countdown("reading the test part")
    for done, sample in enumerate(samples, start=1):
        try:
            mask = None if sample.mask_path is None else load_mask(sample.mask_path, size)
            loaded.append((load_image(sample.path, size, levels), mask, sample))
        except ImageError as error:
            unreadable.append(f"{one_line(error.path)}: {error.reason}")
        progress(done, len(samples))
    if not loaded:
        raise DataError(f"nothing of the test part can be read; the first: {unreadable[0]}")
    return loaded, unreadable


def measure(predict: Predict, test: list[Loaded], arguments: argparse.Namespace) -> Run:
    """Predict the test part -> what `AnomalyMetrics.compute` returns, with two entries more.

    They are "without" (the same for the test part less each named defect type) and "ms_per_image".
    """
    whole, reduced = AnomalyMetrics(), {name: AnomalyMetrics() for name in arguments.without}
    times: list[float] = []
    progress, size = Countdown("evaluating"), arguments.batch_size
    for first in [0, *range(0, len(test), size)]:  # the first batch twice: once to warm up
        batch = test[first : first + size]
        images = torch.stack([image for image, _, _ in batch])
        start = time.perf_counter()
        maps, scores = (result.cpu() for result in predict(images.to(arguments.device).float() / 255))
        times.append(1e3 * (time.perf_counter() - start) / len(batch))
        if len(times) == 1:
            continue
        for (_, mask, sample), anomaly_map, score in zip(batch, maps, scores.tolist()):
            counted = [metrics for name, metrics in reduced.items() if not sample.label or sample.defect_type != name]
            for metrics in (whole, *counted):
                metrics.update(anomaly_map, mask, score, sample.label, sample.defect_type)
        progress(first + len(batch), len(test))
    without = {name: metrics.compute() for name, metrics in reduced.items()}
    return whole.compute() | {"without": without, "ms_per_image": statistics.median(times[1:])}


def open_checkpoints(arguments: argparse.Namespace, levels: Levels) -> dict[str, dict[Path, Predict]]:
    """Files of each --checkpoint -> `predict`, by the name of their folder; plus-0, plus-1 and plus-2 are "plus".

    Raises:
        ValueError: if a file is no checkpoint, two rows have one name, or a network sees other images than the peers:
            of another size, other levels, or a region alone.
    """
    rows: dict[str, dict[Path, Predict]] = {}
    for paths in arguments.checkpoint:
        names = [path.resolve().parent.name for path in paths]
        stems = {name.rstrip("0123456789").rstrip("-_ .") for name in names}
        label = stems.pop() if len(names) > 1 and len(stems) == 1 else " + ".join(names)
        if label in rows:
            raise ValueError(f"two --checkpoint are called {label}; rename one run's folder")
        rows[label] = {}
        for path in paths:
            model = load_checkpoint(path, arguments.device)
            if model.config.tile or model.config.size != arguments.image_size:
                ours, theirs = ("{}x{} pixels".format(*size) for size in (model.config.size, arguments.image_size))
                trained_on = "tiles" if model.config.tile else f"images of {ours}"
                raise ValueError(
                    f"{path} was trained on {trained_on}, the peers on whole images of {theirs}: "
                    "compare at one --image-size, without tiles"
                )
            if model.roi is not None or Levels.of(model.config) != levels:
                sees = "a region alone" if model.roi is not None else f"{Levels.of(model.config)}"
                theirs = "whole images" if model.roi is not None else f"{levels}"
                raise ValueError(f"{path} judges {sees}, the peers {theirs}: there is nothing to compare")
            rows[label][path] = (model.fuse() if arguments.fuse else model).predict
    return rows


def runs_of(
    arguments: argparse.Namespace, data: DataSet, levels: Levels, unreadable: list[str]
) -> Iterator[tuple[str, Run, Predict]]:
    """Open the checkpoints, then fit the peers one by one: the name of the row, what is known of the run, predict."""
    size, device = arguments.image_size, arguments.device
    ours = open_checkpoints(arguments, levels)
    fits: dict[str, Callable[..., Predict]] = {}
    if "patchcore" in arguments.methods:
        fits |= {f"PatchCore {100 * f:g}%": partial(fit_patchcore, fraction=f) for f in arguments.coreset}
    if "padim" in arguments.methods:
        fits["PaDiM"] = fit_padim
    if fits:
        grid = ModelConfig(image_size=size).feature_size
        extractor = FeatureExtractor(arguments.backbone, (1, 2, 3), arguments.weights, grid).to(device)
        images, failures = load_images(data.train, size, levels, Countdown("reading the training images"))
        unreadable += [f"{one_line(path)}: {reason}" for path, reason in failures]
    for label, fit in fits.items():
        for seed in arguments.seeds:
            print(f"fitting {label}, seed {seed}", flush=True)
            batches = (batch.to(device).float() / 255 for batch in images.split(arguments.batch_size))
            start = time.perf_counter()
            predict = fit(extractor, batches, seed)
            yield label, {"seed": seed, "training_s": time.perf_counter() - start}, predict
    for label, runs in ours.items():
        for path, predict in runs.items():
            yield label, {"checkpoint": str(path), "training_s": None}, predict


def groups_of(run: Run) -> dict[str, Run]:
    """The selections of the test part, in the order of the table."""
    without = {f"without {name}": metrics for name, metrics in run["without"].items()}
    return {"all": run, **without, **{f"only {name}": metrics for name, metrics in run["per_type"].items()}}


def table(rows: dict[str, list[Run]]) -> str:
    """Rows -> Markdown: each method on the whole test part, then without types, then per type; in percent."""
    lines = []
    for group in groups_of(next(iter(rows.values()))[0]):
        for method, runs in rows.items():
            measured = [groups_of(run)[group] for run in runs]
            cells = [spread([m[name] and 100 * m[name] for m in measured]) for name in METRICS] + ["", ""]
            if group == "all":
                seconds = [run["training_s"] for run in runs]
                cells[-2] = "-" if None in seconds else duration(statistics.mean(seconds))
                cells[-1] = spread([run["ms_per_image"] for run in runs], 1)
            lines.append([one_line(method), one_line(group), *cells])
    metrics = [name.replace("_", " ") for name in METRICS]
    return markdown_table(["method", "defects", *metrics, "training", "ms per image"], lines, left=2)


def command(arguments: argparse.Namespace) -> int:
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    arguments.device = pick_device(arguments.device)
    arguments.image_size = ModelConfig(image_size=tuple(arguments.image_size)).size  # refuses what cannot be
    if not (arguments.methods or arguments.checkpoint):
        raise ValueError("nothing to compare; name --methods, or a --checkpoint")
    if not all(0 < fraction <= 1 for fraction in arguments.coreset):
        raise ValueError(f"--coreset takes fractions above 0 and up to 1, got {arguments.coreset}")
    if arguments.json:
        make_folder(arguments.json.parent)  # before hours of work
    data = find_dataset(arguments.data)
    print(describe(data), flush=True)
    if not data.test:
        raise DataError(f"{data.root} has no test part to compare on")
    types = sorted({sample.defect_type for sample in data.test if sample.label})
    if missing := [name for name in arguments.without if name not in types]:
        raise ValueError(f"--without {missing[0]}: the defect types here are {', '.join(types) or 'none'}")
    config = ModelConfig(image_size=arguments.image_size)
    levels = Levels.of(recognise_levels([sample.path for sample in data.train], config))
    test, unreadable = load_test(data.test, arguments.image_size, levels)
    rows: dict[str, list[Run]] = {}
    where = environment(arguments.device)
    where |= {name: getattr(arguments, name) for name in ("backbone", "image_size", "batch_size")}
    for label, run, predict in runs_of(arguments, data, levels, unreadable):
        run |= measure(predict, test, arguments)
        rows.setdefault(label, []).append(run)
        print(f"{label}: image AUROC {spread([run['image_auroc'] and 100 * run['image_auroc']])}", flush=True)
        if arguments.json:  # after every run: nothing is lost if a later one fails
            write_json(arguments.json, {**where, "data": str(data.root), "unreadable": unreadable, "rows": rows})
    print(f"\npercent; {as_line(where)}\n")
    print(table(rows))
    for line in unreadable:
        print(f"not read: {line}", file=sys.stderr)
    return 1 if unreadable else 0


def main(argv: list[str] | None = None) -> int:
    parser = measuring_parser(__file__, __doc__)
    add = parser.add_argument
    add("--data", type=path_argument, required=True, metavar="PATH", help="data set with a test part, in any layout")
    add("--backbone", default="resnet18", help="features of the peers (default: resnet18)")
    add("--weights", metavar="FILE", help="its weights, or 'random'; without it: torch hub's cache, then a download")
    add("--methods", nargs="*", choices=METHODS, default=METHODS, help="which peers (default: both; may be empty)")
    add("--coreset", nargs="+", type=float, default=[0.01], help="fractions of patches PatchCore keeps (0.01)")
    add("--seeds", nargs="+", type=int, default=[0], help="a run of each peer for each (default: 0)")
    add("--checkpoint", nargs="+", type=path_argument, action="append", default=[], metavar="FILE", help="a row")
    add("--fuse", action="store_true", help="run the checkpoints in their deployed form: same maps, faster")
    add("--without", nargs="+", default=[], metavar="TYPE", help="also all defects but these, one row for each")
    add("--image-size", nargs="+", type=positive, default=[256], help="side, or height and width, in pixels (256)")
    add("--batch-size", type=positive, default=8, help="images at a time (default: 8)")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
