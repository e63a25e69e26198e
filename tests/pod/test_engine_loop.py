"""What the engine's loop does between two steps."""

import queue
import random
import time
from collections.abc import Callable, Sequence

from fresh_seed import fresh_seed
from history_model import VOCAB_SIZE, HistoryModel

from tasuki_common.messages import Ticket
from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.request import Reservation
from tasuki_pod.engine_loop import EngineLoop
from tasuki_pod.transfer_agent import TransferAgent
from tasuki_pod.wire import Command, DropPrefix, PrefixFailed, Pull, Report, Start

CONFIG = EngineConfig(
    model="history", block_size=8, checkpoint_interval=32, num_blocks=64, num_state_slots=8
)


class CountingEngine(Engine):
    """Counts how often room is looked for."""

    looks = 0

    def reserve(
        self,
        prefix_id: str,
        token_ids: Sequence[int],
        num_tokens: int,
        cache_salt: str | None = None,
    ) -> Reservation | None:
        self.looks += 1
        return super().reserve(prefix_id, token_ids, num_tokens, cache_salt)


def _pull(prefix_id: str, tokens: list[int], engine: Engine, seconds: float) -> Pull:
    ticket = Ticket(
        request_id=prefix_id,
        num_tokens=len(tokens) // 8 * 8,
        pod="p",
        incarnation="i",
        fingerprint=engine.fingerprint,
        host="127.0.0.1",
        port=1,
        backends=("tcp",),
        lease_seconds=30.0,
    )
    return Pull(
        prefix_id=prefix_id, ticket=ticket, token_ids=tokens, cache_salt=None, timeout=seconds
    )


def test_a_prefix_without_room_is_looked_at_20_times_a_second_at_most() -> None:
    rng = random.Random(fresh_seed())
    tokens = [rng.randrange(VOCAB_SIZE) for _ in range(400)]
    engine = CountingEngine(CONFIG, HistoryModel())
    start = Start(
        engine=CONFIG,
        role="decode",
        pod="d",
        deployment="",
        incarnation="i",
        transfer_key=b"k" * 32,
        transfer_backends=("tcp",),
        transfer_host="127.0.0.1",
        transfer_port=0,
        lease_seconds=30.0,
        log_level="warning",
    )
    inbox: queue.SimpleQueue[Command | Callable[[], None]] = queue.SimpleQueue()
    sent: list[Report] = []
    agent = TransferAgent(start, engine, inbox.put)
    loop = EngineLoop(engine, agent, inbox, sent.append)
    assert engine.reserve("taken", tokens[::-1], 400) is not None
    engine.looks = 0
    loop._handle(_pull("waits", tokens, engine, 30.0))
    loop._handle(_pull("overdue", tokens, engine, 0.0))
    begun = time.monotonic()
    for _ in range(500):
        loop._reserve_waiting()
    assert 1 <= engine.looks <= 1 + (time.monotonic() - begun) / 0.05
    patience = 0.0
    for _ in range(1000):  # where this process was held up since the last look, nothing is left
        loop._reserve_waiting()
        if patience := loop._patience() or 0.0:
            break
    assert 0 < patience <= 0.05
    loop._handle(DropPrefix("waits"))
    loop._reserve_waiting()
    failed = {
        report.prefix_id: report.reason for report in sent if isinstance(report, PrefixFailed)
    }
    assert failed == {"waits": "cancelled", "overdue": "no_room"}
    engine.cancel("taken")
    engine.check_integrity()
    agent.stop()
