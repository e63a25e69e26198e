"""`tasuki operator`: one process, of which several may run; the one with the lease works."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import kopf
from aiohttp import web

from tasuki_common import logs
from tasuki_common.errors import ConfigError
from tasuki_common.settings import describe, load
from tasuki_operator import names
from tasuki_operator.api import Api, ApiError
from tasuki_operator.builders import Surroundings
from tasuki_operator.config import OperatorConfig
from tasuki_operator.handlers import watch
from tasuki_operator.kinds import CHILDREN, INFERENCE_DEPLOYMENT, POD, POD_MONITOR, Kind
from tasuki_operator.lease import Lease, LostError
from tasuki_operator.metrics import Metrics
from tasuki_operator.outside import Outside
from tasuki_operator.reconciler import Reconciler
from tasuki_operator.store import Store
from tasuki_operator.work import WorkQueue

log = logs.get("tasuki.operator")

_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_RELIST_SECONDS = 300.0
_RELEASE_SECONDS = 3.0


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
    lease = Lease(api, _own_namespace() or config.system_namespace, socket.gethostname())
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


async def _work(
    config: OperatorConfig,
    api: Api,
    metrics: Metrics,
    stop: asyncio.Event,
) -> None:
    """What the leader does, until `stop`."""
    if not await api.serves(INFERENCE_DEPLOYMENT):
        raise ConfigError("The cluster knows no InferenceDeployment; apply crds/ first.")
    monitors = await api.serves(POD_MONITOR)
    kinds = tuple(
        kind
        for kind in (INFERENCE_DEPLOYMENT, POD, *CHILDREN)
        if kind is not POD_MONITOR or monitors
    )
    gateway = (config.system_namespace, config.gateway) if config.gateway else None
    store, queue = Store(), WorkQueue(metrics)
    outside = Outside(api, config.redis_url, gateway)
    around = Surroundings(
        image=config.engine_image,
        redis_url=config.redis_url,
        system_namespace=config.system_namespace,
        metrics_namespace=config.metrics_namespace,
        pod_monitors=monitors,
    )
    reconciler = Reconciler(
        api,
        store,
        outside,
        around,
        metrics,
        endpoint=config.endpoint,
        resync=config.resync_seconds,
    )
    await _relist(api, kinds, config.namespaces, store, queue)
    for key in store.all():
        queue.add(key)
    tasks = [
        asyncio.ensure_future(watch(_log_in, kinds, config.namespaces, store, queue, stop)),
        asyncio.ensure_future(_relist_now_and_then(api, kinds, config.namespaces, store, queue)),
        *(asyncio.ensure_future(queue.work(reconciler.reconcile)) for _ in range(config.workers)),
    ]
    try:
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait((*tasks, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.set()
        for task in (stopping, *tasks[1:]):
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await outside.close()
    for result in results:
        if isinstance(result, Exception):
            raise result


async def _relist(
    api: Api, kinds: Sequence[Kind], namespaces: Sequence[str], store: Store, queue: WorkQueue
) -> None:
    """Compares with full lists: a watch that was away has missed what was deleted meanwhile."""
    for kind in kinds:
        labels = "" if kind is INFERENCE_DEPLOYMENT else names.DEPLOYMENT
        before = store.known(kind)
        bodies: list[dict[str, Any]] = []
        for namespace in namespaces or (None,):
            bodies += await api.list(kind, namespace, labels)
        for key in store.replace(kind, before, bodies):
            queue.add(key)


async def _relist_now_and_then(
    api: Api, kinds: Sequence[Kind], namespaces: Sequence[str], store: Store, queue: WorkQueue
) -> None:
    while True:
        await asyncio.sleep(_RELIST_SECONDS)
        try:
            await _relist(api, kinds, namespaces, store, queue)
        except (ApiError, aiohttp.ClientError, OSError) as error:
            log.warning("api_server_away", reason=str(error))


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
    site = web.TCPSite(runner, config.host, config.port)
    await site.start()
    log.info("serving", port=runner.addresses[0][1])
    return runner
