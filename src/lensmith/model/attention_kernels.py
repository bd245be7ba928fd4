"""Sums of what branches give to keys that they share: gradients of gathered rows, back to the rows they were gathered from.

A prompt's keys are read by every completion. In 16 bits `index_add_` would round after each of them, and in fp32 it takes
four kernels; here each row is read where it lies, summed in fp32 and rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lensmith.model.launch import Launcher

BLOCK = 1024


@triton.jit
def add_shared(
    from_key, from_value, order, starts, to_key, to_value, key_stride, value_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Programs (row, stretch of it). Row r of keys and values gets the sum of rows order[starts[r] : starts[r + 1]].

    The strides are those from row to row of what is summed; the sums are contiguous, WIDTH values a row.
    """
    row, within = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = within < WIDTH
    key_sum, value_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for number in range(tl.load(starts + row), tl.load(starts + row + 1)):
        place = tl.load(order + number).to(tl.int64)
        key_sum += tl.load(from_key + place * key_stride + within, mask=inside, other=0.0).to(tl.float32)
        value_sum += tl.load(from_value + place * value_stride + within, mask=inside, other=0.0).to(tl.float32)
    kind = to_key.dtype.element_ty
    tl.store(to_key + row * WIDTH + within, key_sum.to(kind), mask=inside)
    tl.store(to_value + row * WIDTH + within, value_sum.to(kind), mask=inside)


launch_add_shared = Launcher(add_shared)
