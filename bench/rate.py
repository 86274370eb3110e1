"""Time training: ``python bench/rate.py``. Steps a second as `train` runs them, and with the samples at hand.

Random weights and noise will do. Two rates in turn: with samples drawn as in training, by the workers, and with one
batch again and again; where the first is the lower one, the network waits for samples: give more ``--workers``. The
first steps are not timed: kernels are compiled and chosen, and the features of the clean images are kept from then on.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator

import torch
from common import as_line, environment, markdown_table, measuring_parser, number, rounds, write_json
from forms import draw_images, random_network
from torch import Tensor

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.config import PRESETS, make_configs
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.textures import ImageTextures
from almrr_ref.fit import fold_for_training
from almrr_ref.plus.varied import varied_anomaly
from almrr_ref.run.cli import pick_device, positive, run_command
from almrr_ref.train import default_workers
from almrr_ref.training import Trainer

LEAST = 3  # steps of a rate
SCHEDULE = 49_000  # steps of the paper's 700 epochs over 280 images


def make_trainer(options: argparse.Namespace, device: torch.device) -> Trainer:
    """A run of the preset at its start."""
    settings = {"backbone": options.backbone, "weights": "random", "image_size": options.image_size, "steps": 1 << 30}
    settings |= {"standardise": "position"} if options.preset == "plus" else {}
    settings |= {"batch_size": options.batch, "amp": options.amp}
    settings["workers"] = default_workers(device) if options.workers is None else options.workers
    model_config, config = make_configs(options.preset, settings)
    model = random_network(model_config).to(device).train()
    fold_for_training(model.extractor, device)
    if model.memory is not None:
        model.memory.freeze()
    images = draw_images(options.images, model_config)
    draw = varied_anomaly if config.anomaly_style == "varied" else textured_anomaly
    return Trainer(model, TrainingSamples(images, ImageTextures(images), config, draw), {})


def steps_per_second(trainer: Trainer, batches: Iterator[list[Tensor]], warm_up: int, seconds: float) -> float:
    """Take ``warm_up`` steps, then as many as fit into the seconds; the device has done all that is counted."""
    wait = torch.cuda.synchronize if trainer.model.device.type == "cuda" else lambda: None

    def step() -> None:
        trainer.step(trainer.model, next(batches), trainer.config.lr)
        trainer.done += 1  # the reconstruction learns in every `rec_every`-th step

    for _ in range(warm_up):
        step()
    wait()
    start, before = time.perf_counter(), trainer.done
    for _ in rounds(seconds, LEAST):
        step()
    wait()
    return (trainer.done - before) / (time.perf_counter() - start)


def command(options: argparse.Namespace) -> int:
    device = pick_device(options.device)
    trainer = make_trainer(options, device)
    where = environment(device) | {"preset": options.preset, "batch": options.batch, "amp": options.amp}
    where |= {"workers": trainer.config.workers}
    print(as_line(where) + "\n", flush=True)
    warm_up = math.ceil(options.images / options.batch)  # every image was seen once
    loader = iter(trainer.samples.batches(0, trainer.steps))
    drawn = steps_per_second(trainer, loader, warm_up, options.seconds)
    at_hand = steps_per_second(trainer, itertools.repeat(next(loader)), 1, options.seconds)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else None
    minutes = SCHEDULE / drawn / 60
    columns = ["steps/s", "images/s", "steps/s, samples at hand", f"minutes for {SCHEDULE:,} steps", "peak MiB"]
    cells = [number(value, 2) for value in (drawn, drawn * options.batch, at_hand, minutes)] + [number(peak, 0)]
    print(markdown_table(columns, [cells], left=0), flush=True)
    if options.json:
        row = {"steps_per_second": drawn, "at_hand": at_hand, "minutes": minutes, "peak_mib": peak}
        write_json(options.json, {**where, **row})
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = measuring_parser(__file__, __doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="paper", help="default: paper")
    add("--backbone", default="resnet50", help="default: resnet50, the paper's")
    add("--image-size", nargs="+", type=positive, default=[256], help="side, or height and width, in pixels (256)")
    add("--batch", type=positive, default=4, help="images a step (default: 4)")
    add("--images", type=positive, default=64, help="good images to train on (default: 64)")
    add("--workers", type=int, help="as for train, whose default it is")
    add("--amp", action="store_true", help="compute in bfloat16")
    add("--seconds", type=float, default=15, help="time for each rate (default: 15)")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
