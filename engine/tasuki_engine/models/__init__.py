"""Model families: `load` reads a checkpoint and builds the one its architecture names."""

from collections.abc import Callable
from pathlib import Path

import torch

from tasuki_common import tokenizer
from tasuki_common.errors import ConfigError
from tasuki_engine import hub, loader
from tasuki_engine.config import DType, EngineConfig
from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.models.base import Model, ModelContext
from tasuki_engine.models.dense import Dense
from tasuki_engine.models.granite_hybrid import GraniteHybrid
from tasuki_engine.models.nemotron_h import NemotronH

__all__ = ["ARCHITECTURES", "Model", "load"]

ARCHITECTURES: dict[str, Callable[[ModelContext, Weights], Model]] = {
    "GraniteMoeHybridForCausalLM": GraniteHybrid,
    "LlamaForCausalLM": Dense,
    "MistralForCausalLM": Dense,
    "NemotronHForCausalLM": NemotronH,
    "Qwen2ForCausalLM": Dense,
    "Qwen3ForCausalLM": Dense,
}


def load(config: EngineConfig, progress: bool = True) -> Model:
    """The model of `config.model`, its weights on the device.

    progress: show a bar while loading, where standard error is a terminal.

    Raises:
        ConfigError: when there is no such model, its architecture or a field of its config is not
            supported, or a weight is missing or left over.
    """
    folder = hub.resolve(config.model, config.revision)
    fields = ModelConfig.read(folder)
    architecture = fields.architecture
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"{folder} is a {architecture}, which is not known; known are "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    context = _context(config, fields, folder)
    weights = loader.load_weights(folder, context.device, context.dtype, progress)
    with torch.inference_mode():
        model = ARCHITECTURES[architecture](context, weights)
    weights.finish()
    return model


def _context(config: EngineConfig, fields: ModelConfig, folder: Path) -> ModelContext:
    device = _device(config.device)
    dtype = _dtype(config.dtype)
    if dtype is None:
        dtype = fields.dtype if device.type == "cuda" else torch.float32
    longest = int(fields.get("max_position_embeddings"))
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the model was made for at most {longest}."
        )
    return ModelContext(
        config=fields,
        folder=folder,
        revision=loader.content_revision(folder),
        device=device,
        dtype=dtype,
        state_dtype=_dtype(config.state_dtype),
        max_model_len=config.max_model_len or longest,
        eos_token_ids=tokenizer.eos_token_ids(tokenizer.read_files(folder)),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; give auto, cpu, cuda or cuda:N.") from None


def _dtype(name: DType) -> torch.dtype | None:
    return None if name == "auto" else getattr(torch, name)
