"""How memory is shared out: a ledger made once at start, which says what goes where and why.

A token's KV and a state slot are dear in different proportions on every model, so the pools are
sized by use: for each `checkpoint_interval` tokens of KV there is one slot for a checkpoint, after
each running request has a slot of its own and the longest request has its blocks.
"""

import dataclasses

import torch

from tasuki_common.errors import ConfigError
from tasuki_engine.config import EngineConfig
from tasuki_engine.step import CacheSpec
from tasuki_engine.storage import block_bytes, slot_bytes

CPU_BUDGET = 1 << 30
"""Bytes for all pools on the CPU."""
MAX_UNITS = 1 << 18
"""Of one pool, unless its size is given: the books of more units cost more than they win."""
_STEP_TOKENS = {"cpu": 512, "cuda": 8192}
_SEQUENCES = {"cpu": 32, "cuda": 256}
_RESERVE = 2 << 30
"""Bytes of device memory left for a step's activations and logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Sizes of everything; unit counts include the null unit and are 0 for what a model lacks."""

    budget_bytes: int
    """For all pools; 0 when every pool's size was given."""
    block_bytes: int
    window_block_bytes: int
    slot_bytes: int
    num_blocks: int
    num_window_blocks: int
    num_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pools together."""
        return (
            self.num_blocks * self.block_bytes
            + self.num_window_blocks * self.window_block_bytes
            + self.num_slots * self.slot_bytes
        )

    def ledger(self) -> dict[str, int]:
        """What to log at start."""
        return dataclasses.asdict(self) | {"pool_bytes": self.pool_bytes}


def plan(
    config: EngineConfig, spec: CacheSpec, *, model_max_len: int, device: torch.device
) -> MemoryPlan:
    """Sizes that fit the memory.

    Raises:
        ConfigError: when a given size cannot hold what another given size demands; it names both.
    """
    block_size = config.block_size
    step_tokens = config.max_num_batched_tokens or _STEP_TOKENS.get(device.type, 8192)
    sequences = config.max_num_seqs or _SEQUENCES.get(device.type, 256)
    wanted_len = config.max_model_len or model_max_len
    budget = _budget(config, device)
    full = block_bytes(spec.full, block_size, spec.kv_dtype) if spec.full else 0
    window = block_bytes(spec.window, block_size, spec.kv_dtype) if spec.window else 0
    state = slot_bytes(spec.state) if spec.state else 0

    longest = -(-wanted_len // block_size) if full else 0
    window_need = 0
    if spec.window is not None and spec.window.window is not None:
        # What each sequence sees, the block it is in, and one step's tokens of them all.
        seen = -(-min(spec.window.window, wanted_len) // block_size) + 1
        window_need = seen * sequences + -(-step_tokens // block_size) + 1
        window_need = min(window_need, sequences * (-(-wanted_len // block_size) + 1))
    if state:
        room = config.num_state_slots or max(
            2, (budget - min(longest * full, budget // 2)) // state
        )
        sequences = max(1, min(sequences, (room - 1) if config.num_state_slots else room // 2))

    num_slots = num_blocks = num_window = 0
    left = budget
    if state:
        unit = state + (full + window) * config.checkpoint_interval // block_size
        kept = (
            max(0, left - (sequences + 1) * state - longest * full - window_need * window) // unit
        )
        num_slots = config.num_state_slots or min(sequences + 1 + kept, MAX_UNITS)
        left -= num_slots * state
    if window:
        share = left if not full else max(window_need * window, left // 4)
        num_window = config.num_window_blocks or min(max(2, min(left, share) // window), MAX_UNITS)
        left -= num_window * window
    if full:
        num_blocks = config.num_blocks or min(max(2, left // full), MAX_UNITS)
    max_len = _fitted_len(config, wanted_len, num_blocks if full else None, budget)
    if window and num_window - 1 < min(seen_blocks(spec, block_size), -(-max_len // block_size)):
        raise ConfigError(
            f"num_window_blocks is {num_window}; one request's window needs "
            f"{seen_blocks(spec, block_size)} blocks and the null block. Raise it."
        )
    if state and num_slots < 2:
        raise ConfigError(
            f"num_state_slots is {num_slots}; it must be 2 or more, one of them the null slot."
        )
    return MemoryPlan(
        budget_bytes=budget,
        block_bytes=full,
        window_block_bytes=window,
        slot_bytes=state,
        num_blocks=num_blocks,
        num_window_blocks=num_window,
        num_slots=num_slots,
        max_num_seqs=min(sequences, step_tokens),
        max_num_batched_tokens=step_tokens,
        max_model_len=max_len,
    )


def seen_blocks(spec: CacheSpec, block_size: int) -> int:
    """Window blocks that one sequence holds at most while it decodes."""
    window = spec.window.window if spec.window is not None else None
    return 0 if window is None else (window - 2) // block_size + 2


def _budget(config: EngineConfig, device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BUDGET
    free, _ = torch.cuda.mem_get_info(device)
    return max(0, int(free * config.memory_share) - _RESERVE)


def _fitted_len(config: EngineConfig, wanted: int, num_blocks: int | None, budget: int) -> int:
    if num_blocks is None:
        return wanted
    reach = (num_blocks - 1) * config.block_size
    if wanted <= reach:
        return wanted
    if config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len is {wanted}, but {num_blocks} KV blocks of {config.block_size} tokens, "
            f"one of them the null block, hold {reach}. Lower max_model_len to {reach}, or raise "
            f"num_blocks or the memory ({budget} bytes for all pools)."
        )
    return reach
