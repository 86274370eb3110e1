"""A local page to judge pictures, set the threshold, watch a folder: ``python -m almrr_ref.serve --checkpoint FILE``.

Other programs use the same server over HTTP (api.py). Only this machine reaches it, unless --host is given; requests
then need a token. It has no TLS: outside a trusted network, put it behind a proxy that does. Extra: [serve].
"""

import argparse
import functools
import secrets
import socket
import sys
import threading
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from almrr_ref.detector import Detector
from almrr_ref.predict import save_pictures
from almrr_ref.run.cli import add_network_flags, make_parser, path_argument, positive, run_command
from almrr_ref.run.text import LOGGER, one_line
from almrr_ref.serve.security import Guard, is_loopback
from almrr_ref.serve.service import Service
from almrr_ref.watch.flags import add_station_flags, refuse_station_flags, station_of

if TYPE_CHECKING:
    import uvicorn  # of the extra; imported when a server is made

MAX_BYTES = 64 * 2**20


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "serve",
        __doc__.split("\n\n")[0] + "\n\nexamples:\n"
        "  python -m almrr_ref.serve --checkpoint runs/demo/last.pt\n"
        "  python -m almrr_ref.serve --checkpoint runs/demo/last.pt --watch camera/ --out found\n"
        "  curl --data-binary @picture.png http://127.0.0.1:8765/judge",
    )
    add_network_flags(parser)
    add = parser.add_argument
    add("--port", type=int, default=8765, metavar="N", help="0: any that is free (default: 8765)")
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to listen on; another than this machine's own needs a token (default: 127.0.0.1)")  # fmt: skip
    add("--token-file", type=path_argument, metavar="FILE",
        help="every request must carry the token in it (default with --host: a new one, which is printed)")  # fmt: skip
    add("--no-browser", action="store_true", help="do not open the page")
    add("--max-bytes", type=positive, default=MAX_BYTES, metavar="N",
        help=f"of a picture that is sent (default: {MAX_BYTES})")  # fmt: skip
    add("--watch", type=path_argument, metavar="DIR", help="a folder to watch, as in predict; needs --out")
    add("--out", type=path_argument, metavar="DIR", help="for the scores.csv of the watched folder")
    add_station_flags(parser)
    return parser


def read_token(path: Path | None, host: str) -> str:
    """Return the token that requests must carry: the file's, else a new one for another host, else "" for loopback.

    Raises ValueError if the file cannot be read or holds no usable token.
    """
    if path is None:
        return "" if is_loopback(host) else secrets.token_urlsafe(24)
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file {one_line(path)}: {error}") from error
    if len(token) < 16 or not all(c.isalnum() or c in "-_." for c in token):
        raise ValueError(f"--token-file {one_line(path)}: expected 16 or more letters, digits, - _ . and nothing else")
    return token


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; ValueError if the address cannot be used."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port lies within 0 and 65535; got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        raise ValueError(f"cannot listen on {host} port {port}: {error.strerror}; name another --port") from error


def make_server(service: Service, host: str, token: str, max_bytes: int = MAX_BYTES) -> "uvicorn.Server":
    """Build the server of a service; its ``run([socket])`` ends at a signal, or once ``should_exit`` is set."""
    import uvicorn

    from almrr_ref.serve.api import Api, Connection

    application = Guard(Api(service, max_bytes).application(), host, token)
    config = uvicorn.Config(
        application, http=Connection, log_level="warning", access_log=False, server_header=False, ws="none",
        limit_concurrency=100, timeout_keep_alive=10, timeout_graceful_shutdown=5, lifespan="on",
    )  # fmt: skip
    return uvicorn.Server(config)


def command(arguments: argparse.Namespace) -> int:
    if bool(arguments.watch) != bool(arguments.out):
        raise ValueError("--watch DIR and --out DIR go together")
    if not arguments.watch:
        refuse_station_flags(arguments)
    if arguments.out and arguments.out.resolve() == arguments.checkpoint.parent.resolve():
        raise ValueError(f"--out {one_line(arguments.out)} is the network's own folder; name another one")
    host, token = arguments.host, read_token(arguments.token_file, arguments.host)
    options = {"dtype": arguments.dtype, "tile": arguments.tile, "batch_size": arguments.batch_size}
    load = functools.partial(Detector.load, arguments.checkpoint, arguments.device, **options)
    service = Service(arguments.checkpoint, load, arguments.max_pixels)
    if arguments.watch:
        save = functools.partial(save_pictures, out=arguments.out, overlays=True, maps=False)
        service.station = station_of(arguments, lambda: service.detector, save, service.drift, service.add_row)
    try:
        server = make_server(service, host, token, arguments.max_bytes)
    except ModuleNotFoundError as error:
        raise ValueError(f'the server needs the extra [serve]: pip install "almrr-ref[serve]" ({error})') from error
    listener = listen(host, arguments.port)
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    LOGGER.info(f"{one_line(address)} (Ctrl-C ends it)")
    if is_loopback(host) and not token and not arguments.no_browser:  # every user sees what a browser is started with
        browser = threading.Timer(1.0, webbrowser.open, (address,))
        browser.daemon = True
        browser.start()
    with listener:
        server.run([listener])
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(command, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
