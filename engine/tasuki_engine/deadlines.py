"""Which requests must end now, because their time is over."""

import heapq

from tasuki_engine.sequence import Sequence, State


class Deadlines:
    """Sequences by the time at which they end, if they have not ended before."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Sequence]] = []

    def add(self, seq: Sequence) -> None:
        """Watches a sequence; one without a deadline has all the time there is."""
        if seq.deadline is not None:
            heapq.heappush(self._entries, (seq.deadline, seq.arrival, seq))

    def overdue(self, now: float, num_alive: int) -> list[Sequence]:
        """Those that wait or run past their deadline, each once. `now` is monotonic.

        `num_alive` sequences have not ended; when most entries are of others, these are dropped.
        """
        late: list[Sequence] = []
        while self._entries and self._entries[0][0] <= now:
            late.append(heapq.heappop(self._entries)[2])
        if len(self._entries) > 2 * num_alive + 64:
            self._entries = [entry for entry in self._entries if _can_be_late(entry[2])]
            heapq.heapify(self._entries)
        return [seq for seq in late if _can_be_late(seq)]


def _can_be_late(seq: Sequence) -> bool:
    return seq.state in (State.WAITING, State.RUNNING)
