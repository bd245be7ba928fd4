"""Triton kernels launched a hundred times per step, without what Triton does for every launch again.

Triton looks at each argument of each launch to choose among the forms that it has compiled: 19 us of the host's time for a
gated product, 51 for a widened weight, more than many a kernel here takes the GPU. A `Launcher` looks at what can differ from
call to call (types, and whether numbers and addresses are multiples of 16) and calls the compiled form itself: 13 and 24 us
(docs/log.md 2026-11-25).

That last step is Triton's own, but not one it documents. So it is tried once per process; where it fails, the ordinary way
is taken, and said.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launcher:
    """One kernel, whose arguments are tensors, then whole numbers, then fractions, then constants.

    Options (`num_warps` and so on) are for compiling it.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        self._kernel, self._options = kernel, options
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int],
        tensors: Sequence[Tensor],
        numbers: Sequence[int] = (),
        fractions: Sequence[float] = (),
        constants: Sequence[Any] = (),
    ) -> None:
        """One launch on the current stream of the current device."""
        # A weight of bitsandbytes asks Python for each of its properties.
        with torch._C.DisableTorchFunctionSubclass():
            addresses = [tensor.data_ptr() for tensor in tensors]
            kinds = tuple([tensor.dtype for tensor in tensors])
            devices = {tensor.get_device() for tensor in tensors}
        device, together = tensors[0].get_device(), 0
        for value in (*addresses, *numbers):
            together |= value
        # Triton has other forms for odd numbers, small and large ones; they are rare here.
        even = together % 16 == 0 and all(0 < number < 2**31 for number in numbers)
        is_short = even and devices == {device} and device >= 0 and direct_launches_work()
        key, arguments = (device, kinds, tuple(constants)), (*numbers, *fractions, *constants)
        if is_short and (compiled := self._compiled.get(key)) is not None:
            _launch(compiled, grid, device, (*addresses, *arguments))
            return
        compiled = self._kernel[grid](*tensors, *arguments, **self._options)
        if is_short:
            self._compiled[key] = compiled


def _launch(compiled: Any, grid: tuple[int, int], device: int, arguments: tuple[Any, ...]) -> None:
    stream = torch._C._cuda_getCurrentRawStream(device)
    hooks = (None, None, None)  # what profilers of Triton's own would be told
    compiled.run(*grid, 1, stream, compiled.function, compiled.packed_metadata, *hooks, *arguments)


@triton.jit
def _add(values, out, number, fraction, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(values + at) * fraction + number)


@cache
def direct_launches_work() -> bool:
    """Whether a compiled kernel can be called without Triton's own way to it; tried once, and where not, said."""
    try:
        values, out = torch.arange(32.0, device="cuda"), torch.zeros(32, device="cuda")
        ordinary: Any = _add[1,]
        compiled = ordinary(values, out, 16, 0.5, 32)
        out.zero_()
        _launch(compiled, (1, 1), values.get_device(), (values.data_ptr(), out.data_ptr(), 16, 0.5, 32))
        works, reason = torch.equal(out, values * 0.5 + 16), "its results are wrong"
    except (AttributeError, TypeError, RuntimeError) as cause:
        works, reason = False, str(cause).partition("\n")[0]
    if not works:
        warnings.warn(
            f"triton {triton.__version__}: kernels are launched the long way, because the short one does not work here "
            f"({reason}). Training is exact, and slower where packs are short.",
            stacklevel=2,
        )
    return works
