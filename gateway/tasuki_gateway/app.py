"""The gateway as an ASGI application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import metadata

import msgspec
from fastapi import FastAPI
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tasuki_common.messages import ErrorBody, ErrorResponse
from tasuki_gateway import failures, metrics
from tasuki_gateway.config import GatewayConfig
from tasuki_gateway.exchange import Exchange
from tasuki_gateway.fleet import Fleet
from tasuki_gateway.http_client import HttpClient
from tasuki_gateway.relay import Legs
from tasuki_gateway.service import Handler, Service
from tasuki_index import Index

_FIRST_LOOK_SECONDS = 5.0
"""A gateway listens once it has looked around: a new replica knows the models it is asked for."""


class _Endpoint:
    """A handler of `Service` as an ASGI application of its own."""

    def __init__(self, service: Service, name: str, handler: Handler) -> None:
        self._service, self._name, self._handler = service, name, handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._service.serve(self._name, self._handler, Exchange(scope, receive, send))


class _Front:
    """Takes the hot paths straight to their endpoints; all else goes through the framework."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._hot = {
            route.path: route.endpoint
            for route in app.router.routes
            if isinstance(route, Route) and "POST" in (route.methods or ())
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self._hot.get(scope["path"]) if hot else None
        await (endpoint or self._app)(scope, receive, send)


class Gateway:
    """All parts of a gateway, and the application in front of them."""

    def __init__(self, config: GatewayConfig) -> None:
        self.draining = False
        self.client = HttpClient(connect_timeout=config.connect_timeout)
        self.index = Index(config.redis_url) if config.redis_url else None
        self.fleet = Fleet(self.client, self.index, config.seeds, config.inline_characters)
        legs = Legs(config, self.fleet, self.client, self.index)
        self.service = Service(config, self.fleet, legs)
        self.app = _Front(self._build())

    def _build(self) -> FastAPI:
        service = self.service

        def api(path: str, method: str, handler: Handler) -> Route:
            return Route(path, _Endpoint(service, path, handler), methods=[method])

        def plain(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
            return Route(path, endpoint, methods=["GET"])

        app = FastAPI(
            title="tasuki gateway",
            lifespan=self._lifespan,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            exception_handlers={HTTPException: _http_error},
        )
        app.router.routes[:] = [
            api("/v1/chat/completions", "POST", service.chat),
            api("/v1/completions", "POST", service.completions),
            api("/tokenize", "POST", service.tokenize),
            api("/detokenize", "POST", service.detokenize),
            api("/v1/models", "GET", service.models),
            api("/v1/models/{model:path}", "GET", service.one_model),
            plain("/health", self._alive),
            plain("/ping", self._alive),
            plain("/started", self._started),
            plain("/ready", self._ready),
            plain("/version", self._version),
            plain("/metrics", self._metrics),
        ]
        return app

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        refreshing = asyncio.create_task(self.fleet.run())
        await self.fleet.changed(_FIRST_LOOK_SECONDS)
        try:
            yield
        finally:
            refreshing.cancel()
            await asyncio.gather(refreshing, return_exceptions=True)
            self.client.close()
            if self.index is not None:
                await self.index.close()

    async def _alive(self, request: Request) -> Response:
        return Response(b"{}", media_type="application/json")

    async def _started(self, request: Request) -> Response:
        """200 once it knows the pods of the index: one that does not must replace none that does,
        for it would say 404 to what others answer."""
        started = self.fleet.informed
        body = msgspec.json.encode({"started": started})
        return Response(body, 200 if started else 503, media_type="application/json")

    async def _ready(self, request: Request) -> Response:
        """200 once at least one model has a ready decode pod, and until the drain."""
        models = sorted(self.fleet.groups)
        ready = bool(models) and not self.draining
        body = msgspec.json.encode({"ready": ready, "models": models})
        return Response(body, 200 if ready else 503, media_type="application/json")

    async def _version(self, request: Request) -> Response:
        body = msgspec.json.encode({"version": metadata.version("tasuki")})
        return Response(body, media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        metrics.event_loop_tasks.set(len(asyncio.all_tasks()))
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}."
    body = ErrorResponse(error=ErrorBody(message=message, type=failures.INVALID))
    return Response(
        msgspec.json.encode(body),
        error.status_code,
        headers=error.headers,
        media_type="application/json",
    )
