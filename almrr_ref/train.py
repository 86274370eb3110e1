"""Train on good images: ``python -m almrr_ref.train --data PATH``. The training itself is training.py.

Writes into RUN: last.pt (the checkpoint), log.jsonl (one line per report), synthetic.png (Fig. 3: a look at the
simulated anomalies), and, where the data has a test part, evaluation/. The model is that of the last step: nothing is
ever chosen by the test part. The threshold comes from good images that were kept aside.

Under torchrun every rank computes its part of each batch, gradients are averaged, and rank 0 alone writes. Which
samples make up a batch does not depend on the number of ranks; dice and batch norm see the images of one rank.
"""

import argparse
import dataclasses
import signal
import sys
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from almrr_ref.anomalies import textured_anomaly
from almrr_ref.calibration import measure_held_out
from almrr_ref.config import PRESETS, ModelConfig, TrainConfig, from_dict, make_configs
from almrr_ref.data.dataset import require_good
from almrr_ref.data.recognise import recognise_levels
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.split import content_key, load_good_images, refuse_other_files, training_files
from almrr_ref.data.textures import texture_source
from almrr_ref.demo.surfaces import demo_defaults, open_data
from almrr_ref.evaluate import evaluate, print_metrics
from almrr_ref.good_features import complete_memory, fit_features
from almrr_ref.model import ALMRR, describe_model, restore_model
from almrr_ref.plus.varied import varied_anomaly
from almrr_ref.report.overlays import contact_sheet, save_picture
from almrr_ref.report.scores import clear_results, results_folder
from almrr_ref.run import cli, distributed
from almrr_ref.run.folder import open_run
from almrr_ref.run.text import one_line
from almrr_ref.training import Trainer
from almrr_ref.verdict import choose_regime, set_verdict, stored_calibration, with_groups, write_calibration

DRAW = {"perlin": textured_anomaly, "varied": varied_anomaly}  # by anomaly_style
SETTINGS = {entry.name for config in (ModelConfig, TrainConfig) for entry in dataclasses.fields(config)}


def save_sample_sheet(samples: TrainingSamples, path: Path, count: int = 8) -> None:
    """Draw the first simulated anomalies of the run, as in the paper's Fig. 3: clean | augmented | mask."""
    drawn = (samples[number][:3] for number in range(100 * count))
    rows = list(islice((row for row in drawn if row[2].any() or samples.config.clean_probability == 1), count))
    save_picture(path, contact_sheet(rows, ("clean", "augmented", "mask"), columns=2))


def build_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(
        "train",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.train --data demo\n"
        "  python -m almrr_ref.train --data images/ --preset plus --backbone efficientnet_lite0\n"
        "  python -m almrr_ref.train --data mvtec/carpet --anomaly-source dtd/images --out runs/carpet\n"
        "  python -m almrr_ref.train --out runs/carpet --resume",
    )
    where = "folder for all that is written (default: runs/NAME of the data)"
    parser.add_argument("--out", metavar="RUN", type=cli.path_argument, help=where)
    which = (
        "paper: the paper's sizes, for a GPU; plus: narrower, shallower, and what finds more, for a CPU or few images "
        "(README, Deviations) (default: paper; for the demo: plus)"
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help=which)
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument("--resume", action="store_true", help="continue the run in RUN where its last.pt stands")
    folder.add_argument("--overwrite", action="store_true", help="start anew although RUN holds a run")
    cli.add_device_flag(parser)
    cli.add_flags(parser, TrainConfig)
    cli.add_flags(parser, ModelConfig)
    cli.add_settings_flag(parser, ModelConfig, TrainConfig)
    return parser


def command(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name in SETTINGS} | dict(arguments.settings)
    preset, as_stored = arguments.preset, arguments.resume and arguments.out and "data" not in given
    if not as_stored and given.setdefault("data", "demo") == "demo":
        preset = preset or "plus"
        given = demo_defaults(preset, given) | given
    configs = make_configs(preset or "paper", given)
    wanted = {name: value for config in configs for name, value in vars(config).items()}
    wanted = {name: wanted[name] for name in {**PRESETS.get(preset or "", {}), **given}}
    opened = distributed.entered_by_first(
        lambda: open_run(arguments.out, configs[1].data, wanted, arguments.resume, arguments.overwrite)
    )
    with opened as (run, stored):
        if as_stored and not stored:
            raise ValueError(f"--resume: there is nothing to resume in {run}; name the --data to start with")
        if stored:
            configs = from_dict(ModelConfig, stored["model_config"]), from_dict(TrainConfig, stored["train_config"])
        return train(*configs, run, stored, cli.pick_device(arguments.device))


def train(
    model_config: ModelConfig, config: TrainConfig, run: Path, stored: dict[str, Any] | None, device: torch.device
) -> int:
    """Read the data, train, calibrate, evaluate; return the exit code of the command."""
    distributed.rank_batch_size(config.batch_size)  # refuses at once a batch that the ranks cannot divide
    data = distributed.from_first(lambda: open_data(config.data, run))
    require_good(data)
    if not stored:
        model_config = recognise_levels([sample.path for sample in data.train], model_config)
    model = restore_model(stored, device) if stored else ALMRR(model_config, seed=config.seed).to(device)
    print(describe_model(model))
    good = load_good_images(data, model.config, config)
    distributed.check_equal(zlib.crc32(good.training.numpy().data), "training images")
    varied = config.anomaly_style == "varied"
    textures = texture_source(config.anomaly_source, good.training, model_config.image_size, mixed=varied)
    files = training_files(data, textures)
    if stored:
        refuse_other_files(stored["training"]["files"], files, run)
    samples = TrainingSamples(good.training, textures, config, DRAW[config.anomaly_style], good.part_ids)
    trainer = Trainer(model, samples, files, run, stored["training"] if stored else None)
    if distributed.rank() == 0:
        save_sample_sheet(samples, run / "synthetic.png")
        if not stored:
            fit_features(model, samples)
            (run / "last.pt").unlink(missing_ok=True)  # only now: whatever was wrong above has cost nothing
            clear_results(run / "evaluation", overwrite=True)
    stopped = trainer.fit()
    if distributed.rank():
        return 0  # any other code would make torchrun end rank 0, which is still at work
    if stopped:
        where = f"stopped by {stopped.name} after step {trainer.done}, saved in {one_line(run)}"
        print(f"{where}; continue with --resume", file=sys.stderr)
        return 130 if stopped is signal.SIGINT else 0
    if model.threshold is None:  # else a finished run was resumed
        held_out = "new" if config.parts else "seen", measure_held_out(model, good.calibration)
        complete_memory(model, good.held_out, samples, good.image_ids)
        regime = choose_regime(config.calibrate_for, config.parts is not None)
        judged = good.calibration if config.parts else with_groups(model, good.calibration)
        verdict = set_verdict(model, judged, config.false_positive_rate, regime, held_out=held_out, seed=config.seed)
        write_calibration(run / "calibration.json", verdict)
        trained = {entry.image_id for entry in good.calibration if entry.trained}
        images = [
            [content_key(data.root / name, digest), name, i in trained]
            for i, (name, digest) in enumerate(files["images"].items())
        ]
        trainer.save(stored_calibration(verdict, images, None))
    print(
        f"threshold {model.threshold:.4f}; network in {one_line(run / 'last.pt')}, "
        f"a look at the simulated anomalies in {one_line(run / 'synthetic.png')}"
    )
    failures = good.unreadable
    if data.test:
        with results_folder(run / "evaluation", overwrite=True):
            metrics = evaluate(model, data.test, data.root, run / "evaluation", config.batch_size, seed=config.seed)
        print_metrics(metrics, run / "evaluation")
        failures += len(metrics["unreadable"])
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    return cli.run_command(command, build_parser(), argv, torchrun=True)


if __name__ == "__main__":
    distributed.leave(main())
