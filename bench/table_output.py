"""What bench/tables.py writes of a table: Markdown with paper beside measured, CSV, JSON, Fig. 8's bars, maps."""

import contextlib
import csv
import io
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cells import Cell, Place
from common import load_pyplot, markdown_table, write_json
from paper_tables import CATEGORIES, PAPER
from torch import Tensor

from almrr_ref.data.images import ImageError, load_image, load_mask
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.pairing import Sample
from almrr_ref.deploy.inference import Prediction, predict_files
from almrr_ref.report.overlays import Picture, contact_sheet, map_picture
from almrr_ref.run.checkpoint import CheckpointError, load_checkpoint
from almrr_ref.run.files import atomic_path, atomic_write
from almrr_ref.run.text import one_line

MOST_EXAMPLES = 12  # rows of a sheet
PAPERS_AVERAGE = "paper's five textures, avg"


@dataclass(frozen=True)
class Results:
    """A table's cells, by (category, variant, seed), and why some failed."""

    key: str
    title: str
    metrics: tuple[str, ...]
    categories: list[str]
    variants: list[str]
    seeds: list[int]
    cells: dict[Place, Cell]
    failed: dict[Place, str]

    def value(self, category: str, variant: str, metric: str, seed: int) -> float | None:
        """A measured figure in percent, "avg" that of all categories; None if a cell failed or it is undefined."""
        if category == "avg":
            values = [self.value(name, variant, metric, seed) for name in self.categories]
            return None if None in values else statistics.fmean(v for v in values if v is not None)
        if (category, variant, seed) in self.failed:
            return None
        found = self.cells[category, variant, seed].metrics()[metric]
        return None if found is None else 100 * found

    def measured(self, category: str, variant: str, metric: str) -> list[float]:
        """The figures of all seeds that have one."""
        if category == PAPERS_AVERAGE:
            return []
        values = (self.value(category, variant, metric, seed) for seed in self.seeds)
        return [value for value in values if value is not None]

    def paper(self, category: str, variant: str, metric: str) -> float | None:
        """The paper's figure in percent; its average only beside an average of the same categories, or for itself."""
        rows = PAPER.get(self.key, {}).get(variant, {})
        if category == PAPERS_AVERAGE:
            category = "avg"
        elif category == "avg" and {*self.categories, "avg"} != set(rows):
            return None
        return rows[category][self.metrics.index(metric)] if category in rows else None

    @property
    def rows(self) -> list[str]:
        """Categories, their average, and the paper's where it is one of other categories."""
        averages = ["avg"] * (len(self.categories) > 1)
        if self.key in PAPER and {*self.categories, "avg"} != set(CATEGORIES):
            averages.append(PAPERS_AVERAGE)
        return self.categories + averages


def spread(values: list[float], wanted: int) -> str:
    """Mean and sample standard deviation; how many seeds, where some are missing."""
    if not values:
        return "-"
    deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
    return f"{statistics.fmean(values):.2f} ± {deviation}" + (f" (n={len(values)})" if len(values) < wanted else "")


def markdown(results: Results, where: dict[str, Any]) -> str:
    """The table, one part for each metric; other methods, in the paper's Tables 1 and 2, have no measured column."""
    seeds = " ".join(map(str, results.seeds))
    lines = [f"## Table {results.key}: {results.title}", "", f"`{where['command']}`", ""]
    lines += [f"Seeds {seeds}; mean ± sample standard deviation; {where['device']}, {where['versions']}.", ""]
    others = [name for name in PAPER.get(results.key, {}) if name not in results.variants]
    for metric in results.metrics:
        heads = [f"{name} paper" for name in others]
        in_paper = results.key in PAPER
        for name in results.variants:
            heads += [f"{name} paper", f"{name} measured"] if in_paper else [name]
        table = []
        for category in results.rows:
            row = [one_line(category)]
            row += [_percent(results.paper(category, name, metric)) for name in others]
            for name in results.variants:
                row += [_percent(results.paper(category, name, metric))] * in_paper
                row.append(spread(results.measured(category, name, metric), len(results.seeds)))
            table.append(row)
        lines += [markdown_table([f"{metric.replace('_', ' ')}, percent", *heads], table), ""]
    for place, reason in results.failed.items():
        lines.append(f"- failed: {results.cells[place].name}: {reason}")
    lines += [f"- undefined: {results.cells[place].name}: {reason}" for place, reason in _undefined(results)]
    lines += [f"- {cell.name}: {number} files not read" for cell, number in _unreadable(results)]
    return "\n".join(lines).rstrip() + "\n"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _undefined(results: Results) -> list[tuple[Place, str]]:
    """Metrics that a cell has none of, with the reason that evaluate gives."""
    found = []
    for place, cell in results.cells.items():
        if place not in results.failed:
            reasons = cell.metrics()["reasons"]
            found += [(place, f"{metric}: {reasons[metric]}") for metric in results.metrics if metric in reasons]
    return found


def _unreadable(results: Results) -> list[tuple[Cell, int]]:
    cells = [cell for place, cell in results.cells.items() if place not in results.failed]
    return [(cell, len(cell.metrics()["unreadable"])) for cell in cells if cell.metrics()["unreadable"]]


def write_table(results: Results, where: dict[str, Any], out: Path) -> None:
    """Print the Markdown and write everything.

    Raises:
        OutputError: if a file cannot be written.
    """
    text = markdown(results, where)
    print("\n" + text, flush=True)
    name = f"table{results.key}"
    atomic_write(out / f"{name}.md", text)
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(("table", "category", "variant", "seed", "metric", "measured", "paper"))
    entries = []
    for (category, variant, seed), cell in results.cells.items():
        for metric in results.metrics:
            value, paper = results.value(category, variant, metric, seed), results.paper(category, variant, metric)
            writer.writerow((results.key, category, variant, seed, metric, value, paper))
        reason = results.failed.get((category, variant, seed))
        entry = {"category": category, "variant": variant, "seed": seed, "flags": cell.flags, "failed": reason}
        entries.append(entry | {"metrics": None if reason else cell.metrics()})
    atomic_write(out / f"{name}.csv", table.getvalue())
    write_json(out / f"{name}.json", {"table": results.key, "title": results.title, **where, "cells": entries})
    draw_maps(results, out / f"{name}_maps.png")
    if results.key == "7":
        draw_bars(results, out / f"{name}_bars.png")


def draw_bars(results: Results, path: Path) -> None:
    """Fig. 8: a panel for each metric, a group of bars for each category, a bar for each variant."""
    pyplot = load_pyplot(path)
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(1, len(results.metrics), figsize=(6 * len(results.metrics), 4), squeeze=False)
    width = 0.8 / len(results.variants)
    for axis, metric in zip(axes[0], results.metrics):
        for i, variant in enumerate(results.variants):
            for j, category in enumerate(results.rows):
                values, place = results.measured(category, variant, metric), j + (i + 0.5) * width - 0.4
                height = statistics.fmean(values) if values else 0
                error = statistics.stdev(values) if len(values) > 1 else None
                axis.bar(place, height, width, yerr=error, color=f"C{i}", label=variant if j == 0 else None)
                paper = results.paper(category, variant, metric)
                if paper is not None:
                    axis.plot(place, paper, marker="_", color="black", markersize=12)
        axis.set_xticks(range(len(results.rows)), results.rows)
        axis.set(title=f"{metric.replace('_', ' ')}, percent (dash: paper)", ylim=(0, 100))
    axes[0][-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    print(f"wrote {path}")


def choose_examples(data: Path, most: int) -> list[Sample]:
    """The first defective image with a mask of each kind of defect, in their order: chosen before anything is seen."""
    first: dict[str, Sample] = {}
    for sample in find_dataset(data).test:
        if sample.label and sample.mask_path is not None and sample.defect_type not in first:
            with contextlib.suppress(ImageError):  # named by the evaluation
                load_image(sample.path, 32), load_mask(sample.mask_path, (32, 32))
                first[sample.defect_type] = sample
    return list(first.values())[: max(1, most)]


def draw_maps(results: Results, path: Path) -> None:
    """Figs. 5-7: image | mask | map of each variant (first seed), on one scale a variant, 0 to its highest value."""
    seed, most = results.seeds[0], MOST_EXAMPLES // len(results.categories)
    data = {place[0]: cell.data for place, cell in results.cells.items()}
    examples = {category: choose_examples(data[category], most) for category in results.categories}
    samples = [sample for category in results.categories for sample in examples[category]]
    if not samples:
        print(f"drew no maps: no defective test image has a mask, {path} not written")
        return
    maps: dict[str, list[Tensor | None]] = {variant: [] for variant in results.variants}
    for variant in results.variants:
        for category in results.categories:
            failed = (category, variant, seed) in results.failed
            folder = None if failed else results.cells[category, variant, seed].folder
            maps[variant] += predict_examples(folder, examples[category])
    tops = {
        variant: max([float(m.max()) for m in made if m is not None], default=0.0) for variant, made in maps.items()
    }
    rows = []
    for i, sample in enumerate(samples):
        assert sample.mask_path is not None
        row: list[Picture] = [load_image(sample.path, 256), load_mask(sample.mask_path, (256, 256)).float()]
        for variant, made in maps.items():
            one = made[i]
            row.append(torch.full((1, 256, 256), 0.9) if one is None else map_picture(one, 0.0, tops[variant] or 1.0))
        rows.append(row)
    captions = ["image", "mask", *(f"{name}, " + (f"0 to {top:.2g}" if top else "none") for name, top in tops.items())]
    names = [sample.path.relative_to(data_root(sample, data)).as_posix() for sample in samples]
    with atomic_path(path) as temporary:
        contact_sheet(rows, captions, row_captions=names).save(temporary, format="PNG")
    print(f"wrote {path}")


def data_root(sample: Sample, data: dict[str, Path]) -> Path:
    """The folder above the data set that a sample belongs to."""
    return next(root.parent for root in data.values() if root in sample.path.parents)


def predict_examples(run: Path | None, samples: list[Sample]) -> list[Tensor | None]:
    """The maps of a finished cell's network; None for each sample of a cell that failed, or lost its checkpoint."""
    if run is None:
        return [None] * len(samples)
    try:
        model = load_checkpoint(run / "last.pt")
    except CheckpointError as error:
        print(f"no maps: {run / 'last.pt'}: {error}", file=sys.stderr)
        return [None] * len(samples)
    found = predict_files(model, [sample.path for sample in samples])
    return [result.anomaly_map if isinstance(result, Prediction) else None for result in found]
