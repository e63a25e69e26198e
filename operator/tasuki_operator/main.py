"""`tasuki operator`: one process, of which several may run; the one with the lease works."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import kopf
from aiohttp import web

from tasuki_common import logs
from tasuki_common.errors import ConfigError
from tasuki_common.listening import listen
from tasuki_common.settings import describe, load
from tasuki_operator.api import Api
from tasuki_operator.autoscaling import Autoscalers
from tasuki_operator.builders import Surroundings
from tasuki_operator.config import OperatorConfig
from tasuki_operator.handlers import watch
from tasuki_operator.kinds import CHILDREN, INFERENCE_DEPLOYMENT, POD, POD_MONITOR
from tasuki_operator.lease import Lease, LostError, identity
from tasuki_operator.metrics import Metrics
from tasuki_operator.outside import Outside
from tasuki_operator.reconciler import Reconciler
from tasuki_operator.store import Store
from tasuki_operator.watched import Watched
from tasuki_operator.work import WorkQueue

log = logs.get("tasuki.operator")

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_RELEASE_SECONDS = 3.0
_BACKLOG = 128


def main(argv: Sequence[str]) -> int:
    """Works until a signal; the exit status."""
    logs.setup(component="operator")
    try:
        config = load(OperatorConfig, argv, prog="tasuki operator")
        logs.setup(component="operator", level=config.log_level)
        logging.getLogger("kopf").setLevel(logging.WARNING)  # it tells of every event
        log.info("settings", **describe(config))
        return asyncio.run(_run(config))
    except ConfigError as error:
        log.error("cannot_start", reason=str(error))
        return 2


async def _run(config: OperatorConfig) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    metrics = Metrics()
    api = Api(_log_in(), metrics)
    lease = Lease(api, _own_namespace() or config.system_namespace, identity())
    probes = await _serve(config, metrics)
    try:
        if not await _first(lease.acquire(), stop):
            return 0
        metrics.leader.set(1)
        working = asyncio.ensure_future(_work(config, api, metrics, stop))
        holding = asyncio.ensure_future(lease.hold())
        await asyncio.wait((working, holding), return_when=asyncio.FIRST_COMPLETED)
        holding.cancel()
        stop.set()
        results = await asyncio.gather(working, holding, return_exceptions=True)
        return _outcome(results)
    finally:
        metrics.leader.set(0)
        with contextlib.suppress(Exception):  # the lease ends by itself as well
            await asyncio.wait_for(lease.release(), _RELEASE_SECONDS)
        await api.close()
        await probes.cleanup()


def _outcome(results: Sequence[BaseException | None]) -> int:
    """0 after a signal; a lost lease is 1, so that the process starts anew and stands by."""
    for result in results:
        if isinstance(result, LostError):
            log.error("lease_lost", reason=str(result))
            return 1
        if isinstance(result, Exception):
            raise result
    return 0


async def _work(config: OperatorConfig, api: Api, metrics: Metrics, stop: asyncio.Event) -> None:
    """What the leader does, until `stop`."""
    if not await api.serves(INFERENCE_DEPLOYMENT):
        raise ConfigError("The cluster knows no InferenceDeployment; apply crds/ first.")
    monitors = await api.serves(POD_MONITOR)
    kinds = (INFERENCE_DEPLOYMENT, POD, *CHILDREN)
    watched = Watched(
        api=api,
        kinds=tuple(kind for kind in kinds if kind is not POD_MONITOR or monitors),
        namespaces=config.namespaces,
        store=Store(),
        autoscalers=Autoscalers(),
        queue=WorkQueue(metrics),
    )
    gateway = (config.system_namespace, config.gateway) if config.gateway else None
    outside = Outside(api, gateway)
    reconciler = _reconciler(config, watched, outside, metrics)
    try:
        await watched.relist()
        await outside.listing(config.redis_url)  # while nothing else keeps the event loop busy
        for key in watched.store.all():
            watched.queue.add(key)
        await _together(
            stop,
            watch(_log_in, watched, stop),
            watched.relist_now_and_then(config.relist_seconds),
            *(watched.queue.work(reconciler.reconcile) for _ in range(config.workers)),
        )
    finally:
        await outside.close()


def _reconciler(
    config: OperatorConfig, watched: Watched, outside: Outside, metrics: Metrics
) -> Reconciler:
    around = Surroundings(
        image=config.engine_image,
        redis_url=config.redis_url,
        system_namespace=config.system_namespace,
        metrics_namespace=config.metrics_namespace,
        pod_monitors=POD_MONITOR in watched.kinds,
    )
    return Reconciler(
        watched.api,
        watched.store,
        watched.autoscalers,
        outside,
        around,
        metrics,
        endpoint=config.endpoint,
        resync=config.resync_seconds,
        namespaces=config.namespaces,
    )


async def _together(
    stop: asyncio.Event,
    watching: Coroutine[Any, Any, None],
    *others: Coroutine[Any, Any, None],
) -> None:
    """Runs all until one ends or `stop` is set, which `watching` heeds; raises what they raised."""
    tasks = [asyncio.ensure_future(each) for each in (watching, *others, stop.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.set()
        for task in tasks[1:]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _first(waited: Any, stop: asyncio.Event) -> bool:
    """Whether `waited` was done before `stop` was set."""
    task, stopping = asyncio.ensure_future(waited), asyncio.ensure_future(stop.wait())
    await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not task.done():
        task.cancel()
        return False
    task.result()
    return True


def _own_namespace() -> str:
    return _NAMESPACE.read_text("utf-8").strip() if _NAMESPACE.is_file() else ""


def _log_in() -> kopf.ConnectionInfo:
    """The pod's service account, else what KUBECONFIG says.

    Raises:
        ConfigError: there is neither.
    """
    settings = kopf.OperatorSettings()
    info = kopf.login_with_service_account(settings=settings)
    info = info or kopf.login_with_kubeconfig(settings=settings)
    if info is None:
        raise ConfigError("There is no cluster: run in a pod, or set KUBECONFIG.")
    return info


async def _serve(config: OperatorConfig, metrics: Metrics) -> web.AppRunner:
    """Probes and metrics. A replica that stands by is as well as the one that works."""

    async def well(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def numbers(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.add_routes(
        [web.get("/health", well), web.get("/ready", well), web.get("/metrics", numbers)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listener = listen(config.host, config.port, _BACKLOG)
    await web.SockSite(runner, listener).start()
    log.info("serving", port=listener.getsockname()[1])
    return runner
