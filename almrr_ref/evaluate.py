"""Measure a trained network on a test part: ``python -m almrr_ref.evaluate --checkpoint RUN/last.pt --data PATH``.

Writes metrics.json, scores.csv, an overlay per image (image | mask | map | overlay, one colour scale for all), and
index.html, which shows them with the worst misses first, judges anew when its threshold is moved, and works offline.
Nothing here changes the network or its threshold.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from almrr_ref.data.folders import DataSet, Sample, describe
from almrr_ref.data.images import ImageError, Remarks
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.masks import load_mask
from almrr_ref.demo.surfaces import data_folder
from almrr_ref.detector import Detector
from almrr_ref.metrics import METRICS, AnomalyMetrics
from almrr_ref.model import describe_model, restore_model
from almrr_ref.report.layers import write_layers
from almrr_ref.report.overlays import save_picture
from almrr_ref.report.page import PAGE, commands_for, describe_threshold, write_page
from almrr_ref.report.result import Result
from almrr_ref.report.scores import ScoresWriter, results_folder, write_metrics
from almrr_ref.run import cli
from almrr_ref.run.ahead import mapped_ahead
from almrr_ref.run.checkpoint import read_checkpoint, valid_calibration, versions
from almrr_ref.run.files import OVERLAYS, output_name
from almrr_ref.run.text import Countdown, one_line


def evaluate(
    detector: Detector,
    data: DataSet,
    out: Path,
    seed: int,
    checkpoint: Path,
    network: str,
    *,
    overwrite: bool,
    overlays: bool,
) -> dict[str, Any]:
    """Measure a network on a test part, write everything into ``out``, and print the metrics.

    Args:
        seed: of the training, for metrics.json.
        checkpoint: of the network, for the commands that the page offers.
        network: its description (`describe_model`), for the page.
        overwrite: whether earlier results in ``out`` are replaced, all of them.
        overlays: whether to draw pictures (the page is written in any case).
    Returns:
        The content of metrics.json; its "unreadable" names the files that were left out.
    Raises:
        ValueError: if a mask does not fit its image, or ``out`` holds earlier results or cannot be written.
    """
    with results_folder(out, overwrite):
        metrics, unreadable = measure(detector, data.test, data.root, out, overlays)
        metrics |= {"threshold": detector.threshold, "seed": seed, "unreadable": unreadable, "versions": versions()}
        write_metrics(out / "metrics.json", metrics)
        notes = [describe_threshold(detector.threshold, detector.model.threshold), network]
        notes.append("the network is that of the last training step: nothing was chosen by these images")
        write_page(
            out,
            f"Defect maps of {data.root.resolve().name}",
            notes,
            detector.threshold,
            detector.model.outline_offset,
            pictures=overlays,
            metrics=metrics,
            calibration=detector.calibration,
            commands=commands_for(checkpoint),
        )
    print_metrics(metrics, out)
    return metrics


def measure(
    detector: Detector, samples: list[Sample], root: Path, out: Path, overlays: bool
) -> tuple[dict[str, Any], list[str]]:
    """Predict every test image, compare with the masks, write scores.csv and pictures: -> metrics, what is unreadable.

    Args:
        root: the data folder, to which names are relative.
    """
    metrics, remarks, unreadable = AnomalyMetrics(), Remarks(), []
    progress = Countdown("evaluating")

    def write(numbered: tuple[int, tuple[Sample, Result | ImageError]]) -> tuple[Sample, Result | ImageError, Any]:
        """Write the pictures: -> the image, its result or why there is none, and its mask."""
        number, (sample, result) = numbered
        if isinstance(result, ImageError):
            return sample, result, None
        size = (result.mask.shape[0], result.mask.shape[1])
        try:
            mask = load_mask(sample.mask_path, size) if sample.mask_path else None
        except ImageError as error:
            return sample, error, None
        if overlays:
            name = sample.path.relative_to(root)
            save_picture(out / OVERLAYS / output_name(name, ".png"), result.overlay(mask))
            write_layers(out, number, detector.model, result, mask)
        return sample, result, mask

    with ScoresWriter(out / "scores.csv", truth=True) as scores:
        results = zip(samples, detector.stream((sample.path for sample in samples), remarks))
        written = mapped_ahead(write, enumerate(results), detector.ahead)
        for done, (sample, result, mask) in enumerate(written, start=1):
            name = sample.path.relative_to(root)
            truth: dict[str, Any] = {"truth": sample.label, "defect_type": sample.defect_type}
            if isinstance(result, ImageError):
                reason = result.reason if result.path == sample.path else f"mask: {result.reason}"
                unreadable.append(f"{name}: {reason}")
                print(f"not read: {one_line(sample.path)}: {reason}", file=sys.stderr)
                scores.write(name, error=reason, **truth)
                continue
            metrics.update(result.network_map, mask, result.score, sample.label, sample.defect_type, detector.model.roi)
            scores.write(name, result.score, result.threshold, result.area, result.box, **truth)
            progress(done, len(samples))
    for remark in remarks.lines():
        print(f"note: {remark}", file=sys.stderr)
    measured = metrics.compute()
    for values in (measured, *measured["per_type"].values()) if unreadable else ():
        values["reasons"] = {name: f"{why} that could be read" for name, why in values["reasons"].items()}
    return measured, unreadable


def print_metrics(metrics: dict[str, Any], out: Path) -> None:
    """Print the metrics, overall and per defect type, in percent."""
    per_type = metrics["per_type"]
    groups = [("all", metrics), *(per_type.items() if len(per_type) > 1 else ())]  # a type may be called all
    width = max(len(one_line(name)) for name, _ in groups)
    print(f"{'percent':{width}}  " + "  ".join(f"{name.replace('_', ' '):>11}" for name in METRICS))
    for name, values in groups:
        cells = "  ".join(f"{'undefined':>11}" if values[m] is None else f"{100 * values[m]:11.2f}" for m in METRICS)
        print(f"{one_line(name):{width}}  {cells}")
    for reason in sorted({f"{name.replace('_', ' ')} is undefined: {why}" for name, why in metrics["reasons"].items()}):
        print(reason)
    print(f"images, worst first: {one_line(out / PAGE)}")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        "evaluate",
        __doc__.split("\n\n")[0] + "\n\nexample:\n"
        "  python -m almrr_ref.evaluate --checkpoint runs/carpet/last.pt --data mvtec/carpet",
    )
    add = parser.add_argument
    add("--checkpoint", type=cli.path_argument, required=True, metavar="FILE", help="last.pt of a training run")
    add("--data", type=cli.path_argument, required=True, metavar="PATH", help="data set with a test part, or 'demo'")
    add("--out", type=cli.path_argument, metavar="DIR",
        help="for the results (default: evaluation/ beside the checkpoint)")  # fmt: skip
    add("--batch-size", type=cli.positive, default=8, metavar="N",
        help="images the network sees at a time (default: 8)")  # fmt: skip
    add("--threshold", type=cli.finite, metavar="X",
        help="call images with this score or a higher one defective (default: the network's threshold)")  # fmt: skip
    add("--no-overlays", action="store_true", help="write no pictures, which is faster")
    add("--overwrite", action="store_true", help="replace the earlier results in --out, all of them")
    cli.add_max_pixels_flag(parser)
    cli.add_device_flag(parser)
    return parser


def command(arguments: argparse.Namespace) -> int:
    content = read_checkpoint(arguments.checkpoint)
    model = restore_model(content, cli.pick_device(arguments.device))
    data = find_dataset(data_folder(str(arguments.data), arguments.checkpoint.parent))
    print(describe(data))
    if not data.test:
        raise ValueError(f"{data.root} has no test part to evaluate on; use predict for images without labels")
    out = arguments.out or arguments.checkpoint.parent / "evaluation"
    calibration = valid_calibration(content.get("calibration"), model.config)
    detector = Detector(model.fuse(), arguments.threshold, batch_size=arguments.batch_size, calibration=calibration)
    seed, described = content["train_config"]["seed"], describe_model(model)
    options = {"overwrite": arguments.overwrite, "overlays": not arguments.no_overlays}
    metrics = evaluate(detector, data, out, seed, arguments.checkpoint, described, **options)
    return 1 if metrics["unreadable"] else 0


def main(argv: list[str] | None = None) -> int:
    return cli.run_command(command, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
