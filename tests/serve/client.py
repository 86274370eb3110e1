"""What asks a server in the tests."""

import contextlib
import http.client
import json
from typing import Any

from almrr_ref.serve.service import Service


class Client:
    """Asks a server; every request has a connection of its own."""

    def __init__(self, port: int, service: Service) -> None:
        self.port, self.service, self.url = port, service, f"http://127.0.0.1:{port}/"

    def __call__(self, path: str, body: Any = None, method: str = "", **headers: str) -> http.client.HTTPResponse:
        """The answer, whose content is in ``.content``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, body, names)
            answer = connection.getresponse()
            answer.content = answer.read()  # type: ignore[attr-defined]
        return answer

    def json(self, path: str, body: Any = None) -> Any:
        answer = self(path, body)
        assert answer.status == 200, answer.content  # type: ignore[attr-defined]
        return json.loads(answer.content)  # type: ignore[attr-defined]
