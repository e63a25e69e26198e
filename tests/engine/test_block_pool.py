"""The books of a pool against the plainest model of them."""

from collections import Counter

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tasuki_engine.block_pool import IntegrityError, Pool

UNITS = 8
NAMES = st.integers(0, 9).map(lambda i: bytes([i]))


class PoolMachine(RuleBasedStateMachine):
    """Any order of taking, holding, naming and dropping leaves books that balance."""

    def __init__(self) -> None:
        super().__init__()
        self.findable: set[bytes] = set()
        self.pool = Pool("full", UNITS, on_name=self.note)
        self.held: list[int] = []
        self.names: dict[bytes, int] = {}
        self.order: list[bytes] = []
        self.generation = [0] * UNITS

    def note(self, name: bytes, stored: bool, parent: bytes) -> None:
        assert not parent
        assert stored != (name in self.findable)
        (self.findable.add if stored else self.findable.remove)(name)

    @rule(count=st.integers(0, UNITS))
    def take(self, count: int) -> None:
        available = UNITS - 1 - len(set(self.held))
        units = self.pool.take(count)
        assert (units is None) == (count > available)
        for unit in units or []:
            assert unit not in self.held
            self.generation[unit] += 1
            self.names = {name: u for name, u in self.names.items() if u != unit}
            self.held.append(unit)

    @rule(dear=st.booleans())
    def take_spare(self, dear: bool) -> None:
        before = dict(self.names)
        unit = self.pool.take_spare(dear=dear)
        if unit is None:
            return
        assert unit not in self.held
        self.generation[unit] += 1
        self.names = {name: u for name, u in before.items() if u != unit}
        self.held.append(unit)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=NAMES, dear=st.booleans())
    def publish(self, data: st.DataObject, name: bytes, dear: bool) -> None:
        unit = data.draw(st.sampled_from(self.held))
        if unit in self.names.values() and self.names.get(name) != unit:
            return  # a unit is named once
        first = name not in self.names
        assert self.pool.publish(unit, name, dear=dear) == (first or self.names[name] == unit)
        self.names.setdefault(name, unit)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def hold_found(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.names)), min_size=1, max_size=3))
        units = [self.names[name] for name in names]
        assert self.pool.find_run([*names, b"nobody's", *names]) == units
        self.pool.hold(*units)
        self.held += units

    @rule(name=NAMES)
    def forget(self, name: bytes) -> None:
        self.pool.forget(name)
        self.names.pop(name, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        units = data.draw(st.permutations(self.held))[: data.draw(st.integers(1, 3))]
        for unit in units:
            self.held.remove(unit)
        self.pool.drop(*units)

    @invariant()
    def balances(self) -> None:
        self.pool.check(Counter(self.held))
        assert self.findable == set(self.names)
        for name in (bytes([i]) for i in range(10)):
            assert self.pool.find(name) == self.names.get(name)
        assert self.pool.used == len(set(self.held))
        assert self.pool.used + self.pool.available == self.pool.total == UNITS - 1
        assert self.pool.generation == self.generation


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)


def _named(pool: Pool, name: bytes, *, dear: bool = False) -> int:
    (unit,) = pool.take(1) or []
    pool.publish(unit, name, dear=dear)
    pool.drop(unit)
    return unit


def test_what_was_let_go_the_longest_ago_is_forgotten_first() -> None:
    pool = Pool("full", 4)
    for name in (b"a", b"b", b"c"):
        _named(pool, name)
    found = pool.find(b"a")
    assert found is not None
    pool.hold(found)
    pool.drop(found)
    pool.take(1)
    assert (pool.find(b"a"), pool.find(b"b")) == (found, None)


def test_dear_units_outlive_all_others_and_make_no_room_for_what_is_not_dear() -> None:
    pool = Pool("state", 4)
    _named(pool, b"prompt end", dear=True)
    _named(pool, b"regular")
    _named(pool, b"junction", dear=True)
    assert pool.take_spare(dear=False) is not None
    assert pool.find(b"regular") is None
    assert pool.take_spare(dear=False) is None
    assert pool.take_spare(dear=True) is not None
    assert pool.find(b"prompt end") is None
    assert pool.find(b"junction") is not None


def test_a_name_that_turns_out_dear_moves_its_unit() -> None:
    pool = Pool("state", 3)
    _named(pool, b"a")
    _named(pool, b"b")
    (other,) = (pool.take_spare(dear=True),)
    assert other is not None
    assert pool.find(b"a") is None
    assert not pool.publish(other, b"b", dear=True)
    assert pool.take_spare(dear=False) is None
    pool.check(Counter([other]))


def test_without_keeping_a_unit_is_found_only_while_it_is_held() -> None:
    pool = Pool("full", 3, keep=False)
    (unit,) = pool.take(1) or []
    pool.publish(unit, b"a")
    assert pool.find(b"a") == unit
    pool.drop(unit)
    assert pool.find(b"a") is None
    assert pool.available == pool.total


def test_a_lost_reference_is_named_by_pool_and_unit() -> None:
    pool = Pool("window", 4)
    units = pool.take(2)
    with pytest.raises(IntegrityError, match=r"Pool window, unit \d: has 1 references and 0"):
        pool.check(Counter(units[:1] if units else []))
