"""Train on good images: ``python -m almrr_ref.train --data PATH``. Reads top to bottom like the paper's Fig. 2.

    sample -> simulated anomaly -> features(clean), features(augmented) -> MFRM -> FRM -> losses -> step

Writes into RUN: last.pt (the checkpoint), log.jsonl (one line per report), synthetic.png (Fig. 3: a look at the
simulated anomalies), and, where the data has a test part, evaluation/. The model is that of the last step: nothing is
ever chosen by the test part. The threshold comes from good images that were kept aside.

Under torchrun every rank takes its share of each batch, gradients are averaged, and rank 0 alone writes
(distributed.py). Which samples make up a batch does not depend on the number of ranks; but dice and batch norm see the
share of one rank at a time, as they see one batch without torchrun.
"""

import argparse
import dataclasses
import math
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from almrr_ref.calibrate import calibrate, complete_memory, fit_evidence, fit_features
from almrr_ref.config import PRESETS, ModelConfig, TrainConfig, demo_defaults, from_dict, make_configs
from almrr_ref.data.fingerprint import Files, refuse_other_files, training_files
from almrr_ref.data.samples import TrainingSamples, save_sample_sheet
from almrr_ref.data.sources import texture_source
from almrr_ref.data.split import load_good_images
from almrr_ref.evaluate import evaluate, print_metrics
from almrr_ref.losses import dice_loss, focal_loss, reconstruction_loss, total_loss
from almrr_ref.model import ALMRR, describe_model
from almrr_ref.report.scores import clear_results, results_folder
from almrr_ref.run import distributed
from almrr_ref.run.checkpoint import restore_model, save_checkpoint
from almrr_ref.run.cli import add_device_flag, add_flags, make_parser, path_argument, pick_device, run_command
from almrr_ref.run.runs import StopSignal, TrainingLog, open_data, open_run, wanted_settings
from almrr_ref.run.text import one_line

SETTINGS = {entry.name for config in (ModelConfig, TrainConfig) for entry in dataclasses.fields(config)}
REPORT_EVERY = 10  # steps between two looks at the loss; each costs a GPU a wait


class LossError(ValueError):
    """The loss is no longer a finite number."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy without making the host wait for the device, which takes pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def training_step(
    model: ALMRR, clean: Tensor, augmented: Tensor, mask: Tensor, config: TrainConfig, own: Tensor | None = None
) -> dict[str, Tensor]:
    """One batch -> the loss by part: L_rec, L_focal, L_dice.

    Args:
        clean, augmented: (b, 3, s, s) in [0, 1], on the model's device.
        mask: (b, 1, s, s) in {0, 1}, on the CPU.
        own: (b,) the parts that the images show, whose own patches in the memory do not count; without it all do.
    """
    changed = to_device(mask.flatten(1).any(dim=1).nonzero().squeeze(1), clean.device)
    mask = to_device(mask, clean.device)
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=config.amp):
        stages = model.standardised(model.extractor.stages(clean))
        phi = model.extractor.join(stages)
        if len(changed):  # a sample left clean has the same features: no second pass for it
            for stage, other in zip(stages, model.standardised(model.extractor.stages(augmented[changed]))):
                stage[changed] = other
        features = model.extractor.join(stages)
    nearest = model.nearest(stages, own) if model.config.frm_input == "memory" else None  # differences need all digits
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=config.amp):
        reconstructed = model.mfrm(features)
        parts = {"rec": reconstruction_loss(reconstructed, phi, config.rec_loss)}
        if model.frm is not None:
            rebuilt = reconstructed.detach() if config.detach_reconstruction else reconstructed
            logits = model.refine(model.frm_view(features, rebuilt, nearest))
            parts["focal"] = focal_loss(logits, mask, config.focal_gamma)
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
    """Take one optimiser step on one batch (clean, augmented, mask, part) and return the loss by part, detached."""
    clean, augmented, mask, own = batch
    clean, augmented, own = (to_device(part, model.feature_mean.device) for part in (clean, augmented, own))
    for group in optimiser.param_groups:
        group["lr"] = rate
    parts = training_step(model, clean, augmented, mask, config, own)
    optimiser.zero_grad(set_to_none=True)
    total_loss(parts).backward()
    distributed.average_gradients(model)
    optimiser.step()
    return {name: part.detach() for name, part in parts.items()}


def fit(
    model: ALMRR, samples: TrainingSamples, held_out: Tensor, files: Files, run: Path, resumed: dict[str, Any] | None
) -> signal.Signals | None:
    """Train to the last step, set the threshold and complete the memory, or stop at a signal.

    last.pt is written now and then, and last.

    Args:
        model: on its device; trained in place.
        samples: the row of training samples, with the configuration.
        held_out: good images for the threshold, then for the memory, uint8 (n, 3, s, s); if there is none, the training
            images serve.
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
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.lr, fused=True)
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
            stopped_by = distributed.largest(stop.requested or 0)  # all ranks at the same step
            if not (len(pending) == REPORT_EVERY or done == steps or stopped_by):
                continue
            losses = {name: torch.stack([parts[name] for parts in pending]) for name in pending[0]}
            values = {name: distributed.mean(loss.cpu()).tolist() for name, loss in losses.items()}
            _refuse_infinite(values, done - len(pending), samples, run)
            log.report(done, values, rate)
            pending = []
            if done == steps or stopped_by or distributed.from_first(log.save_is_due):
                distributed.average_running_statistics(model.frm)
                if done == steps and distributed.rank() == 0:
                    fit_evidence(model, held_out, samples)
                    model.threshold = calibrate(model, held_out, samples)
                    complete_memory(model, held_out, samples)
                state = {
                    "step": done,
                    "steps": steps,
                    "optimiser": optimiser.state_dict(),
                    "rng": torch.get_rng_state(),
                    "files": files,
                }
                if distributed.rank() == 0:
                    save_checkpoint(run / "last.pt", model, config, state)
            if stopped_by and done < steps:
                which = signal.Signals(stopped_by)
                where = f"stopped by {which.name} after step {done}, saved in {one_line(run)}"
                if distributed.rank() == 0:
                    print(f"{where}; continue with --resume", file=sys.stderr)
                return which
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


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "train",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.train --data demo\n"
        "  python -m almrr_ref.train --data images/ --preset plus --backbone efficientnet_lite0\n"
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
        help="paper: the paper's sizes, for a GPU; small: narrower, shallower, a higher rate, for a CPU or few images; "
        "plus: small, and what finds more (README, Deviations) (default: paper; for the demo: plus)",
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
        preset = preset or "plus"
        given = demo_defaults(preset, given) | given
    device = pick_device(arguments.device)
    model_config, config = make_configs(preset or "paper", given)
    wanted = wanted_settings(preset, given)
    run, stored = distributed.from_first(
        lambda: open_run(arguments.out, config.data, wanted, arguments.resume, arguments.overwrite, arguments.at_end)
    )
    if as_stored and not stored:
        raise ValueError(f"--resume: there is nothing to resume in {run}; name the --data to start with")
    if stored:
        model_config, config = (
            from_dict(ModelConfig, stored["model_config"]),
            from_dict(TrainConfig, stored["train_config"]),
        )
    distributed.share(config.batch_size)  # refuses at once a batch that cannot be shared
    data = distributed.from_first(lambda: open_data(config.data, run))
    model = restore_model(stored, device) if stored else ALMRR(model_config, seed=config.seed).to(device)
    print(describe_model(model))
    good = load_good_images(data, model_config, config)
    training, failures = good.training, good.unreadable
    distributed.check_equal(zlib.crc32(training.numpy().data), "training images")
    textures = texture_source(
        config.anomaly_source, training, model_config.image_size, mixed=config.anomaly_style == "varied"
    )
    files = training_files(data, textures)
    if stored:
        refuse_other_files(stored["training"].get("files"), files, run)
    samples = TrainingSamples(training, textures, config, good.parts)
    if distributed.rank() == 0:
        save_sample_sheet(samples, run / "synthetic.png")
        if not stored:
            fit_features(model, samples)
            (run / "last.pt").unlink(missing_ok=True)  # only now: whatever was wrong above has cost nothing
            clear_results(run / "evaluation", overwrite=True)
    distributed.copy_from_first(model)
    stopped = fit(model, samples, good.held_out, files, run, stored["training"] if stored else None)
    if distributed.rank():
        return 0  # any other code would make torchrun end rank 0, which is still writing
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
    return run_command(command, build_parser(), argv, several=True)


if __name__ == "__main__":
    distributed.leave(main())
