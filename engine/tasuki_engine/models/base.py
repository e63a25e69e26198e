"""What every model family offers to the engine, and what they share in offering it."""

import dataclasses
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F

from tasuki_engine.loader import Weights
from tasuki_engine.model_config import ModelConfig
from tasuki_engine.step import Caches, CacheSpec, StepInput
from tasuki_kernels.gemm import linear
from tasuki_kernels.norm import RmsNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelContext:
    """What a family is built from, besides its weights."""

    config: ModelConfig
    folder: Path
    revision: str
    device: torch.device
    dtype: torch.dtype
    state_dtype: torch.dtype | None
    """Of SSM states; None: what the model asks for, else float32."""
    max_model_len: int
    eos_token_ids: tuple[int, ...]


class Model(Protocol):
    """A loaded model."""

    cache_spec: CacheSpec
    vocab_size: int
    context: ModelContext

    @property
    def max_model_len(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def folder(self) -> Path: ...
    @property
    def revision(self) -> str: ...

    def plan(self, step: StepInput, caches: Caches) -> object:
        """What `forward` makes of the host's lists; `step.plan` brings it back."""
        ...

    def forward(self, step: StepInput, caches: Caches) -> torch.Tensor:
        """float32 logits [rows, vocab] of `step.logits_rows`; writes the step into the caches."""
        ...


class BaseModel:
    """Facts of the checkpoint, embedding and head; families add the layers between."""

    cache_spec: CacheSpec
    vocab_size: int

    def __init__(
        self, context: ModelContext, weights: Weights, embedding_name: str, head_name: str
    ) -> None:
        self.context = context
        self.vocab_size = int(context.config.get("vocab_size"))
        self.embedding = weights.take(embedding_name)
        if context.config.get("tie_word_embeddings", False):
            weights.drop(head_name)
            self.head = self.embedding
        else:
            self.head = weights.take(head_name)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.context.max_model_len

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        return self.context.eos_token_ids

    @property
    def device(self) -> torch.device:
        """Where weights and caches lie."""
        return self.context.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.context.dtype

    @property
    def folder(self) -> Path:
        """The local folder of the checkpoint."""
        return self.context.folder

    @property
    def revision(self) -> str:
        """Identity of config and weights; equal in all processes that serve the same files."""
        return self.context.revision

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] int64 -> [tokens, hidden], a new tensor that layers may write into."""
        return F.embedding(token_ids, self.embedding)

    def logits(
        self, hidden: torch.Tensor, rows: torch.Tensor | None, norm: RmsNorm
    ) -> torch.Tensor:
        """norm(hidden[rows]) through the head, float32 [rows, vocab]; rows None: all."""
        chosen = hidden if rows is None else hidden.index_select(0, rows)
        return linear(chosen, self.head, norm=norm, dtype=torch.float32)
