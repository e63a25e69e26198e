"""What all layers of a step share, computed once before the first."""

import dataclasses

import torch

from tasuki_engine.step import (
    AttentionInput,
    AttentionSpec,
    Caches,
    CacheSpec,
    Checkpoint,
    StepInput,
)
from tasuki_kernels import attention, conv1d, kv_write, ssd


@dataclasses.dataclass(frozen=True)
class AttentionStep:
    """One attention group's cache, where this step writes it, and what it reads."""

    cache: torch.Tensor
    write_rows: tuple[torch.Tensor, torch.Tensor]
    plan: attention.AttentionPlan


@dataclasses.dataclass(frozen=True)
class StateStep:
    """The recurrent caches, and the plans for this step's decodes and prefills."""

    conv: torch.Tensor
    ssm: torch.Tensor
    decode_slots: torch.Tensor
    decode_slots_host: list[int]
    conv_plan: conv1d.ConvPlan | None
    ssd_plan: ssd.SsdPlan | None
    num_decodes: int


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Everything that is the same for all layers; `rope` is cos and sin, None without rope."""

    full: AttentionStep | None
    window: AttentionStep | None
    state: StateStep | None
    rope: tuple[torch.Tensor, torch.Tensor] | None


def plan_step(
    step: StepInput,
    caches: Caches,
    spec: CacheSpec,
    num_heads: int,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
) -> StepPlan:
    """Plan a step; clears state slots and KV blocks that start their life in it."""
    return StepPlan(
        full=_attention_step(step, step.full, caches.full, spec.full, num_heads),
        window=_attention_step(step, step.window, caches.window, spec.window, num_heads),
        state=_state_step(step, caches),
        rope=rope,
    )


def finish_step(step: StepInput, caches: Caches) -> None:
    """Export the checkpoints that lie at the end of a sequence's part: copies of its state."""
    at_end = _at_end(step)
    if not at_end or caches.conv is None or caches.ssm is None or step.state_slots is None:
        return
    device = caches.ssm.device
    targets = torch.tensor([checkpoint.slot for checkpoint in at_end], device=device)
    sources = step.state_slots[torch.tensor([c.seq for c in at_end], device=device)]
    for cache in (caches.conv, caches.ssm):
        cache[targets] = cache[sources]


def _attention_step(
    step: StepInput,
    group_input: AttentionInput | None,
    cache: torch.Tensor | None,
    spec: AttentionSpec | None,
    num_heads: int,
) -> AttentionStep | None:
    if group_input is None or cache is None or spec is None:
        return None
    rows = kv_write.write_rows(group_input.slot_mapping, cache.shape[4])
    kv_write.clear_new_blocks(cache, rows)
    plan = attention.plan(
        cache,
        group_input.block_table,
        step.query_lens,
        step.context_lens_host,
        step.num_decodes,
        spec.window,
        num_heads // spec.num_kv_heads,
    )
    return AttentionStep(cache=cache, write_rows=rows, plan=plan)


def _state_step(step: StepInput, caches: Caches) -> StateStep | None:
    slots = step.state_slots
    if slots is None or caches.conv is None or caches.ssm is None:
        return None
    slots_host = slots.tolist()
    for slot, has_state in zip(slots_host, step.has_state, strict=True):
        if not has_state:
            caches.conv[slot].zero_()
            caches.ssm[slot].zero_()
    decodes = step.num_decodes
    conv_plan = ssd_plan = None
    prefill_lens = step.query_lens[decodes:]
    if prefill_lens:
        prefill_slots = slots_host[decodes:]
        inner = [
            (c.seq - decodes, c.num_tokens, c.slot)
            for c in step.checkpoints
            if c.num_tokens < step.query_lens[c.seq]
        ]
        kernel = caches.conv.shape[2] + 1
        conv_plan = conv1d.plan(prefill_lens, prefill_slots, inner, kernel, slots.device)
        ssd_plan = ssd.plan(prefill_lens, prefill_slots, inner, slots.device)
    return StateStep(
        conv=caches.conv,
        ssm=caches.ssm,
        decode_slots=slots[:decodes],
        decode_slots_host=slots_host[:decodes],
        conv_plan=conv_plan,
        ssd_plan=ssd_plan,
        num_decodes=decodes,
    )


def _at_end(step: StepInput) -> list[Checkpoint]:
    return [c for c in step.checkpoints if c.num_tokens == step.query_lens[c.seq]]
