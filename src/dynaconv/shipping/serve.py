"""What is served over HTTP: pictures in, calibrated probabilities out, batched together; and the page at /."""

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynaconv import __version__
from dynaconv.errors import UserError
from dynaconv.shipping.batching import Batcher, BusyError, choose_size
from dynaconv.shipping.prediction import PictureClassifier, to_png_bytes

PATHS = ("/v1/predict", "/v1/model", "/v1/gallery", "/healthz", "/readyz", "/metrics", "/")
"""Told apart in meters and log; all others are one, or strangers could fill both."""
PAGE = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HEADERS = [
    (b"content-security-policy", b"default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


@dataclass(frozen=True)
class ServeSettings:
    """Bounds of the server.

    Attributes:
        max_wait_ms: Milliseconds that a request waits for others at most, to be computed together.
        max_batch: Images computed together at most; 1 batches nothing. None measures at the start what is enough.
        most_waiting: Images that may wait; requests beyond are refused with 503.
        most_bytes: Of a request's body.
        most_pictures: Of a request.
        seconds: That a request may take to arrive, before it is given up with 408, and to be answered, before 504.
        token: What a request must bear; None asks for none.
    """

    max_wait_ms: float = 5.0
    max_batch: int | None = None
    most_waiting: int = 256
    most_bytes: int = 10 * 2**20
    most_pictures: int = 32
    seconds: float = 30.0
    token: str | None = None


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, detail: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.detail, self.headers = status, detail, headers or {}


class _Meters:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        more: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "dynaconv_requests", "Requests answered, by path and status.", ["path", "status"], **more
        )
        self.seconds = Histogram("dynaconv_request_seconds", "From the request to its answer.", **more)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128)
        self.batch = Histogram("dynaconv_batch_images", "Images computed together.", buckets=sizes, **more)
        self.computing = Histogram("dynaconv_batch_seconds", "Time that a batch was computed in.", **more)
        self.waiting = Gauge("dynaconv_images_waiting", "Images accepted and not answered yet.", **more)


def build_app(classifier: PictureClassifier, settings: ServeSettings) -> FastAPI:
    """Makes the application around a classifier; its requests are computed in one thread, decoded in two."""
    meters = _Meters()

    def on_batch(images: int, seconds: float) -> None:
        meters.batch.observe(images)
        meters.computing.observe(seconds)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        shape = (classifier.channels, classifier.image_size, classifier.image_size)
        # The first computation allocates and plans; nobody should wait for it.
        classifier.answer(np.zeros((1, *shape), dtype=np.uint8))
        max_batch = settings.max_batch or choose_size(classifier.answer, shape)
        logging.getLogger("dynaconv.serve").info(f"At most {max_batch} pictures are computed together.")
        app.state.batcher = Batcher(
            classifier.answer, max_batch, settings.max_wait_ms / 1e3, settings.most_waiting, on_batch
        )
        meters.waiting.set_function(lambda: app.state.batcher.waiting)
        app.state.decoders = ThreadPoolExecutor(2, thread_name_prefix="decoder")
        yield
        await asyncio.to_thread(app.state.batcher.close)
        app.state.decoders.shutdown()

    app = FastAPI(title="dynaconv", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_Frame, settings=settings, meters=meters)
    _add_problems(app)
    _add_page(app)
    _add_facts(app, classifier)

    @app.get("/healthz", tags=["operation"])
    def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", tags=["operation"])
    def readyz() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/metrics", tags=["operation"], response_class=Response)
    def metrics() -> Response:
        return Response(generate_latest(meters.registry), media_type="text/plain; version=0.0.4")

    @app.post("/v1/predict", tags=["classifier"], openapi_extra=_body(settings), responses=_problems())
    async def predict(
        request: Request, top: int = Query(5, ge=1, le=1000), detail: bool = Query(False)
    ) -> dict[str, Any]:
        return {"predictions": await _predict(request, app, classifier, settings, top, detail)}

    return app


def _add_facts(app: FastAPI, classifier: PictureClassifier) -> None:
    samples = classifier.gallery()

    @app.get("/v1/model", tags=["classifier"])
    def model() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        return {
            "classes": list(classifier.classes),
            "image_size": classifier.image_size,
            "channels": classifier.channels,
            "threshold": classifier.threshold,
            "version": __version__,
        }

    @app.get("/v1/gallery", tags=["classifier"])
    def gallery() -> dict[str, list[dict[str, str]]]:  # pyright: ignore[reportUnusedFunction]
        return {"samples": samples}


async def _predict(
    request: Request, app: FastAPI, classifier: PictureClassifier, settings: ServeSettings, top: int, detail: bool
) -> list[dict[str, Any]]:
    pictures = await _receive(request, settings)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(settings.seconds):
            read = [
                await loop.run_in_executor(app.state.decoders, classifier.read, content, name)
                for name, content in pictures
            ]
            answer = app.state.batcher.submit(np.stack([image for image, _ in read]))
            rows = await asyncio.wrap_future(answer)
            details: list[dict[str, Any]] = [
                await loop.run_in_executor(app.state.decoders, classifier.detail, image) for image, _ in read if detail
            ]
    except UserError as error:
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
    except BusyError as error:
        raise _too_many() from error
    except TimeoutError as error:
        raise _RefusedError(HTTPStatus.GATEWAY_TIMEOUT, f"No answer within {settings.seconds:g} seconds.") from error
    told = [
        classifier.tell(name, notes, row).as_dict(top)
        for (name, _), (_, notes), row in zip(pictures, read, rows, strict=True)
    ]
    for each, (image, _), more in zip(told, read, details, strict=False):  # there are none where none are asked for
        each |= {"seen": base64.b64encode(to_png_bytes(image)).decode(), **more}
    return told


async def _receive(request: Request, settings: ServeSettings) -> list[tuple[str, bytes]]:
    """Returns what `_pictures` does, or refuses: who sends slowly holds a place that others wait for."""
    try:
        async with asyncio.timeout(settings.seconds):
            return await _pictures(request, settings)
    except TimeoutError as error:
        told = {"Connection": "close"}  # what may still come would be taken for the next request
        late = f"The request did not arrive within {settings.seconds:g} seconds."
        raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, late, told) from error


async def _pictures(request: Request, settings: ServeSettings) -> list[tuple[str, bytes]]:
    """Returns the pictures of a request with what to call each, in any of the forms that are taken."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        found = [("picture 1", await _read(request, settings.most_bytes))]
    elif kind == "application/json":
        found = _from_json(await _read(request, settings.most_bytes))
    elif kind == "multipart/form-data":
        found = await _from_form(request, settings)
    else:
        raise _RefusedError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "Send a picture as image/*, several as multipart/form-data, or base64 as application/json.",
        )
    if not found or not all(content for _, content in found):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "There is no picture in the request, or an empty one.")
    if len(found) > settings.most_pictures:
        raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {settings.most_pictures} pictures at once.")
    return found


async def _read(request: Request, most: int) -> bytes:
    """Reads the body, never more than `most` bytes of it."""
    read = bytearray()
    try:
        async for part in request.stream():
            read += part
            if len(read) > most:
                raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {most} bytes are taken.")
    except ClientDisconnect:  # nobody will read this, but meters and log count it
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "The request ended before its body.") from None
    return bytes(read)


def _from_json(body: bytes) -> list[tuple[str, bytes]]:
    try:
        pictures = json.loads(body)["pictures"]
        if not isinstance(pictures, list):
            raise TypeError
        return [(f"picture {n}", base64.b64decode(each, validate=True)) for n, each in enumerate(pictures, start=1)]
    except (ValueError, KeyError, TypeError, binascii.Error, RecursionError) as error:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, 'The body must be {"pictures": [base64, ...]}.') from error


async def _from_form(request: Request, settings: ServeSettings) -> list[tuple[str, bytes]]:
    body = await _read(request, settings.most_bytes)

    async def again() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, again).form(max_files=settings.most_pictures, max_fields=8) as form:
            uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            return [(f"picture {n}", await each.read()) for n, each in enumerate(uploads, start=1)]
    except (MultiPartException, HTTPException, ValueError) as error:
        detail = getattr(error, "detail", None) or getattr(error, "message", None) or "it is damaged"
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"The form cannot be read: {detail}") from error


class _Frame:
    """What every request goes through: token, a full house, headers, meters, a line in the log.

    Plain ASGI: a middleware of functions costs as much as all the rest of a request.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, meters: _Meters) -> None:
        self._app, self._settings, self._meters = app, settings, meters
        self._log = logging.getLogger("dynaconv.serve")
        self._open = 0
        """Requests for predictions that are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, method = time.perf_counter(), scope["method"]
        if method == "HEAD":  # is GET without the content
            scope = {**scope, "method": "GET"}
        path = scope["path"] if scope["path"] in PATHS else "other"
        status = 500  # if nothing is sent

        async def send_framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            elif method == "HEAD":
                message["body"] = b""
            await send(message)

        app = self._refuse(scope) or self._app
        counts = path == "/v1/predict"
        self._open += counts
        try:
            await app(scope, receive, send_framed)
        finally:
            self._open -= counts
            seconds = time.perf_counter() - started
            self._meters.requests.labels(path, str(status)).inc()
            self._meters.seconds.observe(seconds)
            line = {"method": method, "path": path, "status": status, "ms": round(1e3 * seconds, 2)}
            self._log.info(json.dumps(line))

    def _refuse(self, scope: Scope) -> Response | None:
        """Returns the answer to a request that is not even read."""
        if not scope["path"].startswith("/v1/"):
            return None
        if self._settings.token is not None and not _bears(Headers(scope=scope), self._settings.token):
            told = {"WWW-Authenticate": "Bearer"}
            return _problem(_RefusedError(HTTPStatus.UNAUTHORIZED, "A token is missing or wrong.", told))
        # Each holds a picture at least: reading and decoding what cannot be computed would slow down what can.
        if scope["path"] == "/v1/predict" and self._open >= self._settings.most_waiting:
            return _problem(_too_many())
        return None


def _too_many() -> _RefusedError:
    return _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "Too many pictures wait.", {"Retry-After": "1"})


def _add_problems(app: FastAPI) -> None:
    """Tells all refusals as problem+json."""

    @app.exception_handler(_RefusedError)
    async def refused(request: Request, error: _RefusedError) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _problem(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:  # pyright: ignore
        found = error.errors()[0]
        told = f"{'.'.join(str(part) for part in found['loc'])}: {found['msg']}."
        return _problem(_RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, told))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _problem(_RefusedError(HTTPStatus(error.status_code), str(error.detail), dict(error.headers or {})))


def _bears(headers: Headers, token: str) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _problem(error: _RefusedError) -> Response:
    content = {"type": "about:blank", "title": error.status.phrase, "status": int(error.status), "detail": error.detail}
    return JSONResponse(content, int(error.status), error.headers, media_type="application/problem+json")


def _add_page(app: FastAPI) -> None:
    folder = files("dynaconv.shipping") / "page"

    def serve(name: str, kind: str) -> None:
        content = (folder / (name or "index.html")).read_bytes()

        @app.get(f"/{name}", include_in_schema=False)
        def page() -> Response:  # pyright: ignore[reportUnusedFunction]
            return Response(content, media_type=f"{kind}; charset=utf-8")

    for name, kind in PAGE.items():
        serve(name, kind)


def _body(settings: ServeSettings) -> dict[str, Any]:
    binary = {"schema": {"type": "string", "format": "binary"}}
    several = {"type": "object", "required": ["pictures"], "properties": {"pictures": {"type": "array", "minItems": 1}}}
    strings = {"type": "string", "format": "byte"}
    form = json.loads(json.dumps(several))
    form["properties"]["pictures"]["items"] = {"type": "string", "format": "binary"}
    coded = json.loads(json.dumps(several))
    coded["properties"]["pictures"] |= {"items": strings, "maxItems": settings.most_pictures}
    content = {
        "image/*": binary,
        "multipart/form-data": {"schema": form},
        "application/json": {"schema": coded},
    }
    return {"requestBody": {"required": True, "content": content}}


def _problems() -> dict[int | str, dict[str, Any]]:
    problem = {"content": {"application/problem+json": {}}}
    told = {400: "No picture", 401: "No token", 408: "Did not arrive in time", 413: "Too large", 415: "Wrong type",
            422: "Not a readable picture", 503: "Too many pictures wait", 504: "Took too long"}  # fmt: skip
    return {status: {"description": words, **problem} for status, words in told.items()}
