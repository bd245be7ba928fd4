"""A few rows through frozen 4-bit linears at the pace of reading their packed bytes; for decoding, no gradients.

Widening a matrix to 16 bits and multiplying by it moves 0.5 + 2 + 2 bytes per weight. With 8 to 64 rows (the sequences of a
rollout, one token each) that is all the time there is; here it is 0.5 bytes per weight, 3.6 GB per token at 8B. One launch
takes up to three linears that read the same rows, their adapters, and what follows: a residual, or silu(gate) * up. The
weights are those of `nf4.widen`, bit for bit; a sum is rounded to bf16 once, with its adapter, where `lora.project` rounds
before and after.

Nothing waits for the device, and nothing is allocated by what is in it: `run` may be captured in a CUDA graph. All launches on
a device share one workspace, so they must stay on one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lensmith.model.lora import project, split_linear
from lensmith.model.quant import has_triton, is_four_bit

MAX_ROWS, MAX_LINEARS = 64, 3
BLOCK_BYTES = 32
"""Of 64 values of 4 bits that share a scale; see nf4.py."""
PARTS = 2**22
"""fp32 values of room for split inputs, 16 MiB. 64 rows of 8B's down projection in six parts take 6 MiB."""
TICKETS = 4096
"""Blocks of columns that one launch may have; 8B's gate and up have 384."""
THIN_INPUTS = 128
"""Inputs per program of the product with the adapters' downs: 32 programs at 8B."""
LEAST_RANK = 16
"""Inner length of the shortest tensor core product; smaller ranks are filled up with zeros."""
MOST_RANK = 128
"""A program holds that many columns of the adapters' ups at once; larger ranks take `lora.project`'s way."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program takes at a time. Chosen by benchmarks/decode_kernels.py, never at run time."""

    columns: int
    """Outputs; a multiple of 64, what four warps' tensor core instruction takes."""
    blocks: int
    """NF4 blocks of 64 inputs per step."""
    programs_per_sm: int
    """Inputs are split until there are about so many: several hide each other's waiting, and no multiprocessor is idle
    while another has two left."""
    warps: int
    stages: int
    """Steps that are on their way from memory at once."""
    registers: int | None = None
    """Most per thread. A multiprocessor has 65,536: 128 let two programs of eight warps run on it, and cost nothing."""


TILES = {
    16: Tile(columns=64, blocks=4, programs_per_sm=3, warps=4, stages=3),
    32: Tile(columns=64, blocks=2, programs_per_sm=3, warps=4, stages=3),
    64: Tile(columns=128, blocks=2, programs_per_sm=2, warps=8, stages=3, registers=128),
}
"""By number of rows, filled up to what the tensor cores take."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where programs of one launch leave things for each other; one per device, kept for graphs that know its address."""

    parts: Float[Tensor, " parts"]
    tickets: Tensor
    """int32, all zero between launches."""
    multiprocessors: int


@cache
def workspace(device: torch.device) -> Workspace:
    """That of a device, made at the first call."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return Workspace(
        torch.empty(PARTS, dtype=torch.float32, device=device),
        torch.zeros(TICKETS, dtype=torch.int32, device=device),
        count,
    )


class FewRows:
    """Up to three linears that read the same rows, ready for many small products.

    Linears that are not NF4 with double quantisation, and inputs not in bf16, take `lora.project`'s way and give the same
    up to rounding. Adapters are copied in bf16, as `Shadows` does, 2 bytes per weight: `refresh` after they moved.
    """

    def __init__(self, linears: Sequence[Any], *, gated: bool = False) -> None:
        """`gated`: of two linears (gate, up) `run` gives silu(gate) * up instead of both."""
        if not 1 <= len(linears) <= MAX_LINEARS or (gated and len(linears) != 2):
            raise ValueError(
                f"few_rows: {len(linears)} linears with gated={gated}; one launch takes 1 to {MAX_LINEARS} that read the "
                "same rows, or 2 if gated. Prepare the others separately."
            )
        self.linears, self.gated = tuple(linears), gated
        parts = [split_linear(linear) for linear in linears]
        self._parts = [part for part in parts if part is not None]
        self.fused = len(self._parts) == len(linears) and _readable(self._parts, gated)
        if not self.fused:
            return
        states = [part.base.weight.quant_state for part in self._parts]
        self._states = states
        self._packed = [part.base.weight.data for part in self._parts]
        self.widths: tuple[int, ...] = tuple(state.shape[0] for state in states)
        self.num_inputs: int = states[0].shape[1]
        ranks = [len(part.down) for part in self._parts if part.down is not None]
        self._rank = max(LEAST_RANK, _power_of_two(max(ranks))) if ranks else 0
        like = {"dtype": torch.bfloat16, "device": self._packed[0].device}
        self._down = torch.zeros(len(states) * self._rank, self.num_inputs, **like)
        self._up = torch.zeros(sum(self.widths), self._rank, **like)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the adapters as they are now; in place, so that captured graphs see them too."""
        if not (self.fused and self._rank):
            return
        for index, (part, up) in enumerate(zip(self._parts, self._up.split(self.widths), strict=True)):
            if part.down is not None and part.up is not None:
                self._down[index * self._rank :][: len(part.down)].copy_(part.down)
                up[:, : len(part.down)].copy_(part.up)

    @torch.no_grad()
    def run(
        self,
        x: Float[Tensor, "rows inputs"],
        residual: Float[Tensor, "rows outputs"] | None = None,
        *,
        tile: Tile | None = None,
    ) -> tuple[Float[Tensor, "rows outputs"], ...]:
        """`x` through each linear, or one tensor if gated. `residual` is added to the output of a single one.

        Several outputs are views of one tensor: their rows are not next to each other.
        """
        if residual is not None and len(self.linears) != 1:
            raise ValueError(
                f"few_rows: a residual for {len(self.linears)} linears; only one linear's output takes one."
            )
        if not (self.fused and x.dtype is torch.bfloat16) or len(x) > MAX_ROWS:
            return self._unfused(x, residual)
        if x.ndim != 2 or x.shape[1] != self.num_inputs:
            raise ValueError(
                f"few_rows: rows of shape {tuple(x.shape)}; these linears read rows of {self.num_inputs} inputs."
            )
        if residual is not None and residual.shape != (len(x), self.widths[0]):
            raise ValueError(
                f"few_rows: a residual of shape {tuple(residual.shape)} for {len(x)} rows of {self.widths[0]} outputs. "
                "Give one row per row of x."
            )
        x, num_rows = x.contiguous(), len(x)
        rows = next(size for size in TILES if size >= num_rows)
        thin = self._thin(x, rows) if self._rank else x
        widths = self.widths[:1] if self.gated else self.widths
        out = x.new_empty(num_rows, sum(widths))
        self._launch(x, thin, residual, out, rows, tile or TILES[rows])
        return out.split(widths, dim=-1)

    def _unfused(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        outputs = project(self.linears, x)
        if self.gated:
            return (F.silu(outputs[0]) * outputs[1],)
        return outputs if residual is None else (residual + outputs[0],)

    def _thin(self, x: Tensor, rows: int) -> Float[Tensor, "rows ranks"]:
        """x through the downs of all adapters."""
        from lensmith.model.few_rows_kernels import thin_rows

        space, width = workspace(x.device), len(self._down)
        if width > MOST_RANK:  # too wide for one program's registers
            return x @ self._down.T
        out = x.new_empty(len(x), width)
        splits = _parts_of(self.num_inputs, THIN_INPUTS)
        launch: Any = thin_rows[(splits,)]
        launch(
            x, self._down, space.parts, space.tickets, out, len(x), self.num_inputs, width,
            ROWS=rows, WIDTH=_power_of_two(width), INPUTS=THIN_INPUTS, SPLITS=splits, COMPILED=x.is_cuda,
        )  # fmt: skip
        return out

    def _launch(self, x: Tensor, thin: Tensor, residual: Tensor | None, out: Tensor, rows: int, tile: Tile) -> None:
        from lensmith.model.few_rows_kernels import project_rows

        space, states = workspace(x.device), self._states
        # Places of linears that are not there get the first one's tensors and a width of nothing.
        places = [index if index < len(states) else 0 for index in range(MAX_LINEARS)]
        widths = [*self.widths, 0, 0][:MAX_LINEARS]
        blocks = _parts_of(widths[0], tile.columns) if self.gated else sum(_parts_of(w, tile.columns) for w in widths)
        row_bytes = self.num_inputs // 2
        splits, split_bytes = _split_inputs(
            blocks, rows, row_bytes, tile, space.multiprocessors, tensors=1 + self.gated
        )
        launch: Any = project_rows[(blocks, splits)]
        launch(
            x.view(torch.int32),
            *(self._packed[i] for i in places),
            *(states[i].absmax for i in places),
            *(states[i].state2.absmax for i in places),
            *(states[i].offset for i in places),
            states[0].state2.code, states[0].code, thin, self._up, x if residual is None else residual.contiguous(), out,
            space.parts, space.tickets, len(x), *widths, row_bytes, split_bytes,
            *(self._parts[i].scale for i in places), len(self._down),
            ROWS=rows, COLUMNS=tile.columns, BLOCKS=tile.blocks, SPLITS=splits, RANK=self._rank, GATED=self.gated,
            HAS_RESIDUAL=residual is not None, COMPILED=x.is_cuda, STAGES=tile.stages,
            num_warps=tile.warps, maxnreg=tile.registers,
            enable_fp_fusion=False,  # the scale of a block is rounded before its offset is added, as in bitsandbytes
        )  # fmt: skip


def project_few(linears: Sequence[Any], x: Float[Tensor, "rows inputs"]) -> tuple[Float[Tensor, "rows outputs"], ...]:
    """`lora.project` for at most 64 rows and without gradients; whoever calls it often keeps a `FewRows`."""
    return FewRows(linears).run(x)


def _split_inputs(
    blocks: int, rows: int, row_bytes: int, tile: Tile, multiprocessors: int, *, tensors: int
) -> tuple[int, int]:
    """How many parts the inputs are read in, and the bytes of a weight row in each: whole steps, none of them empty."""
    steps = _parts_of(row_bytes, tile.blocks * BLOCK_BYTES)
    wanted = max(1, round(multiprocessors * tile.programs_per_sm / blocks))
    room = PARTS // (blocks * tile.columns * rows * tensors)
    steps_each = _parts_of(steps, max(1, min(wanted, room, steps)))
    return _parts_of(steps, steps_each), steps_each * tile.blocks * BLOCK_BYTES


def _readable(parts: Sequence[Any], gated: bool) -> bool:
    """Whether the kernel reads all of these: NF4 with double quantisation, rows of one length and whole blocks, one map."""
    bases = [part.base for part in parts]
    if not has_triton() or not all(is_four_bit(base) for base in bases):
        return False
    import triton

    from lensmith.model.nf4 import BLOCK, SCALES_PER_SCALE

    interpreted = triton.knobs.runtime.interpret  # pyright: ignore[reportAttributeAccessIssue]
    states = [base.weight.quant_state for base in bases]
    each = all(
        (base.weight.is_cuda or interpreted)
        and state.nested
        and state.quant_type == "nf4"
        and state.blocksize == BLOCK
        and state.state2.blocksize == SCALES_PER_SCALE
        and state.dtype is torch.bfloat16
        and state.shape[1] % BLOCK == 0
        for base, state in zip(bases, states, strict=True)
    )
    # Tiles are 64 columns or more; each linear begins a new one.
    tickets = sum(_parts_of(state.shape[0], 64) for state in states)
    ranks = [len(part.down) for part in parts if part.down is not None]
    return (
        each
        and tickets <= TICKETS
        and max(ranks, default=0) <= MOST_RANK
        and (not gated or states[0].shape == states[1].shape)
        and all(
            a.shape[1] == b.shape[1] and torch.equal(a.code, b.code) and torch.equal(a.state2.code, b.state2.code)
            for a, b in pairwise(states)
        )
    )


def _parts_of(length: int, part: int) -> int:
    """How many parts cover a length."""
    return -(-length // part)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
