"""What the watches have told: the objects of every deployment, at hand without asking."""

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

from tasuki_operator import names
from tasuki_operator.kinds import INFERENCE_DEPLOYMENT, Kind

Manifest = dict[str, Any]


class Key(NamedTuple):
    """Namespace and name of an InferenceDeployment."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Store:
    """InferenceDeployments, and everything that carries the label `names.DEPLOYMENT`."""

    def __init__(self) -> None:
        self._deployments: dict[Key, Manifest] = {}
        self._children: dict[Key, dict[tuple[str, str], Manifest]] = collections.defaultdict(dict)

    def put(self, body: Manifest) -> Key:
        """Takes in a new or changed object; returns whose it is."""
        key = key_of(body)
        if _is_older(body, self._known(key, body)):
            return key
        if body["kind"] == INFERENCE_DEPLOYMENT.name:
            self._deployments[key] = body
        else:
            self._children[key][body["kind"], body["metadata"]["name"]] = body
        return key

    def drop(self, body: Manifest) -> Key:
        """Forgets a deleted object; returns whose it was."""
        key = key_of(body)
        if body["kind"] == INFERENCE_DEPLOYMENT.name:
            self._deployments.pop(key, None)
        else:
            self._children[key].pop((body["kind"], body["metadata"]["name"]), None)
        if not self._children[key]:
            del self._children[key]
        return key

    def known(self, kind: Kind) -> set[tuple[Key, str]]:
        """Whose objects of a kind, and their names; taken before a list that `replace` gets."""
        return {(key_of(body), body["metadata"]["name"]) for body in self._all(kind)}

    def replace(
        self, kind: Kind, before: set[tuple[Key, str]], bodies: Iterable[Manifest]
    ) -> set[Key]:
        """Takes a list for the truth; returns whose objects were unknown, or are gone.

        Only what a watch lost shows here, and it loses deletions while it is disconnected. What
        came after `before` was taken may be missing in the list, and stays.
        """
        changed: set[Key] = set()
        listed: set[tuple[Key, str]] = set()
        for body in bodies:
            name, key = body["metadata"]["name"], key_of(body)
            listed.add((key, name))
            found = self.get(kind, key, name)
            if found is None or _uid(found) != _uid(body):
                changed.add(key)
            self.put(body)
        for key, name in before - listed:
            gone = self.get(kind, key, name)
            if gone is not None:
                self.drop(gone)
                changed.add(key)
        return changed

    def deployment(self, key: Key) -> Manifest | None:
        """The InferenceDeployment."""
        return self._deployments.get(key)

    def all(self) -> list[Key]:
        """All InferenceDeployments."""
        return list(self._deployments)

    def get(self, kind: Kind, key: Key, name: str) -> Manifest | None:
        """One object of the deployment `key`, or the deployment itself."""
        if kind is INFERENCE_DEPLOYMENT:
            return self._deployments.get(key)
        return self._children.get(key, {}).get((kind.name, name))

    def children(self, key: Key, kind: Kind) -> list[Manifest]:
        """The deployment's objects of one kind."""
        found = self._children.get(key, {})
        return [body for (name, _), body in found.items() if name == kind.name]

    def rival(self, key: Key) -> Key | None:
        """An older deployment that serves a name that `key` wants to serve."""
        mine = self._deployments[key]
        wanted, age = served_names(mine), _age(mine)
        for other, body in self._deployments.items():
            if other != key and _age(body) < age and wanted & served_names(body):
                return other
        return None

    def _known(self, key: Key, body: Manifest) -> Manifest | None:
        if body["kind"] == INFERENCE_DEPLOYMENT.name:
            return self._deployments.get(key)
        return self._children.get(key, {}).get((body["kind"], body["metadata"]["name"]))

    def _all(self, kind: Kind) -> list[Manifest]:
        if kind is INFERENCE_DEPLOYMENT:
            return list(self._deployments.values())
        return [
            body
            for objects in self._children.values()
            for (name, _), body in objects.items()
            if name == kind.name
        ]


def key_of(body: Manifest) -> Key:
    """The deployment that the object is, or is labelled as belonging to."""
    metadata = body["metadata"]
    if body["kind"] == INFERENCE_DEPLOYMENT.name:
        return Key(metadata["namespace"], metadata["name"])
    return Key(metadata["namespace"], metadata["labels"][names.DEPLOYMENT])


def served_names(body: Manifest) -> set[str]:
    """Names under which clients know the deployment."""
    model = body.get("spec", {}).get("model", {})
    return {model.get("servedName") or body["metadata"]["name"], *model.get("aliases", [])}


def _is_older(body: Manifest, known: Manifest | None) -> bool:
    """Whether a watch tells what an answer to a write has told before; versions only grow."""
    if known is None or _uid(known) != _uid(body):
        return False
    return int(body["metadata"]["resourceVersion"]) < int(known["metadata"]["resourceVersion"])


def _uid(body: Manifest) -> str:
    return str(body["metadata"].get("uid", ""))


def _age(body: Manifest) -> tuple[str, str]:
    return str(body["metadata"].get("creationTimestamp", "")), _uid(body)
