"""Who may ask, and what a page of another site cannot."""

import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from client import Client

from almrr_ref.serve.__main__ import main, read_token
from almrr_ref.serve.security import HEADERS

Serve = Callable[..., Client]
REGION = b'{"polygons": [[[0, 0], [0.5, 0], [0.5, 1]]]}'


def test_other_names_and_other_sites_are_refused(serve: Serve, picture: bytes) -> None:
    client = serve()
    port = client.port
    for host in (f"evil.com:{port}", f"127.0.0.1.evil.com:{port}", f"192.168.1.5:{port}", "", f"a@127.0.0.1:{port}"):
        assert client("/health", Host=host).status == 403, host
        assert client("/", Host=host).status == 403
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert client("/health", Host=host).status == 200, host
    own = f"127.0.0.1:{port}"
    for headers in (
        {"Origin": "http://evil.com"}, {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{port + 1}"},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
    ):  # fmt: skip
        for path, body in (("/judge", picture), ("/threshold", b'{"value": 0.1}'), ("/region", REGION)):
            assert client(path, body, **{"Host": own, **headers}).status == 403, headers
    assert client("/judge", picture, Host=own, Origin=f"http://{own}", Sec_Fetch_Site="same-origin").status == 200
    assert client.json("/calibration")["threshold"] != 0.1
    assert client.json("/region")["share"] == 1


def test_an_answer_may_run_no_foreign_script_and_is_in_no_frame(serve: Serve) -> None:
    client = serve()
    answers = [client(path) for path in ("/", "/page.js", "/judge", "/absent", "/health")]
    for headers in (answer.headers for answer in (*answers, client("/health", Host="evil.com"))):
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert "Access-Control-Allow-Origin" not in headers
    page = client("/").content.decode()  # type: ignore[attr-defined]
    assert not re.search(r"<script>|<style>| style=| on\w+=|https?://", page)
    folder = Path(__file__).parents[2] / "almrr_ref" / "serve"
    scripts = "".join(path.read_text() for path in folder.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", scripts)


def test_refusals_carry_the_same_headers(serve: Serve, picture: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "0123456789abcdef"
    client, may = serve(host="0.0.0.0", token=token, max_bytes=20_000), {"Authorization": f"Bearer {token}"}
    answers = [client("/health"), client("/health", Host="evil.com"), client("/absent", **may), client("/judge", **may)]
    answers += [client("/judge", body, **may) for body in (b"", bytes(20_001), b"junk")]
    answers += [client("/threshold", body, **may) for body in (b'{"value": 2}', b"[" * 999)]
    monkeypatch.setattr("almrr_ref.serve.api.MOST_IN_FLIGHT", 0)
    answers.append(client("/judge", picture, **may))
    assert [answer.status for answer in answers] == [401, 403, 404, 405, 400, 413, 422, 409, 400, 503]
    for answer in answers:
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS, answer.status
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_odd_requests_are_refused_and_none_is_a_fault(serve: Serve) -> None:
    client, many = serve(), "9" * 5000
    assert client("/health", Host="[").status == 403
    assert client(f"/recent?after={many}").status == 200
    assert client(f"/recent/{many}.jpg").status == client("/recent/x.jpg").status == 404
    assert client("/threshold", b'{"value": true}').status == 400


@pytest.mark.parametrize("cookies", ['x={"a":1}; almrr_token_P=T', "x=a b; almrr_token_P=T", "flag; almrr_token_P=T"])
def test_a_cookie_of_another_program_hides_no_token(serve: Serve, cookies: str) -> None:
    token = "0123456789abcdef"
    client = serve(host="0.0.0.0", token=token)
    cookies = cookies.replace("P", str(client.port))
    assert client("/health", Cookie=cookies.replace("T", token)).status == 200
    assert client("/health", Cookie=cookies).status == 401


def test_beyond_this_machine_every_request_needs_the_token(serve: Serve, picture: bytes) -> None:
    token = "0123456789abcdef"
    client = serve(host="0.0.0.0", token=token)
    for path, body in (
        ("/", None),
        ("/health", None),
        ("/judge", picture),
        ("/region", REGION),
        ("/region.png", None),
        ("/page.js", None),
        (f"/health?token={token}", None),
    ):
        assert client(path, body).status == 401
        assert client(path, body, Authorization=f"Bearer {token}x").status == 401
        assert client(path, body, Cookie=f"almrr_token_{client.port}=").status == 401
    assert client("/judge", picture, Authorization=f"Bearer {token}").status == 200
    entered = client(f"/?token={token}")
    assert (entered.status, entered.headers["Location"]) == (303, "/")
    cookie = entered.headers["Set-Cookie"]
    assert "HttpOnly; SameSite=Lax" in cookie
    assert client("/", Cookie=cookie.partition(";")[0]).status == 200
    assert client("/?token=wrong").status == 401
    assert client("/health", Authorization=f"Bearer {token}", Host="evil.com").status == 403


def test_two_stations_of_one_machine_stay_open_in_one_browser(open_page: Callable[..., Any], serve: Serve) -> None:
    tokens = "0123456789abcdef", "fedcba9876543210"
    one, two = (f"{serve(token=token).url}?token={token}" for token in tokens)
    page = open_page(one)
    page.wait_for_selector("#health:has-text('ok')")
    page.context.new_page().goto(two)
    assert page.reload().status == 200


def test_the_printed_address_opens_from_a_link_on_another_site(open_page: Callable[..., Any], serve: Serve) -> None:
    token = "0123456789abcdef"
    client = serve(token=token)
    page = open_page(serve().url.replace("127.0.0.1", "localhost"))
    add = "href => document.body.prepend(Object.assign(document.createElement('a'), {href, id: 'link', text: 'open'}))"
    page.evaluate(add, f"{client.url}?token={token}")
    page.click("#link")
    page.wait_for_url(client.url)
    page.wait_for_selector("#health:has-text('ok')")


def test_where_it_listens_to_others_there_is_a_token(tmp_path: Path) -> None:
    assert read_token(None, "127.0.0.1") == read_token(None, "::1") == read_token(None, "localhost") == ""
    assert len(read_token(None, "0.0.0.0")) >= 20
    assert read_token(None, "0.0.0.0") != read_token(None, "0.0.0.0")
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token(tmp_path / "token", "127.0.0.1") == "0123456789abcdef"
    for text in ("short", "0123456789 abcdef", "0123456789abcdef; Path=/x"):
        (tmp_path / "token").write_text(text)
        with pytest.raises(ValueError, match="expected 16 or more"):
            read_token(tmp_path / "token", "0.0.0.0")


def test_the_address_that_is_printed_is_one_that_others_can_open(
    network: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("almrr_ref.serve.__main__.make_server", Mock())
    assert main(["--checkpoint", str(network), "--device", "cpu", "--host", "0.0.0.0", "--port", "0"]) == 0
    assert f"http://{socket.gethostname()}:" in caplog.text


def test_a_name_may_be_given_in_capitals(serve: Serve) -> None:
    client = serve(host="Vision-PC.example", token="0123456789abcdef")
    assert client("/health", Authorization="Bearer 0123456789abcdef", Host="Vision-PC.example:8765").status == 200


def test_no_browser_is_started_with_a_token_that_other_users_would_see(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Mock()
    monkeypatch.setattr("almrr_ref.serve.__main__.make_server", Mock())
    monkeypatch.setattr("threading.Timer", opened)
    (tmp_path / "token").write_text("0123456789abcdef")
    flags = ["--checkpoint", str(network), "--device", "cpu", "--port", "0"]
    assert (main([*flags, "--token-file", str(tmp_path / "token")]), opened.called) == (0, False)
    assert (main(flags), opened.called) == (0, True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--watch", "x"], "go together"), (["--webhook", "http://x"], "go with --watch"), (["--port", "70000"], "65535"),
     (["--token-file", "absent"], "No such file"), (["--host", "203.0.113.7"], "name another --port")],
)  # fmt: skip
def test_wrong_use_is_one_line(network: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra [serve])")
    assert main(["--checkpoint", str(network), "--no-browser", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_whoever_sends_no_request_takes_no_place_for_long(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    client = serve()
    monkeypatch.setattr("almrr_ref.serve.api.HEAD_TIMEOUT", 0.2)
    with socket.create_connection(("127.0.0.1", client.port), timeout=8) as connection:
        connection.sendall(before + b"GET / HT")
        while connection.recv(1000):
            pass
