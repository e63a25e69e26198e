"""The engine: knows tokens and tensors; its offline API is `LLM`.

What needs torch is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tasuki_common.sampling import SamplingParams

if TYPE_CHECKING:
    from tasuki_engine.config import EngineConfig
    from tasuki_engine.engine import Engine
    from tasuki_engine.llm import LLM
    from tasuki_engine.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = [
    "LLM",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
]

_HOMES = {
    "LLM": "llm",
    "CompletionOutput": "outputs",
    "Engine": "engine",
    "EngineConfig": "config",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
