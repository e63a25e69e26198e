"""What a person should notice of Ready and Degraded, as Kubernetes events and log lines."""

import datetime
import math
import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

from tasuki_common import logs
from tasuki_operator import names, status
from tasuki_operator.api import Api, ApiError
from tasuki_operator.kinds import EVENT, INFERENCE_DEPLOYMENT

log = logs.get("tasuki.operator")

Manifest = dict[str, Any]
Severity = Literal["Normal", "Warning"]

_SILENCE_SECONDS = 60.0


class Teller:
    """Tells of one deployment; the same thing at most once in `_SILENCE_SECONDS`, for what comes
    and goes would fill the API server with events."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._told: dict[str, float] = {}

    async def tell(self, body: Manifest, before: Manifest, after: Manifest) -> None:
        """Posts what has changed from one status to the next, and logs it."""
        for said, severity in changes(before, after):
            log.info(
                "condition",
                deployment=f"{body['metadata']['namespace']}/{body['metadata']['name']}",
                **{name: said[name] for name in ("type", "status", "reason", "message")},
            )
            if severity is not None and self.is_due(said["reason"], time.monotonic()):
                await _post(self._api, body, said, severity)

    def is_due(self, reason: str, now: float) -> bool:
        """Whether it was not told of late; asking is telling."""
        if now - self._told.get(reason, -math.inf) < _SILENCE_SECONDS:
            return False
        self._told[reason] = now
        return True


def changes(before: Manifest, after: Manifest) -> Iterator[tuple[Manifest, Severity | None]]:
    """Conditions Ready and Degraded that have changed; None: no person need notice."""
    for kind, good in (("Ready", "True"), ("Degraded", "False")):
        old, new = status.condition(before, kind), status.condition(after, kind)
        if (old.get("status"), old.get("reason")) == (new["status"], new["reason"]):
            continue
        is_good = new["status"] == good
        # What is wrong stands in Degraded; to start is not wrong.
        is_news = is_good if kind == "Ready" else bool(old) or not is_good
        severity: Severity = "Normal" if is_good else "Warning"
        yield new, severity if is_news else None


async def _post(api: Api, body: Manifest, said: Manifest, severity: Severity) -> None:
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
