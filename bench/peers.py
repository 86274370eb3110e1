"""PatchCore, PaDiM and our checkpoints in one table: same images, features, test part and metrics.

    python bench/peers.py --data mt_defect --weights resnet18.pth --coreset 0.01 0.1 --seeds 0 1 2 --without uneven \\
        --checkpoint runs/plus-*/last.pt --checkpoint runs/paper-*/last.pt --json peers.json

What the peers are, and where they differ from their authors' code, is said in peer_methods.py. They train on all good
training images; our checkpoints kept a share of them aside for the threshold. A row with several seeds, or a
--checkpoint with several files, is mean ± standard deviation (n - 1). Metrics are those of ``almrr_ref.evaluate``;
"without TYPE" is the whole test part less the images of that type.

Training time is that of features and fit. Time per image is the median over batches, from an 8-bit image in memory to
map and score, after one batch to warm up; our networks run as trained, or in the deployed form with --fuse.
"""

import argparse
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import almrr_ref  # noqa: F401
except ModuleNotFoundError:
    sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent))  # for peer_methods, where this file is not run as a script

from peer_methods import Predict, fit_padim, fit_patchcore

from almrr_ref.data.images import ImageError, load_mask
from almrr_ref.data.layouts import DataSet, describe, find_dataset
from almrr_ref.data.pairing import DataError, Sample
from almrr_ref.data.split import load_images
from almrr_ref.features import FeatureExtractor
from almrr_ref.metrics import METRICS, AnomalyMetrics
from almrr_ref.model import ALMRR
from almrr_ref.report.scores import ScoresWriter, write_metrics
from almrr_ref.run.checkpoint import read_checkpoint, restore_model
from almrr_ref.run.cli import add_device_flag, path_argument, pick_device, positive, run_command
from almrr_ref.run.files import make_folder
from almrr_ref.run.text import Countdown, duration, one_line

Run = dict[str, Any]  # one training: seed or checkpoint, training_s, ms_per_image, and what AnomalyMetrics returns
METHODS = ("patchcore", "padim")
SHOWN = ("device", "torch", "threads", "batch_size", "image_size", "backbone")  # of the settings, above the table


def batches(images: Tensor, size: int, device: torch.device, what: str) -> Iterator[Tensor]:
    """Images uint8 (n, 3, s, s) -> batches (b, 3, s, s) in [0, 1] on the device, saying how far it is."""
    progress = Countdown(what)
    for done, batch in enumerate(images.split(size), start=1):
        yield batch.to(device).float() / 255
        progress(min(done * size, len(images)), len(images))


@dataclass
class Loaded:
    """The test part, decoded once: images uint8 (n, 3, s, s), masks (1, s, s), and a line for each unreadable file."""

    images: Tensor
    masks: list[Tensor | None]
    samples: list[Sample]
    unreadable: list[str]


def load_test(samples: Sequence[Sample], size: int) -> Loaded:
    """Decode what can be read, as `almrr_ref.evaluate` does: an image or a mask that cannot leaves its sample out."""
    images, failures = load_images(samples, size, Countdown("reading the test part"))
    broken = {path for path, _ in failures}
    lines = [f"{one_line(path)}: {reason}" for path, reason in failures]
    masks: list[Tensor | None] = []
    rows, kept = [], []
    for row, sample in enumerate(sample for sample in samples if sample.path not in broken):
        try:
            masks.append(None if sample.mask_path is None else load_mask(sample.mask_path, size))
        except ImageError as error:
            lines.append(f"mask of {one_line(sample.path)}: {error.reason}")
            continue
        rows.append(row)
        kept.append(sample)
    return Loaded(images[rows], masks, kept, lines)


def measure(
    predict: Predict, test: Loaded, without: Sequence[str], batch_size: int, device: torch.device
) -> tuple[Run, list[float]]:
    """Predict the test part -> what `AnomalyMetrics.compute` returns, with "without" (the same for the test part less
    each named defect type) and "ms_per_image"; and the image scores.
    """
    whole, others = AnomalyMetrics(), {name: AnomalyMetrics() for name in without}
    times: list[float] = []
    scores: list[float] = []
    predict(test.images[:batch_size].to(device).float() / 255)
    progress = Countdown("evaluating")
    for batch in test.images.split(batch_size):
        start = time.perf_counter()
        maps, found = (result.cpu() for result in predict(batch.to(device).float() / 255))
        times.append(1e3 * (time.perf_counter() - start) / len(batch))
        for anomaly_map, score in zip(maps, found.tolist()):
            sample, mask = test.samples[len(scores)], test.masks[len(scores)]
            scores.append(score)
            kept = [metrics for name, metrics in others.items() if not sample.label or sample.defect_type != name]
            for metrics in (whole, *kept):
                metrics.update(anomaly_map, mask, score, sample.label, sample.defect_type)
        progress(len(scores), len(test.images))
    without_types = {name: metrics.compute() for name, metrics in others.items()}
    return whole.compute() | {"without": without_types, "ms_per_image": statistics.median(times)}, scores


def open_checkpoints(groups: Sequence[Sequence[Path]], arguments: argparse.Namespace) -> dict[str, dict[Path, ALMRR]]:
    """Files of each --checkpoint -> networks, by the name of their folder, less its number if there are several.

    Raises:
        ValueError: if a file is no checkpoint, its images have another size than the peers', or two rows one name.
    """
    rows: dict[str, dict[Path, ALMRR]] = {}
    for paths in groups:
        names = [path.resolve().parent.name for path in paths]
        plain = {re.sub(r"[-_ .]*\d+$", "", name) for name in names}  # plus-0, plus-1 and plus-2 are "plus"
        label = names[0] if len(names) == 1 else plain.pop() if len(plain) == 1 else " + ".join(names)
        if label in rows:
            raise ValueError(f"two --checkpoint are called {label}; rename one run's folder")
        rows[label] = {}
        for path in paths:
            model = restore_model(read_checkpoint(path), arguments.device)
            if model.config.tile or model.config.image_size != arguments.image_size:
                seen = "tiles" if model.config.tile else f"images of {model.config.image_size} pixels"
                raise ValueError(
                    f"{path} was trained on {seen}, the peers see whole images of {arguments.image_size} pixels: "
                    "compare at one --image-size, without tiles"
                )
            rows[label][path] = model.fuse() if arguments.fuse else model
    return rows


def groups_of(run: Run) -> dict[str, Run]:
    """The selections of the test part, in the order of the table."""
    without = {f"without {name}": part for name, part in run["without"].items()}
    return {"all": run, **without, **{f"only {name}": part for name, part in run["per_type"].items()}}


def table(rows: dict[str, list[Run]]) -> str:
    """Rows -> Markdown: each method on the whole test part, then without types, then per type; in percent."""
    columns = ["method", "defects", *(name.replace("_", " ") for name in METRICS), "training", "ms per image"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for group in groups_of(next(iter(rows.values()))[0]):
        for method, runs in rows.items():
            parts = [groups_of(run)[group] for run in runs]
            cells = [spread([part[name] for part in parts], 100, 2) for name in METRICS] + ["", ""]
            if group == "all":
                seconds = [run["training_s"] for run in runs]
                cells[-2] = "-" if None in seconds else duration(statistics.mean(seconds))
                cells[-1] = spread([run["ms_per_image"] for run in runs], 1, 1)
            lines.append("| " + " | ".join([one_line(method), one_line(group), *cells]) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], factor: float, digits: int) -> str:
    """Values -> "mean ± standard deviation" times the factor; one value stands alone."""
    known = [factor * value for value in values if value is not None]
    if len(known) < len(values):
        return "undefined"
    mean = f"{statistics.mean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def runs_of(arguments: argparse.Namespace, data: DataSet, unreadable: list[str]) -> Iterator[tuple[str, Run, Predict]]:
    """Open the checkpoints, then fit the peers one by one: the name of the row, what is known of the run, predict."""
    size, device = arguments.image_size, arguments.device
    ours = open_checkpoints(arguments.checkpoint, arguments)
    fits: dict[str, Callable[..., Predict]] = {}
    if "patchcore" in arguments.methods:
        fits |= {f"PatchCore {100 * share:g}%": partial(fit_patchcore, share=share) for share in arguments.coreset}
    if "padim" in arguments.methods:
        fits |= {"PaDiM": fit_padim}
    if fits:
        extractor = FeatureExtractor(arguments.backbone, (1, 2, 3), arguments.weights, size // 4).to(device)
        images, failures = load_images(data.train, size, Countdown("reading the training images"))
        unreadable += [f"{one_line(path)}: {reason}" for path, reason in failures]
    for label, fit in fits.items():
        for seed in arguments.seeds:
            start = time.perf_counter()
            predict = fit(extractor, batches(images, arguments.batch_size, device, f"{label}, seed {seed}"), seed)
            yield label, {"seed": seed, "training_s": time.perf_counter() - start}, predict
    for label, models in ours.items():
        for path, model in models.items():
            yield label, {"checkpoint": str(path), "training_s": None}, model.predict


def command(arguments: argparse.Namespace) -> int:
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    arguments.device = pick_device(arguments.device)
    if not (arguments.methods or arguments.checkpoint):
        raise ValueError("nothing to compare; name --methods, or a --checkpoint")
    for folder in filter(None, (arguments.out, arguments.json and arguments.json.parent)):
        make_folder(folder)
    data = find_dataset(arguments.data)
    print(describe(data), flush=True)
    if not data.test:
        raise DataError(f"{data.root} has no test part to compare on")
    types = sorted({sample.defect_type for sample in data.test if sample.label})
    if missing := [name for name in arguments.without if name not in types]:
        raise ValueError(f"--without {missing[0]}: the defect types here are {', '.join(types) or 'none'}")
    test = load_test(data.test, arguments.image_size)
    rows: dict[str, list[Run]] = {}
    where = {name: str(value) for name, value in vars(arguments).items()} | {"torch": str(torch.__version__)}
    where |= {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for label, run, predict in runs_of(arguments, data, test.unreadable):
        found, scores = measure(predict, test, arguments.without, arguments.batch_size, arguments.device)
        rows.setdefault(label, []).append(run | found)
        print(f"{label}: image AUROC {spread([found['image_auroc']], 100, 2)}", flush=True)
        if arguments.json:  # after every run: nothing is lost if a later one fails
            write_metrics(arguments.json, {**where, "unreadable": test.unreadable, "rows": rows})
        if arguments.out:
            with ScoresWriter(arguments.out / f"{label} {len(rows[label])}.csv", truth=True) as file:
                for sample, score in zip(test.samples, scores):
                    name = sample.path.relative_to(data.root)
                    file.write(name, score, truth=sample.label, defect_type=sample.defect_type)
    print(f"\npercent; {', '.join(f'{name} {value}' for name, value in where.items() if name in SHOWN)}\n")
    print(table(rows))
    for line in test.unreadable:
        print(f"not read: {line}", file=sys.stderr)
    return 1 if test.unreadable else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python bench/peers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("--data", type=path_argument, required=True, metavar="PATH", help="data set with a test part, in any layout")
    flag("--backbone", default="resnet18", help="features of the peers (default: resnet18)")
    flag("--weights", metavar="FILE", help="its weights, or 'random'; without it: torch hub's cache, then a download")
    flag("--methods", nargs="*", choices=METHODS, default=METHODS, help="which peers (default: both; may be empty)")
    flag("--coreset", nargs="+", type=share, default=[0.01], help="shares of patches that PatchCore keeps (0.01)")
    flag("--seeds", nargs="+", type=int, default=[0], help="a run of each peer for each (default: 0)")
    flag("--checkpoint", nargs="+", type=path_argument, action="append", default=[], metavar="FILE", help="a row")
    flag("--fuse", action="store_true", help="run the checkpoints in their deployed form: same maps, faster")
    flag("--without", nargs="+", default=[], metavar="TYPE", help="also all defects but these, one row for each")
    flag("--image-size", type=positive, default=256, help="side in pixels (default: 256)")
    flag("--batch-size", type=positive, default=8, help="images at a time (default: 8)")
    flag("--json", type=path_argument, metavar="FILE", help="also write all metrics, after every run")
    flag("--out", type=path_argument, metavar="DIR", help="also write the image scores of every run, as CSV")
    add_device_flag(parser)
    return run_command(command, parser, argv)


def share(text: str) -> float:
    """An argument that must lie above 0 and be at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
