"""Steps for the Mamba2 mixer: real pool layouts around them, float64 beside them."""

import dataclasses
import random

import torch
import torch.nn.functional as F

from tasuki_kernels import mamba2
from tasuki_kernels.ssd import Mixer

LAYERS, LAYER = 2, 1
"""States lie in a pool of so many layers; the steps run the last."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a mixer."""

    heads: int
    head_dim: int
    groups: int
    size: int
    kernel: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.size


@dataclasses.dataclass(frozen=True)
class Part:
    """One sequence's part of a step; context counts it; marks: its tokens with a checkpoint."""

    length: int
    context: int
    marks: tuple[int, ...] = ()


class Step:
    """A step of random inputs and states; slots that nobody wrote hold NaN, as does a gap."""

    def __init__(
        self,
        sizes: Sizes,
        parts: list[Part],
        *,
        seed: int,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        dt_limits: tuple[float, float] = (0.0, float("inf")),
        with_bias: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = random.Random(seed)
        self.sizes, self.parts = sizes, parts
        marks = sum(len(part.marks) for part in parts)
        free = list(range(1, 1 + len(parts) + marks + 3))
        draw.shuffle(free)
        count = len(free) + 1

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.slots = [free.pop() if part.context else 0 for part in parts]
        self.checkpoints = [
            (seq, tokens, free.pop()) for seq, part in enumerate(parts) for tokens in part.marks
        ]
        self.unused = free
        self.mixer = Mixer(
            conv_weight=(normal(sizes.kernel, sizes.channels) * 0.5).to(device, dtype),
            conv_bias=normal(sizes.channels).mul(0.3).to(device, dtype) if with_bias else None,
            A=-torch.rand(sizes.heads, generator=generator).mul(2).to(device),
            D=normal(sizes.heads).to(device),
            dt_bias=(normal(sizes.heads) - 2).to(device),
            groups=sizes.groups,
            eps=1e-5,
            dt_limits=dt_limits,
        )
        tokens = sum(part.length for part in parts)
        width = sizes.inner + sizes.channels + sizes.heads
        self.projected = normal(tokens, width + 16).to(device, dtype)[:, :width]

        self.region = torch.full((count, self._span(dtype, state_dtype)), 255, dtype=torch.uint8)
        self.region = self.region.to(device)
        conv, ssm = self._views(dtype, state_dtype)
        for slot, part in zip(self.slots, parts, strict=True):
            if part.context > part.length:
                conv[slot] = normal(*conv.shape[1:]).to(device, dtype)
                ssm[slot] = normal(*ssm.shape[1:]).to(device, state_dtype)
        conv[0], ssm[0] = 0, 0
        self.conv, self.ssm = conv[:, LAYER], ssm[:, LAYER]
        self.before = self.region.clone()
        self.conv_before, self.ssm_before = self.conv.clone(), self.ssm.clone()

    def _span(self, dtype: torch.dtype, state_dtype: torch.dtype) -> int:
        s = self.sizes
        self._conv_shape = (LAYERS, s.kernel - 1, s.channels)
        self._ssm_shape = (LAYERS, s.heads, s.head_dim, s.size)
        conv = torch.Size(self._conv_shape).numel() * dtype.itemsize
        self._ssm_start = -(-conv // 16) * 16
        ssm = torch.Size(self._ssm_shape).numel() * state_dtype.itemsize
        return -(-(self._ssm_start + ssm) // 16) * 16 + 16

    def _views(
        self, dtype: torch.dtype, state_dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        conv_bytes = torch.Size(self._conv_shape).numel() * dtype.itemsize
        ssm_bytes = torch.Size(self._ssm_shape).numel() * state_dtype.itemsize
        ssm_end = self._ssm_start + ssm_bytes
        conv = self.region[:, :conv_bytes].view(dtype).unflatten(1, self._conv_shape)
        ssm = self.region[:, self._ssm_start : ssm_end].view(state_dtype)
        return conv, ssm.unflatten(1, self._ssm_shape)

    def plan(self, slot_dtype: torch.dtype = torch.int64) -> mamba2.StateBatch:
        """Decodes are the first parts of one token."""
        lens = [part.length for part in self.parts]
        decodes = next((i for i, length in enumerate(lens) if length > 1), len(lens))
        device = self.projected.device
        start = torch.tensor([0, *lens]).cumsum(0)
        contexts = torch.tensor([part.context for part in self.parts], dtype=torch.int32)
        return mamba2.plan(
            slots=torch.tensor(self.slots, dtype=slot_dtype).to(device),
            context_lens=contexts.to(device),
            query_start=start.to(device, torch.int32),
            num_decodes=decodes,
            query_lens=None if decodes == len(lens) else lens,
            checkpoints=self.checkpoints,
            kernel=self.sizes.kernel,
            heads=self.sizes.heads,
        )

    def run(self, slot_dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return mamba2.mix(self.projected, self.conv, self.ssm, self.mixer, self.plan(slot_dtype))

    def restore(self) -> None:
        """The pool as it was before the first run."""
        self.region.copy_(self.before)

    def expected(self) -> tuple[torch.Tensor, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        """In float64, token by token: the output, and by slot the window and state it must hold."""
        outputs = []
        written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        row = 0
        marks = {(seq, tokens): slot for seq, tokens, slot in self.checkpoints}
        for seq, (part, slot) in enumerate(zip(self.parts, self.slots, strict=True)):
            rows = self.projected[row : row + part.length].double()
            row += part.length
            if part.context == 0:
                outputs.append(torch.zeros_like(rows[:, : self.sizes.inner]))
                continue
            window = torch.zeros_like(self.conv_before[slot]).double()
            state = torch.zeros_like(self.ssm_before[slot]).double()
            if part.context > part.length:
                window = self.conv_before[slot].double()
                state = self.ssm_before[slot].double()
            for number, values in enumerate(rows, start=1):
                y, window, state = self._token(values, window, state)
                outputs.append(y[None])
                if (seq, number) in marks:
                    written[marks[seq, number]] = window, state
            written[slot] = window, state
        return torch.cat(outputs), written

    def _token(
        self, values: torch.Tensor, window: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s, mixer = self.sizes, self.mixer
        gate, conv_in, dt = values.split([s.inner, s.channels, s.heads])
        history = torch.cat((window, conv_in[None]))
        mixed = (history * mixer.conv_weight.double()).sum(0)
        if mixer.conv_bias is not None:
            mixed += mixer.conv_bias.double()
        x, B, C = F.silu(mixed).split([s.inner, s.groups * s.size, s.groups * s.size])
        x = x.view(s.heads, s.head_dim)
        B, C = (v.view(s.groups, 1, -1).expand(-1, s.heads // s.groups, -1) for v in (B, C))
        B, C = B.reshape(s.heads, s.size), C.reshape(s.heads, s.size)
        dt = F.softplus(dt + mixer.dt_bias.double(), threshold=50).clamp(*mixer.dt_limits)
        decay = torch.exp(dt * mixer.A.double())
        state = state * decay[:, None, None] + (dt[:, None] * x)[:, :, None] * B[:, None, :]
        y = (state * C[:, None, :]).sum(-1) + mixer.D.double()[:, None] * x
        gated = (y.flatten() * F.silu(gate)).view(s.groups, -1)
        normed = gated / (gated.square().mean(-1, keepdim=True) + mixer.eps).sqrt()
        return normed.flatten(), history[1:], state

    def untouched(self, written: dict[int, object]) -> bool:
        """Whether all bytes but those of `written` and of the null slot are what they were."""
        for view, before in ((self.conv, self.conv_before), (self.ssm, self.ssm_before)):
            for slot in written:
                view[slot] = before[slot]
        return torch.equal(self.region[1:], self.before[1:])
