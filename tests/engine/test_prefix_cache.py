"""How deep a prompt resumes on what is in the pools, against a search over all boundaries."""

from collections.abc import Iterable

from hypothesis import given, settings, strategies as st

from tasuki_engine.block_pool import Pool
from tasuki_engine.prefix_cache import PrefixCache

BLOCK = 8
LENGTH = 12
NAMES = [bytes([i]) for i in range(LENGTH)]


def _cache(window: int | None, *, full: bool, state: bool) -> PrefixCache:
    return PrefixCache(
        num_blocks=LENGTH + 1 if full else 0,
        num_window_blocks=LENGTH + 1 if window else 0,
        num_slots=LENGTH + 1 if state else 0,
        block_size=BLOCK,
        window=window,
        keep=True,
    )


def _fill(pool: Pool | None, blocks: Iterable[int]) -> None:
    for block in blocks:
        if pool is not None:
            (unit,) = pool.take(1) or []
            pool.publish(unit, NAMES[block])
            pool.drop(unit)


BLOCKS = st.sets(st.integers(0, LENGTH - 1))


@settings(max_examples=400)
@given(
    window=st.none() | st.integers(1, 40),
    full=st.booleans(),
    state=st.booleans(),
    have_full=BLOCKS,
    have_window=BLOCKS,
    have_state=BLOCKS,
    limit=st.integers(0, LENGTH),
)
def test_a_hit_is_the_deepest_boundary_that_can_be_resumed(
    window: int | None,
    full: bool,
    state: bool,
    have_full: set[int],
    have_window: set[int],
    have_state: set[int],
    limit: int,
) -> None:
    if not (full or window or state):
        return
    cache = _cache(window, full=full, state=state)
    _fill(cache.full, have_full)
    _fill(cache.window, have_window)
    _fill(cache.slots, have_state)

    def resumable(depth: int) -> bool:
        seen = range(depth * BLOCK - window + 1, depth * BLOCK) if window else range(0)
        return (
            (not full or set(range(depth)) <= have_full)
            and {token // BLOCK for token in seen if token >= 0} <= have_window
            and (not state or depth - 1 in have_state)
        )

    deepest = max((d for d in range(1, limit + 1) if resumable(d)), default=0)
    match = cache.match(NAMES, limit)
    assert match.depth == deepest
    cache.hold(match)
    cache.drop(match)
    held = {unit for pool in cache.pools().values() for unit in range(pool.used)}
    assert not held
