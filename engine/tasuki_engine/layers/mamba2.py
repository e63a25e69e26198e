"""The Mamba2 mixer (Dao & Gu 2024): projection, causal convolution, state space, gated norm."""

import dataclasses

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_engine.layers.step_plan import StateStep
from tasuki_engine.loader import Weights
from tasuki_engine.step import StateSpec
from tasuki_kernels import mamba2, ssd
from tasuki_kernels.norm import RmsNorm


@dataclasses.dataclass(frozen=True)
class Mamba2Shape:
    """Sizes that all Mamba2 layers of a model share."""

    num_heads: int
    head_dim: int
    state_size: int
    groups: int
    conv_kernel: int
    eps: float
    dt_limits: tuple[float, float]

    @property
    def inner(self) -> int:
        """Channels of the state space's input and output."""
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_size

    def spec(
        self, layers: int, conv_dtype: torch.dtype, ssm_dtype: torch.dtype
    ) -> StateSpec | None:
        """What `layers` such layers need cached; None for none."""
        if not layers:
            return None
        return StateSpec(
            num_layers=layers,
            conv_dim=self.conv_dim,
            conv_kernel=self.conv_kernel,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            state_size=self.state_size,
            conv_dtype=conv_dtype,
            ssm_dtype=ssm_dtype,
        )


class Mamba2:
    """One mixer behind a norm; `layer` is its index among the model's recurrent layers."""

    def __init__(
        self, weights: Weights, prefix: str, shape: Mamba2Shape, layer: int, norm: RmsNorm
    ) -> None:
        self.layer = layer
        take = weights.take
        self.in_proj = Linear.load(weights, f"{prefix}.in_proj", norm=norm)
        self.out_proj = Linear.load(weights, f"{prefix}.out_proj")
        RmsNorm(take(f"{prefix}.norm.weight"), shape.eps).fold_into_(self.out_proj.weight)
        self.mixer = ssd.Mixer(
            conv_weight=take(f"{prefix}.conv1d.weight").squeeze(1).t().contiguous(),
            conv_bias=weights.take_optional(f"{prefix}.conv1d.bias"),
            A=-torch.exp(take(f"{prefix}.A_log", torch.float32)),
            D=take(f"{prefix}.D", torch.float32),
            dt_bias=take(f"{prefix}.dt_bias", torch.float32),
            groups=shape.groups,
            eps=shape.eps,
            dt_limits=shape.dt_limits,
        )

    def add_to(self, hidden: torch.Tensor, state: StateStep, scale: float = 1.0) -> None:
        """hidden += scale * mixer(norm(hidden)); [tokens, hidden size]; updates the states."""
        mixed = mamba2.mix(
            self.in_proj(hidden),
            state.conv[:, self.layer],
            state.ssm[:, self.layer],
            self.mixer,
            state.batch,
        )
        self.out_proj.add_to(hidden, mixed, scale)
