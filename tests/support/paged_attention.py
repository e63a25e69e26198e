"""Random paged attention cases, and dense attention in float64 to hold every path to."""

import dataclasses
import random

import pools
import torch

from tasuki_kernels import attention
from tasuki_kernels.rope import QkNorm, RopeStep, rope_tables

BLOCK_SIZE = 16
LAYERS = 3


@dataclasses.dataclass
class Case:
    """One step over a cache that is NaN wherever nobody wrote; lists are per sequence.

    qkv: of the step's tokens, before norm and rope; K and V of earlier tokens are in the cache.
    queries: float64 [tokens, heads, head_dim], prepared. before: the cache as it was, on the CPU.
    keys, values: float64 [context, kv_heads, head_dim] of all tokens, prepared.
    """

    cache: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    context_lens: list[int]
    query_lens: list[int]
    window: int | None
    layer: int
    qkv: torch.Tensor
    queries: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    norm: QkNorm | None
    rope: RopeStep | None
    before: torch.Tensor

    def run(self, scale: float, **options: object) -> torch.Tensor:
        """What `attention` makes of it, on whichever path is chosen: [tokens, heads * head_dim]."""
        device = self.cache.device
        plan = attention.plan(
            self.cache,
            self.block_table,
            self.slot_mapping,
            torch.tensor(self.context_lens, dtype=torch.int32, device=device),
            self.query_lens,
            self.context_lens,
            self.num_decodes,
            self.window,
            self.heads // self.cache.shape[3],
            plain=not options,
        )
        qkv = self.qkv.clone()
        return attention.attend(
            qkv, plan, self.layer, scale, norm=self.norm, rope=self.rope, **options
        )

    def wrong_places(self) -> int:
        """How many of the tokens' K and V rows in the cache are not what they should be, plus how
        many rows of other layers and blocks were written."""
        cache = self.cache.cpu().float()
        expected, start = self.before.float().clone(), 0
        for seq, length in enumerate(self.query_lens):
            for i in range(length if self.context_lens[seq] else 0):
                block, offset = divmod(int(self.slot_mapping[start + i]), BLOCK_SIZE)
                position = self.context_lens[seq] - length + i
                expected[block, self.layer, 0, :, offset] = self.keys[seq][position].float()
                expected[block, self.layer, 1, :, offset] = self.values[seq][position].float()
            start += length
        bound = 1e-5 if self.cache.dtype == torch.float32 else 2.0**-7
        right = torch.isclose(cache[1:], expected[1:], rtol=bound, atol=bound, equal_nan=True)
        return int((~right.all(-1)).sum())

    @property
    def heads(self) -> int:
        return self.qkv.shape[1] - 2 * self.cache.shape[3]

    @property
    def num_decodes(self) -> int:
        return sum(length <= 1 for length in self.query_lens)

    def expected(
        self, scale: float, softcap: float | None = None, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """float64 [tokens, heads * head_dim], one query and head at a time."""
        rows, start = [], 0
        for seq, length in enumerate(self.query_lens):
            query = self.queries[start : start + length]
            if self.context_lens[seq]:
                case = query, self.keys[seq], self.values[seq], scale, self.window
                rows.append(dense(*case, softcap, sinks))
            else:
                rows.append(torch.zeros_like(query))
            start += length
        return torch.cat(rows).flatten(1)


def dense(query, key, value, scale, window, softcap=None, sinks=None):
    """The last queries of a context: query [t, heads, d]; key, value [context, kv_heads, d]."""
    context, (tokens, heads, _) = len(key), query.shape
    group = heads // key.shape[1]
    positions = torch.arange(context - tokens, context)[:, None]
    columns = torch.arange(context)[None]
    hidden = columns > positions
    if window is not None:
        hidden |= columns <= positions - window
    out = torch.empty(query.shape, dtype=torch.float64)
    for h in range(heads):
        scores = query[:, h].double() @ key[:, h // group].double().T * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            sink = sinks[h].double().expand(tokens, 1)
            scores = torch.cat((scores, sink), dim=1)
        weights = scores.softmax(dim=1)[:, :context]
        out[:, h] = weights @ value[:, h // group].double()
    return out


def make(
    draw: random.Random,
    query_lens: list[int],
    context_lens: list[int],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    with_norm: bool = False,
    rotary_dim: int = 0,
    clean: bool = False,
) -> Case:
    """A random case; context 0 is a padded row (of one query), whose K and V go to block 0.

    Blocks lie in random order; the table has zeros behind the window, as the engine's has.
    clean: blocks are cleared before their first token is written, as the reference needs it.
    """
    layer, rows = draw.randrange(LAYERS), heads + 2 * kv_heads
    widths = [-(-context // BLOCK_SIZE) for context in context_lens]
    free = draw.sample(range(1, sum(widths) + 5), sum(widths))
    cache = pools.nan_pool(sum(widths) + 5, LAYERS, 2, kv_heads, BLOCK_SIZE, head_dim).to(dtype)
    table = torch.zeros(len(query_lens), max(widths) + 3, dtype=torch.int32)
    norm = rope = None
    if with_norm:
        norm = QkNorm(torch.rand(heads + kv_heads, head_dim).to(dtype) + 0.5, 1e-6)
    cos, sin = rope_tables(
        torch.arange(max(context_lens)), 0.5 ** torch.arange(rotary_dim // 2), 1.25
    )
    keys, values, slots, positions, qkvs, queries = [], [], [], [], [], []
    for seq, context in enumerate(context_lens):
        blocks = [free.pop() for _ in range(widths[seq])]
        first = context - query_lens[seq]
        raw = torch.randn(max(context, 1), rows, head_dim).to(dtype)
        ready = _prepared(raw.double(), kv_heads, norm, cos, sin)[:context]
        if dtype != torch.float32:
            ready = ready.to(dtype).double()
        keys.append(ready[:, heads : heads + kv_heads])
        values.append(ready[:, heads + kv_heads :])
        places = [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context)]
        for p, slot in enumerate(places[: max(first, 0)]):
            block, offset = divmod(slot, BLOCK_SIZE)
            if offset == 0 and clean:
                cache[block] = 0
            cache[block, layer, 0, :, offset] = keys[seq][p]
            cache[block, layer, 1, :, offset] = values[seq][p]
        behind = max(0, first - window + 1) // BLOCK_SIZE if window is not None else 0
        table[seq, behind : len(blocks)] = torch.tensor(blocks[behind:], dtype=torch.int32)
        slots += places[first:] if context else [0]
        positions += range(first, context) if context else [0]
        qkvs.append(raw[first:] if context else raw)
        queries.append(ready[first:, :heads] if context else raw[:, :heads].double())
    if rotary_dim:
        rope = RopeStep(cos.to(device), sin.to(device), torch.tensor(positions, device=device))
    return Case(
        cache=cache.to(device, copy=True),
        before=cache,
        block_table=table.to(device),
        slot_mapping=torch.tensor(slots, device=device),
        context_lens=context_lens,
        query_lens=query_lens,
        window=window,
        layer=layer,
        qkv=torch.cat(qkvs).to(device),
        queries=torch.cat(queries),
        keys=keys,
        values=values,
        norm=norm and QkNorm(norm.weight.to(device), norm.eps),
        rope=rope,
    )


def _prepared(x, kv_heads, norm, cos, sin):
    """Norm and rope of q and k in the dtype of x: [tokens, rows, head_dim]."""
    q_and_k = x[:, : x.shape[1] - kv_heads]
    if norm is not None:
        inverse = (q_and_k.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        q_and_k = q_and_k * inverse * norm.weight.to(x.dtype)
    if rotary_dim := cos.shape[-1]:
        turned, rest = q_and_k.split((rotary_dim, x.shape[2] - rotary_dim), dim=-1)
        half = rotary_dim // 2
        swapped = torch.cat((turned[..., half:], turned[..., :half]), dim=-1)
        # A padded row stands at position 0.
        c, s = cos[: len(x)].to(x.dtype), sin[: len(x)].to(x.dtype)
        q_and_k = torch.cat((turned * c + swapped * s, rest), dim=-1)
    return torch.cat((q_and_k, x[:, x.shape[1] - kv_heads :]), dim=1)
