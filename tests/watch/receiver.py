"""A machine that is told of verdicts: a real HTTP server on a free port, which can be made to fail or to hang."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Receiver:
    """Keeps what is posted; ``answer`` is the status it gives, or 0 to hang until it is changed."""

    def __init__(self, answer: int = 200) -> None:
        self.answer, self.taken, self.refused = answer, [], 0  # type: ignore[var-annotated]
        self.headers: list[dict[str, str]] = []
        self.bodies: list[bytes] = []
        self.go_on = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.answer == 0:
                    receiver.refused += 1
                    receiver.go_on.wait(30)
                    return
                if receiver.answer == 200:
                    receiver.bodies.append(body)
                    receiver.headers.append(dict(self.headers))
                    receiver.taken.append(json.loads(body))
                else:
                    receiver.refused += 1
                self.send_response(receiver.answer)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                """Where a redirected POST would end: its answer says that all is well, and the body is lost."""
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/verdicts"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
