"""One look at one deployment: observe, make the children as wanted, say what is seen.

It may be interrupted anywhere and started anew: every step is idempotent, and what is wanted comes
from the spec alone. What is remembered (`_applied`) only saves requests.
"""

import datetime
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec
import pydantic
import xxhash

from tasuki_common import logs
from tasuki_operator import builders, names, status
from tasuki_operator.api import Api, ApiError
from tasuki_operator.builders import Owner, Surroundings
from tasuki_operator.kinds import (
    BY_NAME,
    CHILDREN,
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    INFERENCE_DEPLOYMENT,
    POD,
    SECRET,
    Kind,
)
from tasuki_operator.metrics import Metrics
from tasuki_operator.outside import Outside
from tasuki_operator.schema import Spec
from tasuki_operator.status import Observed
from tasuki_operator.store import Key, Store
from tasuki_operator.troubles import Trouble

log = logs.get("tasuki.operator")

Manifest = dict[str, Any]

_UNSETTLED_SECONDS = 1.5
"""Until the next look while something moves: the index tells of nothing by itself."""
_PATIENCE = 1.3
"""Grows the time between looks at what should move and does not."""


class _GoneError(Exception):
    """The deployment was deleted while it was looked at."""


class Reconciler:
    """Keeps deployments as their specs say; `resync` seconds is how long a drift of the transfer
    Secret, which is not watched, may stay unseen."""

    def __init__(
        self,
        api: Api,
        store: Store,
        outside: Outside,
        around: Surroundings,
        metrics: Metrics,
        *,
        endpoint: str,
        resync: float,
    ) -> None:
        self._api, self._store, self._outside, self._around = api, store, outside, around
        self._metrics, self._endpoint, self._resync = metrics, endpoint, resync
        self._unchanged: dict[Key, int] = {}
        self._applied: dict[tuple[str, str, str], tuple[str, str]] = {}

    async def reconcile(self, key: Key) -> float | None:
        """Looks at `key`; returns after how many seconds to look again."""
        body = self._store.deployment(key)
        if body is None or body["metadata"].get("deletionTimestamp"):
            self._count()
            return None
        try:
            refusal, spec = await self._children(key, body)
            changed, settled = await self._status(key, body, spec, refusal)
        except _GoneError:
            self._unchanged.pop(key, None)
            return None
        except ApiError as error:
            if error.reason == "NamespaceTerminating":
                return None
            raise
        looks = self._unchanged[key] = 0 if changed else self._unchanged.get(key, 0) + 1
        patience = _UNSETTLED_SECONDS * _PATIENCE ** min(looks, 20)
        return self._resync if settled else min(patience, self._resync)

    async def _children(self, key: Key, body: Manifest) -> tuple[Trouble | None, Spec | None]:
        """Makes them as wanted, or tells why it cannot; and the spec, where it is one."""
        try:
            spec = Spec.model_validate(body["spec"])
        except pydantic.ValidationError as error:
            return Trouble("InvalidSpec", _explain(error)), None
        rival = self._store.rival(key)
        if rival is not None:
            return Trouble("NameTaken", _rivalry(rival)), spec
        owner = Owner(namespace=key.namespace, name=key.name, uid=body["metadata"]["uid"])
        try:
            uid = await self._transfer_secret(key, owner, spec)
            wanted = builders.desired(owner, spec, self._around, uid)
            for manifest in wanted:
                await self._make(key, owner, manifest)
            await self._prune(key, owner, wanted)
        except _ForeignError as error:
            return Trouble("NameTaken", str(error)), spec
        except ApiError as error:
            if not error.is_refusal or error.reason == "NamespaceTerminating":
                raise
            log.warning("child_refused", deployment=str(key), reason=str(error))
            return Trouble("ChildRefused", f"The API server refuses a child: {error}"), spec
        return None, spec

    async def _transfer_secret(self, key: Key, owner: Owner, spec: Spec) -> str | None:
        """Makes the Secret where none is given; its uid."""
        if spec.transfer.key_secret is not None:
            return None
        name = names.transfer_secret(owner.name)
        found = await self._api.get(SECRET, owner.namespace, name)
        if found is None:
            await self._still_there(key, owner)
            value = secrets.token_urlsafe(32)
            try:
                found = await self._api.create(builders.transfer_secret(owner, value))
            except ApiError as error:
                if error.status != 409:
                    raise
                found = await self._api.get(SECRET, owner.namespace, name) or {"metadata": {}}
            self._metrics.applied.labels("Secret").inc()
        _must_be_ours(found, owner, "Secret", name)
        return str(found["metadata"]["uid"])

    async def _make(self, key: Key, owner: Owner, manifest: Manifest) -> None:
        """Applies one child unless it is known to be as wanted."""
        kind, name = BY_NAME[manifest["kind"]], manifest["metadata"]["name"]
        memory = (kind.name, owner.namespace, name)
        wanted = _digest(manifest)
        live = self._store.get(kind, key, name)
        if live is not None and self._applied.get(memory) == (wanted, _version(live)):
            return
        if live is None:
            await self._still_there(key, owner)
            live = await self._api.get(kind, owner.namespace, name)
        if live is not None:
            _must_be_ours(live, owner, kind.name, name)
        result = await self._api.apply(manifest)
        self._store.put(result)
        self._applied[memory] = (wanted, _version(result))
        self._metrics.applied.labels(kind.name).inc()

    async def _still_there(self, key: Key, owner: Owner) -> None:
        """Before anything is created: a watch may have missed that the owner was deleted."""
        found = await self._api.get(INFERENCE_DEPLOYMENT, owner.namespace, owner.name)
        if found is not None:
            self._store.put(found)
            metadata = found["metadata"]
            if metadata["uid"] == owner.uid and not metadata.get("deletionTimestamp"):
                return
        elif (body := self._store.deployment(key)) is not None:
            self._store.drop(body)
        raise _GoneError

    async def _prune(self, key: Key, owner: Owner, wanted: list[Manifest]) -> None:
        """Deletes children that are wanted no more; settings that a pod still has are kept."""
        kept = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in wanted}
        if not self._is_still(key):
            kept |= {("ConfigMap", m["metadata"]["name"]) for m in self._of(key, CONFIG_MAP)}
        for kind in CHILDREN:
            for body in self._of(key, kind):
                name = body["metadata"]["name"]
                if (kind.name, name) not in kept and _is_ours(body, owner):
                    await self._api.delete(kind, owner.namespace, name, body["metadata"]["uid"])
                    self._store.drop(body)
                    self._applied.pop((kind.name, owner.namespace, name), None)

    def _is_still(self, key: Key) -> bool:
        """Whether all pods are of the newest revision, so that no old settings are needed."""
        revisions = {
            (pod["metadata"].get("labels") or {}).get(names.REVISION) for pod in self._of(key, POD)
        }
        for deployment in self._of(key, DEPLOYMENT):
            template = deployment["spec"]["template"]["metadata"].get("labels") or {}
            revisions.add(template.get(names.REVISION))
            now = deployment.get("status") or {}
            if now.get("observedGeneration") != deployment["metadata"].get("generation"):
                return False
        return len(revisions) <= 1

    def _of(self, key: Key, kind: Kind) -> list[Manifest]:
        return self._store.children(key, kind)

    async def _status(
        self, key: Key, body: Manifest, spec: Spec | None, refusal: Trouble | None
    ) -> tuple[bool, bool]:
        """Writes the status when it has changed; whether it has, and whether nothing moves."""
        before: Manifest = body.get("status") or {}
        said = status.of(await self._observed(key, body, spec, refusal))
        if said != before:
            metadata = body["metadata"]
            written = {
                "apiVersion": INFERENCE_DEPLOYMENT.api_version,
                "kind": INFERENCE_DEPLOYMENT.name,
                "metadata": {name: metadata[name] for name in ("name", "namespace", "uid")},
                "status": said,
            }
            try:
                result = await self._api.apply(written, "status")
            except ApiError as error:
                if error.status in (404, 409):  # deleted, or another one of that name by now
                    await self._still_there(
                        key, Owner(namespace=key.namespace, name=key.name, uid=metadata["uid"])
                    )
                raise
            self._store.put(result)
            await self._tell(result, before, said)
        self._count()
        ready, moving = (status.condition(said, kind) for kind in ("Ready", "Progressing"))
        return said != before, ready["status"] == "True" and moving["status"] == "False"

    async def _observed(
        self, key: Key, body: Manifest, spec: Spec | None, refusal: Trouble | None
    ) -> Observed:
        listing = await self._outside.listing(
            key.namespace, spec.prefix_index.url_secret if spec else None
        )
        pods = self._of(key, POD)
        prefix = {f"{key.namespace}/{pod['metadata']['name']}" for pod in pods}
        return Observed(
            namespace=key.namespace,
            name=key.name,
            generation=int(body["metadata"]["generation"]),
            spec=spec,
            previous=body.get("status") or {},
            deployments=_by_role(self._of(key, DEPLOYMENT)),
            pods={
                role: [pod for pod in pods if pod["metadata"]["labels"].get(names.ROLE) == role]
                for role in names.ROLES
            },
            members=None
            if listing.members is None
            else [member for member in listing.members if member.pod in prefix],
            index_error=listing.error,
            gateways=await self._outside.gateways(),
            endpoint=self._endpoint,
            refusal=refusal,
            now=datetime.datetime.now(datetime.UTC),
        )

    async def _tell(self, body: Manifest, before: Manifest, after: Manifest) -> None:
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
            await self._post_event(body, new, "Normal" if is_good else "Warning")

    async def _post_event(self, body: Manifest, said: Manifest, severity: str) -> None:
        metadata, now = body["metadata"], _now()
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
            await self._api.create(event)
        except ApiError as error:  # it is told in the status too
            log.warning("event_not_written", reason=str(error))

    def _count(self) -> None:
        counts = {"True": 0, "False": 0}
        for key in self._store.all():
            body = self._store.deployment(key) or {}
            counts[status.condition(body.get("status") or {}, "Ready").get("status", "False")] += 1
        for ready, number in counts.items():
            self._metrics.deployments.labels(ready.lower()).set(number)


class _ForeignError(Exception):
    """An object of that name exists and is not ours to change."""


def _must_be_ours(body: Manifest, owner: Owner, kind: str, name: str) -> None:
    if not _is_ours(body, owner):
        raise _ForeignError(
            f"{kind} {name} exists and does not belong to this deployment; "
            "delete it, or give the deployment another name."
        )


def _is_ours(body: Manifest, owner: Owner) -> bool:
    references = body["metadata"].get("ownerReferences") or []
    return any(reference["uid"] == owner.uid for reference in references)


def _digest(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(manifest))


def _version(live: Manifest) -> str:
    """Changes when anything changes that could be ours: the status of an object does not."""
    metadata = live["metadata"]
    parts = [
        metadata.get("uid"),
        metadata.get("generation") or metadata.get("resourceVersion"),
        *(metadata.get(name) for name in ("labels", "annotations", "ownerReferences")),
    ]
    return _digest({"parts": parts})


def _by_role(bodies: list[Manifest]) -> Mapping[names.Role, Manifest]:
    found: dict[names.Role, Manifest] = {}
    for body in bodies:
        role = body["metadata"]["labels"].get(names.ROLE)
        if role in names.ROLES:
            found[role] = body
    return found


def _explain(error: pydantic.ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [
        f"{'.'.join(('spec', *map(str, problem['loc'])))}: "
        f"{problem['msg'].removeprefix('Value error, ')}."
        for problem in problems
    ]
    return " ".join(lines)


def _rivalry(rival: Key) -> str:
    return (
        f"Deployment {rival} is older and serves a name that this one wants; choose another "
        "spec.model.servedName (or alias), or delete one of the two."
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
