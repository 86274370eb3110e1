"""How long things will take on this machine, from samples that are timed."""

import copy
import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import default_collate

from almrr_ref.calibration.good_features import looked_at
from almrr_ref.calibration.good_scores import MOST
from almrr_ref.calibration.of_training import FIRST
from almrr_ref.calibration.simulated import DRAWS, STRENGTHS
from almrr_ref.demo.defects import DEFECTS, FAINT_DEFECTS
from almrr_ref.deploy.cuda_graph import WARM_UP
from almrr_ref.model import ALMRR
from almrr_ref.plus.k_center import k_center
from almrr_ref.plus.memory import POOL
from almrr_ref.run.distributed import rank_batch_size
from almrr_ref.run.text import counted, duration
from almrr_ref.training import Trainer

SIMULATED = (len(DEFECTS) + len(FAINT_DEFECTS)) * DRAWS * len(STRENGTHS)  # defects that calibration draws and judges
CHOSEN, FEW, MANY = 512, 8192, 32768  # patches to choose, out of few and of many, to tell how long all take


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of a second call; the first warms up."""
    start = 0.0
    for _ in range(2):
        start = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.monotonic() - start


def time_step(trainer: Trainer) -> float:
    """Mean seconds of a step, drawing its samples included; a copy of the network takes the steps and is dropped."""
    trial, samples = Trainer(copy.deepcopy(trainer.model), trainer.samples, trainer.files), trainer.samples
    trial.model.train()
    count, device = rank_batch_size(trainer.config.batch_size), trainer.model.device

    def step() -> None:
        trial.step(trial.model, default_collate([samples[i] for i in range(count)]), trainer.config.lr)

    for _ in range(WARM_UP * (device.type == "cuda")):  # then a step is a replay
        step()
    times = []
    for trial.done in range(min(2, trainer.config.rec_every)):  # the reconstruction learns in the first alone
        times.append(seconds(step, device))
    return times[-1] + (times[0] - times[-1]) / trainer.config.rec_every


def how_long(trainer: Trainer, held_out: int, fresh: bool) -> str:
    """One line: how long the rest of a run will take, by its parts.

    Args:
        held_out: good images that are not trained on.
        fresh: whether features are still to be measured.
    """
    model, images, b = trainer.model, trainer.samples.images, trainer.config.batch_size
    step = time_step(trainer)
    training = step * (trainer.steps - trainer.done)
    batch = images[:b].float().to(model.device) / 255
    with torch.no_grad():
        look = seconds(lambda: model.stages(batch), model.device) / len(batch)
        judge = seconds(partial(model.fuse().maps, batch), model.device) / len(batch)
    measured, all_good = len(looked_at(len(images))), len(images) + held_out
    cached = trainer.float_features is not None and trainer.clean.cache.holds_all(model.stages(batch[:1]))
    choice, completed, passes = 0.0, 0, int(model.standardise is not None)  # passes: of the backbone over all images
    if model.memory is not None:
        choice, passes = seconds_of_choice(model, measured), passes + 2
        completed = len(looked_at(held_out)) + (0 if cached else measured)
    measuring = 0.0
    if fresh:
        measuring = (min(passes, 1) if cached else passes) * look * measured + choice
        if model.memory is not None:  # the verdict of the memory alone
            measuring += judge * (min(held_out or all_good, FIRST) + SIMULATED)
    judged = min(all_good, MOST)
    known = judged * len(images) / all_good if cached and not model.config.tile else 0.0  # of the judged: their stages
    calibration = judge * (judged + SIMULATED) + look * (completed - known) + choice
    return (
        f"this will take about {duration(measuring + training + calibration)}: {duration(measuring)} to measure the "
        f"good images, {duration(training)} for {counted(trainer.steps - trainer.done, 'step')} of {step:.2g} s, "
        f"{duration(calibration)} for the threshold"
    )


def seconds_of_choice(model: ALMRR, images: int) -> float:
    """Seconds that the choice of the stored patches takes: it grows with their number, and with that of all patches."""
    assert model.memory is not None
    stored, width = model.memory.patches.shape
    pool = images * min(math.ceil(POOL / images), math.prod(model.memory.grid))
    chosen = min(stored, pool)
    if chosen * pool < CHOSEN * MANY:
        return 0.0  # less than a second: not worth timing
    points = torch.rand(MANY, width, generator=torch.Generator().manual_seed(0)).to(model.device)
    few = seconds(lambda: k_center(points[:FEW], CHOSEN, 0), model.device)
    many = seconds(lambda: k_center(points, CHOSEN, 0), model.device)
    return chosen / CHOSEN * (few + max(0.0, many - few) * max(0, pool - FEW) / (MANY - FEW))
