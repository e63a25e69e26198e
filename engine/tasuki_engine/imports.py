"""Prefixes that come from another pod: room for them, then a pinned place in the prefix cache."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

from tasuki_common.errors import RequestError
from tasuki_engine.block_pool import Pool
from tasuki_engine.prefix_cache import PrefixCache
from tasuki_engine.request import Reservation


@dataclasses.dataclass
class _Import:
    names: list[bytes]
    units: dict[str, dict[int, int]]
    """Held, by pool and ordinal."""
    local: dict[str, set[int]]
    """Ordinals, by pool, of what was here already."""
    committed: bool = False


class Imports:
    """Reserved and committed prefixes by their id."""

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache
        self._imports: dict[str, _Import] = {}

    def reserve(self, prefix_id: str, names: Sequence[bytes]) -> Reservation | None:
        """Holds what is here of a prefix of `len(names)` blocks and takes room for the rest.

        None, and nothing held, if there is not enough room now.
        """
        if prefix_id in self._imports:
            raise RequestError(f"Prefix {prefix_id!r} is reserved already.", param="prefix_id")
        units: dict[str, dict[int, int]] = {}
        wanted: dict[str, dict[int, int]] = {}
        local: dict[str, set[int]] = {}
        num_local = 0
        for pool, ordinals in self._needs(names):
            found = {o: unit for o in ordinals if (unit := pool.find(names[o])) is not None}
            for unit in found.values():
                pool.hold(unit)
            missing = [ordinal for ordinal in ordinals if ordinal not in found]
            room = pool.take(len(missing))
            units[pool.name], local[pool.name] = found, set(found)
            if room is None:
                self._drop(units)
                return None
            new = dict(zip(missing, room, strict=True))
            units[pool.name] = dict(sorted((found | new).items()))
            if new:
                wanted[pool.name] = _as_spans(pool, new)
            if pool is self._cache.full:
                num_local = len(found) * self._cache.block_size
        self._imports[prefix_id] = _Import(list(names), units, local)
        num_tokens = len(names) * self._cache.block_size
        return Reservation(
            prefix_id=prefix_id, num_tokens=num_tokens, num_local_tokens=num_local, wanted=wanted
        )

    def commit(self, prefix_id: str) -> None:
        """Makes a reserved prefix findable; its bytes have arrived and were verified."""
        prefix = self._imports.get(prefix_id)
        if prefix is None:
            raise RequestError(f"Prefix {prefix_id!r} is not reserved.", param="prefix_id")
        pools = self._cache.pools()
        for name, units in prefix.units.items():
            pool = pools[name]
            for ordinal, unit in units.items():
                if ordinal in prefix.local[name] and pool.find(prefix.names[ordinal]) != unit:
                    continue  # it was forgotten meanwhile, because it may be spoilt
                parent = prefix.names[ordinal - 1] if ordinal and pool is self._cache.full else b""
                pool.publish(
                    unit, prefix.names[ordinal], parent=parent, dear=pool is self._cache.slots
                )
        prefix.committed = True

    def cancel(self, prefix_id: str) -> None:
        """Lets a prefix go, committed or not; an unknown id is one that was let go before."""
        prefix = self._imports.pop(prefix_id, None)
        if prefix is not None:
            self._drop(prefix.units)

    def give_up_one(self, *, but: str | None) -> bool:
        """Unpins a committed prefix, `but` last; False if there is none.

        What is unpinned may still be found. So waiting requests never wait for each other's pins.
        """
        committed = [key for key, prefix in self._imports.items() if prefix.committed]
        committed.sort(key=lambda key: key == but)
        if committed:
            self.cancel(committed[0])
        return bool(committed)

    def owners(self) -> dict[str, Counter[int]]:
        """References held, by pool."""
        counts: dict[str, Counter[int]] = {name: Counter() for name in self._cache.pools()}
        for prefix in self._imports.values():
            for name, units in prefix.units.items():
                counts[name].update(units.values())
        return counts

    def _needs(self, names: Sequence[bytes]) -> Iterator[tuple[Pool, list[int]]]:
        """Per pool the block numbers that a prefix needs; the state's is its last block's."""
        end = len(names)
        if end == 0:
            return
        if self._cache.full is not None:
            yield self._cache.full, list(range(end))
        if self._cache.window is not None:
            first = self._cache.first_window_block(end * self._cache.block_size)
            yield self._cache.window, list(range(first, end))
        if self._cache.slots is not None:
            yield self._cache.slots, [end - 1]

    def _drop(self, units: dict[str, dict[int, int]]) -> None:
        pools = self._cache.pools()
        for name, by_ordinal in units.items():
            for unit in reversed(by_ordinal.values()):
                pools[name].drop(unit)


def _as_spans(pool: Pool, units: dict[int, int]) -> dict[int, int]:
    """By the giver's ordinals: a block's is its number, the state's is 0."""
    return {0 if pool.name == "state" else ordinal: unit for ordinal, unit in units.items()}
