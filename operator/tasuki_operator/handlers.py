"""kopf's part: it watches, and each event only says whose turn it is."""

import asyncio
from collections.abc import Callable
from typing import Any

import kopf

from tasuki_operator import names
from tasuki_operator.kinds import INFERENCE_DEPLOYMENT, Kind
from tasuki_operator.store import Store
from tasuki_operator.work import WorkQueue

_WATCH_SECONDS = 600
_IDENTITY: Any = "tasuki-operator"
"""Given, as kopf would ask for the user's name, and a pod's user has none."""


async def watch(
    log_in: Callable[[], kopf.ConnectionInfo],
    kinds: tuple[Kind, ...],
    namespaces: tuple[str, ...],
    store: Store,
    queue: WorkQueue,
    stop: asyncio.Event,
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
        key = store.drop(body) if event["type"] == "DELETED" else store.put(body)
        queue.add(key)

    for kind in kinds:
        address = (kind.group, kind.version, kind.plural)
        kopf.on.event(*address, registry=registry, id=f"see-{kind.plural}")(on_event)
        if kind is not INFERENCE_DEPLOYMENT:
            settings.watching.label_selectors[address] = names.DEPLOYMENT
    await kopf.operator(
        registry=registry,
        settings=settings,
        standalone=True,
        identity=_IDENTITY,
        clusterwide=not namespaces,
        namespaces=namespaces,
        stop_flag=stop,
    )
