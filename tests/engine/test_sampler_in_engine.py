"""What the engine does with a row that has no distribution to sample from."""

import math

import torch
from history_model import HistoryModel
from relay import GREEDY

from tasuki_engine.config import EngineConfig
from tasuki_engine.engine import Engine
from tasuki_engine.request import EngineRequest
from tasuki_engine.step import Caches, StepInput


class FailingModel(HistoryModel):
    """Computes NaN for the first row of its third step."""

    num_steps = 0

    def forward(self, step: StepInput, caches: Caches) -> torch.Tensor:
        logits = super().forward(step, caches)
        self.num_steps += 1
        if self.num_steps == 3:
            logits[0] = math.nan
        return logits


def test_logits_that_are_no_numbers_end_their_request_and_no_other() -> None:
    config = EngineConfig(
        model="history", block_size=8, checkpoint_interval=32, max_model_len=256, num_blocks=64
    )
    engine = Engine(config, FailingModel())
    for name in ("first", "second"):
        engine.add_request(
            EngineRequest(request_id=name, prompt_token_ids=[1, 2, 3], sampling=GREEDY)
        )
    ended = {}
    while engine.has_work():
        for output in engine.step().outputs:
            if output.finish_reason:
                ended[output.request_id] = output
    assert ended["first"].finish_reason == "error"
    assert "not finite" in (ended["first"].error or "")
    assert ended["first"].token_ids == []
    assert ended["second"].finish_reason == "length"
    engine.check_integrity()
