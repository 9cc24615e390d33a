"""A small HTTP server around a running service: predictions, state, report, health and metrics."""

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import torch
import uvicorn
from anyio.to_thread import run_sync
from python_multipart.exceptions import FormParserError
from starlette.applications import Starlette
from starlette.datastructures import QueryParams, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from ttmpd.errors import InvalidValueError, TTMPDError, UnsupportedError
from ttmpd.serving.bodies import BodyReader, check_whole
from ttmpd.serving.metrics import CONTENT_TYPE, Metrics
from ttmpd.serving.requests import NPY_TYPES, Limits, from_images, from_json, from_npy
from ttmpd.serving.service import OnlineService

TYPES = 'application/json with "inputs", image/png, image/jpeg, multipart/form-data with images, application/x-npy'
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
DISCARD_SECONDS = 2.0
"""How long a body that is too large is read before it is turned away."""
MAX_TOP = 1000
"""Most classes that an answer lists."""


def create_app(service: OnlineService, limits: Limits | None = None) -> Starlette:
    """The application: ``POST /predict``, ``GET /state``, ``/report``, ``/health`` and ``/metrics``.

    Args:
        service: is closed when the application shuts down.
        limits: of a request.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_sync(service.close)

    metrics = Metrics()
    return Starlette(
        routes=[_predict_route(service, limits, metrics), *_view_routes(service, metrics)],
        middleware=[Middleware(Gate, max_bytes=limits.max_bytes, responded=metrics.responded)],
        exception_handlers={HTTPException: _refused, TTMPDError: _stated, Exception: _unexpected},  # type: ignore[dict-item]
        lifespan=lifespan,
    )


def serve(service: OnlineService, *, host: str = "127.0.0.1", port: int = 8000, limits: Limits | None = None) -> None:
    """Answer requests until the process is asked to end; then finish those under way and close the service."""
    app = create_app(service, limits)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10, server_header=False)


# ------------------------------------------------------------------------------------------------------------- predict


def _predict_route(service: OnlineService, limits: Limits, metrics: Metrics) -> Route:
    limiter, bodies = anyio.CapacityLimiter(limits.running), BodyReader(limits)
    under_way = 0

    async def predict(request: Request) -> JSONResponse:
        nonlocal under_way
        top, with_scores = _query(request.query_params)
        kind = _kind(request)
        body = await bodies.read(request)
        # A place is taken only now: a client that sends slowly keeps none from others.
        if under_way >= limits.running + limits.waiting:
            raise HTTPException(503, "the server must have a place for a request, but is busy; try again")
        under_way += 1
        try:
            decode = await _decoder(request, kind, body, service, limits)
            answer = await run_sync(_answer, service, decode, top, with_scores, metrics, limiter=limiter)
        finally:
            under_way -= 1
        return JSONResponse(answer)

    return Route("/predict", predict, methods=["POST"])


def _query(parameters: QueryParams) -> tuple[int, bool]:
    """Read the query: the number of classes that an answer lists, and true when it holds the scores."""
    top, scores = parameters.get("top", "5"), parameters.get("scores", "true").lower()
    if not (top.isascii() and top.isdigit() and len(top) < 9 and 1 <= int(top) <= MAX_TOP):
        raise HTTPException(422, f"query.top must be a whole number from 1 to {MAX_TOP}; correct the query")
    if scores not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
        raise HTTPException(422, "query.scores must be true or false; correct the query")
    return int(top), scores in ("true", "1", "yes", "on")


def _kind(request: Request) -> str:
    """The type of the body; known before any of it is read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "image/png", "image/jpeg", "multipart/form-data", *NPY_TYPES):
        raise HTTPException(415, f"the content type must be one of {TYPES}, but got {kind[:80]!r}")
    return kind


async def _decoder(
    request: Request, kind: str, body: bytes, service: OnlineService, limits: Limits
) -> Callable[[], Tensor]:
    """What decodes the body, to be run in a thread."""
    preprocessing = service.preprocessing
    if kind == "multipart/form-data":
        files = await _files(request, body, limits)
        return lambda: from_images(files, preprocessing, limits)
    if kind.startswith("image/"):
        return lambda: from_images([body], preprocessing, limits)
    decode = from_json if kind == "application/json" else from_npy
    return lambda: decode(body, preprocessing, limits)


async def _files(request: Request, body: bytes, limits: Limits) -> list[bytes]:
    """The bodies of the files of a form."""
    check_whole(body, request.headers["content-type"])

    async def whole() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, whole).form(max_files=limits.max_batch, max_fields=8) as form:
            return [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
    except (HTTPException, FormParserError) as error:  # of Starlette or of the gate; of the parser, which some hand on
        if isinstance(error, HTTPException) and error.status_code != 400:
            raise
        rule = f"a form must be well formed and hold at most {limits.max_batch} files and 8 other fields"
        raise HTTPException(422, f"{rule}, but does not; send several") from error


def _answer(
    service: OnlineService, read: Callable[[], Tensor], top: int, with_scores: bool, metrics: Metrics
) -> dict[str, Any]:
    batch = read()
    begun = time.perf_counter()
    try:
        batch = batch.to(service.device)
        answer = service.answer(batch)
        records = service.records(batch, answer, top=top, scores=with_scores)
    except torch.OutOfMemoryError:
        raise HTTPException(503, f"the device must have room for {len(batch)} samples; send fewer at once") from None
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # what modules raise for what they cannot take
        shape = "x".join(map(str, batch.shape[1:]))
        raise InvalidValueError(
            f"a sample must be what the model takes, but it cannot take values of the shape {shape}; send others"
        ) from error
    metrics.answered(answer.by, len(batch), time.perf_counter() - begun)
    return {"answered_by": answer.by, "answers": records}


# --------------------------------------------------------------------------------------------------------------- views


def _view_routes(service: OnlineService, metrics: Metrics) -> list[Route]:
    def state(_: Request) -> Response:
        return JSONResponse(service.state())

    def report(_: Request) -> Response:
        artifact = service.artifact
        try:
            page = None if artifact is None else (artifact / "report.html").read_bytes()
        except OSError:  # replaced by that of a newer student at this moment
            page = None
        if page is None:
            phase = service.state()["phase"]
            raise HTTPException(404, f"there must be a student to report on, but the service is {phase}; see /state")
        headers = {"content-security-policy": REPORT_POLICY, "x-content-type-options": "nosniff"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    def health(_: Request) -> Response:
        phase = service.state()["phase"]
        ready = phase != "closed"
        return JSONResponse({"live": True, "ready": ready, "phase": phase}, 200 if ready else 503)

    def show_metrics(_: Request) -> Response:
        return Response(metrics.text(service.state()), media_type=CONTENT_TYPE)

    views = {"/state": state, "/report": report, "/health": health, "/metrics": show_metrics}
    return [Route(path, view) for path, view in views.items()]


# -------------------------------------------------------------------------------------------------------------- errors


async def _refused(_: Request, error: HTTPException) -> JSONResponse:
    return _problem(error.status_code, str(error.detail), error.headers)


async def _stated(_: Request, error: TTMPDError) -> JSONResponse:
    return _problem(422 if isinstance(error, InvalidValueError | UnsupportedError) else 500, str(error))


async def _unexpected(_: Request, __: Exception) -> JSONResponse:  # it is raised again, and logged by what serves
    return _problem(500, "the server failed; look at its log")


def _problem(status: int, message: str, headers: Any = None) -> JSONResponse:
    """The answer to any error: JSON of what is wrong and what to do next."""
    error, _, step = message.rpartition("; ")
    steps = {404: "GET /state, /report, /health, /metrics or POST /predict", 405: "POST /predict, GET everything else"}
    plain = {"error": error or message, "next": step if error else steps.get(status, f"send {TYPES}")}
    extra = dict(headers or {}) | ({"retry-after": "1"} if status == 503 else {})
    return JSONResponse(plain, status, headers=extra)


class Gate:
    """Turns a request away as soon as its body is too large: by its stated length, else while it comes in.

    Args:
        app: what answers.
        max_bytes: of the body.
        responded: hears of the status of every response to a POST.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, responded: Callable[[int], None]) -> None:
        self.app, self.max_bytes, self.responded = app, max_bytes, responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        n_read = 0

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["method"] == "POST":
                self.responded(message["status"])
            await send(message)

        async def counted() -> Message:
            nonlocal n_read
            message = await receive()
            n_read += len(message.get("body", b""))
            if n_read > self.max_bytes:
                await _discard(receive, message, self.max_bytes)
                raise HTTPException(413, self._rule, {"connection": "close"})
            return message

        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated[:20]) > self.max_bytes:
            if b"expect" not in headers:  # such a client waits for the answer before it sends
                await _discard(receive, {"more_body": True}, self.max_bytes)
            await _problem(413, self._rule, {"connection": "close"})(scope, receive, noted)
        else:
            try:
                await self.app(scope, counted, noted)
            except Exception:  # it is answered outside of this gate
                if scope["method"] == "POST":
                    self.responded(500)
                raise

    @property
    def _rule(self) -> str:
        return f"a body must have at most {self.max_bytes} bytes; send fewer samples at once"


async def _discard(receive: Receive, message: Message, n_bytes: int) -> None:
    """Read on for a while and keep nothing: a connection that is closed while a client sends may lose the answer."""
    n_left = 4 * n_bytes
    with anyio.move_on_after(DISCARD_SECONDS):
        while message.get("more_body") and n_left > 0:
            message = await receive()
            n_left -= len(message.get("body", b""))


def default_limits(max_mb: float, max_batch: int) -> Limits:
    """Limits with as many requests at once as there are cores."""
    return Limits(max_bytes=int(max_mb * 2**20), max_batch=max_batch, running=max(2, os.cpu_count() or 2))
