"""Random prompts, and whether tokens are the greedy ones by transformers' word."""

import random
from pathlib import Path

import tiny_models
import torch

TIE = 1e-4


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Tokens of a tiny model, none of them special."""
    return [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)]


def is_greedy(model: Path, prompt: list[int], tokens: list[int]) -> bool:
    """Whether transformers would have chosen each of `tokens` after those before it.

    Two tokens within the bound of our log-probabilities stand at a tie, and either is right.
    """
    table = tiny_models.reference_logprobs(model, prompt + tokens)[len(prompt) - 1 : -1]
    chosen = table.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    behind = float((table.max(dim=-1).values - chosen).max())
    print(f"the chosen token is at most {behind:.2e} behind the best")
    return behind <= TIE
