"""The station under load and kills: ``python bench/station.py load|kills --checkpoint RUN/last.pt --pictures DIR``.

load: clients post the pictures again and again, ten minutes long unless --seconds says otherwise; answers, errors,
pictures a second beside predict's on the same pictures before and after, and resident memory at the start, every minute
and at the end: of the server alone, and of it and its decoders together (what they share counts for each).
kills: the pictures arrive in a watched folder while the watching process is killed again and again; every one must have
one row, and the receiver, which fails now and then, must have been told of every one.
The exit code is 1 where an answer is an error, or a picture was lost or doubled.
"""

import argparse
import csv
import http.client
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from common import ROOT, as_line, make_parser

from almrr_ref.data.images import is_image_file
from almrr_ref.predict import main as predict
from almrr_ref.run.cli import path_argument, positive, run_command
from almrr_ref.run.files import SCORES


def memory(pid: int) -> list[float]:
    """Resident memory of a process and of each below it, in MiB."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    below = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [resident, *(mib for child in map(int, below.split()) for mib in memory(child))]


def size(path: Path) -> int:
    """Of a file that may be absent, in bytes."""
    return path.stat().st_size if path.exists() else 0


def predicted(checkpoint: Path, pictures: Path) -> float:
    """Pictures a second of the command predict."""
    with tempfile.TemporaryDirectory() as out:
        flags = ["--checkpoint", checkpoint, "--input", pictures, "--out", out, "--no-maps", "--no-overlays"]
        command = [sys.executable, "-W", "ignore", "-m", "almrr_ref.predict", *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    match = re.search(r"([\d.]+) a second: ", done.stdout)
    if done.returncode or not match:
        raise ValueError(f"predict ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return float(match.group(1))


def load(checkpoint: Path, pictures: Path, clients: int, seconds: float) -> bool:
    """Print answers, errors, speed and memory of a server that many clients ask -> whether none was an error."""
    command = [sys.executable, "-W", "ignore", "-m", "almrr_ref.serve", "--checkpoint", str(checkpoint), "--port", "0"]
    before = predicted(checkpoint, pictures)
    server = subprocess.Popen([*command, "--no-browser"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    try:
        address = re.search(r"http://[^:]+:(\d+)", server.stdout.readline())
        if not address:
            raise ValueError(f"serve did not start; it ended with {server.wait(20)}")
        answers, speed = asked(server, int(address[1]), sorted(pictures.iterdir()), clients, seconds)
        server.send_signal(signal.SIGINT)
        server.wait(20)
    finally:
        server.kill()
    after = predicted(checkpoint, pictures)
    errors = {name: count for name, count in answers.items() if name != "200"}
    print(as_line({"clients": clients, "seconds": round(seconds), "answers": answers["200"], "errors": errors or 0}))
    share = speed / max(before, after)
    print(f"{speed:.1f} pictures a second; predict {before:.1f} before, {after:.1f} after: {share:.2f} of the faster")
    return not errors


def asked(
    server: "subprocess.Popen[str]", port: int, pictures: list[Path], clients: int, seconds: float
) -> tuple[Counter[str], float]:
    """Let clients ask a server, printing its memory -> the answers, and how many pictures a second it judged."""
    bodies = [path.read_bytes() for path in pictures]
    answers: Counter[str] = Counter()
    ask(port, bodies[:1], time.monotonic(), answers)  # the first picture is slow
    start, at_start = time.monotonic(), memory(server.pid)
    end, under_load = start + seconds, []
    print(f"memory in MiB: at the start {as_text(at_start)}", flush=True)
    orders = [[*bodies[number % len(bodies) :], *bodies[: number % len(bodies)]] for number in range(clients)]
    threads = [threading.Thread(target=ask, args=(port, order, end, answers)) for order in orders]
    for thread in threads:
        thread.start()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(60, left))
        under_load.append(memory(server.pid))
        print(f"after {(time.monotonic() - start) / 60:.1f} minutes {as_text(under_load[-1])}", flush=True)
    for thread in threads:
        thread.join()
    speed = answers["200"] / (time.monotonic() - start)
    alone, together = [sizes[0] for sizes in under_load], [sum(sizes) for sizes in under_load]
    moved = [round(max(values) - min(values)) for values in (alone, together)]
    print(f"under load memory moved by {moved[0]} MiB (server alone), {moved[1]} MiB (all)")
    return answers, speed


def as_text(sizes: list[float]) -> str:
    return f"{sizes[0]:.0f} the server alone, {sum(sizes):.0f} all {len(sizes)} processes"


def ask(port: int, bodies: list[bytes], end: float, answers: Counter[str]) -> None:
    """Post pictures one after another until a time, once at least, and count the statuses and what else happens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for body in itertools.cycle(bodies):
        try:
            connection.request("POST", "/judge", body)
            answer = connection.getresponse()
            answer.read()
            answers[str(answer.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            answers[type(error).__name__] += 1
            connection.close()
        if time.monotonic() >= end:
            return


def kills(checkpoint: Path, pictures: Path, count: int, rate: float) -> bool:
    """Kill a watching process ``count`` times while pictures arrive; print what has become of them -> whether each has
    one row, was moved and told of.
    """
    received: list[dict[str, Any]] = []
    chance, stopped = random.Random(0), threading.Event()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            failing = chance.random() < 0.05
            if not failing:
                received.append(json.loads(body))
            self.send_response(500 if failing else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["almrr_ref.predict"])
    with tempfile.TemporaryDirectory() as folder:
        camera, out = Path(folder) / "camera", Path(folder) / "out"
        camera.mkdir()
        names = sorted(path.name for path in pictures.iterdir())
        url = f"http://127.0.0.1:{receiver.server_address[1]}/"
        flags = ["--checkpoint", checkpoint, "--watch", camera, "--out", out, "--move-to", Path(folder) / "sorted"]
        flags = [*map(str, flags), "--webhook", url, "--no-maps", "--no-overlays"]

        def arrive() -> None:
            for name in names:
                if stopped.wait(1 / rate):
                    return
                (camera / f".{name}").write_bytes((pictures / name).read_bytes())
                os.replace(camera / f".{name}", camera / name)

        def start() -> multiprocessing.process.BaseProcess:
            process = context.Process(target=predict, args=(flags,))
            process.start()
            return process

        def wait_while(process: multiprocessing.process.BaseProcess, condition: Callable[[], bool]) -> None:
            while condition():
                if not process.is_alive():
                    raise ValueError("the watching process ended by itself")
                time.sleep(0.01)

        def waits(before: int) -> bool:
            return size(out / SCORES) <= before and any(camera.iterdir())

        thread = threading.Thread(target=arrive)
        thread.start()
        try:
            for _ in range(count):
                process = start()
                wait_while(process, partial(waits, size(out / SCORES)))
                time.sleep(chance.uniform(0, 1))
                process.kill()
                process.join()
            process, deadline = start(), time.monotonic() + len(names) / rate + 600
            wait_while(process, lambda: thread.is_alive() and time.monotonic() < deadline)
            wait_while(
                process,
                lambda: (
                    time.monotonic() < deadline
                    and (any(camera.iterdir()) or len({entry["id"] for entry in received}) < len(names))
                ),
            )
            process.kill()
            process.join()
        finally:
            stopped.set()
            thread.join()
        with (out / SCORES).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        files = [path.name for path in (Path(folder) / "sorted").rglob("*") if path.is_file()]
    doubled = sum(n - 1 for n in Counter(row["path"] for row in rows).values())
    print(f"{len(names)} pictures, {count} kills: {len(rows)} rows, {doubled} of them twice, {len(files)} files moved")
    print(f"unreadable: {sum(bool(row['error']) for row in rows)}; whole rows: {all(row['judged'] for row in rows)}")
    ids, paths = ({entry[name] for entry in received} for name in ("id", "path"))
    print(f"told: {len(received)} times, {len(ids)} ids, {len(paths)} paths")
    return not doubled and len(rows) == len(files) == len(ids) == len(paths) == len(names)


def command(arguments: argparse.Namespace) -> int:
    checkpoint, pictures = arguments.checkpoint.resolve(), arguments.pictures.resolve()
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint}: there is no such checkpoint")
    if others := [path.name for path in pictures.iterdir() if not (path.is_file() and is_image_file(path.name))]:
        raise ValueError(f"--pictures {pictures} also holds {others[0]}; name a folder that holds image files alone")
    if arguments.what == "load":
        fine = load(checkpoint, pictures, arguments.clients, arguments.seconds)
    else:
        fine = kills(checkpoint, pictures, arguments.kills, arguments.rate)
    return 0 if fine else 1


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("what", choices=("load", "kills"))
    parser.add_argument("--checkpoint", type=path_argument, required=True)
    parser.add_argument(
        "--pictures", type=path_argument, required=True, help="a folder of image files, without folders in it"
    )
    parser.add_argument("--clients", type=positive, default=8)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rate", type=float, default=30.0, help="pictures that arrive in a second")
    return run_command(command, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
