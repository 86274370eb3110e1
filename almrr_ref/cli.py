"""What the commands share: one clear line for a user's mistake, the device, the clock."""

import argparse
import sys
from collections.abc import Callable

import torch

DEVICES = ("auto", "cpu", "cuda")


def run_command(
    command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser, argv: list[str] | None
) -> int:
    """Parse, run, and turn a user's mistake (ValueError) or a failing disk (OSError) into one line and exit code 2."""
    arguments = parser.parse_args(argv)
    try:
        return command(arguments)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"python -m almrr_ref.{module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: auto, CUDA if there is one)"
    )


def pick_device(name: str) -> torch.device:
    """Turn a --device value into a device.

    Raises:
        ValueError: if CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: this PyTorch sees no CUDA GPU; use --device cpu, or install a CUDA build of torch"
        )
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
