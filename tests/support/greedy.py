"""Random prompts, and whether tokens are the greedy ones by transformers' word."""

import random
from pathlib import Path

import tiny_models


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Tokens of a tiny model, none of them special."""
    return [rng.randrange(3, tiny_models.VOCAB_SIZE) for _ in range(length)]


def is_greedy(model: Path, prompt: list[int], tokens: list[int]) -> bool:
    """Whether transformers would have chosen each of `tokens` after those before it."""
    table = tiny_models.reference_logprobs(model, prompt + tokens)
    return table[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == tokens
