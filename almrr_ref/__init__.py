"""almrr-ref: defect maps for industrial textures (ALMRR, arXiv 2407.17705) in plain PyTorch.

The scan kernels live in the folder ``kernels/`` beside this package and are imported as ``almrr_ref.kernels``:
setup.cfg maps the folder there on install, and the lines below do the same in a checkout that is not installed.
"""

from pathlib import Path

__all__ = ["ALMRR", "Detector", "ModelConfig", "TrainConfig", "load_checkpoint", "train_detector"]

_checkout = Path(__file__).resolve().parent.parent
if not (Path(__file__).resolve().parent / "kernels").is_dir() and (_checkout / "kernels" / "reference.py").is_file():
    __path__.append(str(_checkout))

from almrr_ref.config import VERSION as __version__  # noqa: E402, F401 (the path above comes first)
from almrr_ref.config import ModelConfig, TrainConfig  # noqa: E402
from almrr_ref.detector import Detector  # noqa: E402
from almrr_ref.fit import train_detector  # noqa: E402
from almrr_ref.model import ALMRR, load_checkpoint  # noqa: E402
