"""Writing new keys and values into the paged cache."""

import torch


def write_rows(slot_mapping: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(block, offset) of each token's place, int64 [tokens] each; once a step for all layers.

    slot_mapping: [tokens] int64, block * block_size + offset.
    """
    return slot_mapping // block_size, slot_mapping % block_size


def clear_new_blocks(cache: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Zero the blocks whose first token is written in this step, all layers at once.

    The reference attention multiplies the tail of a block, not yet written, by a probability of
    zero; what an earlier owner left there must not be NaN.
    """
    block, offset = rows
    cache[block[offset == 0]] = 0


def write_kv(
    cache: torch.Tensor,
    layer: int,
    rows: tuple[torch.Tensor, torch.Tensor],
    kv: torch.Tensor,
) -> None:
    """Put each token's K and V into its place.

    cache: [blocks, layers, 2, kv_heads, block_size, head_dim]; kv: [tokens, 2, kv_heads, head_dim],
    any strides; rows: of `write_rows`. Moves 2 * tokens * 2 * kv_heads * head_dim elements.
    """
    block, offset = rows
    cache[:, layer].permute(0, 3, 1, 2, 4)[block, offset] = kv.to(cache.dtype)
