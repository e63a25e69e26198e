"""What a person should notice of Ready and Degraded, as Kubernetes events and log lines."""

import datetime
import secrets
from typing import Any

from tasuki_common import logs
from tasuki_operator import names, status
from tasuki_operator.api import Api, ApiError
from tasuki_operator.kinds import EVENT, INFERENCE_DEPLOYMENT

log = logs.get("tasuki.operator")

Manifest = dict[str, Any]


async def tell(api: Api, body: Manifest, before: Manifest, after: Manifest) -> None:
    """Kubernetes events for what a person should notice: Ready and Degraded that change."""
    for kind, good in (("Ready", "True"), ("Degraded", "False")):
        old, new = status.condition(before, kind), status.condition(after, kind)
        if (old.get("status"), old.get("reason")) == (new["status"], new["reason"]):
            continue
        is_good = new["status"] == good
        log.info(
            "condition",
            deployment=f"{body['metadata']['namespace']}/{body['metadata']['name']}",
            type=kind,
            status=new["status"],
            reason=new["reason"],
            message=new["message"],
        )
        if not is_good and kind == "Ready":
            continue  # what is wrong stands in Degraded; to start is not wrong
        if is_good and kind == "Degraded" and not old:
            continue
        await _post(api, body, new, "Normal" if is_good else "Warning")


async def _post(api: Api, body: Manifest, said: Manifest, severity: str) -> None:
    metadata = body["metadata"]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    event = {
        "apiVersion": EVENT.api_version,
        "kind": EVENT.name,
        "metadata": {
            "namespace": metadata["namespace"],
            "name": f"{metadata['name']}.{secrets.token_hex(6)}",
        },
        "involvedObject": {
            "apiVersion": INFERENCE_DEPLOYMENT.api_version,
            "kind": INFERENCE_DEPLOYMENT.name,
            **{name: metadata[name] for name in ("name", "namespace", "uid")},
        },
        "type": severity,
        "reason": said["reason"],
        "message": said["message"],
        "source": {"component": names.MANAGER},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    try:
        await api.create(event)
    except ApiError as error:  # it is told in the status too
        log.warning("event_not_written", reason=str(error))
