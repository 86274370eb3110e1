"""almrr-ref: defect maps for industrial textures (ALMRR, arXiv 2407.17705) in plain PyTorch.

The scan kernels live in the folder ``kernels/`` beside this package and are imported as ``almrr_ref.kernels``:
setup.cfg maps the folder there on install, and the lines below do the same in a checkout that is not installed.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__all__ = ["ALMRR", "Detector", "ModelConfig", "TrainConfig", "__version__", "load_checkpoint", "train_detector"]

_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).resolve().parent / "kernels").is_dir() and (_checkout / "kernels" / "reference.py").is_file():
    __path__.append(str(_checkout))

from almrr_ref.config import VERSION as __version__  # noqa: E402 (the path above comes first)

if TYPE_CHECKING:
    from almrr_ref.config import ModelConfig, TrainConfig
    from almrr_ref.detector import Detector
    from almrr_ref.fit import train_detector
    from almrr_ref.model import ALMRR, load_checkpoint

_WHERE = {"ALMRR": "model", "Detector": "detector", "ModelConfig": "config", "TrainConfig": "config"}
_WHERE |= {"load_checkpoint": "model", "train_detector": "fit"}


def __getattr__(name: str) -> Any:
    """What the package exports, once it is asked for: a process that only decodes pictures needs no PyTorch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"almrr_ref.{_WHERE[name]}"), name)
