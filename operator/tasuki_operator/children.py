"""A deployment's children in the cluster: made as wanted, set right, and deleted when unwanted."""

import base64
import secrets
from typing import Any, ClassVar

import msgspec
import xxhash

from tasuki_operator import autoscaling, builders, credentials, names, troubles
from tasuki_operator.api import Api, ApiError
from tasuki_operator.autoscaling import Autoscalers
from tasuki_operator.builders import Owner, Surroundings
from tasuki_operator.credentials import Credentials, Named
from tasuki_operator.kinds import (
    BY_NAME,
    CHILDREN,
    CONFIG_MAP,
    DEPLOYMENT,
    INFERENCE_DEPLOYMENT,
    POD,
    SECRET,
)
from tasuki_operator.metrics import Metrics
from tasuki_operator.schema import Spec
from tasuki_operator.store import Key, Store
from tasuki_operator.troubles import Trouble

Manifest = dict[str, Any]


class GoneError(Exception):
    """The deployment was deleted while it was looked at."""


class Children:
    """Makes children. What is remembered of those that were applied only saves requests."""

    def __init__(
        self,
        api: Api,
        store: Store,
        autoscalers: Autoscalers,
        around: Surroundings,
        metrics: Metrics,
    ) -> None:
        self._api, self._store, self._autoscalers = api, store, autoscalers
        self._around, self._metrics = around, metrics
        self._applied: dict[Key, dict[tuple[str, str], tuple[str, bool, str]]] = {}

    def forget(self, key: Key) -> None:
        """Of a deployment that is deleted nothing is remembered."""
        self._applied.pop(key, None)

    async def make(
        self, key: Key, owner: Owner, spec: Spec, named: Named, kept: Credentials | None
    ) -> Trouble | None:
        """Makes them as wanted, or tells why it cannot; without a Secret, with what is `kept`."""
        try:
            if named.trouble is None or kept is None:
                transfer_key = await self._transfer_key(key, owner, named)
                model = spec.model.served_name or key.name
                kept = credentials.made(model, named, transfer_key)
            wanted = builders.desired(owner, spec, self._around, kept)
            if any(self._live(key, owner, manifest) is None for manifest in wanted):
                await self.still_there(key, owner)
            for manifest in wanted:
                await self._make(key, owner, manifest)
            await self._prune(key, owner, wanted)
        except _HinderedError as error:
            return Trouble(error.reason, str(error))
        return None

    async def _transfer_key(self, key: Key, owner: Owner, named: Named) -> bytes:
        """The one that is given, else that of the Secret which is made here."""
        if (given := named.values.get(credentials.TRANSFER)) is not None:
            return given
        name = names.transfer_secret(owner.name)
        found = await self._api.get(SECRET, owner.namespace, name)
        if found is None:
            await self.still_there(key, owner)
            made = builders.transfer_secret(owner, secrets.token_urlsafe(32))
            try:
                found = await self._api.create(made)
            except ApiError as error:
                if error.is_refusal:
                    raise _RefusedError(made, error) from error
                if error.status != 409:
                    raise
                found = await self._api.get(SECRET, owner.namespace, name) or {"metadata": {}}
            self._metrics.applied.labels("Secret").inc()
        _must_be_ours(found, owner, "Secret", name)
        return base64.b64decode(found["data"][names.KEY_ENTRY])

    async def _make(self, key: Key, owner: Owner, manifest: Manifest) -> None:
        """Applies one child unless it is known to be as wanted."""
        kind, name = BY_NAME[manifest["kind"]], manifest["metadata"]["name"]
        applied = self._applied.setdefault(key, {})
        wanted, is_scaled = _digest(manifest), self._is_scaled(key, manifest)
        live = self._live(key, owner, manifest)
        known = applied.get((kind.name, name))
        if live is not None and known == (wanted, is_scaled, _version(live)):
            return
        if live is None or is_scaled:  # it may be scaled while we look
            live = await self._api.get(kind, owner.namespace, name)
        if live is not None:
            _must_be_ours(live, owner, kind.name, name)
            if is_scaled:
                manifest = autoscaling.keep_replicas(manifest, live)
        try:
            result = await self._api.apply(manifest)
        except ApiError as error:
            if not error.is_refusal:
                raise
            raise _RefusedError(manifest, error) from error
        self._store.put(result)
        applied[kind.name, name] = (wanted, is_scaled, _version(result))
        self._metrics.applied.labels(kind.name).inc()

    def _is_scaled(self, key: Key, manifest: Manifest) -> bool:
        """Whether an autoscaler sets its replicas."""
        role = manifest["metadata"]["labels"].get(names.ROLE)
        return manifest["kind"] == DEPLOYMENT.name and role in self._autoscalers.roles(key)

    def _live(self, key: Key, owner: Owner, manifest: Manifest) -> Manifest | None:
        """The child as the watches know it; None if it was another's, which may be gone by now."""
        live = self._store.get(BY_NAME[manifest["kind"]], key, manifest["metadata"]["name"])
        return live if live is not None and _is_ours(live, owner) else None

    async def still_there(self, key: Key, owner: Owner) -> None:
        """Before anything is created: a watch may have missed that the owner was deleted."""
        found = await self._api.get(INFERENCE_DEPLOYMENT, owner.namespace, owner.name)
        if found is not None:
            self._store.put(found)
            metadata = found["metadata"]
            if metadata["uid"] == owner.uid and not metadata.get("deletionTimestamp"):
                return
        elif (body := self._store.deployment(key)) is not None:
            self._store.drop(body)
        raise GoneError

    async def _prune(self, key: Key, owner: Owner, wanted: list[Manifest]) -> None:
        """Deletes children that are wanted no more; settings that a pod still has are kept."""
        kept = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in wanted}
        if not self._is_still(key):
            maps = self._store.children(key, CONFIG_MAP)
            kept |= {(CONFIG_MAP.name, one["metadata"]["name"]) for one in maps}
        for kind in CHILDREN:
            for body in self._store.children(key, kind):
                name = body["metadata"]["name"]
                if (kind.name, name) not in kept and _is_ours(body, owner):
                    await self._api.delete(kind, owner.namespace, name, body["metadata"]["uid"])
                    self._store.drop(body)
                    self._applied[key].pop((kind.name, name), None)

    def _is_still(self, key: Key) -> bool:
        """Whether all pods are of the newest revision, so that no old settings are needed."""
        pods = (pod for pod in self._store.children(key, POD) if not troubles.is_over(pod))
        revisions = {(pod["metadata"].get("labels") or {}).get(names.REVISION) for pod in pods}
        for deployment in self._store.children(key, DEPLOYMENT):
            template = deployment["spec"]["template"]["metadata"].get("labels") or {}
            revisions.add(template.get(names.REVISION))
            now = deployment.get("status") or {}
            if now.get("observedGeneration") != deployment["metadata"].get("generation"):
                return False
        return len(revisions) <= 1


class _HinderedError(Exception):
    """Why a child cannot be made as wanted; `reason` as in the status."""

    reason: ClassVar[str]


class _ForeignError(_HinderedError):
    """An object of that name exists and is not ours to change."""

    reason = "NameTaken"


class _LeftoverError(_HinderedError):
    """One of a deleted deployment of the same name is still there."""

    reason = "Leftover"


class _RefusedError(_HinderedError):
    """The API server will not have a child as the spec wants it."""

    reason = "ChildRefused"

    def __init__(self, manifest: Manifest, error: ApiError) -> None:
        metadata = manifest["metadata"]
        role = metadata["labels"].get(names.ROLE)
        source = f"spec.{role}" if role and manifest["kind"] == DEPLOYMENT.name else "spec"
        child = f"{manifest['kind']} {metadata['name']}"
        super().__init__(f"The API server refuses {child}, which {source} describes: {error}")


def _must_be_ours(body: Manifest, owner: Owner, kind: str, name: str) -> None:
    if _is_ours(body, owner):
        return
    if any(
        reference["kind"] == INFERENCE_DEPLOYMENT.name and reference["name"] == owner.name
        for reference in _owners(body)
    ):
        raise _LeftoverError(
            f"{kind} {name} is left from a deployment of this name that was deleted; Kubernetes' "
            "garbage collector removes it, and then this one's is made."
        )
    raise _ForeignError(
        f"{kind} {name} exists and does not belong to this deployment; "
        "delete it, or give the deployment another name."
    )


def _is_ours(body: Manifest, owner: Owner) -> bool:
    return any(reference["uid"] == owner.uid for reference in _owners(body))


def _owners(body: Manifest) -> list[Manifest]:
    return list(body["metadata"].get("ownerReferences") or [])


def _digest(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(manifest))


def _version(live: Manifest) -> str:
    """Changes when anything changes that could be ours: the status of an object does not."""
    metadata = live["metadata"]
    parts = [
        metadata.get("uid"),
        metadata.get("generation") or metadata.get("resourceVersion"),
        *(metadata.get(name) for name in ("labels", "ownerReferences")),
    ]
    return _digest({"parts": parts})
