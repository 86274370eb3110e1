"""Train on good images: ``python -m almrr_ref.train --data PATH``.

fit.py holds what it shares with `almrr_ref.train_detector`, training.py the training itself.

Writes into RUN: last.pt (the checkpoint), calibration.json (what its threshold promises and finds), log.jsonl (one line
per report), synthetic.png (Fig. 3: a look at the simulated anomalies), and, where the data has a test part,
evaluation/. The model is that of the last step: nothing is ever chosen by the test part. The threshold comes from good
images alone.

Under torchrun every rank computes its part of each batch, gradients are averaged, and rank 0 alone writes. Which
samples make up a batch does not depend on the number of ranks; dice and batch norm see the images of one rank.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from almrr_ref.config import DEMO, PRESETS, SETTINGS, ModelConfig, TrainConfig, from_dict, make_configs
from almrr_ref.data.folders import describe
from almrr_ref.data.layouts import find_dataset
from almrr_ref.demo.surfaces import data_folder
from almrr_ref.detector import Detector
from almrr_ref.evaluate import evaluate
from almrr_ref.fit import IN_MEMORY, choose_preset, fit
from almrr_ref.model import describe_model
from almrr_ref.run import cli, distributed
from almrr_ref.run.ahead import cores
from almrr_ref.run.checkpoint import valid_calibration
from almrr_ref.run.folder import open_run
from almrr_ref.run.text import LOGGER, decimals, one_line


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        "train",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.train --data demo\n"
        "  python -m almrr_ref.train --data images/\n"
        "  python -m almrr_ref.train --data mvtec/carpet --anomaly-source dtd/images --out runs/carpet\n"
        "  python -m almrr_ref.train --out runs/carpet --resume",
    )
    where = "folder for all that is written (default: runs/NAME of the data)"
    parser.add_argument("--out", metavar="RUN", type=cli.path_argument, help=where)
    which = (
        "paper: the paper's sizes, for a GPU; plus: narrower, shallower, and what finds more, for a CPU or few images "
        "(README, Deviations) (default: auto, paper where there is a CUDA GPU, plus otherwise and for the demo)"
    )
    parser.add_argument("--preset", choices=("auto", *PRESETS), default="auto", help=which)
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="continue the run in RUN where its last.pt stands")
    folder.add_argument("--overwrite", action="store_true", help="start anew although RUN holds a run")
    cli.add_max_pixels_flag(parser)
    cli.add_device_flag(parser)
    lengths = {"epochs": "700; with preset plus 2000 --steps, for the demo 200"}
    cli.add_flags(parser, TrainConfig, lengths | {"workers": "0, with a GPU its free cores, 8 at most"})
    cli.add_flags(parser, ModelConfig, {"backbone": "auto, resnet50 if its weights are here or can be downloaded"})
    cli.add_settings_flag(parser, ModelConfig, TrainConfig)
    return parser


def default_workers(device: torch.device) -> int:
    """Processes that prepare samples: a GPU must not wait for them, and what trains on a CPU needs its cores itself."""
    return 0 if device.type != "cuda" else min(8, max(0, cores() // distributed.world_size() - 1))


def command(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name in SETTINGS} | dict(arguments.settings)
    if given.get("backbone") == "auto":
        del given["backbone"]
    data_of_run = arguments.resume and arguments.out and "data" not in given
    if data_of_run and not (arguments.out / "last.pt").exists():
        raise ValueError(f"--resume: there is nothing to resume in {arguments.out}; name the --data to start with")
    data = None if data_of_run else given.setdefault("data", "demo")
    device = cli.pick_device(arguments.device)
    preset, reason = choose_preset(arguments.preset, data, device)
    defaults = DEMO[preset] if data == "demo" else {"backbone": "auto"}
    configs = make_configs(preset, given, {**defaults, "workers": default_workers(device)})
    # by a named preset: the fields that any preset sets, as paper has the defaults of those of plus
    by_preset = {name for values in PRESETS.values() for name in values} if arguments.preset in PRESETS else set()
    if data_of_run:
        by_preset -= DEMO[preset].keys()  # the run may be of the demo, which has values of its own
    named = {*by_preset, *given}  # by the user; a resumed run must have the same values
    wanted = {name: value for config in configs for name, value in vars(config).items() if name in named}
    opened = distributed.entered_by_first(
        lambda: open_run(arguments.out, configs[1].data, wanted, arguments.resume, arguments.overwrite)
    )
    with opened as (run, stored):
        if stored and stored["train_config"]["data"] == IN_MEMORY:
            raise ValueError(f"--resume: {run} was trained on pictures in memory, which only its program has")
        if stored:
            if data:  # it may have moved
                stored["train_config"]["data"] = data
            configs = from_dict(ModelConfig, stored["model_config"]), from_dict(TrainConfig, stored["train_config"])
        elif reason:
            LOGGER.info(reason)
        try:
            return train(*configs, run, stored, device)
        except KeyboardInterrupt:
            if (run / "last.pt").exists() and not distributed.rank():
                print(f"what was trained is saved in {one_line(run)}; continue with --resume", file=sys.stderr)
            raise


def train(
    model_config: ModelConfig, config: TrainConfig, run: Path, stored: dict[str, Any] | None, device: torch.device
) -> int:
    """Read the data, train, calibrate, evaluate; return the exit code of the command."""
    data = distributed.from_first(lambda: find_dataset(data_folder(config.data, run)))
    if not distributed.rank():
        print(describe(data))
    fitted = fit(data, model_config, config, device, run, stored)
    if distributed.rank():
        return 0  # torchrun would end rank 0, which is still working, at any other code
    if fitted.stopped_by:
        where = f"stopped by {fitted.stopped_by.name} after step {fitted.step}, saved in {one_line(run)}"
        judges = "" if fitted.model.threshold is None else "; until then it judges by its memory alone"
        print(f"{where}; continue with --resume{judges}", file=sys.stderr)
        return 128 + fitted.stopped_by
    print(
        f"threshold {decimals(fitted.model.threshold)}; network in {one_line(run / 'last.pt')}, "
        f"a look at the simulated anomalies in {one_line(run / 'synthetic.png')}"
    )
    failures = fitted.unreadable
    if data.test:
        out, checkpoint = run / "evaluation", run / "last.pt"
        calibration = valid_calibration(fitted.calibration, fitted.model.config)  # a region may be drawn since
        detector = Detector(fitted.model.fuse(), batch_size=config.batch_size, calibration=calibration)
        described = describe_model(fitted.model)
        metrics = evaluate(detector, data, out, config.seed, checkpoint, described, overwrite=True, overlays=True)
        failures += len(metrics["unreadable"])
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    return cli.run_command(command, build_parser(), argv, torchrun=True)


if __name__ == "__main__":
    distributed.end_process(main())
