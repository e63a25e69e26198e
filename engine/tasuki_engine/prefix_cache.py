"""Which computed prefixes are still here, and how deep a prompt can resume on them.

A prefix of b blocks can be *resumed* when all that the next token needs is here: every
full-attention block before it, the blocks that its sliding window still sees, and a checkpoint of
the recurrent state exactly there. What a model does not have it does not need.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from tasuki_engine.block_pool import NULL, Pool
from tasuki_engine.request import CacheEvent


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """What is here of a prompt. Nothing of it is held yet."""

    depth: int
    """Blocks that can be skipped."""
    full: list[int]
    """Full-attention blocks from the first on; they may reach deeper than `depth`."""
    window: list[int]
    """The window's blocks before `depth`, the last one ends there."""
    checkpoint: int
    """Slot with the state at `depth`; the null slot if there is none or none is needed."""

    @classmethod
    def none(cls) -> "Match":
        """Nothing is here."""
        return cls(0, [], [], NULL)


class PrefixCache:
    """The pools of one engine, with the names of what they hold."""

    def __init__(
        self,
        *,
        num_blocks: int,
        num_window_blocks: int,
        num_slots: int,
        block_size: int,
        window: int | None,
        keep: bool,
    ) -> None:
        """Counts include the null unit; 0 where the model has no such layers.

        `window` is in tokens. `keep` False: nothing is found once nobody holds it.
        """
        self.block_size = block_size
        self._window_tokens = window
        self._events: list[CacheEvent] = []

        def note_block(name: bytes, stored: bool, parent: bytes) -> None:
            self._events.append(CacheEvent("block", stored, name, parent))

        def note_checkpoint(name: bytes, stored: bool, _: bytes) -> None:
            self._events.append(CacheEvent("checkpoint", stored, name))

        self.full = Pool("full", num_blocks, keep=keep, on_name=note_block) if num_blocks else None
        self.window = (
            Pool(
                "window",
                num_window_blocks,
                keep=keep,
                on_name=None if num_blocks else note_block,
            )
            if num_window_blocks
            else None
        )
        self.slots = (
            Pool("state", num_slots, keep=keep, on_name=note_checkpoint) if num_slots else None
        )

    def pools(self) -> dict[str, Pool]:
        """The pools that the model has, by the names of their regions."""
        pools = (self.full, self.window, self.slots)
        return {pool.name: pool for pool in pools if pool is not None}

    def forget(self, names: Sequence[bytes]) -> None:
        """Nothing is found by these names any more, in any pool; the deepest goes first.

        For a sequence that failed on what it read: any of it may be spoilt. What others share goes
        as well: that their numbers were finite does not prove that they were right, and to compute
        a prefix once more is cheap.
        """
        for pool in self.pools().values():
            for name in reversed(names):
                pool.forget(name)

    def take_events(self) -> list[CacheEvent]:
        """What became findable or was forgotten since the last call, in order."""
        events, self._events = self._events, []
        return events

    def first_window_block(self, num_tokens: int) -> int:
        """The first block that token number `num_tokens` (from 0) still sees."""
        if self._window_tokens is None:
            return 0
        return max(0, num_tokens - self._window_tokens + 1) // self.block_size

    def match(self, names: Sequence[bytes], limit: int) -> Match:
        """The deepest boundary of at most `limit` blocks that can be resumed; `names` name them."""
        full: list[int] = []
        reach = limit
        if self.full is not None:
            full = self.full.find_run(names[:limit])
            reach = len(full)
        depth = self._resumable(names, reach)
        if depth == 0:
            return Match(0, full, [], NULL)
        return Match(depth, full, self._window_blocks(names, depth), self._slot(names, depth))

    def hold(self, match: Match) -> None:
        """Adds a reference to all units of a match."""
        for pool, units in self._units(match):
            pool.hold(*units)

    def drop(self, match: Match) -> None:
        """Takes back what `hold` added; the deepest blocks are let go first."""
        for pool, units in self._units(match):
            pool.drop(*reversed(units))

    def _units(self, match: Match) -> Iterable[tuple[Pool, list[int]]]:
        if self.full is not None:
            yield self.full, match.full
        if self.window is not None:
            yield self.window, match.window
        if self.slots is not None and match.checkpoint != NULL:
            yield self.slots, [match.checkpoint]

    def _resumable(self, names: Sequence[bytes], depth: int) -> int:
        while depth > 0:
            if self.slots is not None and self.slots.find(names[depth - 1]) is None:
                depth -= 1
                continue
            hole = self._window_hole(names, depth)
            if hole is None:
                return depth
            depth = hole  # every boundary between the hole and here sees the hole
        return 0

    def _window_hole(self, names: Sequence[bytes], depth: int) -> int | None:
        if self.window is None:
            return None
        first = self.first_window_block(depth * self.block_size)
        for block in range(depth - 1, first - 1, -1):
            if self.window.find(names[block]) is None:
                return block
        return None

    def _window_blocks(self, names: Sequence[bytes], depth: int) -> list[int]:
        if self.window is None:
            return []
        first = self.first_window_block(depth * self.block_size)
        found = (self.window.find(name) for name in names[first:depth])
        return [block for block in found if block is not None]

    def _slot(self, names: Sequence[bytes], depth: int) -> int:
        slot = self.slots.find(names[depth - 1]) if self.slots is not None else None
        return NULL if slot is None else slot
