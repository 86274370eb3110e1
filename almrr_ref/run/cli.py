"""What the commands share: one clear line for a user's mistake, the device, the clock, flags made from the configs."""

import argparse
import ast
import contextlib
import dataclasses
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from almrr_ref.config import PRESETS, flag_or_name
from almrr_ref.run.distributed import local_device, process_group, rank, world_size
from almrr_ref.run.text import one_line

DEVICES = ("auto", "cpu", "cuda")


def run_command(
    command: Callable[[argparse.Namespace], int],
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    torchrun: bool = False,
) -> int:
    """Parse, run, and turn a user's mistake (ValueError), a failing disk (OSError), a lack of memory or a lost worker
    into one line and exit code 2, and Ctrl-C into one line and exit code 130.

    Args:
        torchrun: whether the command can be several processes under torchrun (distributed.py).
    """
    arguments = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name must not end a run because it cannot be shown
    format_before, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        if world_size() > 1 and not torchrun:
            if rank():
                return 2
            raise ValueError("this command is one process; start it without torchrun")
        with process_group():
            code = command(arguments)
        if sys.stdout:
            sys.stdout.flush()  # here, where its failure is one line; at exit it would be a traceback
        _drop_broken_streams()
        return code
    except BrokenPipeError:
        message = "nobody reads what is printed any more; what was saved until now is whole"
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        message = f"{error.filename}: {error.strerror}" if named else str(error)
    except (ValueError, MemoryError) as error:
        message = str(error) or "not enough memory"
    except RuntimeError as error:
        message = _cause_outside(error)
        if not message:
            raise
    except KeyboardInterrupt:
        _complain(f"{parser.prog}: stopped")
        return 130
    finally:
        warnings.formatwarning = format_before
    _complain(f"{parser.prog}: error: {one_line(' '.join(message.split()))}")
    return 2


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as a user needs it: one line, without the place in the program."""
    return f"warning: {one_line(message)}\n"


def _cause_outside(error: RuntimeError) -> str:
    """What PyTorch reports as RuntimeError though the cause lies outside the program; "" for everything else."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in text:
        return f"not enough memory ({text.splitlines()[0][:150]}); try a smaller --batch-size or --image-size"
    if text.startswith("DataLoader worker"):
        return f"a process that prepares samples is gone ({text.splitlines()[0][:150]}); try fewer --workers"
    return ""


def _complain(line: str) -> None:
    """Print a last line to stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
    _drop_broken_streams()


def _drop_broken_streams() -> None:
    """Give up a stream whose reader is gone or whose disk is full: flushing it at exit would change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller, as by >&-
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line, as every other error of the commands; --help shows the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, "" if rank() else f"{self.prog}: error: {message}; see --help\n")


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    return _OneLineParser(
        f"python -m almrr_ref.{module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to compute (default: auto, CUDA if there is one)"
    )


def pick_device(name: str) -> torch.device:
    """Turn a --device value into a device; under torchrun every process gets its own GPU.

    Raises:
        ValueError: if CUDA is asked for and there is none, or there are fewer GPUs than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: this PyTorch sees no CUDA GPU; use --device cpu, or install a CUDA build of torch"
        )
    return local_device(
        torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)
    )


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def path_argument(text: str) -> Path:
    """An argument that is a path; "", as from a variable that is not set, would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got nothing")
    return Path(text)


def add_flags(parser: argparse.ArgumentParser, config_class: type[Any]) -> None:
    """Add a flag for every field that has a help text; a flag that is not given stays out of the result."""
    for entry in dataclasses.fields(config_class):
        if not entry.metadata.get("help"):
            continue
        options: dict[str, Any] = {"help": entry.metadata["help"], "default": argparse.SUPPRESS}
        if isinstance(entry.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(entry.default, tuple):
            options.update(type=int, nargs="+", metavar="N")
        else:
            kinds = {"steps": int, "tile": int}
            options["type"] = kinds.get(entry.name, str if entry.default is None else type(entry.default))
            if entry.metadata["choices"]:
                options["choices"] = entry.metadata["choices"]
            else:
                options["metavar"] = options["type"].__name__.upper()
        if entry.default is not None and not isinstance(entry.default, bool):
            shown = " ".join(map(str, entry.default)) if isinstance(entry.default, tuple) else entry.default
            by_preset = any(entry.name in values for values in PRESETS.values())
            options["help"] += f" (default: {shown}{', unless the preset says otherwise' if by_preset else ''})"
        parser.add_argument(flag_or_name(entry), **options)


def add_settings_flag(parser: argparse.ArgumentParser, *config_classes: type[Any]) -> None:
    """Add ``--set NAME=VALUE`` for every field of the configs, also those that have no flag of their own."""
    fields = [entry for config_class in config_classes for entry in dataclasses.fields(config_class)]
    names = [entry.name for entry in fields if not entry.metadata.get("help")]

    def setting(text: str) -> tuple[str, Any]:
        name, equals, value = text.partition("=")
        entry = next((entry for entry in fields if entry.name == name.replace("-", "_")), None)
        if not equals or entry is None:
            raise argparse.ArgumentTypeError(f"expected NAME=VALUE, NAME out of {', '.join(names)}; got {text!r}")
        try:
            return entry.name, _parsed(value, entry.default)
        except (ValueError, SyntaxError) as error:
            kind = type(entry.default).__name__
            raise argparse.ArgumentTypeError(f"{name} is a {kind}, such as {entry.default}; got {value!r}") from error

    parser.add_argument(
        "--set",
        dest="settings",
        type=setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"any other setting, may be given again: {', '.join(names)} (config.py says what each is)",
    )


def _parsed(text: str, default: Any) -> Any:
    """Text -> a value of the default's type; ValueError or SyntaxError if it is none."""
    if isinstance(default, str | None):
        return text
    value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise ValueError(text)
    return value
