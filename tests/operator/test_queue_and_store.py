"""The queue looks at each deployment once at a time; the store keeps what watches tell."""

import asyncio
import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

from fresh_seed import fresh_seed
from hypothesis import given, strategies as st

from tasuki_operator.kinds import INFERENCE_DEPLOYMENT, POD
from tasuki_operator.metrics import Metrics
from tasuki_operator.store import Key, Store, held_names, served_names
from tasuki_operator.work import WorkQueue

KEYS = [Key("models", f"m{number}") for number in range(5)]


async def until(true: Callable[[], bool]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("it did not come true in 10 seconds")


async def test_a_key_is_never_worked_on_twice_at_once_and_no_wish_is_lost() -> None:
    random.seed(fresh_seed())
    queue, busy, seen = WorkQueue(Metrics()), set[Key](), dict.fromkeys(KEYS, 0)
    version = dict.fromkeys(KEYS, 0)

    async def look(key: Key) -> float | None:
        assert key not in busy
        busy.add(key)
        taken = version[key]
        await asyncio.sleep(random.random() / 200)
        seen[key] = taken
        busy.discard(key)
        return None

    workers = [asyncio.create_task(queue.work(look)) for _ in range(3)]
    for _ in range(400):
        key = random.choice(KEYS)
        version[key] += 1
        queue.add(key)
        await asyncio.sleep(random.random() / 2000)
    await until(lambda: seen == version)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


async def test_a_failure_is_tried_again_stops_nobody_else_and_is_counted_until_it_ends() -> None:
    metrics = Metrics()
    queue, tries = WorkQueue(metrics), dict.fromkeys(KEYS[:2], 0)
    failing: list[bool] = []

    async def look(key: Key) -> float | None:
        tries[key] += 1
        if key == KEYS[0]:
            failing.append(b"tasuki_operator_failing_deployments 1.0" in metrics.render())
            if tries[key] == 1:
                raise RuntimeError("the first look fails")
        return None

    worker = asyncio.create_task(queue.work(look))
    for key in tries:
        queue.add(key)
    await until(lambda: tries == {KEYS[0]: 2, KEYS[1]: 1})
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    assert failing == [False, True]
    assert b"tasuki_operator_failing_deployments 0.0" in metrics.render()


def body(kind: str, name: str, version: int, **more: Any) -> dict[str, Any]:
    metadata = {
        "namespace": "models",
        "name": name,
        "uid": f"{kind}-{name}",
        "resourceVersion": str(version),
        "labels": {"tasuki.dev/deployment": "granite"},
        "creationTimestamp": "2026-01-31T12:00:00Z",
    }
    return {"kind": kind, "metadata": metadata | more}


def deployment(name: str, created: str, *aliases: str) -> dict[str, Any]:
    found = body("InferenceDeployment", name, 1, creationTimestamp=created)
    return found | {"spec": {"model": {"aliases": list(aliases)}}}


GRANITE = Key("models", "granite")


def test_what_is_older_than_what_is_known_is_left() -> None:
    store = Store()
    store.put(body("Pod", "p", 12, annotations={"new": "yes"}))
    store.put(body("Pod", "p", 9))
    assert store.children(GRANITE, POD)[0]["metadata"]["annotations"] == {"new": "yes"}


def test_a_list_finds_what_a_watch_has_missed_and_keeps_what_came_after_it() -> None:
    store = Store()
    store.put(body("Pod", "gone", 1))
    store.put(body("Pod", "stays", 1))
    before = store.known(POD)
    store.put(body("Pod", "newer", 7))
    changed = store.replace(POD, before, [body("Pod", "stays", 1), body("Pod", "unseen", 3)])
    assert changed == {GRANITE}
    names = {pod["metadata"]["name"] for pod in store.children(GRANITE, POD)}
    assert names == {"stays", "newer", "unseen"}
    assert store.replace(POD, set(), [body("Pod", "stays", 1)]) == set()


def test_a_child_with_anothers_label_concerns_both() -> None:
    store = Store()
    store.put(body("Pod", "p", 1))
    labels = {"tasuki.dev/deployment": "other"}
    other = Key("models", "other")
    assert store.put(body("Pod", "p", 2, labels=labels)) == {GRANITE, other}
    assert store.children(GRANITE, POD) == []
    assert len(store.children(other, POD)) == 1
    before = store.known(POD)
    assert store.replace(POD, before, [body("Pod", "p", 3)]) == {GRANITE, other}
    assert store.children(other, POD) == []
    assert store.drop(body("Pod", "p", 4, labels=labels)) == {GRANITE, other}
    assert store.children(GRANITE, POD) == []


def test_what_went_while_a_list_was_made_does_not_come_back_with_it() -> None:
    store = Store()
    old, new = body("Pod", "p", 5, uid="old"), body("Pod", "p", 9, uid="new")
    store.put(old)
    before = store.known(POD)
    store.drop(old | {"metadata": old["metadata"] | {"resourceVersion": "7"}})
    store.replace(POD, before, [old])
    assert store.children(GRANITE, POD) == []
    store.put(new)
    store.replace(POD, before, [old])
    store.drop(old | {"metadata": old["metadata"] | {"resourceVersion": "7"}})
    assert [pod["metadata"]["uid"] for pod in store.children(GRANITE, POD)] == ["new"]


def test_who_manages_which_field_is_not_kept() -> None:
    store = Store()
    given = body("Pod", "p", 1, managedFields=[{"manager": "kubelet", "fieldsV1": {}}])
    store.put(given)
    assert "managedFields" not in store.children(GRANITE, POD)[0]["metadata"]
    assert "managedFields" in given["metadata"], "what a watch gives is left as it is"


def test_of_two_that_want_one_name_the_older_gets_it() -> None:
    store = Store()
    store.put(deployment("old", "2026-01-01T00:00:00Z", "chat"))
    store.put(deployment("new", "2026-01-02T00:00:00Z", "chat"))
    store.put(deployment("other", "2026-01-03T00:00:00Z"))
    assert store.rival(Key("models", "new")) == Key("models", "old")
    assert store.rival(Key("models", "old")) is None
    assert store.rival(Key("models", "other")) is None
    assert store.get(INFERENCE_DEPLOYMENT, Key("models", "old"), "old") is not None


def test_who_has_a_name_keeps_it_from_an_older_one() -> None:
    store = Store()
    store.put(deployment("old", "2026-01-01T00:00:00Z"))
    serving = deployment("new", "2026-01-02T00:00:00Z", "chat") | {"status": {"names": ["chat"]}}
    store.put(serving)
    late = deployment("old", "2026-01-01T00:00:00Z", "chat")
    late["metadata"]["resourceVersion"] = "2"
    store.put(late)
    assert store.rival(Key("models", "new")) is None
    assert store.rival(Key("models", "old")) == Key("models", "new")
    store.drop(serving)
    assert store.rival(Key("models", "old")) is None


NAMES = st.sampled_from(["m0", "m1", "m2", "chat", "code"])
EDITS = st.lists(st.tuples(st.integers(0, 3), st.none() | st.sets(NAMES, max_size=3)), max_size=20)


@given(EDITS, st.data())
def test_no_two_ever_have_one_name_and_each_name_that_one_alone_wants_is_got(
    edits: list[tuple[int, set[str] | None]], data: st.DataObject
) -> None:
    store, there = Store(), dict[str, dict[str, Any]]()
    versions = itertools.count(1)

    def put(name: str, changed: dict[str, Any]) -> None:
        there[name] = changed
        changed["metadata"]["resourceVersion"] = str(next(versions))
        store.put(changed)

    def look(name: str) -> None:
        if store.rival(Key("models", name)) is None:
            put(name, copy.deepcopy(there[name]) | {"status": {"names": served_names(there[name])}})

    def check() -> None:
        held = [name for one in there.values() for name in held_names(one)]
        assert len(held) == len(set(held))

    for number, aliases in edits:
        name = f"m{number}"
        if aliases is not None:
            wanted = deployment(name, f"2026-01-0{number + 1}T00:00:00Z", *sorted(aliases))
            put(name, wanted | {"status": there.get(name, {}).get("status", {})})
        elif name in there:
            store.drop(there.pop(name))
        for looked_at in data.draw(st.sets(st.sampled_from(sorted(there)))) if there else ():
            look(looked_at)
            check()
    for name in [*there] * 4:
        look(name)
        check()
    for name, one in there.items():
        others = {n for other in there if other != name for n in served_names(there[other])}
        others |= {n for other in there if other != name for n in held_names(there[other])}
        assert held_names(one) == served_names(one) or set(served_names(one)) & others
