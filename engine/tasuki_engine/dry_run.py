"""What a step takes of the device's memory beside weights and pools: measured, not guessed.

One step of as many prompt tokens as a step may have runs on pools of just that size, before the
real ones take the rest. It and some short ones load the kernels that the first requests will need.
"""

from array import array

import torch

from tasuki_common.sampling import SamplingParams
from tasuki_engine import memory, sampler
from tasuki_engine.config import EngineConfig
from tasuki_engine.flights import Part
from tasuki_engine.memory import MemoryPlan
from tasuki_engine.models import Model
from tasuki_engine.request import EngineRequest
from tasuki_engine.runner import Runner
from tasuki_engine.sampler import SamplerRow
from tasuki_engine.sequence import Sequence
from tasuki_engine.storage import allocate
from tasuki_kernels import gemm


def fitted_plan(config: EngineConfig, model: Model) -> MemoryPlan:
    """Sizes of everything; the pools on CUDA get what the largest step leaves.

    Raises:
        ConfigError: when the sizes that were given cannot work.
    """
    spec, sizes = model.cache_spec, {"model_max_len": model.max_model_len}
    rough = memory.plan(config, spec, device=model.device, **sizes)
    needed = _step_bytes(model, rough, config.block_size)
    return memory.plan(config, spec, device=model.device, step_bytes=needed, **sizes)


def _step_bytes(model: Model, plan: MemoryPlan, block_size: int) -> int:
    """Bytes at the peak of the largest step; 0 where memory is not counted (CPU).

    plan: as it would be without this; its pools are not allocated here.
    """
    if model.device.type != "cuda":
        return 0
    tokens = min(plan.max_step_tokens, plan.max_model_len - 1)
    blocks = -(-tokens // block_size)
    units = {"full": blocks + 1, "window": blocks + 1, "state": 2}
    storage = allocate(model.cache_spec, units=units, block_size=block_size, device=model.device)
    runner = Runner(model, storage, plan, block_size)
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    run_prompt(runner, tokens, block_size)
    peak = torch.cuda.max_memory_allocated(model.device)
    # A prompt of one token is a decode; products of few rows have kernels of their own.
    for few in (1, *gemm.SIZES):
        run_prompt(runner, min(few, tokens), block_size)
    _load_draws(model, plan.max_num_seqs)
    del storage, runner
    torch.cuda.empty_cache()
    return peak - before


def run_prompt(runner: Runner, tokens: int, block_size: int) -> None:
    """One step that computes a prompt of so many tokens, in the first blocks and the first slot."""
    seq = _sequence(tokens, block_size)
    seq.full = list(range(1, 1 + -(-tokens // block_size)))
    seq.window, seq.slot, seq.row = list(seq.full), 1, 0
    runner.collect(runner.launch([Part(seq, 0, tokens, samples=True, checkpoints=[])]))


def _load_draws(model: Model, most: int) -> None:
    """Draws once in a small and in the largest batch, which have kernels of their own.

    Else the first request that draws waits until they are compiled: four seconds on an H200's host.
    """
    for count in (1, most):
        logits = torch.zeros(count, model.vocab_size, device=model.device)
        logits[:, 0] = 20.0
        for params in (SamplingParams(), SamplingParams(top_p=0.9, logprobs=1)):
            sampler.sample(logits, [SamplerRow(params, [0], [], 0, 0, ())] * count)


def _sequence(tokens: int, block_size: int) -> Sequence:
    prompt, params = [0] * tokens, SamplingParams(temperature=0.0, max_tokens=1)
    return Sequence(
        EngineRequest(request_id="dry run", prompt_token_ids=prompt, sampling=params),
        array("i", prompt),
        arrival=0,
        deadline=None,
        block_size=block_size,
        hash_algorithm="xxh3",
        parent=None,
        writes_cache=False,
        max_tokens=1,
        sampler_row=SamplerRow(params, prompt, [], 0, 0, ()),
    )
