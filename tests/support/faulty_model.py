"""The history model on a device that fails in the steps that it is told to."""

import math

import torch
from history_model import HistoryModel

from tasuki_engine.step import Caches, StepInput


class FaultyModel(HistoryModel):
    """Right but for the faults that are switched on."""

    raises = False
    """Steps raise."""
    gives_nan = False
    """Logits are no numbers; what steps write into the caches is right."""
    fails_after = 0
    """After so many tokens of a sequence the logits are no numbers."""
    spoils = 0
    """The next so many steps leave no numbers in the blocks and states that they write."""

    def forward(self, step: StepInput, caches: Caches) -> torch.Tensor:
        if self.raises:
            raise RuntimeError("The device is out of memory.")
        logits = super().forward(step, caches)
        assert step.logits_rows is not None
        failing = step.positions[step.logits_rows] + 1 == self.fails_after
        if self.gives_nan or self.spoils:
            failing.fill_(True)
        if self.spoils:
            self.spoils -= 1
            self._spoil(step, caches)
        return logits.masked_fill_(failing[:, None], math.nan)

    def _spoil(self, step: StepInput, caches: Caches) -> None:
        for group, cache in ((step.full, caches.full), (step.window, caches.window)):
            if group is not None and cache is not None:
                slots, block_size = group.slot_mapping, cache.shape[4]
                cache[slots // block_size, :, :, :, slots % block_size] = math.nan
        if step.state_slots is not None and caches.ssm is not None:
            caches.ssm[step.state_slots] = math.nan
            for checkpoint in step.checkpoints:
                caches.ssm[checkpoint.slot] = math.nan
