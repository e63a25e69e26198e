"""The verbs of the index on a real Redis: who is alive, and who could resume what."""

import asyncio

from index_helpers import FINGERPRINT, checkpoints, member, prompt, stored

from tasuki_common.messages import Load
from tasuki_index import Change, Index, Registration


async def hold(index: Index, pod: str, changes: list[Change]) -> Registration:
    registration = await index.announce(member(pod), 10.0)
    published = await index.publish(FINGERPRINT, registration, changes)
    assert published is not None
    return published


async def test_a_member_comes_back_as_it_was_announced(index: Index) -> None:
    announced = member("p", aliases=("a", "b"), load=Load(running=3), transfer=("tcp",))
    await index.announce(announced, 10.0)
    assert await index.members() == [announced]


async def test_lookup_gives_each_pod_its_own_depth(index: Index) -> None:
    names = prompt("x", 300)
    for pod, depth in {"a": 1, "b": 150, "c": 300}.items():
        await hold(index, pod, stored(names[:depth]))
    await hold(index, "other", stored(prompt("y", 10)))
    assert await index.lookup(FINGERPRINT, names, False) == {"a": 1, "b": 150, "c": 300}


async def test_a_checkpoint_counts_only_on_held_blocks_and_the_deepest_wins(index: Index) -> None:
    names = prompt("x", 100)
    await hold(index, "a", stored(names[:50]) + checkpoints([names[15], names[31], names[63]]))
    await hold(index, "b", stored(names[:90]))
    assert await index.lookup(FINGERPRINT, names, True) == {"a": 32}


async def test_a_pod_that_is_silent_for_its_ttl_is_gone(index: Index) -> None:
    names = prompt("x", 4)
    registration = await index.announce(member("a"), 0.1)
    await index.publish(FINGERPRINT, registration, stored(names))
    await asyncio.sleep(0.15)
    assert await index.members() == []
    assert await index.lookup(FINGERPRINT, names, False) == {}


async def test_a_pod_that_was_silent_keeps_what_it_published(index: Index) -> None:
    names = prompt("x", 4)
    registration = await index.announce(member("a"), 0.1)
    published = await index.publish(FINGERPRINT, registration, stored(names))
    await asyncio.sleep(0.15)
    assert await index.announce(member("a"), 10.0, published) == published
    assert await index.lookup(FINGERPRINT, names, False) == {"a": 4}


async def test_entries_die_with_their_incarnation(index: Index) -> None:
    names = prompt("x", 4)
    first = await hold(index, "a", stored(names))
    second = await index.announce(member("a", incarnation="two"), 10.0)
    assert second.mark != first.mark
    assert await index.lookup(FINGERPRINT, names, False) == {}
    assert await index.publish(FINGERPRINT, first, stored(names)) is None


async def test_a_withdrawn_pod_is_gone_but_a_late_withdrawal_spares_its_successor(
    index: Index,
) -> None:
    await index.announce(member("a"), 10.0)
    await index.announce(member("a", incarnation="two"), 10.0)
    await index.withdraw(member("a"))
    assert [found.incarnation for found in await index.members()] == ["two"]
    await index.withdraw(member("a", incarnation="two"))
    assert await index.members() == []


async def test_a_lost_batch_shows_at_the_next_one(index: Index) -> None:
    registration = await index.announce(member("a"), 10.0)
    ahead = Registration(registration.mark, 5)
    assert await index.publish(FINGERPRINT, ahead, stored(prompt("x", 1))) is None
    assert await index.announce(member("a"), 10.0, ahead) != ahead


async def test_a_model_without_pods_is_no_longer_asked_for(index: Index) -> None:
    await index.announce(member("a"), 0.05)
    await asyncio.sleep(0.1)
    assert await index.members() == []
    assert await index._connection.command("SMEMBERS", "tasuki:models") == set()
    await index.announce(member("a"), 10.0)
    assert [found.fingerprint for found in await index.members()] == [FINGERPRINT]
