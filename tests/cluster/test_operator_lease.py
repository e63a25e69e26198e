"""Of several operators one works: who it is, who comes next, and what a cut-off one still writes.

Each has a token of its own, by which the API server's audit log tells them apart.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import audit
from cluster.api import Cluster
from cluster.audit import Request
from cluster.identities import SERVICE_ADDRESS
from cluster.own import OwnCluster
from operator_process import SYSTEM, Operator, deployment, install, kubeconfig

from tasuki_operator.lease import DURATION, GIVE_UP, RENEW

Object = dict[str, Any]
NOWHERE = {"nodeSelector": {"type": "nowhere"}}
TAKE_OVER_SECONDS = DURATION + 2 * RENEW + 5.0
"""Until the lease has run out by the other's clock, and its next look; and a busy machine."""

LATE_SECONDS = 30.0
"""After the network is whole again: what a kernel still tries to send has arrived by then."""


@pytest.fixture(scope="module")
def installed(cluster: Cluster) -> OwnCluster:
    """A cluster with CRDs and rights, and no operator."""
    if not isinstance(cluster, OwnCluster):
        pytest.skip("the audit log and the network of a cluster of the tests' own are needed")
    install(cluster)
    return cluster


@pytest.fixture
def namespace(installed: OwnCluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty namespace; the lease is nobody's."""
    installed.kubectl("delete", "lease", "tasuki-operator", "-n", SYSTEM, "--ignore-not-found")
    with installed.namespace(f"led-{abs(hash(request.node.name)):x}") as name:
        yield name


@contextlib.contextmanager
def operator(cluster: Cluster, folder: Path, server: str = "") -> Iterator[Operator]:
    """One more, with a token of its own; `server`: another address of the API server."""
    folder.mkdir()
    path = kubeconfig(cluster, folder / "kubeconfig")
    if server:
        config = yaml.safe_load(path.read_text())
        config["clusters"][0]["cluster"]["server"] = server
        path.write_text(yaml.safe_dump(config))
    one = Operator(path, folder / "log")
    one.start()
    try:
        yield one
    finally:
        one.end()


def says(one: Operator, event: str) -> bool:
    """Whether it has logged the event."""
    return any(line["event"] == event for line in one.events())


def when(one: Operator, event: str) -> str:
    """The time of its first such line."""
    return next(str(line["ts"]) for line in one.events() if line["event"] == event)


def wanted(namespace: str, number: int, name: str = "granite") -> Object:
    """A deployment; another number, another spec."""
    decode = {**NOWHERE, "replicas": 1 + number % 7}
    model = {"maxModelLen": 256 + 16 * number}
    return deployment(name, namespace, prefill=NOWHERE, decode=decode, engine=model)


def is_made(cluster: Cluster, namespace: str, number: int, name: str = "granite") -> bool:
    """Whether the children are those of `wanted`."""
    found = cluster.get("deployment", f"{name}-decode", namespace)
    maps = cluster.list("configmap", namespace, f"tasuki.dev/deployment={name}")
    settings = [json.loads(one["data"].get("engine.json", "{}")) for one in maps]
    lengths = [one.get("max_model_len") for one in settings]
    return found["spec"]["replicas"] == 1 + number % 7 and 256 + 16 * number in lengths


def writers(found: list[Request], since: float) -> set[str]:
    """The tokens with which anything was written from then on, the lease aside."""
    return {
        one.token for one in found if one.writes and one.ended >= since and one.resource != "leases"
    }


def test_of_two_one_works_and_a_killed_one_is_followed_within_the_lease(
    installed: OwnCluster, namespace: str, tmp_path: Path
) -> None:
    with operator(installed, tmp_path / "first") as first:
        installed.wait("the first leads", lambda: says(first, "leading"))
        begun = time.time()
        with operator(installed, tmp_path / "second") as second:
            installed.wait("the second waits", lambda: says(second, "standing_by"))
            for number in range(4):
                installed.apply(wanted(namespace, number))
                installed.wait("made", lambda n=number: is_made(installed, namespace, n))
            assert not says(second, "leading")
            assert len(writers(audit.of_operator(installed, namespace), begun)) == 1
            first.kill()
            killed = time.monotonic()
            installed.apply(wanted(namespace, 9))
            installed.wait(
                "the second leads", lambda: says(second, "leading"), seconds=TAKE_OVER_SECONDS
            )
            installed.wait("the second works", lambda: is_made(installed, namespace, 9))
            print(f"the second worked {time.monotonic() - killed:.1f} s after the first was killed")
            names = [holder(first), holder(second)]
            assert len(set(names)) == 2, "two processes of one host have one name"
    assert len(writers(audit.of_operator(installed, namespace), begun)) == 2


def holder(one: Operator) -> str:
    """The name under which it has led."""
    return next(line["holder"] for line in one.events() if line["event"] == "leading")


def test_an_operator_that_ends_in_order_is_followed_at_once(
    installed: OwnCluster, namespace: str, tmp_path: Path
) -> None:
    with (
        operator(installed, tmp_path / "first") as first,
        operator(installed, tmp_path / "second") as second,
    ):
        installed.wait("one leads", lambda: says(first, "leading") or says(second, "leading"))
        leader, other = (first, second) if says(first, "leading") else (second, first)
        installed.wait("the other waits", lambda: says(other, "standing_by"))
        begun = time.monotonic()
        assert leader.stop() == 0
        installed.wait("the other leads", lambda: says(other, "leading"), seconds=2 * RENEW + 6)
        print(f"followed {time.monotonic() - begun:.1f} s after the signal")


@contextlib.contextmanager
def cut_off(cluster: OwnCluster, address: str) -> Iterator[None]:
    """Nothing that is sent to `address` arrives, as behind a broken switch."""
    rule = ["OUTPUT", "--destination", address, "--jump", "DROP"]
    cluster.machine.run("iptables", "--wait", "5", "--table", "mangle", "--append", *rule)
    try:
        yield
    finally:
        cluster.machine.run("iptables", "--wait", "5", "--table", "mangle", "--delete", *rule)


def test_a_leader_that_is_cut_off_stops_before_another_begins_and_writes_nothing_afterwards(
    installed: OwnCluster, namespace: str, tmp_path: Path
) -> None:
    by_service = f"https://{SERVICE_ADDRESS}:443"
    names = [f"m{number}" for number in range(16)]

    def apply(number: int) -> None:
        installed.apply(*(wanted(namespace, number, name) for name in names))

    def all_made(number: int) -> bool:
        return all(is_made(installed, namespace, number, name) for name in names)

    with operator(installed, tmp_path / "first", by_service) as first:
        installed.wait("the first leads", lambda: says(first, "leading"))
        apply(1)
        installed.wait("made", lambda: all_made(1))
        (token,) = writers(audit.of_operator(installed, namespace), 0.0)
        with operator(installed, tmp_path / "second") as second:
            installed.wait("the second waits", lambda: says(second, "standing_by"))
            apply(2)  # it is at work when it is cut off
            with cut_off(installed, SERVICE_ADDRESS):
                cut = time.monotonic()
                apply(3)  # what it hears of, it cannot do
                assert first.wait(GIVE_UP + 2 * RENEW + 5) == 1
                ended = time.monotonic() - cut
                installed.wait(
                    "the second leads", lambda: says(second, "leading"), seconds=TAKE_OVER_SECONDS
                )
                assert when(first, "lease_lost") < when(second, "leading"), "two worked at once"
                led, followed = time.time(), time.monotonic() - cut
                print(f"ended {ended:.1f} s and followed {followed:.1f} s after it was cut off")
                installed.wait("made", lambda: all_made(3))
            time.sleep(LATE_SECONDS)
            assert token not in writers(audit.of_operator(installed, namespace), led)
            assert all_made(3)
