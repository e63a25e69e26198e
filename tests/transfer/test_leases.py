"""Leases: each ends exactly once, whatever happens in whatever order."""

import contextlib

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from transfer_peers import Ends

from tasuki_transfer import wire
from tasuki_transfer.base import TransferError
from tasuki_transfer.leases import Leases
from tasuki_transfer.session import Session
from tasuki_transfer.spans import Span

IDS = st.sampled_from("abcd")
SECONDS = 10.0


class LeaseMachine(RuleBasedStateMachine):
    """Two takers and an engine against a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ends = Ends()
        self.leases = Leases(SECONDS, self.ends, lambda: self.now)
        self.told: list[list[object]] = [[], []]
        self.sessions = [Session(self.leases, None, told.append) for told in self.told]
        self.opened: dict[str, int] = {}
        self.touched: dict[str, float] = {}

    @rule(request_id=IDS)
    def open(self, request_id: str) -> None:
        if self.leases.find(request_id) is None:
            self.leases.open(request_id)
            self.opened[request_id] = self.opened.get(request_id, 0) + 1
            self.touched[request_id] = self.now

    @rule(request_id=IDS, ordinal=st.integers(0, 5))
    def offer(self, request_id: str, ordinal: int) -> None:
        lease = self.leases.find(request_id)
        if lease is not None and not lease.complete:
            lease.publish([Span("full", ordinal, ordinal, 0)], [0])

    @rule(request_id=IDS)
    def complete(self, request_id: str) -> None:
        lease = self.leases.find(request_id)
        if lease is not None:
            lease.finish()

    @rule(request_id=IDS)
    def fail(self, request_id: str) -> None:
        lease = self.leases.find(request_id)
        if lease is not None:
            self.leases.end(lease, "failed")
            self.leases.end(lease, "expired")

    @rule(taker=st.integers(0, 1), pull=st.integers(0, 3), request_id=IDS)
    def subscribe(self, taker: int, pull: int, request_id: str) -> None:
        with contextlib.suppress(TransferError):
            self.sessions[taker].handle(wire.Subscribe(pull, request_id))
        if self.leases.find(request_id) is not None:
            self.touched[request_id] = self.now

    @rule(taker=st.integers(0, 1), pull=st.integers(0, 3))
    def release(self, taker: int, pull: int) -> None:
        with contextlib.suppress(TransferError):
            self.sessions[taker].handle(wire.Release(pull))

    @rule(taker=st.integers(0, 1))
    def leave(self, taker: int) -> None:
        self.sessions[taker].end()

    @rule(seconds=st.floats(0, 15))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.leases.expire()

    @invariant()
    def each_lease_is_open_or_ended_once(self) -> None:
        for request_id, count in self.opened.items():
            ended = len(self.ends.of.get(request_id, []))
            assert ended + (self.leases.find(request_id) is not None) == count

    @invariant()
    def none_outlives_its_term(self) -> None:
        for request_id, touched in self.touched.items():
            if self.leases.find(request_id) is not None:
                assert self.now <= touched + SECONDS

    def teardown(self) -> None:
        self.leases.end_all()
        assert len(self.leases) == 0
        self.each_lease_is_open_or_ended_once()


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLeases = LeaseMachine.TestCase
