"""The HTTP interface of a model. `dstrain serve` runs it; it knows nothing of sockets, processes or signals.

    POST /predict   {"inputs": ["text", …]} → {"predictions": [{"label": …, "probability": …}, …]}
                    {"inputs": [{"question": …, "context": …}, …]} where the model takes several fields
    GET  /          a page to try the model in a browser        GET /docs      the OpenAPI page
    GET  /health    200 while the process lives                 GET /ready     503 from the moment it is to stop
    GET  /metrics   Prometheus

Refusals are JSON with a `detail`: 401 token, 413 too large, 422 wrong shape, 429 come back later, 504 too late.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Response
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, create_model
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dstrain.serve.batcher import Batcher, QueueFull

MAX_INPUTS = 256  # of one request
MAX_CHARACTERS = 100_000  # of one input
RETRY_AFTER_SECONDS = 1
PAGE = Path(__file__).with_name("page.html")

# ECMAScript's, Python's and Rust's \s differ in these: named, the pattern means the same to every reader of the schema.
NOT_BLANK = r"[^\s\u001c-\u001f\u0085\ufeff]"
Text = Annotated[str, StringConstraints(min_length=1, max_length=MAX_CHARACTERS, pattern=NOT_BLANK)]


@dataclass(frozen=True)
class Limits:
    """What one server takes at a time."""

    batch_rows: int = 32
    queue_rows: int = 512
    threads: int = 2
    body_bytes: int = 1 << 20
    timeout_seconds: float = 30.0


Values = tuple[str, ...]


def request_model(fields: tuple[str, ...]) -> type[BaseModel]:
    """The body of a request: a list of texts, or of objects where the model takes several fields of each input."""
    config = ConfigDict(extra="forbid")
    kind: Any = Text
    if len(fields) > 1:
        definitions: dict[str, Any] = {field: (Text, ...) for field in fields}
        kind = create_model("Input", __config__=config, **definitions)
    inputs = (list[kind], Field(min_length=1, max_length=MAX_INPUTS))
    return create_model("PredictRequest", __config__=config, __doc__="What to apply the model to.", inputs=inputs)


class PredictResponse(BaseModel):
    """One prediction for each input, in order."""

    predictions: list[dict[str, Any]]


class Refusal(BaseModel):
    """Why a request was not answered."""

    detail: str


class Health(BaseModel):
    """State of the server."""

    status: str


def make_app(
    name: str,
    predict: Callable[[list[Values]], list[dict[str, Any]]],
    *,
    fields: tuple[str, ...] = ("text",),
    limits: Limits,
    token: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The application of one model.

    Args:
        name: of the model, shown on the page and in the metrics.
        predict: from inputs, a tuple of texts each, to one JSON object for each; called in threads.
        fields: what the model takes of each input; a single one is given as a text, several as an object.
        limits: what is taken at a time.
        token: which requests for predictions and metrics must bear; None lets all in.
        stopping: whether the server was told to stop; `/ready` says so, and what was begun is still answered.
    """
    registry = CollectorRegistry()
    batch_rows = Histogram(
        "dstrain_batch_rows", "Inputs in a batch", buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256], registry=registry
    )
    waiting = Gauge("dstrain_queue_rows", "Inputs that wait for the model", registry=registry)
    answered = Counter("dstrain_requests", "Requests for predictions", ["code"], registry=registry)
    latency = Histogram("dstrain_request_seconds", "From a request to its answer", registry=registry)
    batcher: Batcher[Values, dict[str, Any]] = Batcher(
        predict,
        size=lambda values: sum(map(len, values)),
        batch_rows=limits.batch_rows,
        queue_rows=limits.queue_rows,
        threads=limits.threads,
        observe=batch_rows.observe,
    )
    waiting.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        computing = asyncio.create_task(batcher.run())
        yield
        computing.cancel()

    # Its /docs loads nothing from elsewhere: clusters have no way out.
    app = FastAPIOffline(redoc_url=None, title=f"dstrain: {name}", version="1", lifespan=lifespan)
    app.add_middleware(_LimitedBody, body_bytes=limits.body_bytes)
    app.add_middleware(_Measured, answered=answered, latency=latency)  # outermost: it sees what the others refuse
    guarded = [] if token is None else [Depends(_bearing(token))]
    refusals: dict[int | str, dict[str, Any]] = {
        code: {"model": Refusal, "description": text}
        for code, text in {
            400: "The body is not JSON",
            **({} if token is None else {401: "The bearer token is missing or wrong"}),
            413: "The body is too large",
            429: "The queue is full; come back later",
            504: "Not answered in time",
        }.items()
    }

    @app.post("/predict", responses=refusals, dependencies=guarded)
    async def predictions(request: request_model(fields)) -> PredictResponse:  # type: ignore[valid-type]
        """Apply the model to texts."""
        values = [
            (each,) if isinstance(each, str) else tuple(getattr(each, field) for field in fields)
            for each in request.inputs
        ]
        try:
            async with asyncio.timeout(limits.timeout_seconds):
                return PredictResponse(predictions=await batcher.answer(values))
        except QueueFull:
            message = f"{limits.queue_rows} inputs wait already; come back later"
            raise HTTPException(429, message, {"Retry-After": str(RETRY_AFTER_SECONDS)}) from None
        except TimeoutError:
            raise HTTPException(504, f"not answered within {limits.timeout_seconds:g} seconds") from None

    @app.get("/health")
    async def health() -> Health:
        """Whether the process lives."""
        return Health(status="alive")

    @app.get("/ready", responses={503: {"model": Health, "description": "It was told to stop"}})
    async def ready(response: Response) -> Health:
        """Whether new requests should come here."""
        response.status_code = 503 if stopping() else 200
        return Health(status="stopping" if stopping() else "ready")

    @app.get("/metrics", dependencies=guarded, include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = PAGE.read_text(encoding="utf-8").replace("FIELDS", json.dumps(fields).replace("<", "\\u003c"))
        return HTMLResponse(text, headers={"Content-Security-Policy": PAGE_POLICY})

    return app


# Only the page's own script and style, and requests to this server: nothing a text contains can run.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def _bearing(token: str) -> Callable[..., None]:
    """A dependency that refuses requests without the token."""

    def authorised(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(401, "give the server's token: Authorization: Bearer …", {"WWW-Authenticate": "Bearer"})

    return authorised


class _LimitedBody:
    """Refuses a body that is longer than allowed, by its announced length or, unannounced, as soon as it is."""

    def __init__(self, app: ASGIApp, body_bytes: int) -> None:
        self.app, self.body_bytes = app, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        too_long = announced.isdigit() and int(announced) > self.body_bytes
        messages: list[Message] = []
        length, more = 0, True
        while more and not too_long:
            messages.append(message := await receive())
            more = message.get("more_body", False)
            length += len(message.get("body", b""))
            too_long = length > self.body_bytes
        if too_long:
            response = Response(
                f'{{"detail":"the body is larger than {self.body_bytes} bytes; send fewer texts at a time"}}',
                413,
                {"Connection": "close"},
                "application/json",
            )
            return await response(scope, receive, send)
        read = iter(messages)

        async def replayed() -> Message:
            return next(read, None) or await receive()

        await self.app(scope, replayed, send)


class _Measured:
    """Counts and times the requests for predictions, refused ones too."""

    def __init__(self, app: ASGIApp, answered: Counter, latency: Histogram) -> None:
        self.app, self.answered, self.latency = app, answered, latency

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await self.app(scope, receive, send)
        begin = time.perf_counter()

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered.labels(str(message["status"])).inc()
                self.latency.observe(time.perf_counter() - begin)
            await send(message)

        await self.app(scope, receive, measured)
