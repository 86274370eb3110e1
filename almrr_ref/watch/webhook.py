"""Tell another machine of every verdict: POST, with a queue that is on the disk already, the journal itself.

What is delivered is one number in webhook.json: the place in scores.csv up to which the receiver has answered 2xx. A
thread of its own delivers row after row; it tries again with growing pauses for as long as it takes, so that a dead or
hanging receiver neither slows the judging nor loses a row. After a kill the row that was under way is sent once more.

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
    """Delivers the rows of a journal, those that an earlier process left as well; use as a context manager.

    Args:
        url: http or https.
        secret: key of the signature; empty: none.
        state: the file that says up to where rows are delivered. Where it is absent only rows to come are.
    Raises:
        ValueError: if the URL is none, or the state is damaged.
    """

    def __init__(self, url: str, secret: bytes, journal: Journal, state: Path) -> None:
        super().__init__(name="webhook", daemon=True)
        self._url, self._secret, self._journal, self._state = check_url(url), secret, journal, state
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
        """How many rows are not delivered yet."""
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
        """Send one row until it is taken; -> False if stopped before."""
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
        """Send once; -> what went wrong, empty if nothing."""
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
    """A POST that is redirected would become a GET: an error instead."""

    def redirect_request(self, *_: Any) -> None:
        return None


def row_id(row: Row) -> str:
    """What tells a repeat: the same for the same row of the same journal."""
    return hashlib.sha256("\0".join(row.values()).encode()).hexdigest()[:32]


def signature(secret: bytes, body: bytes) -> str:
    """The header that proves where a body comes from."""
    return "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()


def check_url(url: str) -> str:
    """A URL of http or https; ValueError if it is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise ValueError(f"--webhook is a URL such as https://host/path; got {one_line(url)!r}")
    return url
