"""The application: its endpoints, and what requests pass through before they reach one."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from bytelm.inference import Engine
from bytelm.language_model import LanguageModel
from bytelm.serving.completions import CompletionWriter, engine_requests
from bytelm.serving.errors import JSON, ApiError, ClientGoneError, add_handlers
from bytelm.serving.limits import Gate, deadline, while_connected
from bytelm.serving.metrics import Measured, Metrics
from bytelm.serving.prompts import prompt_choices
from bytelm.serving.schemas import (
    Completion,
    CompletionRequest,
    ErrorResponse,
    ModelCard,
    ModelList,
    PatchesRequest,
    PatchesResponse,
)
from bytelm.serving.segmentation import applicable_rules, check_length, patches_response
from bytelm.serving.settings import Settings
from bytelm.serving.sidework import Sidework
from bytelm.serving.worker import Answers, EngineLike, Worker
from bytelm.version import __version__

PAGE = Path(__file__).parent / "page"
"""Folder of the page at ``/``: its files are served under their names, ``index.html`` at ``/``."""
UNREAD_SECONDS = 5.0
"""Seconds after the end of a request in which its client can still read what is left."""
PAGE_HEADERS = {
    # Model output is never markup; were it ever inserted as such, its scripts would not run.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 404, 413, 429, 500, 503, 504)
}


def create_app(
    lm: LanguageModel, settings: Settings | None = None, engine: EngineLike | None = None
) -> FastAPI:
    """Return the application that serves a model.

    Args:
        lm: the model, which nothing else may move while it is served.
        settings: settings of the server.
        engine: engine that generates instead of one for ``lm``.

    Raises:
        ConfigError: the model cannot predict, or the settings do not fit it.
    """
    server = Server(lm, settings or Settings(), engine)
    app = FastAPI(
        title="bytelm",
        version=__version__,
        lifespan=server.lifespan,
        # The pages of documentation load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = server
    add_handlers(app)
    _add_routes(app, server)
    _add_page(app)
    app.add_middleware(Gate, settings=server.settings)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=server.settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type"),
        )
    app.add_middleware(Measured, metrics=server.metrics)
    return app


class Server:
    """What the endpoints share: the model, the engine's thread, the thread for work on texts."""

    def __init__(self, lm: LanguageModel, settings: Settings, engine: EngineLike | None) -> None:
        self.lm, self.settings, self.metrics = lm, settings, Metrics()
        if engine is None:
            engine = Engine(
                lm.module,
                settings.num_slots,
                max_document_bytes=settings.max_document_bytes,
                speculate=settings.speculate,
            )
        self.worker = Worker(engine, settings.max_open, self.metrics.on_step)
        self.sidework = Sidework()
        self.metrics.watch(lambda: self.worker.stats)
        self._created = int(time.time())
        self._rules = applicable_rules(lm)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the threads while the application runs."""
        self.worker.start()
        yield
        self.sidework.close()
        await self.worker.stop()

    @property
    def card(self) -> dict[str, Any]:
        """Description of the model."""
        rule = self.lm.config.patching
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self._created,
            "owned_by": "bytelm",
            "max_document_bytes": self.settings.max_document_bytes,
            "context_bytes": self.lm.context_bytes,
            "patching": None if rule is None else rule.model_dump(mode="json", exclude_none=True),
            "patching_rules": self._rules,
            "has_patches": getattr(self.lm.config.model, "has_patches", False),
        }

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model.

        Raises:
            ApiError: the name is not that of the model.
        """
        if name is not None and name != self.settings.name:
            raise ApiError(
                404,
                f"there is no model {name!r}: this server has {self.settings.name!r}",
                param="model",
                code="model_not_found",
            )

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Answer a completion request, whole or as a stream."""
        self.check_model(body.model)
        client = request.scope.get("client_name", "")
        requests = engine_requests(body, client, self.settings.max_document_bytes)
        ends = time.monotonic() + self.settings.timeout
        writer = CompletionWriter(body, self.settings.name)
        answers = self.worker.submit(requests)
        try:
            async with deadline(ends):
                await while_connected(request.receive, answers.accepted)
                if body.echo and body.logprobs is not None:
                    work = partial(prompt_choices, self.lm, body.prompt, body.logprobs)
                    writer.read(await while_connected(request.receive, self.sidework.run(work)))
                if not body.stream:
                    whole = await while_connected(request.receive, writer.whole(answers))
                    return Response(whole, media_type="application/json")
        except BaseException:
            answers.cancel()
            raise
        return EventStream(writer, answers, ends)

    async def patch(self, body: PatchesRequest, request: Request) -> Response:
        """Answer a request for the patches of a text."""
        self.check_model(body.model)
        check_length(body.text, self.settings.max_document_bytes)
        work = partial(patches_response, self.lm, self.settings.name, body)
        async with deadline(time.monotonic() + self.settings.timeout):
            found = await while_connected(request.receive, self.sidework.run(work))
        return Response(found, media_type="application/json")


class EventStream(Response):
    """Completion as server-sent events; its requests are cancelled when the client disconnects."""

    def __init__(self, writer: CompletionWriter, answers: Answers, ends: float) -> None:
        super().__init__(
            media_type="text/event-stream",
            # Proxies must not wait for the end.
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        del self.headers["content-length"]
        self._writer, self._answers, self._ends = writer, answers, ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except (ClientGoneError, OSError):  # TimeoutError is an OSError
            pass
        finally:
            self._answers.cancel()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._writer.events(self._answers, self._ends):
            # A client that does not read what it asked for is left at some time.
            async with deadline(self._ends + UNREAD_SECONDS):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _add_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/completions", response_model=Completion, responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts; a stream of server-sent events with `stream`."""
        return await server.complete(body, request)

    @app.post("/v1/patches", response_model=PatchesResponse, responses=ERRORS)
    async def patches(body: PatchesRequest, request: Request) -> Response:
        """Cut a text into patches."""
        return await server.patch(body, request)

    @app.get("/v1/models", response_model=ModelList, responses=ERRORS)
    async def models() -> Response:
        """List the models: there is one."""
        return JSON({"object": "list", "data": [server.card]})

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=ERRORS)
    async def model(name: str) -> Response:
        """Describe a model."""
        server.check_model(name)
        return JSON(server.card)

    @app.get("/health")
    async def health() -> Response:
        """Whether the server can answer requests."""
        if not server.worker.is_alive:
            return JSON({"status": "failed"}, 503)
        return JSON({"status": "ok"})

    @app.get("/metrics", responses=ERRORS)
    async def metrics() -> Response:
        """Metrics in the format of Prometheus."""
        return Response(server.metrics.text(), headers={"Content-Type": PROMETHEUS})


def _add_page(app: FastAPI) -> None:
    """Add a route for each file of the page, so that other paths stay unknown."""

    def add(path: Path, route: str) -> None:
        async def file() -> Response:
            return FileResponse(path, headers=PAGE_HEADERS)

        app.add_api_route(route, file, include_in_schema=False)

    for path in sorted(PAGE.glob("*.*")):
        add(path, "/" if path.name == "index.html" else f"/{path.name}")
