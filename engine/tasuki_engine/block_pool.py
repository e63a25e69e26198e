"""Who holds which unit of a pool: the books of KV blocks and of state slots alike.

A unit is *free* (nobody's, without a name), *held* (by as many owners as it has references) or
*cached* (nobody's, but it bears the name of what it contains and may be found again). `take` uses
free units first and then forgets the cached unit that was let go the longest ago. Unit 0 is the
null unit: never given out, a place for writes that nobody reads. Every operation takes as long as
it has units, however many the pool has.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable

NULL = 0

OnName = Callable[[bytes, bool, bytes], None]
"""Called with a name, whether it came (True) or went (False), and, if it came, its parent's."""


class IntegrityError(AssertionError):
    """The books of a pool do not balance; the message names the pool and the unit."""


class Pool:
    """`num_units` equal units, the null unit among them."""

    def __init__(
        self, name: str, num_units: int, *, keep: bool = True, on_name: OnName | None = None
    ) -> None:
        """`keep` False: a named unit is forgotten as soon as nobody holds it."""
        self.name = name
        self.num_units = num_units
        self.generation = [0] * num_units
        """How often each unit was given out: what stood in it before is gone."""
        self._keep = keep
        self._on_name = on_name
        self._free = list(range(num_units - 1, NULL, -1))
        self._references = [0] * num_units
        self._names: list[bytes | None] = [None] * num_units
        self._by_name: dict[bytes, int] = {}
        self._dear = bytearray(num_units)
        self._cached: tuple[OrderedDict[int, None], OrderedDict[int, None]] = (
            OrderedDict(),
            OrderedDict(),
        )

    @property
    def total(self) -> int:
        """Units that can be given out."""
        return self.num_units - 1

    @property
    def cached(self) -> int:
        """Units that nobody holds and that can still be found."""
        return len(self._cached[0]) + len(self._cached[1])

    @property
    def available(self) -> int:
        """Units that `take` could give now."""
        return len(self._free) + self.cached

    @property
    def used(self) -> int:
        """Units that somebody holds."""
        return self.total - self.available

    def take(self, count: int) -> list[int] | None:
        """`count` units with one reference each; None, and nothing done, if there are too few."""
        if count > self.available:
            return None
        return self._give_out(count)

    def take_spare(self, *, dear: bool) -> int | None:
        """One unit for what nobody needs; no dear one is forgotten for what is not `dear`."""
        if self._free or self._cached[0] or (dear and self._cached[1]):
            return self._give_out(1)[0]
        return None

    def hold(self, *units: int) -> None:
        """Adds a reference to each of these held or cached units."""
        references = self._references
        for unit in units:
            if references[unit] == 0:
                del self._cached[self._dear[unit]][unit]
            references[unit] += 1

    def drop(self, *units: int) -> None:
        """Takes a reference to each away; the last makes a named unit cached, another free.

        In this order they will be forgotten.
        """
        references, names = self._references, self._names
        for unit in units:
            references[unit] -= 1
            if references[unit] > 0:
                continue
            if names[unit] is not None and self._keep:
                self._cached[self._dear[unit]][unit] = None
                continue
            self._unname(unit)
            self._free.append(unit)

    def publish(self, unit: int, name: bytes, *, parent: bytes = b"", dear: bool = False) -> bool:
        """Names a held unit, so that it can be found; `parent` is told on with the name.

        False if another unit bears the name already: this one then stays its owner's alone. A dear
        unit is forgotten only after all others.
        """
        bearer = self._by_name.setdefault(name, unit)
        if dear:
            self._make_dear(bearer)
        if bearer != unit:
            return False
        if self._names[unit] is None:
            self._names[unit] = name
            if self._on_name is not None:
                self._on_name(name, True, parent)
        return True

    def find(self, name: bytes) -> int | None:
        """The unit of that name."""
        return self._by_name.get(name)

    def find_run(self, names: Iterable[bytes]) -> list[int]:
        """The units of the first names, up to one that no unit bears."""
        units: list[int] = []
        for unit in map(self._by_name.get, names):
            if unit is None:
                break
            units.append(unit)
        return units

    def forget(self, name: bytes) -> None:
        """Takes a name away: nobody finds its unit by it any more; who holds it keeps it."""
        unit = self._by_name.get(name)
        if unit is None:
            return
        if self._references[unit] == 0:
            del self._cached[self._dear[unit]][unit]
            self._free.append(unit)
        self._unname(unit)

    def _make_dear(self, unit: int) -> None:
        if not self._dear[unit]:
            if unit in self._cached[0]:
                del self._cached[0][unit]
                self._cached[1][unit] = None
            self._dear[unit] = 1

    def _give_out(self, count: int) -> list[int]:
        """So many available units, now with one reference each."""
        units = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - len(units) :]
        while len(units) < count:
            unit, _ = (self._cached[0] or self._cached[1]).popitem(last=False)
            self._unname(unit)
            units.append(unit)
        for unit in units:
            self._references[unit] = 1
            self.generation[unit] += 1
        return units

    def _unname(self, unit: int) -> None:
        name = self._names[unit]
        self._dear[unit] = 0
        if name is None:
            return
        self._names[unit] = None
        del self._by_name[name]
        if self._on_name is not None:
            self._on_name(name, False, b"")

    def check(self, owners: Counter[int]) -> None:
        """Recounts the books; `owners` says how many references each unit should have.

        Raises:
            IntegrityError: naming the pool and the first unit that is wrong.
        """

        def demand(holds: bool, unit: int, what: str) -> None:
            if not holds:
                raise IntegrityError(f"Pool {self.name}, unit {unit}: {what}.")

        free = set(self._free)
        demand(len(free) == len(self._free), NULL, "a unit is free twice")
        demand(NULL not in free and not owners[NULL], NULL, "the null unit was given out")
        for unit in range(1, self.num_units):
            references, name = self._references[unit], self._names[unit]
            cached = unit in self._cached[self._dear[unit]]
            demand(unit not in self._cached[1 - self._dear[unit]], unit, "in the wrong LRU order")
            demand(
                references == owners[unit],
                unit,
                f"has {references} references and {owners[unit]} owners",
            )
            demand((unit in free) + cached + (references > 0) == 1, unit, "is not in one place")
            demand(not cached or name is not None, unit, "is cached without a name")
            demand(unit not in free or name is None, unit, "is free and has a name")
            demand(name is None or self._by_name.get(name) == unit, unit, "has another's name")
        named = sum(name is not None for name in self._names)
        demand(named == len(self._by_name), NULL, "a name belongs to no unit")
