"""Who may send requests: Host, Origin and token are checked first. And headers that limit what a browser does.

A browser that shows a page of another site can be made to send requests to this machine. Its POSTs carry that site's
Origin and are refused. If the site lets a name of its own point here (DNS rebinding), that name is in Host and is
refused. Headers forbid other sites to embed an answer.
"""

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Guard:
    """An ASGI application that passes allowed requests on to another one.

    Args:
        host: the address that the server listens on.
        token: every request must carry it, as `Authorization: Bearer` or in the cookie that /?token=... sets; empty: no
            token, for a loopback address.
    """

    def __init__(self, application: Application, host: str, token: str) -> None:
        self._application, self._token = application, token
        self._names = {"localhost"} if is_loopback(host) else {"localhost", host.lower(), *_machine_names()}
        self._addresses = is_loopback if is_loopback(host) else _is_address

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in present)]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal:
            await _answer(send_guarded, *refusal)
        elif self._token and scope["path"] == "/" and "token=" in scope["query_string"].decode("latin-1"):
            # Strict would be lost in this redirect behind a link in a chat; Lax comes with GETs, which change nothing.
            cookie = f"{_cookie(scope)}={self._token}; HttpOnly; SameSite=Lax; Path=/"
            await _answer(send_guarded, 303, "", [(b"location", b"/"), (b"set-cookie", cookie.encode())])
        else:
            await self._application(scope, receive, send_guarded)

    def _refusal(self, scope: Message, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason if a request is refused; None if it is allowed."""
        host = headers.get("host", "")
        name = _host_name(host)
        if not name or not (name in self._names or self._addresses(name)):
            return 403, "this server is not asked for by that name: use the address that it printed"
        site, origin = headers.get("sec-fetch-site", "same-origin"), headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and (
            site not in ("same-origin", "none") or origin not in (None, f"http://{host}", f"https://{host}")
        ):
            return 403, "a page of another site may not ask this server"
        token = self._token.encode()
        if token and not any(hmac.compare_digest(sent.encode(), token) for sent in _tokens(scope, headers)):
            return 401, "open the address that was printed, with its token; or send Authorization: Bearer TOKEN"
        return None


def _host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None if it is none."""
    if not host.isprintable() or "/" in host or "@" in host:
        return None
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # half a bracket
        return None


def _tokens(scope: Message, headers: dict[str, str]) -> list[str]:
    """Every token that a request carries: in the Authorization header, in cookies, or in the page's address."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    tokens = [value.strip()] if kind.lower() == "bearer" else []
    # Other programs on this host may set cookies, too.
    cookies = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
    tokens += [value for name, _, value in cookies if name == _cookie(scope)]
    if scope["path"] == "/":
        tokens += parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
    return tokens


def _cookie(scope: Message) -> str:
    """The name of the cookie that holds the token; browsers send a cookie to every port of its host."""
    return f"almrr_token_{scope['server'][1]}"


async def _answer(send: Send, status: int, reason: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    start = [(b"content-type", b"text/plain; charset=utf-8"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": reason.encode()})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def _machine_names() -> set[str]:
    """The names of this machine, in lower case."""
    name = socket.gethostname().lower()
    return {name, name.partition(".")[0], f"{name.partition('.')[0]}.local"}
