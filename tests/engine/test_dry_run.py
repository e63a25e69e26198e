"""The steps that an engine on a GPU takes before it has its pools, on pools of their size."""

import pytest
import tiny_models
import torch

from tasuki_engine import memory, models
from tasuki_engine.config import EngineConfig
from tasuki_engine.dry_run import run_prompt
from tasuki_engine.runner import Runner
from tasuki_engine.storage import allocate
from tasuki_kernels import gemm


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_short_prompts_follow_the_longest_in_the_same_blocks(family, tmp_path):
    config = EngineConfig(model=str(tiny_models.make(family, tmp_path, 0)), device="cpu")
    model = models.load(config)
    spec, device = model.cache_spec, model.device
    plan = memory.plan(config, spec, model_max_len=model.max_model_len, device=device)
    units = {"full": 6, "window": 6, "state": 2}
    storage = allocate(spec, units=units, block_size=config.block_size, device=device)
    for region in storage.regions.values():
        region.fill_(255)  # NaN wherever nothing is written
    runner = Runner(model, storage, plan, config.block_size)
    for tokens in (80, 1, *gemm.SIZES):
        run_prompt(runner, tokens, config.block_size)
    for cache in (storage.caches.full, storage.caches.window, storage.caches.ssm):
        assert cache is None or torch.isfinite(cache[1:]).all()
