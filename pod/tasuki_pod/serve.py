"""From settings to a serving process and out again: behind `tasuki prefill` and `decode`."""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from tasuki_common import logs, tracing
from tasuki_common.errors import ConfigError, TasukiError
from tasuki_common.listening import listen
from tasuki_common.messages import Role
from tasuki_common.settings import describe, load
from tasuki_pod.config import PodConfig
from tasuki_pod.engine_client import EngineLostError
from tasuki_pod.http import error_response
from tasuki_pod.pod import Pod, common_routes

log = logs.get("tasuki.serve")

Routes = Callable[[Pod], Sequence[BaseRoute]]

_BACKLOG = 2048
_CLOSE_SECONDS = 5.0


def main(role: Role, argv: Sequence[str], routes: Routes) -> int:
    """Serves until a signal or the engine's end; the exit status."""
    logs.setup(component=role)
    try:
        config = load(PodConfig, argv, prog=f"tasuki {role}")
        logs.setup(role, config.log_level, deployment=config.deployment)
        tracing.setup(role, config.pod_name)
        log.info("settings", **describe(config))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_run(config, role, routes))
    except ConfigError as error:
        log.error("cannot_start", reason=str(error))
        return 2


async def _run(config: PodConfig, role: Role, routes: Routes) -> int:
    listener = listen(config.host, config.port, _BACKLOG)
    port = listener.getsockname()[1]
    pod = Pod(config, role, f"http://{_bracketed(config.advertise_host)}:{port}")
    await pod.start()
    app = FastAPI(title=f"tasuki {role}", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(TasukiError, _answer_error)
    app.router.routes.extend([*common_routes(pod), *routes(pod)])
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(_CLOSE_SECONDS),
            backlog=_BACKLOG,
        )
    )
    leave, forced = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (forced if leave.is_set() else leave).set())
    serving = asyncio.ensure_future(server.serve([listener]))
    opening = asyncio.ensure_future(pod.open())
    leaving = asyncio.ensure_future(leave.wait())
    lost = asyncio.ensure_future(pod.client.lost())
    try:
        await asyncio.wait((serving, leaving, lost), return_when=asyncio.FIRST_COMPLETED)
        if lost.done() and not leave.is_set():
            log.error("engine_lost", pod=config.pod_name, reason=lost.result())
        opening.cancel()  # a pod that leaves does not open any more
        await pod.drain(forced)
    finally:
        server.should_exit = True
        await asyncio.wait((serving,), timeout=2 * _CLOSE_SECONDS)
        for task in (serving, opening, leaving, lost):
            task.cancel()
        results = await asyncio.gather(serving, opening, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, EngineLostError):
            raise result
    log.info("drain_6_gone", pod=config.pod_name)
    return 0 if leave.is_set() else 1


async def _answer_error(_: Request, error: Exception) -> Response:
    """What a plain route raised, in the shape of every error: a pod that loads answers 503."""
    assert isinstance(error, TasukiError)
    return error_response(error)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: the pod conducts the drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the process's handlers as they are."""
        yield
