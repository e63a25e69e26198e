"""How many requests, units and tokens there are: one snapshot of an engine's parts."""

import msgspec

from tasuki_engine.prefix_cache import PrefixCache
from tasuki_engine.request import EngineStats
from tasuki_engine.scheduler import Scheduler


def take(counters: EngineStats, scheduler: Scheduler, cache: PrefixCache) -> EngineStats:
    """A copy of `counters` with what scheduler and pools say now."""
    stats = msgspec.structs.replace(
        counters,
        running=len(scheduler.running),
        waiting=scheduler.num_waiting,
        waiting_tokens=sum(
            max(0, len(seq.request.prompt_token_ids) - seq.num_computed)
            for seq in (*scheduler.running, *scheduler.waiting)
        ),
        prefix_query_tokens=scheduler.query_tokens,
        prefix_hit_tokens=scheduler.hit_tokens,
        preemptions=scheduler.num_preemptions,
    )
    if (full := cache.full) is not None:
        stats.blocks_total, stats.blocks_used = full.total, full.used
        stats.blocks_cached = full.cached
    if (window := cache.window) is not None:
        stats.window_blocks_total, stats.window_blocks_used = window.total, window.used
    if (slots := cache.slots) is not None:
        stats.slots_total, stats.slots_used = slots.total, slots.used
        stats.slots_cached = slots.cached
    return stats
