"""The page and the HTTP API.

    POST /judge      the bytes of a picture -> JSON; its map with ?map=png, ?map=tiff, or Accept: image/png, image/tiff;
                     with ?map=inline the PNG stands in the JSON, in base64
    GET  /health     {"status": "ok", "waiting": N, "error": null}; "trouble" and why while pictures of the folder
                     have to wait, 503 if it is no longer watched. N pictures are being received, decoded or judged
    GET  /metrics    Prometheus text; its almrr_waiting is the same N
    POST /threshold  {"value": X}
    POST /region     {"polygons": [[[x, y], ...], ...]}, x and y in 0..1 of the picture: from now on only the inside of
                     these polygons is judged; [] for the whole picture
    GET  /region.png the mask of what is judged
    GET  /about  /calibration  /region  /recent?after=N  /recent/N.jpg      for the page

No path or name that a client sends is ever opened. A request that is refused (too large, too many, no picture) gets its
HTTP status and one line of JSON: {"error": ...}; 401, 403, 404 and 405 are plain text.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from almrr_ref import report
from almrr_ref.data.images import ImageError
from almrr_ref.serve.service import Service, answer, encoded_map, verdict

MOST_IN_FLIGHT = 16  # pictures; one more gets 503
HEAD_TIMEOUT = 10.0  # seconds; the head of a request may take twice as long to arrive
BODY_TIMEOUT = 60.0  # seconds that a picture may take to arrive
OF_REPORT = ("colours.css", "numbers.js")  # of the report's page, too
STATIC = (*OF_REPORT, "page.css", "draw.js", "page.js", "judge.js", "threshold.js", "region.js")
DIGITS = 19  # longest number in a request; Python refuses to read thousands
MOST_SETTING = 50_000  # bytes of a body that sets the threshold or the region
KINDS = {"image/png": "png", "image/tiff": "tiff"}


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError("true and false are no numbers")
    return float(value)


class Connection(H11Protocol):
    """A connection, closed when no whole head of a request comes: uvicorn keeps it, and takes a hundred at most."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def _look(self, before: Any = None) -> None:
        """Close if it waits for a request, and waited for the same one at the look before."""
        waits = self.cycle is None or self.cycle.response_complete
        if waits and before == (self.cycle,):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(HEAD_TIMEOUT, self._look, (self.cycle,) if waits else None)


class RefusedError(ValueError):
    """A request that is refused: HTTP status, a word for /metrics, the message."""

    def __init__(self, status: int, reason: str, text: str) -> None:
        self.status, self.reason = status, reason
        super().__init__(text)


class Api:
    """The routes of a service.

    Args:
        max_bytes: of a picture.
    """

    def __init__(self, service: Service, max_bytes: int) -> None:
        self._service, self._max_bytes, self._in_flight = service, max_bytes, 0

    def application(self) -> Starlette:
        """Build the ASGI application; it starts and stops the service with itself."""
        routes = [Route(f"/{name}", self.static) for name in ("", *STATIC)]
        for name in ("health", "metrics", "about", "calibration", "region", "recent"):
            routes.append(Route(f"/{name}", getattr(self, name)))
        routes += [Route("/region.png", self.region_png), Route("/recent/{number}.jpg", self.picture)]
        changes = {"judge": self.judge, "threshold": self.set_threshold, "region": self.set_region}
        routes += [Route(f"/{name}", endpoint, methods=["POST"]) for name, endpoint in changes.items()]
        return Starlette(routes=routes, lifespan=self._lifespan, exception_handlers={RefusedError: self._refused})

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        with self._service.running():
            yield

    async def static(self, request: Request) -> Response:
        name = request.url.path[1:] or "page.html"  # one of the routes
        kind = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}[Path(name).suffix]
        folder = Path(report.__file__ if name in OF_REPORT else __file__).parent
        return Response((folder / name).read_bytes(), media_type=kind)

    async def judge(self, request: Request) -> Response:
        if self._in_flight >= MOST_IN_FLIGHT:
            raise RefusedError(503, "busy", f"{MOST_IN_FLIGHT} pictures are being judged; come again in a second")
        self._in_flight += 1
        try:
            return await self._judged(request)
        finally:
            self._in_flight -= 1

    async def _judged(self, request: Request) -> Response:
        kind = request.query_params.get("map") or KINDS.get(request.headers.get("accept", ""), "")
        if kind not in ("", "png", "tiff", "inline"):
            raise RefusedError(400, "wrong_use", f"map is png, tiff or inline; got {kind[:20]!r}")
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise RefusedError(415, "wrong_use", "send the bytes of a picture as the body, not a form with a file")
        data = await self._body(request, self._max_bytes)
        if not data:
            raise RefusedError(400, "wrong_use", "the body is empty; send the bytes of a picture as the body")
        try:
            result, seconds = await run_in_threadpool(self._service.judged, data)
        except ImageError as error:
            raise RefusedError(422, "unreadable", error.reason) from error
        except CancelledError as error:
            raise RefusedError(503, "busy", "the server is ending") from error
        except (RuntimeError, MemoryError) as error:  # PyTorch's: only a lack of memory may pass
            reason = str(error).partition("\n")[0][:200] or "not enough memory"
            raise RefusedError(503 if "memory" in reason else 500, "failed", reason) from error
        if kind in ("png", "tiff"):
            headers = {"X-Almrr-Verdict": verdict(result), "X-Almrr-Score": str(result.score)}
            return Response(await run_in_threadpool(encoded_map, result, kind), 200, headers, f"image/{kind}")
        content = answer(result, seconds)
        if kind:
            content["map"] = base64.b64encode(await run_in_threadpool(encoded_map, result, "png")).decode()
        return JSONResponse(content)

    async def _body(self, request: Request, most: int) -> bytes:
        """The whole body. Raises RefusedError if it is too large or too slow."""
        too_large = RefusedError(413, "too_large", f"more than {most} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > most:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > most:
                    raise too_large
            return bytes(body)

        try:
            data = await asyncio.wait_for(read(), BODY_TIMEOUT)
        except asyncio.TimeoutError as error:
            raise RefusedError(408, "too_slow", f"did not arrive within {BODY_TIMEOUT:.0f} s") from error
        except ClientDisconnect as error:
            raise RefusedError(400, "gone", "the client is gone") from error
        return data

    async def set_threshold(self, request: Request) -> Response:
        form = '{"value": 0.5}'
        await self._set(request, lambda body: _number(body["value"]), self._service.set_threshold, form)
        return await self.calibration(request)

    async def set_region(self, request: Request) -> Response:
        form = '{"polygons": [[[0.1, 0.1], [0.9, 0.1], [0.5, 0.9]]]}'
        await self._set(request, lambda body: list(body["polygons"]), self._service.set_region, form)
        return await self.region(request)

    async def _set(
        self, request: Request, read: Callable[[Any], Any], change: Callable[[Any], None], form: str
    ) -> None:
        """Call ``change`` with what ``read`` takes from the JSON body; RefusedError if either fails."""
        body = await self._body(request, MOST_SETTING)
        try:
            value = read(json.loads(body))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RefusedError(400, "wrong_use", f"expected JSON such as {form}") from error
        try:
            await run_in_threadpool(change, value)
        except ValueError as error:
            raise RefusedError(409, "wrong_use", str(error)) from error

    async def _refused(self, _: Request, error: Exception) -> Response:
        """Count and answer a request that was refused."""
        assert isinstance(error, RefusedError)
        self._service.counts.refuse(error.reason)
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"error": str(error)}, error.status, headers)

    async def health(self, _: Request) -> Response:
        failure, station = self._service.failure, self._service.station
        trouble = station.trouble if station else ""
        status = "failed" if failure else "trouble" if trouble else "ok"
        content = {"status": status, "waiting": self._in_flight, "error": failure or trouble or None}
        return JSONResponse(content, 503 if failure else 200)

    async def metrics(self, _: Request) -> Response:
        service = self._service
        threshold = await run_in_threadpool(lambda: service.detector.threshold)  # it may have to be loaded
        text = service.counts.text(self._in_flight, threshold, service.drift)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def about(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._service.about))

    async def calibration(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._service.calibration))

    async def region(self, _: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._service.region))

    async def region_png(self, _: Request) -> Response:
        return Response(await run_in_threadpool(self._service.region_png), media_type="image/png")

    async def recent(self, request: Request) -> Response:
        after, station = request.query_params.get("after", "0"), self._service.station
        rows = self._service.rows_after(int(after) if after.isdecimal() and len(after) < DIGITS else 0)
        folder, counts = (str(station.folder), dict(station.counts)) if station else (None, {})
        return JSONResponse({"folder": folder, "counts": counts, "rows": rows, "drift": self._service.drift.standing})

    async def picture(self, request: Request) -> Response:
        number = request.path_params["number"]
        data = self._service.picture_of(int(number)) if number.isdecimal() and len(number) < DIGITS else b""
        return Response(data, media_type="image/jpeg") if data else Response(status_code=404)
