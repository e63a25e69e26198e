"""The Mamba2 mixer (Dao & Gu 2024): projection, causal convolution, state space, gated norm."""

import dataclasses

import torch

from tasuki_engine.layers.linear import Linear
from tasuki_engine.layers.step_plan import StateStep
from tasuki_engine.loader import Weights
from tasuki_engine.step import StateSpec
from tasuki_kernels import conv1d, ssd
from tasuki_kernels.norm import gated_rms_norm


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
    """One mixer; `layer` is its index among the model's recurrent layers."""

    def __init__(self, weights: Weights, prefix: str, shape: Mamba2Shape, layer: int) -> None:
        self.shape = shape
        self.layer = layer
        take = weights.take
        self.in_proj = Linear.load(weights, f"{prefix}.in_proj")
        self.out_proj = Linear.load(weights, f"{prefix}.out_proj")
        self.conv_weight = take(f"{prefix}.conv1d.weight").squeeze(1).t().contiguous()
        self.conv_bias = weights.take_optional(f"{prefix}.conv1d.bias")
        self.A = -torch.exp(take(f"{prefix}.A_log", torch.float32))
        self.D = take(f"{prefix}.D", torch.float32)
        self.dt_bias = take(f"{prefix}.dt_bias", torch.float32)
        self.norm = take(f"{prefix}.norm.weight")

    def add_to(
        self, residual: torch.Tensor, x: torch.Tensor, state: StateStep, scale: float = 1.0
    ) -> None:
        """residual += scale * mixer(x); x, residual: [tokens, hidden]; updates the states."""
        shape = self.shape
        projected = self.in_proj(x)
        gate, conv_in, dt = torch.split(
            projected, [shape.inner, shape.conv_dim, shape.num_heads], dim=-1
        )
        dt = ssd.positive_dt(dt, self.dt_bias, shape.dt_limits)
        decodes, tokens = state.num_decodes, x.shape[0]
        if decodes == tokens:
            y = self._decode(conv_in, dt, state)
        elif decodes == 0:
            y = self._prefill(conv_in, dt, state)
        else:
            y = torch.cat(
                (
                    self._decode(conv_in[:decodes], dt[:decodes], state),
                    self._prefill(conv_in[decodes:], dt[decodes:], state),
                )
            )
        y = gated_rms_norm(y.flatten(1), gate, self.norm, shape.eps, shape.groups)
        self.out_proj.add_to(residual, y, scale)

    def _decode(self, conv_in: torch.Tensor, dt: torch.Tensor, state: StateStep) -> torch.Tensor:
        mixed = conv1d.causal_conv1d_update(
            conv_in,
            state.conv[:, self.layer],
            state.decode_slots,
            self.conv_weight,
            self.conv_bias,
        )
        x, B, C = self._split(mixed)
        return ssd.selective_state_update(
            state.ssm[:, self.layer], state.decode_slots_host, x, dt, self.A, B, C, self.D
        )

    def _prefill(self, conv_in: torch.Tensor, dt: torch.Tensor, state: StateStep) -> torch.Tensor:
        assert state.conv_plan is not None
        assert state.ssd_plan is not None
        mixed = conv1d.causal_conv1d(
            conv_in, state.conv[:, self.layer], state.conv_plan, self.conv_weight, self.conv_bias
        )
        x, B, C = self._split(mixed)
        return ssd.chunk_scan(x, dt, self.A, B, C, self.D, state.ssm[:, self.layer], state.ssd_plan)

    def _split(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [tokens, heads, head_dim], B and C [tokens, groups, state_size], of conv's output."""
        shape = self.shape
        bc = shape.groups * shape.state_size
        x, B, C = torch.split(mixed, [shape.inner, bc, bc], dim=-1)
        tokens = mixed.shape[0]
        return (
            x.view(tokens, shape.num_heads, shape.head_dim),
            B.view(tokens, shape.groups, shape.state_size),
            C.view(tokens, shape.groups, shape.state_size),
        )
