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
_SPARE = 2 << 30
"""Bytes of device memory left beside a step's: for graphs, logits of many rows, long contexts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Sizes of everything; unit counts include the null unit and are 0 for what a model lacks."""

    budget_bytes: int
    """For all pools, unless their sizes were given."""
    step_bytes: int
    """At the peak of the largest step (CUDA)."""
    block_bytes: int
    window_block_bytes: int
    slot_bytes: int
    num_blocks: int
    num_window_blocks: int
    num_slots: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_step_tokens: int
    """With what a step may have beyond its budget to end a prompt."""
    max_model_len: int

    @property
    def units(self) -> dict[str, int]:
        """Of each pool, by the name of its region."""
        return {"full": self.num_blocks, "window": self.num_window_blocks, "state": self.num_slots}

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
    config: EngineConfig,
    spec: CacheSpec,
    *,
    model_max_len: int,
    device: torch.device,
    step_bytes: int = 0,
) -> MemoryPlan:
    """Sizes that fit the memory, of which a step needs `step_bytes` (CUDA).

    Raises:
        ConfigError: when a given size cannot hold what another given size demands, naming both; or
            when nothing is left for a pool whose size was not given.
    """
    block_size = config.block_size
    step_tokens = config.max_num_batched_tokens or _STEP_TOKENS.get(device.type, 8192)
    most_tokens = step_tokens + step_tokens // 16
    sequences = config.max_num_seqs or _SEQUENCES.get(device.type, 256)
    wanted_len = config.max_model_len or model_max_len
    budget = _budget(config, device, step_bytes)
    size = _UnitBytes(
        full=block_bytes(spec.full, block_size, spec.kv_dtype) if spec.full else 0,
        window=block_bytes(spec.window, block_size, spec.kv_dtype) if spec.window else 0,
        state=slot_bytes(spec.state) if spec.state else 0,
    )
    sized = (config.num_blocks, config.num_window_blocks, config.num_state_slots)
    if not budget and any(
        unit and not given for unit, given in zip(dataclasses.astuple(size), sized, strict=True)
    ):
        raise ConfigError(
            f"memory_share is {config.memory_share}; beside the weights and a step's {step_bytes} "
            "bytes it leaves nothing of the device's memory for KV blocks and state slots. Raise "
            "it, free memory on the device, or give num_blocks and num_state_slots."
        )
    longest = -(-wanted_len // block_size) if size.full else 0
    window_need = _window_need(spec, block_size, wanted_len, sequences, most_tokens)
    if size.state:
        sequences = _sequences_with_slots(config, sequences, budget, longest * size.full, size)
    needs = (sequences + 1) * size.state + longest * size.full + window_need * size.window
    num_slots, num_window, num_blocks = _units(config, size, budget, needs, sequences, window_need)
    max_len = _fitted_len(config, wanted_len, num_blocks if size.full else None, budget)
    if size.window:
        _check_window(seen_blocks(spec, block_size), num_window, -(-max_len // block_size))
    if size.state and num_slots < 2:
        raise ConfigError(
            f"num_state_slots is {num_slots}; it must be 2 or more, one of them the null slot."
        )
    return MemoryPlan(
        budget_bytes=budget,
        step_bytes=step_bytes,
        block_bytes=size.full,
        window_block_bytes=size.window,
        slot_bytes=size.state,
        num_blocks=num_blocks,
        num_window_blocks=num_window,
        num_slots=num_slots,
        max_num_seqs=min(sequences, step_tokens),
        max_num_batched_tokens=step_tokens,
        max_step_tokens=most_tokens,
        max_model_len=max_len,
    )


@dataclasses.dataclass(frozen=True)
class _UnitBytes:
    """Of one unit of each pool; 0 for what the model lacks."""

    full: int
    window: int
    state: int


def _window_need(
    spec: CacheSpec, block_size: int, wanted_len: int, sequences: int, step_tokens: int
) -> int:
    """Window blocks for what each sequence sees, the block it is in, and one step's tokens."""
    if spec.window is None or spec.window.window is None:
        return 0
    seen = -(-min(spec.window.window, wanted_len) // block_size) + 1
    need = seen * sequences + -(-step_tokens // block_size) + 1
    return min(need, sequences * (-(-wanted_len // block_size) + 1))


def _sequences_with_slots(
    config: EngineConfig, sequences: int, budget: int, longest_bytes: int, size: _UnitBytes
) -> int:
    """How many of the sequences can run: each has a slot, and half of the room is for others."""
    if config.num_state_slots:
        return max(1, min(sequences, config.num_state_slots - 1))
    room = max(2, (budget - min(longest_bytes, budget // 2)) // size.state)
    return max(1, min(sequences, room // 2))


def _units(
    config: EngineConfig,
    size: _UnitBytes,
    budget: int,
    needs: int,
    sequences: int,
    window_need: int,
) -> tuple[int, int, int]:
    """State slots, window blocks and KV blocks that share the budget; `needs` bytes come first."""
    num_slots = num_window = num_blocks = 0
    left = budget
    if size.state:
        blocks = config.checkpoint_interval // config.block_size
        kept = max(0, budget - needs) // (size.state + (size.full + size.window) * blocks)
        num_slots = config.num_state_slots or min(sequences + 1 + kept, MAX_UNITS)
        left -= num_slots * size.state
    if size.window:
        share = left if not size.full else max(window_need * size.window, left // 4)
        fitting = max(2, min(left, share) // size.window)
        num_window = config.num_window_blocks or min(fitting, MAX_UNITS)
        left -= num_window * size.window
    if size.full:
        num_blocks = config.num_blocks or min(max(2, left // size.full), MAX_UNITS)
    return num_slots, num_window, num_blocks


def _check_window(seen: int, num_window: int, longest: int) -> None:
    if num_window - 1 < min(seen, longest):
        raise ConfigError(
            f"num_window_blocks is {num_window}; one request's window needs {seen} blocks and the "
            "null block. Raise it."
        )


def seen_blocks(spec: CacheSpec, block_size: int) -> int:
    """Window blocks that one sequence holds at most while it decodes."""
    window = spec.window.window if spec.window is not None else None
    return 0 if window is None else (window - 2) // block_size + 2


def _budget(config: EngineConfig, device: torch.device, step_bytes: int) -> int:
    if device.type != "cuda":
        return CPU_BUDGET
    # Not of what is free: of two processes that start at once, each would count on the same bytes.
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * config.memory_share) - torch.cuda.memory_allocated(device)
    return max(0, min(share, free) - step_bytes - _SPARE)


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
