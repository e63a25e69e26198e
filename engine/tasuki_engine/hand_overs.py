"""Prompts that are computed for another pod: which spans became final, and when all are there."""

from tasuki_engine import checkpoints
from tasuki_engine.block_pool import NULL
from tasuki_engine.prefix_cache import PrefixCache
from tasuki_engine.request import HandOver
from tasuki_engine.scheduler import Scheduler
from tasuki_engine.sequence import Sequence, State
from tasuki_transfer.spans import Span


class HandOvers:
    """Those that are not complete."""

    def __init__(self, cache: PrefixCache, scheduler: Scheduler) -> None:
        self._cache = cache
        self._scheduler = scheduler
        self._open: dict[str, Sequence] = {}

    def add(self, seq: Sequence) -> None:
        """Reports on a sequence until it is complete or discarded."""
        self._open[seq.id] = seq

    def discard(self, seq: Sequence) -> None:
        """Reports no more on a sequence that has ended, if it is one of these."""
        self._open.pop(seq.id, None)

    def progress(self) -> list[HandOver]:
        """What is new of those that run; those that are complete now stay pinned."""
        reports = []
        for seq in list(self._open.values()):
            if seq.state is State.RUNNING and (report := self._report(seq)) is not None:
                reports.append(report)
        return reports

    def _report(self, seq: Sequence) -> HandOver | None:
        num_final = seq.num_settled // seq.block_size
        complete = seq.num_settled == seq.target
        if num_final == seq.num_offered and not complete:
            return None
        spans = self._spans("full", seq.full, seq.num_offered, num_final)
        if complete:
            spans += self._spans("window", seq.window, seq.first_window_block, num_final)
            if self._cache.slots is not None and seq.slot != NULL:
                checkpoints.publish_running_state(seq, self._cache.slots)
                spans += self._spans("state", [seq.slot], 0, 1)
            self._scheduler.remove(seq, State.PINNED)
            self.discard(seq)
        seq.num_offered = num_final
        return HandOver(
            request_id=seq.id,
            spans=spans,
            num_tokens=num_final * seq.block_size,
            complete=complete,
            num_cached_tokens=seq.num_cached or 0,
        )

    def _spans(self, name: str, units: list[int], start: int, end: int) -> list[Span]:
        pool = self._cache.pools().get(name)
        if pool is None:
            return []
        return [Span(name, units[i], i, pool.generation[units[i]]) for i in range(start, end)]
