"""Steps that were launched and are not yet collected, and the units that must wait for them.

The device works behind the host. A unit that the host lets go may still be read or written by a
step in flight, and whoever gets it next may write it from another stream (an import does). So it is
given back only when the newest step in flight at that time has been collected.
"""

import dataclasses
from collections import Counter, deque

from tasuki_engine.block_pool import Pool
from tasuki_engine.sequence import Sequence


@dataclasses.dataclass(slots=True)
class PlannedCheckpoint:
    """The state after `boundary` tokens of the sequence goes into `slot`."""

    boundary: int
    slot: int
    dear: bool


@dataclasses.dataclass(slots=True)
class Part:
    """What one sequence computes in a step: `num_tokens` from token `start` on."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """A token is drawn from the logits of its last one."""
    checkpoints: list[PlannedCheckpoint]

    @property
    def end(self) -> int:
        """Tokens of the sequence that are in the caches after it."""
        return self.start + self.num_tokens


_Dropped = tuple[Pool, tuple[int, ...]]


class Flights:
    """In order of launch; the oldest is settled first."""

    def __init__(self) -> None:
        self._steps: deque[tuple[list[Part], list[_Dropped]]] = deque()
        """Parts, and what to give back when they are settled."""
        self._sources: list[_Dropped] = []

    def __len__(self) -> int:
        return len(self._steps)

    def launch(self, parts: list[Part]) -> None:
        """A step begins."""
        self._steps.append((parts, self._sources))
        self._sources = []

    def settle(self) -> list[Part]:
        """The oldest step has ended: gives back what waited for it; returns its parts."""
        parts, dropped = self._steps.popleft()
        _give_back(dropped)
        return parts

    def drop(self, pool: Pool, *units: int) -> None:
        """Takes a reference to each away as soon as no step in flight can touch them."""
        if self._steps:
            self._steps[-1][1].append((pool, units))
        else:
            pool.drop(*units)

    def drop_source(self, pool: Pool, unit: int) -> None:
        """The same for what a copy reads that goes before the next step."""
        self._sources.append((pool, (unit,)))

    @property
    def copies(self) -> bool:
        """Whether copies were started that no step follows yet."""
        return bool(self._sources)

    def copies_done(self) -> None:
        """No step followed the copies, but they have ended."""
        _give_back(self._sources)
        self._sources = []

    def add_owners(self, counts: dict[str, Counter[int]]) -> None:
        """Counts the references that are held here, by pool."""
        waiting = [entry for _, dropped in self._steps for entry in dropped]
        for pool, units in waiting + self._sources:
            counts[pool.name].update(units)
        for parts, _ in self._steps:
            for part in parts:
                counts.get("state", Counter()).update(c.slot for c in part.checkpoints)


def _give_back(entries: list[_Dropped]) -> None:
    for pool, units in entries:
        pool.drop(*units)
