"""Helpers for tests of one or two engines in one process: run to the end, hand a prefix over."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tasuki_common.sampling import SamplingParams
from tasuki_engine.engine import Engine
from tasuki_engine.request import EngineRequest, HandOver, Reservation, TokenOutput
from tasuki_transfer.spans import Span

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)


def greedy(max_tokens: int, **fields: object) -> SamplingParams:
    """Greedy parameters that run to the end."""
    values = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True} | fields
    return SamplingParams(**values)  # type: ignore[arg-type]


def run(engine: Engine, requests: Iterable[EngineRequest] = ()) -> dict[str, TokenOutput]:
    """Adds requests, steps until nothing is left, checks the books after every step.

    One merged output per request.
    """
    for request in requests:
        engine.add_request(request)
    merged: dict[str, TokenOutput] = {}
    while engine.has_work():
        for output in engine.step().outputs:
            merge(merged, output)
        engine.check_integrity()
        assert not engine.stalled
    return merged


def merge(merged: dict[str, TokenOutput], new: TokenOutput) -> None:
    """Adds what a step brought."""
    old = merged.setdefault(new.request_id, new)
    if old is new:
        return
    assert old.finish_reason is None, f"{new.request_id} went on after its end"
    old.token_ids += new.token_ids
    if new.logprobs is not None:
        old.logprobs = (old.logprobs or []) + new.logprobs
    old.prompt_logprobs = old.prompt_logprobs or new.prompt_logprobs
    old.finish_reason, old.stop_reason = new.finish_reason, new.stop_reason
    old.error = new.error


def compute_hand_over(giver: Engine, request_id: str, prompt: list[int]) -> list[HandOver]:
    """All progress reports of one hand-over, which is pinned afterwards."""
    giver.add_request(EngineRequest(request_id=request_id, prompt_token_ids=prompt, hand_over=True))
    reports: list[HandOver] = []
    while giver.has_work():
        reports += giver.step().hand_overs
        giver.check_integrity()
    return reports


def move(giver: Engine, taker: Engine, spans: Sequence[Span], reservation: Reservation) -> int:
    """Copies the wanted spans from region to region; returns how many."""
    by_place = defaultdict(dict)
    for span in spans:
        assert giver.generation(span.pool, span.index) == span.generation
        by_place[span.pool][span.ordinal] = span.index
    moved = 0
    for pool, wanted in reservation.wanted.items():
        for ordinal, index in wanted.items():
            source = giver.regions()[pool][by_place[pool][ordinal]]
            taker.regions()[pool][index].copy_(source)
            moved += 1
    return moved


def hand_over(giver: Engine, taker: Engine, prefix_id: str, prompt: list[int]) -> Reservation:
    """Computes a prefix on the giver and commits it on the taker; the giver lets it go."""
    reports = compute_hand_over(giver, prefix_id, prompt)
    assert reports[-1].complete, reports[-1].error
    num_tokens = reports[-1].num_tokens
    reservation = taker.reserve(prefix_id, prompt, num_tokens)
    assert reservation is not None
    move(giver, taker, [span for report in reports for span in report.spans], reservation)
    taker.commit(prefix_id)
    giver.release(prefix_id)
    giver.check_integrity()
    taker.check_integrity()
    return reservation
