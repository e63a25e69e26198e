"""What all layers of a step share, computed once before the first."""

import dataclasses

import torch

from tasuki_engine.step import (
    AttentionInput,
    AttentionSpec,
    Caches,
    CacheSpec,
    StepInput,
)
from tasuki_kernels import attention, mamba2
from tasuki_kernels.rope import RopeStep


@dataclasses.dataclass(frozen=True)
class StateStep:
    """The recurrent caches, and this step's sequences as their kernels see them."""

    conv: torch.Tensor
    ssm: torch.Tensor
    batch: mamba2.StateBatch


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Everything that is the same for all layers; a part is None where the model has no such."""

    full: attention.AttentionPlan | None
    window: attention.AttentionPlan | None
    state: StateStep | None
    rope: RopeStep | None


def plan_step(
    step: StepInput,
    caches: Caches,
    spec: CacheSpec,
    num_heads: int,
    rope: RopeStep | None,
) -> StepPlan:
    """Plan a step, unless it brings its plan."""
    if isinstance(step.plan, StepPlan):
        return step.plan
    return StepPlan(
        full=_attention_plan(step, step.full, caches.full, spec.full, num_heads),
        window=_attention_plan(step, step.window, caches.window, spec.window, num_heads),
        state=_state_step(step, caches),
        rope=rope,
    )


def _attention_plan(
    step: StepInput,
    group_input: AttentionInput | None,
    cache: torch.Tensor | None,
    spec: AttentionSpec | None,
    num_heads: int,
) -> attention.AttentionPlan | None:
    if group_input is None or cache is None or spec is None:
        return None
    return attention.plan(
        cache,
        group_input.block_table,
        group_input.slot_mapping,
        step.context_lens,
        step.query_lens,
        step.context_lens_host,
        step.num_decodes,
        spec.window,
        num_heads // spec.num_kv_heads,
    )


def _state_step(step: StepInput, caches: Caches) -> StateStep | None:
    slots = step.state_slots
    if slots is None or caches.conv is None or caches.ssm is None:
        return None
    batch = mamba2.plan(
        slots=slots,
        context_lens=step.context_lens,
        query_start=step.query_start,
        num_decodes=step.num_decodes,
        query_lens=step.query_lens,
        checkpoints=[(c.seq, c.num_tokens, c.slot) for c in step.checkpoints],
        kernel=caches.conv.shape[2] + 1,
        heads=caches.ssm.shape[2],
    )
    return StateStep(conv=caches.conv, ssm=caches.ssm, batch=batch)
