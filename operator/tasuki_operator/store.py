"""What the watches have told: the objects of every deployment, at hand without asking."""

import collections
from collections.abc import Iterable
from typing import Any, NamedTuple

from tasuki_operator import names
from tasuki_operator.kinds import INFERENCE_DEPLOYMENT, Kind

Manifest = dict[str, Any]

_BULK = "managedFields"
"""Of metadata: as large as all the rest, and nobody here reads it."""


class Key(NamedTuple):
    """Namespace and name of an InferenceDeployment."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Place(NamedTuple):
    """Where an object is; another one may follow it there."""

    kind: str
    namespace: str
    name: str


class Store:
    """InferenceDeployments, and everything that carries the label `names.DEPLOYMENT`."""

    def __init__(self) -> None:
        self._deployments: dict[Key, Manifest] = {}
        self._claims: dict[str, set[Key]] = collections.defaultdict(set)
        self._children: dict[Key, dict[tuple[str, str], Manifest]] = collections.defaultdict(dict)
        self._bodies: dict[Place, Manifest] = {}
        self._dropped: dict[Place, int] = {}
        """Versions in which objects went, since the last list of their kind."""

    def put(self, body: Manifest) -> set[Key]:
        """Takes in a new or changed object; returns whose it is, and whose it was until now."""
        place, key = _place(body), key_of(body)
        if _version(body) <= self._dropped.get(place, -1) or self._is_older(body):
            return {key}
        before = self._take(place)
        slim = {name: value for name, value in body["metadata"].items() if name != _BULK}
        self._bodies[place] = body = body | {"metadata": slim}
        if place.kind == INFERENCE_DEPLOYMENT.name:
            self._deployments[key] = body
            for name in {*served_names(body), *held_names(body)}:
                self._claims[name].add(key)
        else:
            self._children[key][place.kind, place.name] = body
        return {key, before or key}

    def drop(self, body: Manifest) -> set[Key]:
        """Forgets a deleted object; returns whose it was."""
        place, key = _place(body), key_of(body)
        if self._is_older(body):
            return {key}
        self._dropped[place] = _version(body)
        return {key, self._take(place) or key}

    def known(self, kind: Kind) -> set[tuple[Key, str]]:
        """Whose objects of a kind, and their names; taken before a list that `replace` gets."""
        for place in [place for place in self._dropped if place.kind == kind.name]:
            del self._dropped[place]
        return {
            (key_of(body), place.name)
            for place, body in self._bodies.items()
            if place.kind == kind.name
        }

    def replace(
        self, kind: Kind, before: set[tuple[Key, str]], bodies: Iterable[Manifest]
    ) -> set[Key]:
        """Takes a list for the truth; returns whose objects were unknown, or are gone.

        Only what a watch lost shows here, and it loses deletions while it is disconnected. What
        came after `before` was taken may be missing in the list, and stays; what went meanwhile
        may still be listed, and does not come back.
        """
        changed: set[Key] = set()
        listed: set[tuple[Key, str]] = set()
        for body in bodies:
            name, key = body["metadata"]["name"], key_of(body)
            listed.add((key, name))
            found = self.get(kind, key, name)
            owners = self.put(body)
            if found is None or _uid(found) != _uid(body):
                changed |= owners
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
        """Another deployment that has a name which `key` wants: it holds it, or both only want it
        and the other is older."""
        mine = self._deployments[key]
        owners = {self._owner(name) for name in served_names(mine)} - {key}
        return min(owners, key=lambda other: _age(self._deployments[other]), default=None)

    def _owner(self, name: str) -> Key:
        def rank(key: Key) -> tuple[bool, tuple[str, str]]:
            body = self._deployments[key]
            return name not in held_names(body), _age(body)

        return min(self._claims[name], key=rank)

    def _take(self, place: Place) -> Key | None:
        """Takes out what is known there; whose it was."""
        body = self._bodies.pop(place, None)
        if body is None:
            return None
        key = key_of(body)
        if place.kind != INFERENCE_DEPLOYMENT.name:
            del self._children[key][place.kind, place.name]
            if not self._children[key]:
                del self._children[key]
            return key
        del self._deployments[key]
        for name in {*served_names(body), *held_names(body)}:
            self._claims[name].discard(key)
            if not self._claims[name]:
                del self._claims[name]
        return key

    def _is_older(self, body: Manifest) -> bool:
        """Whether an event or a list tells what an answer to a write has overtaken."""
        known = self._bodies.get(_place(body))
        return known is not None and _version(body) < _version(known)


def key_of(body: Manifest) -> Key:
    """The deployment that the object is, or is labelled as belonging to."""
    metadata = body["metadata"]
    if body["kind"] == INFERENCE_DEPLOYMENT.name:
        return Key(metadata["namespace"], metadata["name"])
    return Key(metadata["namespace"], metadata["labels"][names.DEPLOYMENT])


def served_names(body: Manifest) -> list[str]:
    """Names under which clients shall know the deployment."""
    model = body.get("spec", {}).get("model", {})
    wanted = (model.get("servedName") or body["metadata"]["name"], *model.get("aliases", []))
    return list(dict.fromkeys(wanted))


def held_names(body: Manifest) -> list[str]:
    """Names that it was given, and that nobody takes from it while it wants them."""
    return list((body.get("status") or {}).get("names") or [])


def _place(body: Manifest) -> Place:
    return Place(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"])


def _version(body: Manifest) -> int:
    """Versions only grow, of one object and of those that follow it in its place."""
    return int(body["metadata"]["resourceVersion"])


def _uid(body: Manifest) -> str:
    return str(body["metadata"].get("uid", ""))


def _age(body: Manifest) -> tuple[str, str]:
    return str(body["metadata"].get("creationTimestamp", "")), _uid(body)
