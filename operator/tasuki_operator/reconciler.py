"""One look at one deployment: observe, make the children as wanted, say what is seen.

It may be interrupted anywhere and started anew: every step is idempotent, and what is wanted comes
from the spec alone.
"""

import datetime
import functools
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pydantic

from tasuki_operator import credentials, names, rivals, status
from tasuki_operator.api import Api, ApiError
from tasuki_operator.autoscaling import Autoscalers
from tasuki_operator.builders import Owner, Surroundings
from tasuki_operator.children import Children, GoneError
from tasuki_operator.events import Teller
from tasuki_operator.kinds import CONFIG_MAP, DEPLOYMENT, INFERENCE_DEPLOYMENT, POD, Kind
from tasuki_operator.metrics import Metrics
from tasuki_operator.observed import Observed, index_name, is_ready
from tasuki_operator.outside import Listing, Outside
from tasuki_operator.schema import Spec
from tasuki_operator.store import Key, Store, held_names, served_names
from tasuki_operator.troubles import Trouble

Manifest = dict[str, Any]

_UNSETTLED_SECONDS = 1.5
"""Until the next look while something moves: the index tells of nothing by itself."""
_PATIENCE = 1.3
"""Grows the time between looks at what should move and does not."""


class Reconciler:
    """Keeps deployments as their specs say; `resync` seconds is how long a drift of the transfer
    Secret, which is not watched, may stay unseen."""

    def __init__(
        self,
        api: Api,
        store: Store,
        autoscalers: Autoscalers,
        outside: Outside,
        around: Surroundings,
        metrics: Metrics,
        *,
        endpoint: str,
        resync: float,
        namespaces: Collection[str] = (),
    ) -> None:
        """`namespaces`: those that are served; none: all."""
        self._api, self._store, self._outside, self._around = api, store, outside, around
        self._autoscalers = autoscalers
        self._metrics, self._endpoint, self._resync = metrics, endpoint, resync
        self._namespaces = frozenset(namespaces)
        self._unchanged: dict[Key, int] = {}
        self._tellers: dict[Key, Teller] = {}
        self._children = Children(api, store, autoscalers, around, metrics)
        for ready in ("true", "false"):
            gauge = metrics.deployments.labels(ready)
            gauge.set_function(functools.partial(self._number, ready))

    async def reconcile(self, key: Key) -> float | None:
        """Looks at `key`; returns after how many seconds to look again."""
        body = self._store.deployment(key)
        if body is None or body["metadata"].get("deletionTimestamp"):
            self._forget(key)
            return None
        try:
            look = await self._look(key, body)
            changed, settled = await self._status(key, body, look)
        except GoneError:
            self._forget(key)
            return None
        except ApiError as error:
            if error.is_farewell:
                return None
            raise
        looks = self._unchanged[key] = 0 if changed else self._unchanged.get(key, 0) + 1
        patience = _UNSETTLED_SECONDS * _PATIENCE ** min(looks, 20)
        return self._resync if settled else min(patience, self._resync)

    def _forget(self, key: Key) -> None:
        """Of a deployment that is deleted nothing is remembered."""
        self._unchanged.pop(key, None)
        self._children.forget(key)
        self._tellers.pop(key, None)
        self._metrics.deployment_ready.remove(str(key))

    async def _look(self, key: Key, body: Manifest) -> "_Look":
        """Makes the children as wanted, or finds why it cannot."""
        try:
            spec = Spec.model_validate(body["spec"])
        except pydantic.ValidationError as error:
            default = self._around.redis_url
            listing = await self._outside.listing(default)
            return _Look(None, default, listing, Trouble("InvalidSpec", _explain(error)))
        rival = self._store.rival(key)  # now: an await later it may be deleted
        named = await credentials.read(self._api, key.namespace, spec)
        url = credentials.index_url(spec, named, self._around.redis_url)
        listing = (
            await self._outside.listing(url)
            if url is not None
            else Listing(None, "the Secret with its URL is missing")
        )
        stranger = rivals.stranger(key, body, listing.members or (), self._namespaces)
        deployments, policy = self._of(key, DEPLOYMENT), names.gateway_policy(key.name)
        kept = credentials.kept(deployments, self._store.get(CONFIG_MAP, key, policy))
        hindrances = (
            None if rival is None else rivals.owner(rival),
            credentials.exposed_password(spec, self._around.redis_url),
            None if deployments else stranger,  # who serves already goes on
            None if kept else named.trouble,
        )
        refusal = next((trouble for trouble in hindrances if trouble is not None), None)
        if refusal is None:
            refusal = await self._children.make(key, _owner(body), spec, named, kept)
        worry = named.trouble or stranger
        same = url is not None and credentials.is_same_redis(url, self._around.redis_url)
        return _Look(spec, url, listing, refusal, worry, same, rival is None)

    def _of(self, key: Key, kind: Kind) -> list[Manifest]:
        return self._store.children(key, kind)

    async def _status(self, key: Key, body: Manifest, look: "_Look") -> tuple[bool, bool]:
        """Writes the status when it has changed; whether it has, and whether nothing moves."""
        before: Manifest = body.get("status") or {}
        said = status.of(await self._observed(key, body, look))
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
                    await self._children.still_there(key, _owner(body))
                raise
            self._store.put(result)
            teller = self._tellers.setdefault(key, Teller(self._api))
            await teller.tell(result, before, said)
        ready, moving = (status.condition(said, kind) for kind in ("Ready", "Progressing"))
        serves = ready["status"] == "True"
        self._metrics.deployment_ready.labels(str(key)).set(serves)
        return said != before, serves and moving["status"] == "False"

    async def _observed(self, key: Key, body: Manifest, look: "_Look") -> Observed:
        every = self._of(key, POD)
        pods = {
            role: [pod for pod in every if pod["metadata"]["labels"].get(names.ROLE) == role]
            for role in names.ROLES
        }
        listing = await self._listing(body, look, pods["decode"])
        listed = (listing.by_pod.get(index_name(key.namespace, pod), ()) for pod in every)
        return Observed(
            namespace=key.namespace,
            name=key.name,
            generation=int(body["metadata"]["generation"]),
            spec=look.spec,
            names=served_names(body) if look.has_names else held_names(body),
            previous=body.get("status") or {},
            deployments=_by_role(self._of(key, DEPLOYMENT)),
            pods=pods,
            scaled=self._autoscalers.roles(key),
            members=None
            if listing.members is None
            else [member for members in listed for member in members],
            index_error=listing.error,
            gateways=await self._outside.gateways() if look.is_gateways_index else None,
            endpoint=self._endpoint if look.is_gateways_index else "",
            refusal=look.refusal,
            worry=look.worry,
            now=datetime.datetime.now(datetime.UTC),
        )

    async def _listing(self, body: Manifest, look: "_Look", decode: Sequence[Manifest]) -> Listing:
        """The look's; asked for anew where it alone says of a deployment that it is ready no more.

        It is older than the pods: a new one is in the index before it is ready, and then the old
        one, which it lists, leaves.
        """
        namespace = body["metadata"]["namespace"]
        before = status.condition(body.get("status") or {}, "Ready").get("status")
        ready = [index_name(namespace, pod) for pod in decode if is_ready(pod)]
        is_worse = before == "True" and ready and not any(map(look.listing.by_pod.get, ready))
        if look.url is None or look.listing.members is None or not is_worse:
            return look.listing
        return await self._outside.listing(look.url, since=time.monotonic())

    def _number(self, ready: str) -> int:
        """How many deployments have that status of Ready ("true" or "false")."""
        bodies = (self._store.deployment(key) or {} for key in self._store.all())
        said = (status.condition(body.get("status") or {}, "Ready") for body in bodies)
        return sum(one.get("status", "False").lower() == ready for one in said)


class _Look(NamedTuple):
    """What one look at a deployment has found out."""

    spec: Spec | None
    """None: it does not fit the schema."""
    url: str | None
    """Of the index; None: the Secret with it is missing."""
    listing: Listing
    refusal: Trouble | None
    """Why the children are not as wanted."""
    worry: Trouble | None = None
    """What a person should see to, though what there was is kept up."""
    is_gateways_index: bool = True
    """Whether it is in the index that the installation's gateways read."""
    has_names: bool = False
    """Whether the names that it wants are its own."""


def _owner(body: Manifest) -> Owner:
    return Owner(**{name: body["metadata"][name] for name in ("namespace", "name", "uid")})


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
