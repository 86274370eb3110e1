"""POST every verdict to another machine. The queue is on the disk already: it is the journal itself.

webhook.json holds one number: the position in scores.csv up to which the receiver has answered 2xx. A separate thread
delivers row after row and tries again, with growing pauses, for as long as it takes: a dead or hanging receiver neither
slows the judging nor loses a row. After a kill, the row that was being sent is sent once more.

Body: JSON of journal.message, and the id. Headers: X-Almrr-Id, the same for every repeat of a row; with a secret also
X-Almrr-Signature: sha256=HEX, HMAC-SHA256 of the body.
"""

import hashlib
import hmac
import http.client
import json
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from almrr_ref.run.files import OutputError, atomic_write
from almrr_ref.run.text import LOGGER, one_line
from almrr_ref.watch.journal import Journal, Row, message, read_rows

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between two tries; each pause is twice the one before
TIMEOUT = 10.0  # seconds that a receiver may take to answer


class Webhook(threading.Thread):
    """Delivers the rows of a journal, also those that an earlier process left; use as a context manager.

    Args:
        url: as from `check_url`.
        secret: key of the signature; empty: no signature.
        state: webhook.json. Without it, delivery begins with the next row.
    Raises:
        ValueError: if the state is damaged.
    """

    def __init__(self, url: str, secret: bytes, journal: Journal, state: Path) -> None:
        super().__init__(name="webhook", daemon=True)
        self._url, self._secret, self._journal, self._state = url, secret, journal, state
        self._end, self._opener = threading.Event(), urllib.request.build_opener(_NoRedirects)
        if state.exists():
            try:
                self.delivered = int(json.loads(state.read_text())["delivered"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{state} is damaged; remove it, and rows to come are delivered") from error
            self.delivered = min(self.delivered, journal.end)
        else:
            self.delivered = journal.end
            self._note()
        self._failing = False

    def waiting(self) -> int:
        """Number of rows that are not delivered yet."""
        return sum(1 for _ in read_rows(self._journal.path, self.delivered, self._journal.end))

    def run(self) -> None:
        """Deliver until stopped."""
        while not self._end.wait(0.05):
            try:
                for end, row in read_rows(self._journal.path, self.delivered, self._journal.end):
                    if not self._deliver(row):
                        return
                    self.delivered = end
                    self._note()
            except OutputError as error:  # the rows cannot be read for a while
                self._fail(str(error))
                self._end.wait(FIRST_PAUSE)

    def _deliver(self, row: Row) -> bool:
        """Send one row until the receiver takes it; -> False if stopped before."""
        body = json.dumps({"id": row_id(row), **message(row)}).encode()
        headers = {"Content-Type": "application/json", "User-Agent": "almrr-ref", "X-Almrr-Id": row_id(row)}
        if self._secret:
            headers["X-Almrr-Signature"] = signature(self._secret, body)
        pause = FIRST_PAUSE
        while not self._end.is_set():
            problem = self._post(body, headers)
            if not problem:
                if self._failing:
                    LOGGER.info("webhook: the receiver answers again")
                self._failing = False
                return True
            self._fail(problem)
            self._end.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        return False

    def _fail(self, problem: str) -> None:
        if not self._failing:
            LOGGER.warning(f"webhook: {one_line(problem)}; rows wait in {one_line(self._journal.path)}")
        self._failing = True

    def _post(self, body: bytes, headers: dict[str, str]) -> str:
        """Send once; -> the problem, empty if there was none."""
        request = urllib.request.Request(self._url, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as answer:
                answer.read(1024)
                return "" if 200 <= answer.status < 300 else f"answer {answer.status}"
        except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and timeouts are OSErrors
            return str(error) or type(error).__name__

    def _note(self) -> None:
        try:
            atomic_write(self._state, json.dumps({"delivered": self.delivered}))
        except OutputError as error:
            LOGGER.warning(f"{error}; after a restart some rows are sent again")

    def __enter__(self) -> "Webhook":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join(0.5)  # a receiver that hangs is not waited for: the row is sent at the next start
        if waiting := self.waiting():
            LOGGER.info(f"webhook: {waiting} rows wait for the next start")


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: it would turn the POST into a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def row_id(row: Row) -> str:
    """The same id for every repeat of a row of a journal."""
    return hashlib.sha256("\0".join(row.values()).encode()).hexdigest()[:32]


def signature(secret: bytes, body: bytes) -> str:
    """The header that proves where a body comes from."""
    return "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()


def check_url(url: str) -> str:
    """Return an http or https URL; ValueError if it is not one."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ValueError("--webhook takes no user and password in its URL; --webhook-secret-file signs what is posted")
    form = url.isascii() and url.isprintable() and " " not in url and parts.port != 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not form:
        raise ValueError(f"--webhook is a URL such as https://host/path; got {one_line(url)!r}")
    return url
