"""Replicas that a HorizontalPodAutoscaler sets on a child: they are its, not ours.

Prefill pods have no scale subresource of their own, so an autoscaler of theirs names the child. As
long as there is one, the operator sets that Deployment's replicas to what they are; the spec's
number counts for the first time, and again when the autoscaler is gone.
"""

import collections
from collections.abc import Iterable
from typing import Any

from tasuki_operator import names
from tasuki_operator.kinds import DEPLOYMENT
from tasuki_operator.names import Role
from tasuki_operator.store import Key

Manifest = dict[str, Any]
Name = tuple[str, str]
"""Namespace and name of an autoscaler."""


class Autoscalers:
    """Autoscalers whose target is, by its name, a child of an InferenceDeployment."""

    def __init__(self) -> None:
        self._targets: dict[Name, tuple[Key, Role]] = {}
        self._roles: dict[Key, dict[Name, Role]] = collections.defaultdict(dict)

    def put(self, body: Manifest) -> set[Key]:
        """Takes in a new or changed autoscaler; returns whose pods it scales, or did until now."""
        changed = self.drop(body)
        target = _target(body)
        if target is not None:
            self._add(_name(body), target)
            changed.add(target[0])
        return changed

    def drop(self, body: Manifest) -> set[Key]:
        """Forgets one that is deleted; returns whose pods it scaled."""
        before = self._remove(_name(body))
        return set() if before is None else {before}

    def known(self) -> set[Name]:
        """All; taken before a list that `replace` gets."""
        return set(self._targets)

    def replace(self, before: set[Name], bodies: Iterable[Manifest]) -> set[Key]:
        """Takes a list for the truth, except for what came after `before`; returns what changed."""
        targets = {_name(body): target for body in bodies if (target := _target(body)) is not None}
        changed: set[Key] = set()
        for name in before | set(targets):
            old, new = self._targets.get(name), targets.get(name)
            if old == new:
                continue
            changed |= {target[0] for target in (old, new) if target is not None}
            self._remove(name)
            if new is not None:
                self._add(name, new)
        return changed

    def roles(self, key: Key) -> frozenset[Role]:
        """The roles of a deployment whose replicas are an autoscaler's."""
        return frozenset(self._roles.get(key, {}).values())

    def _add(self, name: Name, target: tuple[Key, Role]) -> None:
        key, role = self._targets[name] = target
        self._roles[key][name] = role

    def _remove(self, name: Name) -> Key | None:
        """Whose pods it scaled."""
        before = self._targets.pop(name, None)
        if before is None:
            return None
        key = before[0]
        del self._roles[key][name]
        if not self._roles[key]:
            del self._roles[key]
        return key


def keep_replicas(manifest: Manifest, live: Manifest) -> Manifest:
    """The Deployment `manifest` with the replicas of `live`, for this version of it alone.

    They are not left out: a field that its only manager leaves out is set back to its default.
    """
    metadata = manifest["metadata"] | {"resourceVersion": live["metadata"]["resourceVersion"]}
    spec = manifest["spec"] | {"replicas": live["spec"]["replicas"]}
    return manifest | {"metadata": metadata, "spec": spec}


def _target(body: Manifest) -> tuple[Key, Role] | None:
    target = body["spec"]["scaleTargetRef"]
    if target["kind"] != DEPLOYMENT.name:
        return None
    for role in names.ROLES:
        name = target["name"].removesuffix(names.of_role("", role))
        if name != target["name"]:
            return Key(body["metadata"]["namespace"], name), role
    return None


def _name(body: Manifest) -> Name:
    return body["metadata"]["namespace"], body["metadata"]["name"]
