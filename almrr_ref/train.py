"""Train on good images: ``python -m almrr_ref.train --data PATH``. Reads top to bottom like the paper's Fig. 2.

    sample -> simulated anomaly -> features(clean), features(augmented) -> MFRM -> FRM -> losses -> step

Writes into RUN: last.pt (the checkpoint), log.jsonl (one line per report), synthetic.png (Fig. 3: a look at the
simulated anomalies), and, where the data has a test part, evaluation/. The model is that of the last step: nothing is
ever chosen by the test part. The threshold comes from good images that were kept aside.
"""

import argparse
import dataclasses
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from almrr_ref.anomalies import OwnTextures, TextureFolder
from almrr_ref.checkpoint import restore_model, save_checkpoint
from almrr_ref.cli import add_device_flag, make_parser, path_argument, pick_device, run_command
from almrr_ref.config import PRESETS, ModelConfig, TrainConfig, add_flags, demo_defaults, from_dict, make_configs
from almrr_ref.evaluate import evaluate, print_metrics
from almrr_ref.fingerprint import Files, refuse_other_files, training_files
from almrr_ref.images import one_line
from almrr_ref.losses import dice_loss, focal_loss, reconstruction_loss, total_loss
from almrr_ref.model import ALMRR, describe_model
from almrr_ref.report import clear_results, results_folder
from almrr_ref.runs import Countdown, StopSignal, TrainingLog, load_good_images, open_data, open_run, wanted_settings
from almrr_ref.sampling import TrainingSamples, save_sample_sheet

SETTINGS = {entry.name for config in (ModelConfig, TrainConfig) for entry in dataclasses.fields(config)}
ROUNDING = 2e-5  # more than a score changes with the folded network or another batch size
REPORT_EVERY = 10  # steps between two looks at the loss; each costs a GPU a wait


class LossError(ValueError):
    """The loss is no longer a finite number."""


def training_step(
    model: ALMRR, clean: Tensor, augmented: Tensor, mask: Tensor, config: TrainConfig
) -> dict[str, Tensor]:
    """One batch -> the loss by part: L_rec, L_focal, L_dice.

    Args:
        clean, augmented: (b, 3, s, s) in [0, 1], on the model's device.
        mask: (b, 1, s, s) in {0, 1}, on the CPU.
    """
    changed = mask.flatten(1).any(dim=1).nonzero().squeeze(1).to(clean.device)
    mask = mask.to(clean.device)
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=config.amp):
        phi = model.features(clean)
        features = phi.clone()  # a sample left clean has the same features: no second pass for it
        if len(changed):
            features[changed] = model.features(augmented[changed])
        reconstructed = model.mfrm(features)
        parts = {"rec": reconstruction_loss(reconstructed, phi, config.rec_loss)}
        if model.frm is not None:
            seen = reconstructed.detach() if config.detach_reconstruction else reconstructed
            logits = model.refine(features, seen)
            parts["focal"] = focal_loss(logits, mask, config.focal_gamma, config.focal_alpha)
            parts["dice"] = dice_loss(logits.softmax(dim=1)[:, 1:], mask)
    return parts


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of one step: a linear warm-up, then constant or half a cosine down to 1% of the rate."""
    rate = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
    if config.schedule == "cosine":
        rate *= 0.01 + 0.99 * (1 + math.cos(math.pi * step / steps)) / 2
    return rate


def optimise(
    model: ALMRR, optimiser: torch.optim.Optimizer, batch: list[Tensor], rate: float, config: TrainConfig
) -> dict[str, Tensor]:
    """Take one optimiser step on one batch (clean, augmented, mask) and return the loss by part, detached."""
    device = model.feature_mean.device
    clean, augmented, mask = batch
    clean, augmented = clean.to(device, non_blocking=True), augmented.to(device, non_blocking=True)
    for group in optimiser.param_groups:
        group["lr"] = rate
    parts = training_step(model, clean, augmented, mask, config)
    optimiser.zero_grad(set_to_none=True)
    total_loss(parts).backward()
    optimiser.step()
    return {name: part.detach() for name, part in parts.items()}


def fit(
    model: ALMRR, samples: TrainingSamples, held_out: Tensor, files: Files, run: Path, resumed: dict[str, Any] | None
) -> signal.Signals | None:
    """Train to the last step and set the threshold, or stop at a signal; last.pt is written now and then, and last.

    Args:
        model: on its device; trained in place.
        samples: the row of training samples, with the configuration.
        held_out: good images for the threshold, uint8 (n, 3, s, s); if there is none, the training images serve.
        files: what is trained on, for the checkpoint (fingerprint.py).
        run: folder for last.pt and log.jsonl.
        resumed: "training" part of a checkpoint to continue from.

    Returns:
        None when the last step is done, else the signal that stopped the run.
    Raises:
        LossError: if the loss is not finite; the last good checkpoint stays.
    """
    config, first = samples.config, 0
    steps = config.steps or math.ceil(config.epochs * len(samples.images) / config.batch_size)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr)
    if resumed:
        first = resumed["step"]
        optimiser.load_state_dict(resumed["optimiser"])
        torch.set_rng_state(resumed["rng"])
        print(f"continuing after step {first} of {steps}")
    log = TrainingLog(run / "log.jsonl", first, steps, config.batch_size, config.save_minutes)
    model.train()
    pending: list[dict[str, Tensor]] = []
    with StopSignal() as stop:
        for done, batch in enumerate(samples.batches(first, steps), start=first + 1):
            rate = learning_rate(done - 1, steps, config)
            pending.append(optimise(model, optimiser, batch, rate, config))
            if not (len(pending) == REPORT_EVERY or done == steps or stop.requested):
                continue
            values = {name: torch.stack([parts[name] for parts in pending]).tolist() for name in pending[0]}
            _refuse_infinite(values, done - len(pending), samples, run)
            log.report(done, values, rate)
            pending = []
            if done == steps:
                model.threshold = calibrate(model, held_out if len(held_out) else samples.images, config)
            if done == steps or stop.requested or log.save_is_due():
                state = {
                    "step": done,
                    "steps": steps,
                    "optimiser": optimiser.state_dict(),
                    "rng": torch.get_rng_state(),
                    "files": files,
                }
                save_checkpoint(run / "last.pt", model, config, state)
            if stop.requested and done < steps:
                where = f"stopped by {stop.requested.name} after step {done}, saved in {one_line(run)}"
                print(f"{where}; continue with --resume", file=sys.stderr)
                return stop.requested
    return None


def _refuse_infinite(values: dict[str, list[float]], first: int, samples: TrainingSamples, run: Path) -> None:
    for offset, row in enumerate(zip(*values.values())):
        if not all(map(math.isfinite, row)):
            b = samples.config.batch_size
            images = [samples.image_index((first + offset) * b + i) for i in range(b)]
            raise LossError(
                f"the loss is not finite at step {first + offset + 1} ({dict(zip(values, row))}), images number"
                f" {images}; nothing of it was saved into {run}: try a lower --lr, or no --amp"
            )


def counted_batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Images uint8 (n, 3, s, s) in batches, float in [0, 1], with progress on the screen."""
    batches, progress = images.split(size), Countdown("measuring features")
    for done, batch in enumerate(batches, start=1):
        yield batch.float() / 255
        progress(done, len(batches))


def calibrate(model: ALMRR, images: Tensor, config: TrainConfig) -> float:
    """The threshold: the score that at most a share ``false_positive_rate`` of the given good images exceeds.

    Args:
        images: good images that were not trained on, uint8 (n, 3, s, s).
    """
    scores = torch.cat([model.predict(batch.float() / 255)[1].cpu() for batch in images.split(config.batch_size)])
    allowed = int(config.false_positive_rate * len(scores))  # images that may lie above
    highest = scores.sort(descending=True).values[allowed]
    return float(highest) + ROUNDING  # a score at the threshold counts as defective


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "train",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.train --data demo\n"
        "  python -m almrr_ref.train --data images/ --preset small --backbone efficientnet_lite0\n"
        "  python -m almrr_ref.train --data mvtec/carpet --anomaly-source dtd/images --out runs/carpet\n"
        "  python -m almrr_ref.train --out runs/carpet --resume",
    )
    parser.add_argument(
        "--out",
        metavar="RUN",
        type=path_argument,
        help="folder for all that is written (default: runs/NAME of the data)",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="paper: the paper's sizes, for a GPU; small: narrower, shallower, "
        "a higher rate, for a CPU or few images (default: paper; for the demo: small)",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--resume", action="store_true", help="continue the run in RUN exactly where its last.pt stands"
    )
    folder.add_argument("--overwrite", action="store_true", help="start anew although RUN holds a run")
    add_device_flag(parser)
    add_flags(parser, TrainConfig)
    add_flags(parser, ModelConfig)
    return parser


def command(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if name in SETTINGS}
    preset, as_stored = arguments.preset, arguments.resume and arguments.out and "data" not in given
    if not as_stored and given.setdefault("data", "demo") == "demo":
        preset = preset or "small"
        given = demo_defaults(preset, given) | given
    device = pick_device(arguments.device)
    model_config, config = make_configs(preset or "paper", given)
    wanted = wanted_settings(preset, given)
    run, stored = open_run(arguments.out, config.data, wanted, arguments.resume, arguments.overwrite, arguments.at_end)
    if as_stored and not stored:
        raise ValueError(f"--resume: there is nothing to resume in {run}; name the --data to start with")
    if stored:
        model_config, config = (
            from_dict(ModelConfig, stored["model_config"]),
            from_dict(TrainConfig, stored["train_config"]),
        )
    data = open_data(config.data, run)
    model = restore_model(stored, device) if stored else ALMRR(model_config, seed=config.seed).to(device)
    print(describe_model(model))
    training, held_out, failures = load_good_images(data.train, model_config, config)
    textures = (
        TextureFolder(config.anomaly_source, model_config.image_size)
        if config.anomaly_source
        else OwnTextures(training)
    )
    files = training_files(data, textures)
    if stored:
        refuse_other_files(stored["training"].get("files"), files, run)
    samples = TrainingSamples(training, textures, config)
    save_sample_sheet(samples, run / "synthetic.png")
    if not stored:
        if model_config.standardise:
            model.fit_standardisation(counted_batches(training, config.batch_size))
        (run / "last.pt").unlink(missing_ok=True)  # only now: whatever was wrong above has cost nothing
        clear_results(run / "evaluation", overwrite=True)
    stopped = fit(model, samples, held_out, files, run, stored["training"] if stored else None)
    if stopped:
        return 130 if stopped is signal.SIGINT else 0
    print(
        f"threshold {model.threshold:.4f}; network in {one_line(run / 'last.pt')}, "
        f"a look at the simulated anomalies in {one_line(run / 'synthetic.png')}"
    )
    if data.test:
        with results_folder(run / "evaluation", overwrite=True):
            metrics = evaluate(model, data.test, data.root, run / "evaluation", config.batch_size, seed=config.seed)
        print_metrics(metrics, run / "evaluation")
        failures += len(metrics["unreadable"])
    return 1 if failures else 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
