"""Three hundred deployments at once, on nodes that kwok plays; all else is real.

The index is a real Redis; what pods write there of themselves is written here for them.
"""

import collections
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from announced_members import Members
from cluster import audit, kwok
from cluster.api import Cluster
from cluster.audit import Request
from cluster.own import OwnCluster
from operator_process import Operator, deployment, install, running
from redis_server import RedisServer

Object = dict[str, Any]
NUMBER, EDGE = 300, 50
BEFORE, AFTER = range(900, 930), (range(800, 830), range(830, 860), range(860, 890))
"""Some more, made at once before and after the three hundred; after them again where it is slow."""
NODES = 5
CHILDREN = 11
"""Of each, its Secret aside."""
MOST_WRITES = 18
"""11 children and their Secret, each once; and what a person should notice, as events."""
SETTLED_SECONDS = 420.0
QUIET_SECONDS = 20.0
NOWHERE = {"nodeSelector": {"type": "nowhere"}}
STATES = {  # how the pods of every tenth deployment and its neighbours fare, and what Ready says
    3: ({"metadata": {"annotations": {kwok.STATE: "crashing"}}}, "CrashLoop"),
    5: ({"metadata": {"annotations": {kwok.STATE: "without-image"}}}, "ImagePull"),
    7: ({"spec": NOWHERE}, "Unschedulable"),
}


def wanted(number: int, namespace: str) -> Object:
    """One of the three hundred; some of them cannot serve."""
    overlay, _ = STATES.get(number % 10, ({}, ""))
    decode = {**kwok.PLACEMENT, "podTemplate": overlay}
    if overlay.get("spec") == NOWHERE:
        decode["nodeSelector"] = {"type": "nowhere"}
        decode["podTemplate"] = {}
    return deployment(f"m{number:03}", namespace, prefill=kwok.PLACEMENT, decode=decode)


def expected(number: int) -> dict[str, tuple[str, str]]:
    """Status and reason of each condition, once all has settled."""
    same = {"PrefillReady": ("True", "AllReady"), "IndexReady": ("True", "Reachable")}
    _, reason = STATES.get(number % 10, ({}, ""))
    if not reason:
        return same | {
            "Ready": ("True", "Serving"),
            "DecodeReady": ("True", "AllReady"),
            "TransferReady": ("True", "Paired"),
            "Progressing": ("False", "Done"),
            "Degraded": ("False", "AsWanted"),
        }
    return same | {
        "Ready": ("False", reason),
        "DecodeReady": ("False", reason),
        "TransferReady": ("False", "Waiting"),
        "Progressing": ("True", "Starting"),
        "Degraded": ("True", reason),
    }


def conditions(body: Object) -> dict[str, tuple[str, str]]:
    """Status and reason by type."""
    found = body.get("status", {}).get("conditions", [])
    return {one["type"]: (one["status"], one["reason"]) for one in found}


def message(body: Object, kind: str) -> str:
    """The sentence of a condition."""
    return next(one["message"] for one in body["status"]["conditions"] if one["type"] == kind)


def owner(request: Request) -> str:
    """The deployment that the request is about; children's names begin with its."""
    return request.name[:4]


def first_looks(found: list[Request]) -> list[float]:
    """Seconds from each deployment's first request to its first status, by order of beginning."""
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    for request in sorted(found, key=lambda request: request.begun):
        begun.setdefault(owner(request), request.begun)
        if request.resource == "inferencedeployments/status":
            ended.setdefault(owner(request), request.ended)
    return [ended[name] - start for name, start in begun.items() if name in ended]


def whole_looks(found: list[Request]) -> list[float]:
    """Seconds from a deployment's first request to its last apply, by order of beginning."""
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    for request in sorted(found, key=lambda request: request.begun):
        begun.setdefault(owner(request), request.begun)
        if request.verb == "patch" and request.resource != "inferencedeployments/status":
            ended[owner(request)] = request.ended
    return [ended[name] - start for name, start in begun.items() if name in ended]


def versions(cluster: OwnCluster, namespace: str) -> dict[tuple[str, str], str]:
    """Resource versions of all that only the operator writes; generations of Deployments."""
    kinds = "infd,serviceaccount,configmap,service,networkpolicy,secret,deployment"
    found = json.loads(
        cluster.kubectl("get", kinds, "--namespace", namespace, "--output", "json", timeout=120)
    )["items"]
    return {
        (item["kind"], item["metadata"]["name"]): item["metadata"][
            "generation" if item["kind"] == "Deployment" else "resourceVersion"
        ]
        for item in found
    }


class Crowd(NamedTuple):
    """Three hundred deployments that have settled."""

    cluster: OwnCluster
    namespace: str
    operator: Operator
    cpu_seconds: float
    """That the operator took until then."""
    seconds: float
    """From the first of them to the moment when the last said what it should."""
    requests: list[Request]
    """All until then."""
    before: list[float]
    """Seconds that the first looks at BEFORE took."""
    redis: str


def settle(cluster: OwnCluster, namespace: str, members: Members, numbers: range) -> None:
    """Returns when all conditions of all say what they should."""
    due = {f"m{number:03}": expected(number) for number in numbers}

    wrong: Object = {}

    def all_say_so() -> bool:
        members.refresh()
        found = {body["metadata"]["name"]: body for body in cluster.list("infd", namespace)}
        said = {name: conditions(body) for name, body in found.items()}
        wrong.clear()
        wrong.update({name: said.get(name) for name in due if said.get(name) != due[name]})
        return not wrong

    try:
        cluster.wait("all say what they should", all_say_so, seconds=SETTLED_SECONDS)
    except TimeoutError as error:
        some = dict(list(wrong.items())[:5])
        raise AssertionError(f"{len(wrong)} say what they should not: {some}") from error


def make_at_once(cluster: OwnCluster, namespace: str, redis: str, numbers: range) -> list[float]:
    """Deployments in a new namespace, until they have settled: what the first look at each took."""
    cluster.kubectl("create", "namespace", namespace)
    cluster.apply(*(wanted(number, namespace) for number in numbers))
    settle(cluster, namespace, Members(cluster, namespace, redis), numbers)
    return first_looks(audit.of_operator(cluster, namespace))


@pytest.fixture(scope="module")
def crowd(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    """Applied at once, and settled."""
    if not isinstance(cluster, OwnCluster):
        pytest.skip("kwok and the audit log need a cluster of the tests' own")
    install(cluster)
    kwok.start(cluster, NODES)
    folder = tmp_path_factory.mktemp("crowd")
    redis = RedisServer(folder, tcp=True).start()
    try:
        namespace = "crowd"  # it goes with the cluster
        cluster.kubectl("create", "namespace", namespace)
        with running(cluster, folder, f"--redis-url={redis.url}") as operator:
            before = make_at_once(cluster, "before", redis.url, BEFORE)
            idle = operator.cpu_seconds()
            members = Members(cluster, namespace, redis.url)
            begun = time.monotonic()
            cluster.apply(*(wanted(number, namespace) for number in range(NUMBER)))
            settle(cluster, namespace, members, range(NUMBER))
            seconds, busy = time.monotonic() - begun, operator.cpu_seconds() - idle
            asked = audit.of_operator(cluster, namespace)
            yield Crowd(cluster, namespace, operator, busy, seconds, asked, before, redis.url)
    finally:
        redis.stop()
    assert operator.errors() == []


def test_each_of_three_hundred_says_what_is_so_of_its_own_pods(crowd: Crowd) -> None:
    busy = 1000 * crowd.cpu_seconds / NUMBER
    print(f"{NUMBER} deployments settled in {crowd.seconds:.0f} s, {busy:.0f} ms of CPU for each")
    for body in crowd.cluster.list("infd", crowd.namespace):
        number = int(body["metadata"]["name"][1:])
        said = conditions(body)
        assert said == expected(number)
        if said["Ready"][0] == "False":
            assert f"Pod m{number:03}-decode-" in message(body, "Ready")
        assert body["status"]["observedGeneration"] == body["metadata"]["generation"]


def test_making_one_takes_a_bounded_number_of_requests(crowd: Crowd) -> None:
    each = collections.Counter(owner(request) for request in crowd.requests)
    kinds = collections.Counter(
        (request.verb, request.resource, request.code) for request in crowd.requests
    )
    looks = first_looks(crowd.requests)
    print(
        f"requests: {statistics.mean(each.values()):.1f} a deployment, at most {max(each.values())}"
    )
    for kind, number in kinds.most_common():
        print(f"  {number / NUMBER:.2f} {kind}")
    medians = [statistics.median(looks[at : at + EDGE]) for at in range(0, NUMBER, EDGE)]
    print(f"first looks, {EDGE} at a time: {', '.join(f'{one:.2f}' for one in medians)} s")
    writes = collections.Counter(
        owner(request)
        for request in crowd.requests
        if request.writes and request.resource != "inferencedeployments/status"
    )
    assert max(writes.values()) <= MOST_WRITES


def test_the_first_look_at_one_does_not_grow_with_those_that_are_served(crowd: Crowd) -> None:
    """Minutes lie between the two, in which another file's cluster takes more or less of the cores;
    a look whose cost grew with their number would take ten times as long, each time."""
    before = statistics.median(crowd.before)
    for some in AFTER:
        looks = make_at_once(crowd.cluster, f"after-{some.start}", crowd.redis, some)
        after = statistics.median(looks)
        print(f"first looks: {before:.2f} s before there were {NUMBER}, {after:.2f} s after")
        if after < 3 * before:
            break
    assert after < 3 * before


def test_a_quiet_deployment_costs_one_read_now_and_then(crowd: Crowd) -> None:
    cluster, namespace = crowd.cluster, crowd.namespace
    before = len(audit.of_operator(cluster, namespace))
    busy = crowd.operator.cpu_seconds()
    time.sleep(QUIET_SECONDS)
    busy = crowd.operator.cpu_seconds() - busy
    found = audit.of_operator(cluster, namespace)[before:]
    rate = len(found) / QUIET_SECONDS
    print(f"quiet: {rate:.1f} requests/s; {busy / QUIET_SECONDS:.3f} cores for all")
    kinds = collections.Counter((request.verb, request.resource) for request in found)
    print(kinds)
    assert {verb for verb, _ in kinds} == {"get"}


def test_an_operator_that_starts_anew_looks_at_the_last_as_fast_as_at_the_first_and_writes_nothing(
    crowd: Crowd,
) -> None:
    for _ in range(3):  # the load of others comes and goes; what grows, grows each time
        first, last = restarted(crowd)
        if last < 1.5 * first:
            break
    assert last < 1.5 * first


def restarted(crowd: Crowd) -> tuple[float, float]:
    """Median seconds of the first and of the last looks of an operator that starts anew."""
    cluster, namespace = crowd.cluster, crowd.namespace
    before = versions(cluster, namespace)
    crowd.operator.stop()
    seen = len(audit.of_operator(cluster, namespace))
    crowd.operator.start()
    begun = time.monotonic()

    def looked_at() -> bool:
        found = audit.of_operator(cluster, namespace)[seen:]
        applied = collections.Counter(owner(one) for one in found if one.verb == "patch")
        return len(applied) == NUMBER and min(applied.values()) >= CHILDREN

    cluster.wait("all are looked at", looked_at, seconds=SETTLED_SECONDS)
    time.sleep(5)
    print(f"restart: {time.monotonic() - begun:.0f} s")
    found = audit.of_operator(cluster, namespace)[seen:]
    looks = whole_looks(found)
    first, last = statistics.median(looks[:EDGE]), statistics.median(looks[-EDGE:])
    print(f"a look of the first {EDGE} takes {first:.3f} s, of the last {last:.3f} s")
    print(f"{len(found) / NUMBER:.1f} requests each")
    after = versions(cluster, namespace)
    assert {name: after.get(name) for name in before if after.get(name) != before[name]} == {}
    return first, last
