"""Who is told of verdicts: everything, in order, whatever fails on the way."""

import time
from pathlib import Path
from typing import Any

import pytest
from receiver import Receiver
from stations import rows, wait_for, watching
from trust_cases import write_images

from almrr_ref.run.files import OutputError
from almrr_ref.watch import webhook


@pytest.mark.parametrize("answer", [0, 500, 302])
def test_a_receiver_that_hangs_or_fails_slows_nothing_and_gets_all_in_order_signed(
    checkpoint: Path, camera: Path, tmp_path: Path, receiver: Receiver, answer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT", 0.3)
    receiver.answer = answer
    write_images(camera, 6)
    with watching(checkpoint, camera, webhook=(receiver.url, b"key"), threshold=0.0):
        wait_for(lambda: len(rows(tmp_path / "out")) == 6)
        wait_for(lambda: receiver.refused > 1)
        assert not receiver.taken
    receiver.answer = 200
    receiver.go_on.set()
    with watching(checkpoint, camera, webhook=(receiver.url, b"key"), threshold=0.0):
        wait_for(lambda: len(receiver.taken) == 6)
        time.sleep(0.1)
    assert [entry["path"] for entry in receiver.taken] == [row["path"] for row in rows(tmp_path / "out")]
    for entry, headers, body in zip(receiver.taken, receiver.headers, receiver.bodies):
        assert headers["X-Almrr-Signature"] == webhook.signature(b"key", body) != webhook.signature(b"other", body)
        assert headers["X-Almrr-Id"] == entry["id"]
        assert entry["regions"][0]["box"][:2] >= [0, 0]


def test_rows_that_cannot_be_read_for_a_while_are_told_later(
    checkpoint: Path, camera: Path, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, broken = webhook.read_rows, [OutputError("scores.csv: gone")] * 2

    def sometimes(*arguments: Any) -> Any:
        if arguments[1] < arguments[2] and broken:
            raise broken.pop()
        return read(*arguments)

    monkeypatch.setattr(webhook, "read_rows", sometimes)
    write_images(camera, 2)
    with watching(checkpoint, camera, webhook=(receiver.url, b"key"), threshold=0.0):
        wait_for(lambda: len(receiver.taken) == 2)
    assert not broken
