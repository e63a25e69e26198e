"""Who computes how many tokens in the next step.

There are no phases. Every sequence has tokens that are known and tokens that are computed; each
step deals out a budget of tokens so that the second catch up with the first; the end of a prompt
may overdraw it a little, rather than take a step of its own. Running sequences come first, those
that lack one token before those that lack many, so that no long prompt stops the others' streams;
then waiting ones are admitted by (priority, arrival). An admission takes the full-attention blocks
of all known tokens at once, so that only growing outputs can run out of them; then the sequence
that is last in order loses its units and computes again later. What hand-overs hold was promised to
another pod and is taken only when nothing else is left.

A step is scheduled while the one before may still run: what is *computed* counts from the launch
on, what can be *found* by others, or be freed, from the time it is settled.
"""

import dataclasses
import heapq
from collections import Counter
from collections.abc import Callable, Iterable

from tasuki_engine import checkpoints
from tasuki_engine.block_pool import NULL, Pool
from tasuki_engine.flights import Flights, Part
from tasuki_engine.prefix_cache import Match, PrefixCache
from tasuki_engine.sequence import Sequence, State

_SCORED_TOKENS = 1024
"""Prompt tokens of one sequence and step whose log-probabilities are asked for: the logits of them
all, float32 over the whole vocabulary, are in memory at once."""


class UnsettledError(Exception):
    """The next step needs units, or tokens, that only the steps in flight can bring."""


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of one engine."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_step_tokens: int
    checkpoint_interval: int


class Scheduler:
    """Waiting and running sequences, and the units they hold."""

    def __init__(
        self,
        cache: PrefixCache,
        limits: Limits,
        copy_state: Callable[[int, int], None],
    ) -> None:
        """`copy_state(source, target)` copies a state slot before the next step runs, or later."""
        self.running: list[Sequence] = []
        """In order; the last is preempted first."""
        self.failed: list[tuple[Sequence, str]] = []
        """Sequences that were ended here, and the sentence that says why; the caller empties it."""
        self.blocked: Sequence | None = None
        """The head of the queue, if it found too few units in the last step while nothing ran."""
        self.num_preemptions = 0
        self.query_tokens = 0
        self.hit_tokens = 0
        self.num_waiting = 0
        self.flights = Flights()
        self._cache = cache
        self._free_rows = list(range(limits.max_num_seqs - 1, -1, -1))
        self._limits = limits
        self._copy_state = copy_state
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []

    @property
    def waiting(self) -> Iterable[Sequence]:
        """Waiting sequences in no particular order."""
        return (seq for _, seq in self._waiting if seq.state is State.WAITING)

    def add(self, seq: Sequence) -> None:
        """Lets a new or preempted sequence wait."""
        seq.state = State.WAITING
        self.num_waiting += 1
        heapq.heappush(self._waiting, (seq.order, seq))

    def remove(self, seq: Sequence, state: State = State.DONE) -> None:
        """Takes a sequence out, wherever it is; its units are dropped unless it becomes PINNED."""
        if seq.state is State.WAITING:
            self.num_waiting -= 1
        elif seq.state is State.RUNNING:
            self.running.remove(seq)
            self._free_rows.append(seq.row)
        if state is not State.PINNED:
            self._drop_units(seq)
        seq.state = state
        if len(self._waiting) > 2 * self.num_waiting + 64:
            self._waiting = [entry for entry in self._waiting if entry[1].state is State.WAITING]
            heapq.heapify(self._waiting)

    def schedule(self) -> list[Part]:
        """The next step's parts, those of one token first; may be empty.

        Raises:
            UnsettledError: when the steps in flight must be settled first.
        """
        if self.flights and any(seq.awaits_history for seq in self.running):
            raise UnsettledError
        budget = self._limits.max_num_batched_tokens
        parts: dict[Sequence, Part] = {}
        preemptions = self.num_preemptions
        for seq in self._one_token_first():
            if budget <= 0:
                break
            if seq.state is State.RUNNING:
                budget -= self._continue(seq, budget, parts)
        self.blocked = None
        if self.num_preemptions == preemptions:
            self._admit_waiting(budget, parts)
        ordered = sorted(parts.values(), key=lambda part: part.num_tokens > 1)
        if self._cache.slots is not None:
            for part in ordered:
                part.checkpoints = checkpoints.plan(
                    part, self._cache.slots, self._limits.checkpoint_interval
                )
        return ordered

    def launch(self, parts: list[Part]) -> None:
        """Books a step that was sent to the device: the next one starts from where it will end."""
        for part in parts:
            part.sequence.num_computed = part.end
            part.sequence.sampler_row.in_flight += part.samples
        self.flights.launch(parts)

    def settle(self) -> list[Part]:
        """Books what the oldest step in flight has computed: from now on others can find it.

        Returns its parts. Of sequences that have ended meanwhile nothing is kept.
        """
        parts = self.flights.settle()
        for part in parts:
            seq = part.sequence
            seq.sampler_row.in_flight -= part.samples
            if seq.state is State.RUNNING:
                seq.num_settled = part.end
                if seq.writes_cache:
                    self._publish_blocks(seq)
                self._free_behind_window(seq)
            if self._cache.slots is not None:
                checkpoints.settle(part, self._cache.slots)
        return parts

    def owners(self, pinned: Iterable[Sequence]) -> dict[str, Counter[int]]:
        """References that sequences hold between steps, by pool."""
        counts: dict[str, Counter[int]] = {name: Counter() for name in self._cache.pools()}
        for seq in (*self.running, *pinned):
            for name, units in (("full", seq.full), ("window", seq.window), ("state", [seq.slot])):
                if name in counts:
                    counts[name].update(unit for unit in units if unit != NULL)
        self.flights.add_owners(counts)
        return counts

    # Running sequences

    def _one_token_first(self) -> list[Sequence]:
        one: list[Sequence] = []
        many: list[Sequence] = []
        for seq in self.running:
            missing = seq.num_missing
            if missing:
                (one if missing == 1 else many).append(seq)
        return one + many

    def _continue(self, seq: Sequence, budget: int, parts: dict[Sequence, Part]) -> int:
        """Gives a running sequence tokens of a budget; returns how many of it are gone."""
        wanted = self._wanted(seq, budget)
        given_back = 0
        while (tokens := self._grow(seq, wanted)) == 0:
            if self.flights:
                raise UnsettledError
            victim = self._victim(seq)
            if victim is None:
                return -given_back
            if victim in parts:
                given_back += parts.pop(victim).num_tokens
            self._preempt(victim)
            if victim is seq:
                return -given_back
        parts[seq] = _part(seq, tokens)
        return tokens - given_back

    def _wanted(self, seq: Sequence, budget: int) -> int:
        """Tokens that a sequence can use of `budget`, or of a little more, if that ends it."""
        if seq.wants_prompt_logprobs:
            return min(seq.num_missing, budget, _SCORED_TOKENS)
        most = budget + self._limits.max_step_tokens - self._limits.max_num_batched_tokens
        return seq.num_missing if seq.num_missing <= most else budget

    def _grow(self, seq: Sequence, tokens: int) -> int:
        """Takes the blocks that `tokens` more tokens need; returns how many of them have room."""
        end = seq.num_computed + tokens
        if self._cache.full is not None and end > len(seq.full) * seq.block_size:
            missing = -(-end // seq.block_size) - len(seq.full)
            blocks = self._cache.full.take(missing)
            if blocks is None:
                return 0
            seq.full += blocks
        pool = self._cache.window
        if pool is not None and end > len(seq.window) * seq.block_size:
            missing = -(-end // seq.block_size) - len(seq.window)
            blocks = pool.take(min(missing, pool.available)) or []
            seq.window += blocks
            return min(tokens, len(seq.window) * seq.block_size - seq.num_computed)
        return tokens

    def _victim(self, seq: Sequence) -> Sequence | None:
        """Who loses its units so that `seq` can go on; None: it must wait for others to end."""
        for candidate in reversed(self.running):
            if not candidate.request.hand_over:
                return candidate
        return self.running[-1] if self.running[-1] is not seq else None

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        if seq.request.hand_over:
            self.remove(seq)
            self.failed.append((seq, "Its KV blocks were needed by a request before it."))
            return
        self.remove(seq, State.WAITING)
        self.add(seq)

    # Admission

    def _admit_waiting(self, budget: int, parts: dict[Sequence, Part]) -> None:
        while budget > 0 and (seq := self._next_waiting()) is not None:
            if len(self.running) >= self._limits.max_num_seqs:
                return
            if not self._admit(seq):
                self.blocked = None if self.running else seq
                return
            heapq.heappop(self._waiting)
            tokens = self._wanted(seq, budget)
            if tokens == 0:
                continue
            tokens = self._grow(seq, tokens)
            if tokens == 0:
                return
            parts[seq] = _part(seq, tokens)
            budget -= tokens

    def _next_waiting(self) -> Sequence | None:
        while self._waiting and self._waiting[0][1].state is not State.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _admit(self, seq: Sequence) -> bool:
        """Gives a waiting sequence a row and all units of its known tokens, or nothing."""
        match = self._match(seq)
        complete = seq.request.hand_over and match.depth == seq.resumable_blocks
        missing = -(-seq.target // seq.block_size) - len(match.full)
        full, slots = self._cache.full, self._cache.slots
        needs_slot = slots is not None and not complete
        if not self._has_room(missing, needs_slot=needs_slot):
            return False
        self._cache.hold(match)  # what is held is no longer room
        if not self._has_room(missing, needs_slot=needs_slot):
            self._cache.drop(match)
            return False
        self._start(seq, match, needs_slot=needs_slot)
        if full is not None:
            seq.full += _take(full, missing)
        return True

    def _has_room(self, num_blocks: int, *, needs_slot: bool) -> bool:
        full, window, slots = self._cache.full, self._cache.window, self._cache.slots
        return not (
            (full is not None and full.available < num_blocks)
            or (slots is not None and needs_slot and slots.available < 1)
            or (window is not None and window.available < 1)
        )

    def _match(self, seq: Sequence) -> Match:
        if not seq.reads_cache or seq.wants_prompt_logprobs:
            return Match.none()
        return self._cache.match(seq.names, seq.resumable_blocks)

    def _start(self, seq: Sequence, match: Match, *, needs_slot: bool) -> None:
        """Makes a waiting sequence run from a match that it holds."""
        block_size = seq.block_size
        self.num_waiting -= 1
        seq.state = State.RUNNING
        seq.row = self._free_rows.pop()
        self._insert(seq)
        seq.num_computed = seq.num_settled = match.depth * block_size
        seq.num_published = match.depth
        seq.num_shared = len(match.full) * block_size
        seq.full = list(match.full)
        seq.first_window_block = match.depth - len(match.window)
        seq.window = [NULL] * seq.first_window_block + match.window
        seq.slot = match.checkpoint
        seq.prompt_end = seq.resumable_blocks * block_size
        if self._cache.slots is not None:
            seq.junction = seq.num_shared if len(match.full) > match.depth else 0
            if needs_slot:
                (seq.slot,) = _take(self._cache.slots, 1)
        if needs_slot and match.checkpoint != NULL and self._cache.slots is not None:
            self._copy_state(match.checkpoint, seq.slot)
            self.flights.drop_source(self._cache.slots, match.checkpoint)
        if seq.num_cached is None:
            seq.num_cached = seq.num_computed
            if seq.reads_cache:
                self.query_tokens += len(seq.tokens)
                self.hit_tokens += seq.num_computed

    def _insert(self, seq: Sequence) -> None:
        position = len(self.running)
        while position > 0 and self.running[position - 1].order > seq.order:
            position -= 1
        self.running.insert(position, seq)

    # Units

    def _publish_blocks(self, seq: Sequence) -> None:
        settled = seq.num_settled // seq.block_size
        new, names = range(seq.num_published, settled), seq.names
        if (full := self._cache.full) is not None:
            for i in new:
                full.publish(seq.full[i], names[i], parent=names[i - 1] if i else b"")
        if (window := self._cache.window) is not None:
            for i in new:
                window.publish(seq.window[i], names[i])
        seq.num_published = settled

    def _free_behind_window(self, seq: Sequence) -> None:
        pool = self._cache.window
        if pool is None:
            return
        # A step in flight continues from there: it does not see them any more.
        first = self._cache.first_window_block(seq.num_settled)
        for number in range(seq.first_window_block, first):
            pool.drop(seq.window[number])
            seq.window[number] = NULL
        seq.first_window_block = max(seq.first_window_block, first)

    def _drop_units(self, seq: Sequence) -> None:
        """Lets everything go, the deepest blocks first, so that chains are cut from their end."""
        for pool, units in (
            (self._cache.full, seq.full),
            (self._cache.window, seq.window),
            (self._cache.slots, [seq.slot]),
        ):
            if pool is not None:
                self.flights.drop(pool, *(unit for unit in reversed(units) if unit != NULL))
        seq.forget_progress()


def _take(pool: Pool, count: int) -> list[int]:
    """Units that the caller has seen to be available."""
    units = pool.take(count)
    assert units is not None, f"pool {pool.name} promised {count} units"
    return units


def _part(seq: Sequence, num_tokens: int) -> Part:
    samples = num_tokens == seq.target - seq.num_computed
    return Part(seq, seq.num_computed, num_tokens, samples, [])
