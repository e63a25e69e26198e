"""What NetworkPolicies let through, as their specification has it: of labels and ports alone.

A pod that no policy of a direction selects is open in that direction. Addresses (ipBlock) and
selectors other than matchLabels are not known here, and are an error.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Object = dict[str, Any]


class Place(NamedTuple):
    """A pod, or who is outside of the cluster: without a namespace no selector finds it."""

    namespace: str = ""
    labels: Mapping[str, str] = {}
    ports: Mapping[str, int] = {}
    """Numbers of its named ports."""


def lets_through(
    policies: Sequence[Object], source: Place, target: Place, port: int, protocol: str = "TCP"
) -> bool:
    """Whether `source` reaches `target` there: both must be allowed to."""
    named = {number: name for name, number in target.ports.items()}
    wanted = (protocol, port, named.get(port))
    return _open(policies, "Egress", source, target, wanted) and _open(
        policies, "Ingress", target, source, wanted
    )


def _open(
    policies: Sequence[Object],
    direction: str,
    pod: Place,
    other: Place,
    wanted: tuple[str, int, str | None],
) -> bool:
    """Whether `pod` may talk to `other` in the direction, as seen from `pod`."""
    about = [policy for policy in policies if _is_about(policy, direction, pod)]
    return not about or any(
        _is_peer(policy, peers, other) and _is_port(ports, wanted)
        for policy in about
        for peers, ports in _rules(policy, direction)
    )


def _rules(policy: Object, direction: str) -> Iterator[tuple[list[Object], list[Object]]]:
    """Peers and ports of each rule."""
    peers = {"Ingress": "from", "Egress": "to"}[direction]
    for rule in policy["spec"].get(direction.lower()) or []:
        yield rule.get(peers) or [], rule.get("ports") or []


def _is_about(policy: Object, direction: str, pod: Place) -> bool:
    spec = policy["spec"]
    return (
        policy["metadata"]["namespace"] == pod.namespace
        and direction in spec["policyTypes"]
        and _selects(spec["podSelector"], pod.labels)
    )


def _is_peer(policy: Object, peers: list[Object], other: Place) -> bool:
    """No peers: everybody, outside of the cluster too."""
    for peer in peers:
        assert peer.keys() <= {"namespaceSelector", "podSelector"}, peer
        namespace = {"kubernetes.io/metadata.name": other.namespace}
        if "namespaceSelector" in peer:
            near = bool(other.namespace) and _selects(peer["namespaceSelector"], namespace)
        else:
            near = other.namespace == policy["metadata"]["namespace"]
        if near and _selects(peer.get("podSelector", {}), other.labels):
            return True
    return not peers


def _is_port(ports: list[Object], wanted: tuple[str, int, str | None]) -> bool:
    protocol, number, name = wanted
    for port in ports:
        first = port["port"]
        is_it = first == name or (
            isinstance(first, int) and first <= number <= port.get("endPort", first)
        )
        if is_it and port["protocol"] == protocol:
            return True
    return not ports


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return dict(selector.get("matchLabels", {})).items() <= labels.items()
