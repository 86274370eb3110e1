"""Where the time of `plus` goes, beside the peers: ``python bench/speed.py --data images/``. A few minutes.

1. *Judging*, milliseconds an image: the frozen backbone alone as PyTorch computes it, PaDiM on it, PatchCore on it with
   1% and 10% of the patches of so many images, `plus` in its deployed form (its backbone is folded) with the share of
   each of its modules, and by its memory alone (``--steps 0``). Where the CPU has units for bfloat16, `plus` in it, and
   PaDiM on that folded backbone in it. All take turns; the ratio is to the backbone.
2. *Training*: one step by its parts, and what comes before the first step.
3. ``--against REV``: whole trainings of another commit and of this one, in turn, as commands. CPU time of a run of a
   pass and a few steps, extrapolated by the time of the last ones that its log tells, which needs a quiet core.

Memories and banks hold random patches: their size alone decides on the time. One thread unless OMP_NUM_THREADS says
otherwise.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, as_line, environment, make_parser, markdown_table, number, quantiles, rounds, write_json
from forms import random_network
from peer_methods import fit_padim, patchcore
from torch import Tensor

from almrr_ref.config import TrainConfig, make_configs
from almrr_ref.data.layouts import find_dataset
from almrr_ref.data.loading import load_images
from almrr_ref.deploy.spared import SparedMFRM
from almrr_ref.doctor import BFLOAT16_UNITS, cpu_flags
from almrr_ref.fit import fold_for_training
from almrr_ref.losses import total_loss
from almrr_ref.model import ALMRR
from almrr_ref.optimiser import Adam
from almrr_ref.run.cli import path_argument, positive, run_command
from almrr_ref.timing import seconds, seconds_of_choice
from almrr_ref.training import REPORT_EVERY, memory_distance, training_losses

CPU = torch.device("cpu")
LEAST_ROUNDS = 3
LATER = 40  # steps of a short training that tell how long all take: the first pass over the images also fills caches


def take_turns(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Seconds of each call, round by round, until the budget is used up; each runs twice, and the second counts."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in rounds(budget, LEAST_ROUNDS):
        for name, call in calls.items():
            times[name].append(seconds(call, CPU))
    return times


def fill(model: ALMRR) -> None:
    """Put random patches into the memory, and let the network judge."""
    assert model.memory is not None
    generator = torch.Generator().manual_seed(0)
    model.memory.patches.copy_(torch.randn(model.memory.patches.shape, generator=generator))
    model.memory.axes.copy_(torch.linalg.qr(torch.randn(model.memory.axes.shape, generator=generator))[0])
    model.eval()


def by_module(network: Any, images: Tensor) -> dict[str, float]:
    """Share of each module in one deployed pass."""
    starts: dict[str, float] = {}
    spent: dict[str, float] = {}

    def begin(name: str, *_: Any) -> None:
        starts[name] = time.monotonic()

    def end(name: str, *_: Any) -> None:
        spent[name] = time.monotonic() - starts[name]

    hooks = []
    for name in ("extractor.backbone", "mfrm", "memory", "frm"):
        module = network.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(partial(begin, name)))
        hooks.append(module.register_forward_hook(partial(end, name)))
    whole = seconds(partial(network.predict, images), CPU)
    for hook in hooks:
        hook.remove()
    return {name: value / whole for name, value in spent.items()} | {"rest": 1 - sum(spent.values()) / whole}


@torch.inference_mode()
def judging(model: ALMRR, images: Tensor, count: int, budget: float) -> list[dict[str, Any]]:
    """Rows of the first table, for one batch (b, 3, h, w) in [0, 1]; ``count`` good images give the banks' sizes."""
    assert model.evidence is not None
    fused = model.fuse()
    model.evidence.weigh(memory_alone=True)
    alone = model.fuse()
    model.evidence.weigh(memory_alone=False)
    extractor = model.extractor
    cells = images.shape[2] * images.shape[3] // 64
    calls: dict[str, Callable[[], object]] = {"backbone alone": partial(extractor.stages, images)}
    calls["PaDiM"] = partial(fit_padim(extractor, [images.repeat(2, 1, 1, 1)], 0), images)
    for share in (0.01, 0.1):
        bank = torch.randn(max(1, round(share * count * cells)), sum(extractor.channels[1:]))
        calls[f"PatchCore {100 * share:g}%"] = partial(patchcore(extractor, bank), images)
    calls["plus"], calls["plus, memory alone"] = partial(fused.predict, images), partial(alone.predict, images)
    if BFLOAT16_UNITS & cpu_flags():
        half = model.fuse(torch.bfloat16)
        calls["plus, bfloat16"] = partial(half.predict, images)
        calls["PaDiM, bfloat16 backbone"] = partial(fit_padim(half.extractor, [images.repeat(2, 1, 1, 1)], 0), images)
    times = take_turns(calls, budget)
    rows = []
    for name, values in times.items():
        median, low, high = (1e3 * value / len(images) for value in quantiles(values))
        ratio = quantiles([value / floor for value, floor in zip(values, times["backbone alone"])])[0]
        rows.append({"method": name, "ratio": ratio, "ms": median, "p20": low, "p80": high})
        if name == "plus":
            rows[-1]["shares"] = by_module(fused, images)
    return rows


def training(model: ALMRR, config: TrainConfig, images: Tensor, budget: float) -> dict[str, float]:
    """Seconds of a step's parts, half of whose images have an anomaly; `images` (b, 3, h, w) in [0, 1].

    In the mean of steps: the reconstruction learns in every `rec_every`-th alone, and is spared in the others.
    """
    changed = len(images) // 2 or 1
    mask = torch.zeros(len(images), 1, *images.shape[2:])
    mask[:changed, :, 8:24, 8:24] = 1
    with torch.no_grad():
        clean, stages = model.stages(images), model.stages(images[:changed])
        distance = memory_distance(model, clean, None)
        features, search = partial(model.stages, images[:changed]), partial(memory_distance, model, stages, None)
        spent = take_turns({"features": features, "search": search}, budget / 3)
    model.train()
    optimiser = Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    spared = SparedMFRM(model)

    def forward(spared: SparedMFRM | None) -> Tensor:
        return total_loss(training_losses(model, clean, images, mask, config, None, distance, spared=spared))

    def both(spared: SparedMFRM | None) -> None:
        forward(spared).backward()

    forwards = {"forward": partial(forward, None), "forward, spared": partial(forward, spared)}
    spent |= take_turns({**forwards, "both": partial(both, None), "both, spared": partial(both, spared)}, budget)
    spent |= take_turns({"Adam": optimiser.step, "folding": partial(SparedMFRM, model)}, budget / 3)
    median = {name: quantiles(values)[0] for name, values in spent.items()}
    learns = 1 / config.rec_every
    mean = {name: learns * median[name] + (1 - learns) * median[f"{name}, spared"] for name in ("forward", "both")}
    parts = {name: median[name] for name in ("features", "search")}
    parts["forward, the rest"] = mean["forward"] + learns * median["folding"] - sum(parts.values())
    parts |= {"backward": mean["both"] - mean["forward"], "Adam": median["Adam"]}
    learning = {"a step with the reconstruction": median["both"] + median["Adam"]}
    return {"a step": sum(parts.values()), **parts, **learning}


def short_training(root: Path, flags: list[str], steps: int) -> tuple[float, float]:
    """A training by the command of a checkout -> its CPU time, and the time of a step by its log, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "almrr_ref.train", *flags, "--steps", str(steps)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words, variables = [*command, "--out", f"{folder}/run"], {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(words, cwd=root, env=os.environ | variables, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise ValueError(f"{root}: training ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        log = [json.loads(line) for line in Path(folder, "run/log.jsonl").read_text().splitlines()]
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rate = statistics.median(line["images_per_second"] for line in log[-LATER // REPORT_EVERY :])
    return spent, TrainConfig().batch_size / rate


def check_revision(revision: str) -> None:
    """Raise a ValueError if the checkout has no such commit: before minutes of measuring."""
    found = subprocess.run(
        ["git", "rev-parse", "-q", "--verify", f"{revision}^{{commit}}"], cwd=ROOT, capture_output=True
    )
    if found.returncode:
        raise ValueError(f"--against {revision}: git knows no such commit in {ROOT}")


def against(revision: str, flags: list[str], steps: int, full: dict[str, int]) -> list[dict[str, Any]]:
    """Trainings of two commits in turn, extrapolated to the steps of each (`full`, by name)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(other), revision], cwd=ROOT, check=True)
        try:
            for name, root in ((revision, other), ("this", ROOT)):
                spent, step = short_training(root, flags, steps)
                row = {"commit": name, "without steps": spent - steps * step, "step": step, "steps": full[name]}
                rows.append(row | {"whole": spent + (full[name] - steps) * step})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)
    return rows


def command(arguments: argparse.Namespace) -> int:
    if arguments.against:
        check_revision(arguments.against)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    data = find_dataset(arguments.data)
    given = {"backbone": arguments.backbone, "weights": arguments.weights, "image_size": arguments.image_size}
    model_config, config = make_configs("plus", {**given, "standardise": "position"})
    model = random_network(model_config)
    fill(model)
    where = environment(CPU)
    result: dict[str, Any] = {}

    def save() -> None:
        if arguments.json:
            write_json(arguments.json, {**where, **result})

    print(as_line(where), flush=True)
    pictures = load_images(data.train[: max(*arguments.batch, config.batch_size)], model_config.size)[0].float() / 255
    for batch in arguments.batch:
        rows = judging(model, pictures[:batch], len(data.train), arguments.seconds)
        print(f"\nJudging, batch {batch}\n")
        cells = [[r["method"], number(r["ratio"], 2), *(number(r[n], 1) for n in ("ms", "p20", "p80"))] for r in rows]
        print(markdown_table(["method", "of the backbone", "ms an image", "p20", "p80"], cells), flush=True)
        shares = next(row["shares"] for row in rows if "shares" in row)
        print("plus: " + as_line({name: f"{100 * share:.0f}%" for name, share in shares.items()}))
        result[f"judging, batch {batch}"] = rows
        save()
    fold_for_training(model.extractor, CPU)
    parts = training(model, config, pictures[: config.batch_size], arguments.seconds)
    print("\nTraining, batch 4: " + as_line({name: f"{1e3 * value:.0f} ms" for name, value in parts.items()}))
    choice = seconds_of_choice(model, len(data.train))
    print(f"choosing {model_config.memory} patches of {len(data.train)} images: about {choice:.0f} s")
    result |= {"training": parts, "choice_s": choice}
    save()
    if arguments.against:
        weights = arguments.weights if arguments.weights == "random" else Path(arguments.weights).resolve()
        flags = ["--data", str(arguments.data.resolve()), "--weights", str(weights), "--backbone", arguments.backbone]
        flags += ["--preset", "plus", "--image-size", str(arguments.image_size)]
        full = {arguments.against: arguments.against_steps, "this": config.steps or 0}
        steps = arguments.steps or math.ceil(len(data.train) / config.batch_size) + LATER
        rows = against(arguments.against, flags, steps, full)
        names = ["without steps", "step", "steps", "whole"]
        print("\nWhole trainings, seconds of CPU time\n")
        cells = [[row["commit"], *(number(row[name], 0 if name != "step" else 3) for name in names)] for row in rows]
        print(markdown_table(["commit", *names], cells))
        print(f"{rows[0]['whole'] / rows[1]['whole']:.2f} times as fast")
        result["against"] = rows
        save()
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__file__, __doc__)
    add = parser.add_argument
    add("--data", type=path_argument, required=True, metavar="PATH", help="good images, in any layout")
    add("--backbone", default="resnet18", help="default: resnet18")
    add("--weights", default="random", metavar="FILE", help="its weights; for times random ones will do (default)")
    add("--image-size", type=positive, default=256, help="side in pixels (default: 256)")
    add("--batch", type=positive, nargs="+", default=[1, 8], help="images judged at a time (default: 1 8)")
    add("--seconds", type=float, default=20, help="for each table, but 3 rounds at least (default: 20)")
    add("--against", metavar="REV", help="another commit, to be trained in turn with this checkout")
    add("--against-steps", type=positive, default=2000, help="steps of its preset (default: 2000)")
    add("--steps", type=positive, help=f"of the short trainings (default: a pass over the images and {LATER} more)")
    add("--json", type=path_argument, metavar="FILE", help="also write everything measured")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
