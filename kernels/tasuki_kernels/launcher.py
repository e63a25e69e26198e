"""Launches of Triton kernels at the price of a look-up.

`triton.jit` looks at every argument, option and global of a kernel at every launch, which takes
longer than a small kernel runs. Where steps are not in a CUDA graph (prompts), that is the time of
the step. `quick` decides by a coarser look which compiled variant is meant, and launches that.
"""

from typing import Any

import torch
from triton.runtime.jit import JITFunction

Variant = tuple[Any, Any, Any, tuple[Any, ...]]
"""How a compiled kernel is started, what of it, and the constants that follow the arguments."""


def _stream(device: int) -> int:
    return int(torch._C._cuda_getCurrentRawStream(device))


class QuickKernel:
    """A kernel launched as `kernel[grid](*arguments, CONSTANT=value, num_warps=...)`.

    Everything but constants and options goes by position. Two launches share a variant when their
    constants and options are equal and their arguments are alike: tensors of one dtype that both
    start on 16 bytes or both do not, integers alike in width, in being 1 and in being a multiple of
    16. Triton distinguishes no further. Globals must not change after the first launch.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._constant = [param.is_constexpr for param in kernel.params]
        self._variants: dict[tuple[Any, ...], Variant] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> "_Launch":
        return _Launch(self, grid)

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Launches the variant that is meant, compiling it the first time."""
        device = torch.cuda.current_device()
        likeness: list[Any] = [device]
        for value, constant in zip(args, self._constant, strict=False):
            if constant:
                likeness.append(value)
            elif type(value) is torch.Tensor:  # most are: no call for these
                likeness += (value.dtype, value.data_ptr() & 15 == 0)
            else:
                likeness.append(_likeness(value))
        key = (*likeness, *named.items())
        variant = self._variants.get(key)
        if variant is None:
            self._variants[key] = self._compile(grid, args, named)
            return
        start, function, metadata, rest = variant
        # As a compiled kernel starts itself; hooks are for profilers of Triton's own.
        start(
            *(*grid, 1, 1)[:3], _stream(device), function, metadata, None, None, None, *args, *rest
        )

    def _compile(
        self, grid: tuple[int, ...], args: tuple[Any, ...], named: dict[str, Any]
    ) -> Variant:
        """Launches it Triton's way, which compiles it where no cache has it."""
        rest = self._kernel.params[len(args) :]
        if not all(param.is_constexpr for param in rest):
            raise TypeError(f"{self._kernel.__name__} takes its arguments by position.")
        compiled = self._kernel[grid](*args, **named)
        constants = tuple(named.get(param.name, param.default) for param in rest)
        return compiled.run, compiled.function, compiled.packed_metadata, constants


class _Launch:
    """A kernel with its grid."""

    __slots__ = ("_grid", "_kernel")

    def __init__(self, kernel: QuickKernel, grid: tuple[int, ...]) -> None:
        self._kernel = kernel
        self._grid = grid

    def __call__(self, *args: Any, **named: Any) -> None:
        self._kernel.launch(self._grid, args, named)


def quick(kernel: Any) -> Any:
    """A kernel of `triton.jit` with quick launches; unchanged where Triton interprets it."""
    return QuickKernel(kernel) if isinstance(kernel, JITFunction) else kernel


def _likeness(value: Any) -> Any:
    """Equal for two arguments only if Triton compiles the same for them."""
    if isinstance(value, bool):
        return bool, value
    if isinstance(value, int):
        return value == 1, value & 15 == 0, -(1 << 31) <= value < 1 << 31, value < 1 << 63
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() & 15 == 0
    return type(value)
