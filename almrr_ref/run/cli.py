"""What the commands share: one line for a user's mistake, the device, flags made from the configs."""

import argparse
import contextlib
import dataclasses
import io
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from PIL import Image

from almrr_ref.config import PRESETS, SETTINGS, flag_or_name
from almrr_ref.run.distributed import process_group, rank, world_size
from almrr_ref.run.memory import keep_freed_memory
from almrr_ref.run.text import LOGGER, one_line

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # Pillow's own limit: --max-pixels changes it while a command runs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_command(
    command: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    torchrun: bool = False,
) -> int:
    """Parse, run, and return the exit code: 130 for Ctrl-C; 2, after one line, for a user's mistake (ValueError), a
    failing disk, a lack of memory or a lost worker. ``torchrun``: whether the command can be several processes.
    """
    arguments = parser.parse_args(argv)
    keep_freed_memory()
    try:
        if world_size() > 1 and not torchrun:
            if rank():
                return 2
            raise ValueError("this command is one process; start it without torchrun")
        with _on_screen(arguments), process_group():
            code = command(arguments)
        if sys.stdout:
            sys.stdout.flush()  # here, where its failure is one line; at exit it would be a traceback
        _last_line("")
        return code
    except BrokenPipeError:
        message = "nobody reads what is printed any more; what was saved until now is whole"
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except (ValueError, MemoryError) as error:
        message = str(error) or "not enough memory"
    except RuntimeError as error:
        message = _cause_outside(error, parser)
        if not message:
            raise
    except KeyboardInterrupt:
        _last_line(f"{parser.prog}: stopped\n")
        return 130
    _last_line(f"{parser.prog}: error: {one_line(' '.join(message.split()))}\n")
    return 2


@contextlib.contextmanager
def _on_screen(arguments: argparse.Namespace) -> Iterator[None]:
    """For a command: what the library logs and warns of is printed, and --max-pixels is Pillow's limit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name must not end a run because it cannot be shown
    format_before, level_before, pixels_before = warnings.formatwarning, LOGGER.level, Image.MAX_IMAGE_PIXELS
    warnings.formatwarning, screen = _format_warning, _Screen()
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(screen)
    Image.MAX_IMAGE_PIXELS = vars(arguments).get("max_pixels", pixels_before)
    try:
        yield
    finally:
        warnings.formatwarning, Image.MAX_IMAGE_PIXELS = format_before, pixels_before
        LOGGER.removeHandler(screen)
        LOGGER.setLevel(level_before)


def _cause_outside(error: RuntimeError, parser: argparse.ArgumentParser) -> str:
    """The message for an error of PyTorch's whose cause is outside the program; "" for all others."""
    cause = str(error).partition("\n")[0][:150]
    too_large = cause.startswith(("could not create a primitive", "Storage size calculation overflowed"))
    if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error) or too_large:
        flags = [flag for flag in ("--batch-size", "--image-size") if flag in parser._option_string_actions]
        return f"not enough memory ({cause})" + "; try a smaller " * bool(flags) + " or ".join(flags)
    if cause.startswith("DataLoader worker"):
        return f"a process that prepares samples is gone ({cause}); try fewer --workers"
    return ""


class _Screen(logging.Handler):
    """Prints what the library logs: warnings to stderr, all else to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # its reader is gone or its disk full: no reason to end the work
            print(record.getMessage(), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


def _format_warning(message: Warning | str, category: Any, filename: str, lineno: int, line: Any = None) -> str:
    """A warning as a user needs it: one line, without the place in the program."""
    return f"warning: {one_line(message)}\n"


def _last_line(text: str) -> None:
    """Print a last text to stderr. A stream whose reader is gone or whose disk is full is redirected to nowhere:
    flushing it at exit would change the exit code."""
    for stream, line in ((sys.stdout, ""), (sys.stderr, text)):
        try:
            if stream:  # None: closed by the caller, as by >&-
                print(line, end="", file=stream, flush=True)
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _OneLineParser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, as the commands do."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: --([a-z-]+)", message)
        if unknown and (name := unknown[1].replace("-", "_")) in SETTINGS and "--set" in self._option_string_actions:
            message += f"; perhaps --set {name}=VALUE"
        self.exit(2, "" if rank() else f"{self.prog}: error: {message}; see --help\n")


def make_parser(name: str, description: str, start: str = "python -m almrr_ref.") -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return _OneLineParser(start + name, description=description, formatter_class=formatter)


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    help = "where to compute: auto (CUDA if there is one), cpu, cuda, cuda:N (default: auto)"
    parser.add_argument("--device", default="auto", help=help)


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """For the commands that judge pictures: --checkpoint, --tile, --batch-size, --dtype, --max-pixels, --device."""
    add = parser.add_argument
    add("--checkpoint", type=path_argument, required=True, metavar="FILE",
        help="last.pt of a training run, or a model.onnx that export wrote")  # fmt: skip
    add("--tile", type=positive, metavar="N",
        help="for a network that was trained with --tile, and images at another resolution than in training: side in "
        "pixels of the overlapping tiles (default: that of the training)")  # fmt: skip
    add("--batch-size", type=positive, default=8, metavar="N", help="images the network sees at a time (default: 8)")
    add("--dtype", choices=tuple(DTYPES), default="float32",
        help="precision of the folded network's products; 16 bits pay on GPUs, and bfloat16 on CPUs with AMX or "
        "AVX512-BF16, elsewhere they are slower (default: float32)")  # fmt: skip
    add_max_pixels_flag(parser)
    add_device_flag(parser)


def add_max_pixels_flag(parser: argparse.ArgumentParser) -> None:
    """``--max-pixels``, which `run_command` makes Pillow's limit."""
    help = f"pixels of the largest image that is read, for line scans (default: {MAX_PIXELS})"
    parser.add_argument("--max-pixels", type=positive, default=MAX_PIXELS, metavar="N", help=help)


def words_of(arguments: argparse.Namespace, parser: argparse.ArgumentParser, *names: str) -> list[str]:
    """The flags of these names, as they are to be given again; those that have their default are left out."""
    words = []
    for name in names:
        value, flag = getattr(arguments, name), name.replace("_", "-")
        if value != parser.get_default(name):
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def pick_device(name: str | torch.device) -> torch.device:
    """Turn a --device value into a device; under torchrun every process gets a different GPU.

    Raises:
        ValueError: for another value, a device that this machine lacks, or fewer GPUs than processes.
    """
    kind, _, index = str(name).partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"--device is one of auto, cpu, cuda, cuda:N; got {name!r}")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name}: PyTorch sees no CUDA GPU; use --device cpu, or install torch with CUDA")
    count = torch.cuda.device_count()
    if world_size() == 1:
        if index and int(index) >= count:
            raise ValueError(f"--device {name}: the last of the {count} GPUs here is cuda:{count - 1}")
        return torch.device("cuda", int(index)) if index else torch.device("cuda")
    if index:
        raise ValueError(f"--device {name}: torchrun gives every process a GPU of its own; use --device cuda")
    number = int(os.environ["LOCAL_RANK"])
    if number >= count:
        raise ValueError(f"torchrun started more processes than GPUs; use --nproc_per_node={count}, or --device cpu")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    """An argument that must be a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return number


def path_argument(text: str) -> Path:
    """An argument that is a path; "", as from a variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return Path(text)


def add_flags(parser: argparse.ArgumentParser, config_class: type[Any], defaults: dict[str, str] | None = None) -> None:
    """Add a flag for every field that has a help text; a flag that is not given stays out of the result.

    Args:
        defaults: texts for the help of fields whose default the command replaces.
    """
    for entry in dataclasses.fields(config_class):
        if not entry.metadata.get("help"):
            continue
        kind, default = _kind(entry), (defaults or {}).get(entry.name, entry.default)
        options: dict[str, Any] = {"help": entry.metadata["help"], "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif entry.metadata["choices"]:
            options["choices"] = entry.metadata["choices"]
        else:
            options |= {"type": kind, "metavar": "INT" if kind is whole_or_auto else kind.__name__.upper()}
        if isinstance(default, tuple):
            options["nargs"] = "+"
        if default is not None and kind is not bool:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            by_preset = any(entry.name in values for values in PRESETS.values())
            options["help"] += f" (default: {shown}{', unless the preset says otherwise' if by_preset else ''})"
        parser.add_argument(flag_or_name(entry), **options)


def add_settings_flag(parser: argparse.ArgumentParser, *config_classes: type[Any]) -> None:
    """Add ``--set NAME=VALUE`` for every field of the configs, also those that have no flag of their own."""
    fields = {entry.name: entry for config_class in config_classes for entry in dataclasses.fields(config_class)}
    names = ", ".join(name for name, entry in fields.items() if not entry.metadata.get("help"))

    def setting(text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        entry = fields.get(name.replace("-", "_"))
        if not equals or not entry:
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE, NAME out of {names}; got {text!r}")
        kind = _kind(entry)
        try:
            if kind is bool:
                return entry.name, {"true": True, "false": False}[value.lower()]
            if isinstance(entry.default, tuple):
                return entry.name, tuple(map(kind, value.strip("(,)").split(",")))
            return entry.name, kind(value)
        except (ValueError, KeyError) as error:
            form = f"{type(entry.default).__name__}, such as {entry.default}"
            form = kind.__name__ if entry.default is None else form
            raise argparse.ArgumentTypeError(f"{name} takes one {form}; got {value!r}") from error

    help = f"any other setting, may be given again: {names} (config.py says what each is)"
    parser.add_argument(
        "--set", dest="settings", type=setting, action="append", default=[], metavar="NAME=VALUE", help=help
    )


def _kind(entry: dataclasses.Field[Any]) -> Any:
    """The type of a field, or of what it holds: int for int, int | None and tuple[int, ...]."""
    if entry.name == "image_size":
        return whole_or_auto
    return (get_args(entry.type) or (entry.type,))[0]


def whole_or_auto(text: str) -> int | str:
    """One of the numbers of --image-size, or auto."""
    return text if text == "auto" else int(text)
