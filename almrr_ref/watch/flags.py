"""The flags of a watched folder, for every command that has it."""

import argparse
from collections.abc import Callable
from pathlib import Path

from almrr_ref.calibration.drift import Drift
from almrr_ref.detector import Detector
from almrr_ref.report.result import Result
from almrr_ref.run.cli import path_argument
from almrr_ref.run.distributed import world_size
from almrr_ref.run.text import one_line
from almrr_ref.watch.journal import Row
from almrr_ref.watch.station import Judged, Station
from almrr_ref.watch.webhook import check_url


def add_station_flags(parser: argparse.ArgumentParser) -> None:
    """--move-to, --webhook, --webhook-secret-file; --watch and --out are the command's."""
    add = parser.add_argument
    add("--move-to", type=path_argument, metavar="DIR",
        help="with --watch: move what is judged into good/, defective/ and unreadable/ of this folder")  # fmt: skip
    add("--webhook", metavar="URL",
        help="with --watch: POST every verdict there as JSON, again until it is taken")  # fmt: skip
    add("--webhook-secret-file", type=path_argument, metavar="FILE",
        help="its content signs what is posted: X-Almrr-Signature, HMAC-SHA256")  # fmt: skip


def station_of(
    arguments: argparse.Namespace,
    detector: Callable[[], Detector],
    save: Callable[[Result, Path], None],
    drift: Drift,
    on_row: Callable[[Row, Judged], None] = lambda row, result: None,
) -> Station:
    """Build the station that the flags describe; the other arguments are `Station`'s. ValueError for a bad flag."""
    if world_size() > 1:
        raise ValueError("--watch is one process; start it without torchrun")
    webhook = (check_url(arguments.webhook), _secret(arguments.webhook_secret_file)) if arguments.webhook else None
    return Station(detector, arguments.watch, arguments.out, save, arguments.move_to, webhook, drift, on_row)


def refuse_station_flags(arguments: argparse.Namespace) -> None:
    """Raise a ValueError if one of the flags is given; call it where --watch is not."""
    if arguments.move_to or arguments.webhook or arguments.webhook_secret_file:
        raise ValueError("--move-to, --webhook and --webhook-secret-file go with --watch DIR")


def _secret(path: Path | None) -> bytes:
    """The key in a file, without white space around it; empty without a file."""
    if path is None:
        return b""
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"--webhook-secret-file {one_line(path)}: {error.strerror}") from error
    if not secret:
        raise ValueError(f"--webhook-secret-file {one_line(path)} is empty; write a random text into it")
    return secret
