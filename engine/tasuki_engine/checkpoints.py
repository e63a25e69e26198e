"""Which states of a recurrent model are kept, and when others may find them.

A state is worth keeping where other prompts will go on from: at the end of a prompt and where
prompts were seen to branch (*dear* ones), and every `interval` tokens between. A step writes into
slots that nobody needs otherwise; they get their names when it is settled.
"""

from tasuki_engine.block_pool import Pool
from tasuki_engine.flights import Part, PlannedCheckpoint
from tasuki_engine.sequence import Sequence, State


def plan(part: Part, slots: Pool, interval: int) -> list[PlannedCheckpoint]:
    """Slots for the states to keep of a part; what finds no spare slot is not kept."""
    seq = part.sequence
    if not seq.writes_cache or part.start // seq.block_size == part.end // seq.block_size:
        return []
    planned: list[PlannedCheckpoint] = []
    for boundary, is_dear in _boundaries(part, interval):
        block = boundary // seq.block_size - 1
        # A block that ends in a token in flight has no name yet.
        if block < len(seq.names) and slots.find(seq.names[block]) is not None:
            continue
        slot = slots.take_spare(dear=is_dear)
        if slot is None:
            break
        planned.append(PlannedCheckpoint(boundary, slot, is_dear))
    return sorted(planned, key=lambda checkpoint: checkpoint.boundary)


def settle(part: Part, slots: Pool) -> None:
    """Names the checkpoints that were written, unless their sequence has ended; lets them go."""
    seq = part.sequence
    for checkpoint in part.checkpoints:
        if seq.state is State.RUNNING:
            name = seq.names[checkpoint.boundary // seq.block_size - 1]
            slots.publish(checkpoint.slot, name, dear=checkpoint.dear)
        slots.drop(checkpoint.slot)


def publish_running_state(seq: Sequence, slots: Pool) -> None:
    """Names a finished hand-over's running state: it is the checkpoint at `num_computed`."""
    if not seq.writes_cache:
        return
    name = seq.names[seq.num_computed // seq.block_size - 1]
    found_here = seq.num_cached == seq.target
    if not found_here or slots.find(name) == seq.slot:  # else it was forgotten meanwhile
        slots.publish(seq.slot, name, dear=True)


def _boundaries(part: Part, interval: int) -> list[tuple[int, bool]]:
    """Token counts within a part after which the state is worth a slot, the dearest first."""
    seq, start, end = part.sequence, part.start, part.end
    dear = {b for b in (seq.prompt_end, seq.junction) if start < b <= end}
    regular = range(start - start % interval + interval, end + 1, interval)
    boundaries = [(b, True) for b in sorted(dear)]
    boundaries += [(b, False) for b in reversed(regular) if b not in dear]
    if seq.request.hand_over and end == seq.target:
        # The running slot will be that checkpoint.
        return [(b, is_dear) for b, is_dear in boundaries if b != end]
    return boundaries
