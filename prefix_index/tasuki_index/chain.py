"""A pod's book of what it has cached, as the index may see it.

Look-ups find a depth by bisection, which is right only if nobody holds a block without the one
before it. A cache may evict in the middle; so the book publishes a block only while the whole chain
down to it is held. Behind a hole, blocks are kept but taken back, and published again when the hole
is filled.
"""

from collections.abc import Iterable, Iterator

from tasuki_index.events import CacheEvent, Change


class Chain:
    """Turns raw cache events into changes whose sum is closed under prefixes after each of them.

    Work is proportional to the number of changes, memory to the blocks held.
    """

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}
        self._children: dict[bytes, set[bytes]] = {}
        self._published: dict[bytes, None] = {}  # in order of publication: parents come first
        self._checkpoints: set[bytes] = set()

    def __len__(self) -> int:
        """Entries published: blocks whose chain is whole, and checkpoints."""
        return len(self._published) + len(self._checkpoints)

    def apply(self, events: Iterable[CacheEvent]) -> list[Change]:
        """What is to be published for these events. Events that say nothing new give nothing."""
        changes: list[Change] = []
        for event in events:
            if event.kind == "checkpoint":
                changes.extend(self._checkpoint(event.hash, event.stored))
            elif event.stored:
                changes.extend(self._store(event.hash, event.parent))
            else:
                changes.extend(self._evict(event.hash))
        return changes

    def snapshot(self) -> list[Change]:
        """The changes that lead from nothing to all that is published now."""
        blocks = [Change("block", True, name) for name in self._published]
        return blocks + [Change("checkpoint", True, name) for name in self._checkpoints]

    def _store(self, name: bytes, parent: bytes) -> Iterator[Change]:
        if name in self._parents:
            return
        self._parents[name] = parent
        if parent:
            self._children.setdefault(parent, set()).add(name)
        if not parent or parent in self._published:
            for reachable in self._below(name):
                self._published[reachable] = None
                yield Change("block", True, reachable)

    def _evict(self, name: bytes) -> Iterator[Change]:
        parent = self._parents.get(name)
        if parent is None:
            return
        if name in self._published:
            for unreachable in reversed(self._below(name)):
                del self._published[unreachable]
                yield Change("block", False, unreachable)
        del self._parents[name]
        if parent:
            siblings = self._children[parent]
            siblings.discard(name)
            if not siblings:
                del self._children[parent]

    def _checkpoint(self, name: bytes, stored: bool) -> Iterator[Change]:
        if stored is (name in self._checkpoints):
            return
        (self._checkpoints.add if stored else self._checkpoints.discard)(name)
        yield Change("checkpoint", stored, name)

    def _below(self, name: bytes) -> list[bytes]:
        """`name` and all held blocks after it, parents before children."""
        found = [name]
        for block in found:
            found.extend(self._children.get(block, ()))
        return found
