"""The queue looks at each deployment once at a time; the store keeps what watches tell."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

from fresh_seed import fresh_seed

from tasuki_operator.kinds import INFERENCE_DEPLOYMENT, POD
from tasuki_operator.metrics import Metrics
from tasuki_operator.store import Key, Store
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


async def test_a_failure_is_tried_again_and_stops_nobody_else() -> None:
    queue, tries = WorkQueue(Metrics()), dict.fromkeys(KEYS[:2], 0)

    async def look(key: Key) -> float | None:
        tries[key] += 1
        if key == KEYS[0] and tries[key] == 1:
            raise RuntimeError("the first look fails")
        return None

    worker = asyncio.create_task(queue.work(look))
    for key in tries:
        queue.add(key)
    await until(lambda: tries == {KEYS[0]: 2, KEYS[1]: 1})
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


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


def test_of_two_that_want_one_name_the_older_has_it() -> None:
    store = Store()
    store.put(deployment("old", "2026-01-01T00:00:00Z", "chat"))
    store.put(deployment("new", "2026-01-02T00:00:00Z", "chat"))
    store.put(deployment("other", "2026-01-03T00:00:00Z"))
    assert store.rival(Key("models", "new")) == Key("models", "old")
    assert store.rival(Key("models", "old")) is None
    assert store.rival(Key("models", "other")) is None
    assert store.get(INFERENCE_DEPLOYMENT, Key("models", "old"), "old") is not None
