"""The training: one step (Fig. 2, Eqs. (7)-(11)) and the loop around it.

sample -> simulated anomaly -> features(clean), features(augmented) -> MFRM -> FRM -> losses -> step
"""

import math
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from almrr_ref.config import TrainConfig
from almrr_ref.data.samples import TrainingSamples
from almrr_ref.data.split import Files
from almrr_ref.deploy.cuda_graph import Replayed
from almrr_ref.deploy.predictor import to_image_size
from almrr_ref.deploy.spared import SparedMFRM
from almrr_ref.features import FeatureCache, to_device
from almrr_ref.losses import dice_loss, focal_loss, reconstruction_loss, total_loss
from almrr_ref.model import ALMRR
from almrr_ref.optimiser import Adam, learning_rate
from almrr_ref.run import distributed
from almrr_ref.run.checkpoint import save_checkpoint
from almrr_ref.run.log import StopSignal, TrainingLog, loss_values, mean_losses
from almrr_ref.run.text import LOGGER

REPORT_EVERY = 10  # steps between two looks at the loss; each costs a GPU a wait

Progress = Callable[[int, int, dict[str, float]], object]  # step, steps, losses by name


class LossError(ValueError):
    """The loss is no longer a finite number."""


def training_losses(
    model: ALMRR,
    clean: list[Tensor],
    augmented: Tensor,
    mask: Tensor,
    config: TrainConfig,
    part_ids: Tensor | None = None,
    log_distance: Tensor | None = None,
    network: nn.Module | None = None,
    spared: SparedMFRM | None = None,
) -> dict[str, Tensor]:
    """One batch -> the losses by name: L_rec, L_focal, L_dice.

    Args:
        clean: the stages of the clean images, [(b, c_k, h_k, w_k)], on the model's device.
        augmented: (b, 3, h, w) in [0, 1], on the model's device.
        mask: (b, 1, h, w) in {0, 1}, on the model's device.
        part_ids: (b,) the parts that the images show, whose stored patches do not count; without it all do.
        log_distance: of the clean stages to the memory, (b, places), if the model has one.
        network: what is called for the forward pass: the model, or what `distributed.wrap` made of it.
        spared: the reconstruction module where it does not learn; there is no L_rec then.
    """
    losses = {}
    with torch.autocast(augmented.device.type, torch.bfloat16, enabled=config.amp):
        changed = mask.flatten(1).any(dim=1)
        stages_of = stages_of_changed if augmented.device.type == "cpu" else stages_of_all
        stages, log_distance = stages_of(model, clean, augmented, changed, part_ids, log_distance)
        if spared is None:
            result = (network or model)(stages, part_ids, config.detach_reconstruction, log_distance)
            phi, logits = model.extractor.join(clean), result.logits
            losses["rec"] = reconstruction_loss(result.reconstructed, phi, config.rec_loss)
        else:
            assert model.frm is not None
            nearest = [] if model.memory is None else [model.memory(stages, part_ids, log_distance)]
            logits = model.frm(torch.cat([*spared.inputs(stages), *nearest], dim=1))
        if logits is not None:
            logits = to_image_size(logits, (mask.shape[-2], mask.shape[-1]))
            losses["focal"] = focal_loss(logits, mask, config.focal_gamma)
            losses["dice"] = dice_loss(logits.softmax(dim=1)[:, 1:], mask)
    return losses


def stages_of_all(
    model: ALMRR,
    clean: list[Tensor],
    augmented: Tensor,
    changed: Tensor,
    part_ids: Tensor | None,
    log_distance: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """Stages and log distances of the augmented images: those of the clean ones where nothing was `changed`, (b,) bool.

    For a GPU: every step has the same shapes, and an image more costs it less than to wait for how many there are.
    """
    new = model.stages(augmented)
    if log_distance is not None:
        log_distance = memory_distance(model, new, part_ids).where(changed[:, None], log_distance)
    return [other.where(changed[:, None, None, None], stage) for other, stage in zip(new, clean)], log_distance


def stages_of_changed(
    model: ALMRR,
    clean: list[Tensor],
    augmented: Tensor,
    changed: Tensor,
    part_ids: Tensor | None,
    log_distance: Tensor | None,
) -> tuple[list[Tensor], Tensor | None]:
    """The same for a CPU: no pass of the backbone, and no search, for images that were left clean."""
    numbers = changed.nonzero().squeeze(1)
    if not len(numbers):
        return clean, log_distance
    new = model.stages(augmented[numbers])
    stages = [stage.clone() for stage in clean]  # channels-last as they are, which index_copy's result is not
    for stage, other in zip(stages, new):
        stage[numbers] = other
    if log_distance is not None:
        parts = None if part_ids is None else part_ids[numbers]
        log_distance = log_distance.index_copy(0, numbers, memory_distance(model, new, parts))
    return stages, log_distance


def memory_distance(model: ALMRR, stages: list[Tensor], part_ids: Tensor | None) -> Tensor:
    """Log distances of stages [(b, c_k, h_k, w_k)] to the memory without the patches of some parts: (b, places)."""
    assert model.memory is not None
    with torch.autocast(stages[0].device.type, enabled=False):  # differences need all digits
        return model.memory.log_distance(model.memory.points(stages), part_ids)


class CleanImages:
    """What a step needs of its clean images, kept from step to step: image numbers -> stages, and log distances.

    Both stay the same while the network trains. One image at a time, as in `FeatureCache`, so that a resumed run, which
    starts with nothing kept, computes the same.
    """

    def __init__(self, model: ALMRR, samples: TrainingSamples, cache: FeatureCache) -> None:
        self.model, self.part_ids, self.cache = model, samples.part_ids, cache
        self.log_distances: dict[int, Tensor] = {}

    def __call__(self, numbers: list[int]) -> tuple[list[Tensor], Tensor | None]:
        """Stages [(b, c_k, h_k, w_k)]; log distances to the memory (b, places), None without one."""
        stages = self.cache.stages(numbers, self.model.stages)
        if self.model.memory is None:
            return stages, None
        for place, number in enumerate(numbers):
            if number not in self.log_distances:
                one, part = [stage[place : place + 1] for stage in stages], self.part_ids[number : number + 1]
                self.log_distances[number] = memory_distance(self.model, one, to_device(part, self.model.device))
        return stages, torch.cat([self.log_distances[number] for number in numbers])


class Trainer:
    """A training run: network, samples, optimiser, and the step it has reached.

    Args:
        model: on its device; trained in place.
        samples: the row of training samples, with the configuration.
        files: what is trained on, for the checkpoint (data/split.py).
        run: folder for last.pt and log.jsonl; without one nothing is written.
        stored: content of the checkpoint to continue from.
        progress: called with the step, the number of steps and the losses since its last call, now and then.
        cache: of the features of the samples' images, as far as they are known.
    """

    def __init__(
        self,
        model: ALMRR,
        samples: TrainingSamples,
        files: Files,
        run: Path | None = None,
        stored: dict[str, Any] | None = None,
        progress: Progress | None = None,
        cache: FeatureCache | None = None,
    ) -> None:
        self.model, self.samples, self.files, self.run, self.progress = model, samples, files, run, progress
        self.config = samples.config
        epochs = math.ceil(self.config.epochs * len(samples.images) / self.config.batch_size)
        self.steps = epochs if self.config.steps is None else self.config.steps
        self.optimiser = Adam([p for p in model.parameters() if p.requires_grad], lr=self.config.lr, fused=True)
        self.clean = CleanImages(model, samples, cache or FeatureCache(samples.images, model.device))
        self.replayed: Callable[..., dict[str, Tensor]] | None = None  # losses and gradients of a batch, on one GPU
        self.spared: SparedMFRM | None = None  # on a CPU, from one step in which it learns to the next
        self.done = 0
        self.calibration: dict[str, Any] | None = None  # what last.pt says of its threshold
        if stored:
            self.done, self.calibration = stored["training"]["step"], stored.get("calibration")
            self.optimiser.load_state_dict(stored["training"]["optimiser"])
            LOGGER.info("continuing after step %d of %d", self.done, self.steps)

    @property
    def float_features(self) -> FeatureCache | None:
        """The kept features of the clean images; None where they have 16 bits, which is not enough to measure with."""
        return None if self.config.amp else self.clean.cache

    def fit(self) -> signal.Signals | None:
        """Train to the last step, or stop at a signal; last.pt is written now and then, and last.

        Returns:
            The signal that stopped the run, also one that came in the last step; None without one.
        Raises:
            LossError: if the loss is not finite; the last good checkpoint stays.
        """
        log = TrainingLog(self.run and self.run / "log.jsonl", self.done, self.steps, self.config.batch_size)
        saved, pending = time.monotonic(), []  # type: float, list[dict[str, Tensor]]
        self.model.train()
        if self.model.memory is not None:
            self.model.memory.freeze()
        network = distributed.wrap(self.model)
        with StopSignal() as stop:
            for batch in self.samples.batches(self.done, self.steps):
                rate = learning_rate(self.done, self.steps, self.config)
                pending.append(self.step(network, batch, rate))
                self.done += 1
                stopped_by = distributed.largest(stop.requested or 0)  # all ranks at the same step
                last = self.done == self.steps or stopped_by
                if not (len(pending) == REPORT_EVERY or last):
                    continue
                means = mean_losses(self._finite(loss_values(pending)))
                log.report(self.done, means, rate)
                if self.progress is not None:
                    self.progress(self.done, self.steps, means)
                pending = []
                if last or distributed.largest(time.monotonic() - saved > 60 * self.config.save_minutes):
                    distributed.average_running_statistics(self.model.frm)
                    self.save()
                    saved = time.monotonic()
                if stopped_by:
                    break
            stopped_by = distributed.largest(stop.requested or 0)  # also while the last file was being written
        return signal.Signals(stopped_by) if stopped_by else None

    def step(self, network: nn.Module, batch: list[Tensor], rate: float) -> dict[str, Tensor]:
        """Take one optimiser step on a batch (augmented, mask, numbers of clean images) -> losses by name, detached.

        One GPU replays all but the optimiser as one graph: it takes less time than its launches. The reconstruction
        module learns in every `rec_every`-th step; in the others a CPU takes its folded form.
        """
        augmented, mask, numbers = batch
        part_ids, device = self.samples.part_ids[numbers], self.model.device
        augmented, mask, part_ids = (to_device(t, device) for t in (augmented, mask, part_ids))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.config.amp):
            clean, log_distance = self.clean(numbers.tolist())
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        reconstructs = self.model.frm is None or self.done % self.config.rec_every == 0
        if reconstructs:
            self.spared = None
        elif self.spared is None and device.type == "cpu" and distributed.world_size() == 1:
            self.spared = SparedMFRM(self.model, torch.bfloat16 if self.config.amp else None)
        work: Callable[..., dict[str, Tensor]] = partial(self._losses_and_gradients, network)
        if device.type == "cuda" and distributed.world_size() == 1:
            work = self.replayed = self.replayed or Replayed(work, device)
        losses = work(augmented, mask, part_ids, log_distance, *clean)
        resting = [] if reconstructs else [(weight, weight.grad) for weight in self.model.mfrm.parameters()]
        for weight, _ in resting:
            weight.grad = None  # Adam then skips it
        self.optimiser.step()
        for weight, gradient in resting:
            weight.grad = gradient  # where a replay writes
        return {name: loss.clone() for name, loss in losses.items()}

    def _losses_and_gradients(self, network: nn.Module, *tensors: Any) -> dict[str, Tensor]:
        augmented, mask, part_ids, log_distance, *clean = tensors  # one by one, as a graph takes them
        with distributed.exchanging():  # also in the forward pass, in which DDP sorts its buckets
            batch = augmented, mask, self.config, part_ids, log_distance
            losses = training_losses(self.model, clean, *batch, network, self.spared)
            self.optimiser.zero_grad(set_to_none=True)
            total_loss(losses).backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def save(self) -> None:
        """Write last.pt, on rank 0, if there is a folder for it."""
        if self.run and distributed.rank() == 0:
            optimiser = self.optimiser.state_dict()
            training = {"step": self.done, "steps": self.steps, "files": self.files, "optimiser": optimiser}
            configs, weights = (self.model.config, self.config), self.model.state_dict()
            save_checkpoint(self.run / "last.pt", configs, weights, self.model.threshold, training, self.calibration)

    def _finite(self, losses: list[dict[str, float]]) -> list[dict[str, float]]:
        """The losses of the last steps; raise if one of them is not finite, naming step and images."""
        for step, values in enumerate(losses, start=self.done - len(losses)):
            if not all(map(math.isfinite, values.values())):
                b = self.config.batch_size
                images = [self.samples.image_index(step * b + i) for i in range(b)]
                raise LossError(
                    f"the loss is not finite at step {step + 1} ({values}), images number {images}; "
                    f"nothing of it was saved{f' into {self.run}' if self.run else ''}: try a lower --lr, or no --amp"
                )
        return losses
