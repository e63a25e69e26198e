"""kopf's part: it watches, and each event only says whose turn it is."""

import asyncio
from collections.abc import Callable
from typing import Any

import kopf

from tasuki_operator import names
from tasuki_operator.kinds import AUTOSCALER, INFERENCE_DEPLOYMENT
from tasuki_operator.watched import Watched

_WATCH_SECONDS = 600
_IDENTITY: Any = "tasuki-operator"
"""Given, as kopf would ask for the user's name, and a pod's user has none."""


async def watch(
    log_in: Callable[[], kopf.ConnectionInfo], watched: Watched, stop: asyncio.Event
) -> None:
    """Runs kopf until `stop`: events of InferenceDeployments and of all that is labelled as theirs.

    The handlers are of the lowest level: no finalizer, no annotation, nothing is written.
    """
    registry = kopf.OperatorRegistry()
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = _WATCH_SECONDS
    settings.execution.max_workers = 1

    @kopf.on.login(registry=registry)
    def login(**_: Any) -> kopf.ConnectionInfo:
        return log_in()

    async def on_event(event: kopf.RawEvent, **_: Any) -> None:
        body: dict[str, Any] = dict(event["object"])
        take = watched.store.drop if event["type"] == "DELETED" else watched.store.put
        for key in take(body):
            watched.queue.add(key)

    async def on_autoscaler(event: kopf.RawEvent, **_: Any) -> None:
        body: dict[str, Any] = dict(event["object"])
        known = watched.autoscalers
        take = known.drop if event["type"] == "DELETED" else known.put
        for key in take(body):
            watched.queue.add(key)

    address = (AUTOSCALER.group, AUTOSCALER.version, AUTOSCALER.plural)
    kopf.on.event(*address, registry=registry, id="see-autoscalers")(on_autoscaler)
    for kind in watched.kinds:
        address = (kind.group, kind.version, kind.plural)
        kopf.on.event(*address, registry=registry, id=f"see-{kind.plural}")(on_event)
        if kind is not INFERENCE_DEPLOYMENT:
            settings.watching.label_selectors[address] = names.DEPLOYMENT
    await kopf.operator(
        registry=registry,
        settings=settings,
        standalone=True,
        identity=_IDENTITY,
        clusterwide=not watched.namespaces,
        namespaces=watched.namespaces,
        stop_flag=stop,
    )
