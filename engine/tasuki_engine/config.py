"""The engine's configuration: one object, checked at start, printed in full."""

import dataclasses
from typing import Literal

from tasuki_common.errors import ConfigError
from tasuki_common.hashing import HashAlgorithm

DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What an engine needs to know; a prefill and a decode engine differ in nothing else."""

    model: str
    """A local folder, or a Hugging Face id (`org/name`)."""
    revision: str | None = None
    """Of a Hugging Face id; None: its default branch."""
    dtype: DType = "auto"
    """auto: the checkpoint's on CUDA, float32 on the CPU (where bfloat16 is slower)."""
    state_dtype: DType = "auto"
    """Of the SSM state; auto: what the model asks for, else float32."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    max_model_len: int | None = None
    """Tokens of prompt and output; None: what the model was made for, as far as memory goes."""
    max_num_seqs: int | None = None
    """Requests in the running batch; None: 256 on CUDA, 32 on the CPU, or as state slots allow."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step; None: 8192 on CUDA, 512 on the CPU. Where it saves a prompt a step
    of its own, a step has up to a sixteenth more."""
    block_size: int = 16
    """Tokens in a KV block, and the grid on which prefixes are shared."""
    checkpoint_interval: int = 256
    """Tokens between regular checkpoints of recurrent state; a multiple of block_size."""
    enable_prefix_caching: bool = True
    hash_algorithm: HashAlgorithm = "xxh3"
    """sha256 where prompts of mutually hostile tenants share a cache without salts."""
    memory_share: float = 0.9
    """Share of the device's memory for the process's weights and pools, as far as it is free
    (CUDA)."""
    num_blocks: int | None = None
    """Overrides the number of KV blocks; None: from memory (CPU: 1 GiB for all pools)."""
    num_window_blocks: int | None = None
    num_state_slots: int | None = None
    """Running states and checkpoints together."""
    max_queued_requests: int = 1024
    """Waiting requests beyond which admission answers 503."""
    max_queued_tokens: int | None = None
    """The same in prompt tokens; None: no limit of its own."""
    cpu_threads: int | None = None
    """Of torch on the CPU; None: half of the cores, at least 1."""
    seed: int = 0
    """Of requests that carry none, in the offline API."""

    def __post_init__(self) -> None:
        def check(name: str, holds: bool, rule: str) -> None:
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it {rule}.")

        check(
            "block_size",
            self.block_size >= 8 and self.block_size & (self.block_size - 1) == 0,
            "must be a power of two, 8 or more",
        )
        check(
            "checkpoint_interval",
            self.checkpoint_interval > 0 and self.checkpoint_interval % self.block_size == 0,
            f"must be a multiple of block_size ({self.block_size})",
        )
        check("memory_share", 0.0 < self.memory_share <= 1.0, "must be in (0, 1]")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "num_blocks",
            "num_window_blocks",
            "num_state_slots",
            "max_queued_requests",
            "max_queued_tokens",
            "cpu_threads",
        ):
            value = getattr(self, name)
            check(name, value is None or value > 0, "must be above 0")
