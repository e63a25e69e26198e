"""What the scheduler hands to the model for one step, and how the caches are laid out.

This is the seam between policy (scheduler, pools, prefix cache) and maths (models, kernels): the
scheduler builds a `StepInput`, the model reads it and writes into a `Caches`.
"""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Attention layers that share a block table: all that see everything, or all of one window."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    """Keys a query sees, itself included; None: all."""


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """Recurrent (Mamba2) layers: what one state slot holds."""

    num_layers: int
    conv_dim: int
    conv_kernel: int
    """The window keeps the inputs of conv_kernel - 1 tokens."""
    num_heads: int
    head_dim: int
    state_size: int
    conv_dtype: torch.dtype
    ssm_dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """All that a model needs cached; a part is None where the model has no such layer."""

    full: AttentionSpec | None
    window: AttentionSpec | None
    state: StateSpec | None
    kv_dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Caches:
    """Tensors of the pools, as kernels see them (views; strides are the pools').

    full, window: [blocks, layers, 2, kv_heads, block_size, head_dim], kv_dtype; 0 is K, 1 is V.
    conv: [slots, layers, conv_kernel - 1, conv_dim], oldest token first.
    ssm: [slots, layers, heads, head_dim, state_size].
    One block, and one slot (conv and ssm of all layers), is one contiguous span of bytes.
    """

    full: torch.Tensor | None
    window: torch.Tensor | None
    conv: torch.Tensor | None
    ssm: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class AttentionInput:
    """One attention group's part of a step.

    block_table: [seqs, max_blocks] int32; entry j holds the block of tokens j*block_size onward;
        entries behind the window or past the end hold anything and must not be read.
    slot_mapping: [tokens] int64, block * block_size + offset: where each token's K and V go.
    """

    block_table: torch.Tensor
    slot_mapping: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Write the recurrent state after `num_tokens` tokens of sequence `seq`'s part into `slot`."""

    seq: int
    num_tokens: int
    """1 .. query length of the sequence in this step - 1: its end is nobody's business here."""
    slot: int


@dataclasses.dataclass(frozen=True)
class StepInput:
    """One step's batch. Sequences with one query token come first (`num_decodes` of them).

    token_ids, positions: [tokens] int64.
    query_start: [seqs + 1] int32, cumulative; query_lens, the same as a host list of lengths.
    context_lens: [seqs] int32, tokens known to the caches after this step; also as a host list. A
        sequence whose context is not longer than its query starts here: what its slot holds is
        stale, and its state begins at zero.
    state_slots: [seqs] int64, the running state, read and written in place; None without state.
    checkpoints: host list, ordered by (seq, num_tokens).
    logits_rows: [rows] int32 or int64, token rows whose hidden states go through the head; None:
        all of them.

    There may be more tokens than the sequences have: what lies behind is padding, of valid numbers
    and the null block, and its results are not read.

    On CUDA the host lists are empty where every sequence has one token. Such a step may end in
    padding: context 0, the null block and the null slot.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    num_decodes: int
    query_start: torch.Tensor
    query_lens: list[int]
    context_lens: torch.Tensor
    context_lens_host: list[int]
    full: AttentionInput | None
    window: AttentionInput | None
    state_slots: torch.Tensor | None
    checkpoints: list[Checkpoint]
    logits_rows: torch.Tensor | None
    plan: object = None
    """The model's own plan of this step, where it was made before (`Model.plan`)."""
