"""The Triton programs of `few_rows`: packed NF4 in, a few rows of outputs out, nothing widened in memory.

Each program owns COLUMNS outputs of one linear and a stretch of its inputs. A tile of weights is widened in registers on its
way to the tensor cores, which take it as their left operand: [COLUMNS, inputs] x [inputs, ROWS]. Bytes hold two neighbouring
inputs, so even and odd inputs are two products and nothing is interleaved.

Where inputs are split, each part is written in fp32 and the program that finishes last adds all parts in their order: the
result does not depend on who that was. It finds out by a ticket, which it leaves at zero for the next launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _entry_of_lane(value_map):
    """Entry `lane % 16` of the value map, in one register of each lane: a scalar to Triton, which it never moves."""
    return tl.inline_asm_elementwise(
        """
        {
            .reg .u32 lane;
            .reg .u64 at;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 at, lane, 4, $1;
            ld.global.nc.f32 $0, [at];
        }
        """,
        "=f,l",
        [value_map.to(tl.int64)],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _look_up_lanes(pair, entry):
    """Both values of each byte, high nibble first, by asking the lane that holds them: four bytes at a time.

    A shuffle reads the low five bits of its index, and both halves of a warp hold the table: one shift per value, no
    mask and no address. Loads from a table cost twice the instructions, and Triton would send them through shared memory.
    """
    return tl.inline_asm_elementwise(
        """
        {
            .reg .u32 pairs, entry, code;
            mov.b32 pairs, $8;
            mov.b32 entry, $9;
            shfl.sync.idx.b32 $4, entry, pairs, 0x1f, 0xffffffff;
            shr.u32 code, pairs, 4;
            shfl.sync.idx.b32 $0, entry, code, 0x1f, 0xffffffff;
            shr.u32 code, pairs, 8;
            shfl.sync.idx.b32 $5, entry, code, 0x1f, 0xffffffff;
            shr.u32 code, pairs, 12;
            shfl.sync.idx.b32 $1, entry, code, 0x1f, 0xffffffff;
            shr.u32 code, pairs, 16;
            shfl.sync.idx.b32 $6, entry, code, 0x1f, 0xffffffff;
            shr.u32 code, pairs, 20;
            shfl.sync.idx.b32 $2, entry, code, 0x1f, 0xffffffff;
            shr.u32 code, pairs, 24;
            shfl.sync.idx.b32 $7, entry, code, 0x1f, 0xffffffff;
            shr.u32 code, pairs, 28;
            shfl.sync.idx.b32 $3, entry, code, 0x1f, 0xffffffff;
        }
        """,
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r",
        [pair, entry],
        dtype=(tl.float32, tl.float32),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _to_bf16(x, COMPILED: tl.constexpr):
    """The nearest bf16, ties to even. Triton's interpreter would cut the bits off."""
    if COMPILED:
        near = x.to(tl.bfloat16)
    else:
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return near


@triton.jit
def _dot(a, b, acc, COMPILED: tl.constexpr):
    """acc + a b in fp32. Triton's interpreter multiplies the bit patterns of bf16, so it gets the numbers in fp32."""
    return tl.dot(a, b, acc) if COMPILED else tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def _multiply(
    x, packed, scales, scale_map, group_scales, offset, value_map, first_column, num_columns, num_rows, row_bytes,
    first_byte, last_byte, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over bytes [first_byte, last_byte) of each weight row: fp32 [COLUMNS, ROWS]. `x` is read as pairs of inputs."""
    BYTES: tl.constexpr = BLOCKS * 32
    columns = first_column + tl.arange(0, COLUMNS)
    # Columns and rows beyond the last are computed from whatever the last one holds and never stored.
    column = tl.minimum(columns, num_columns - 1)[:, None]
    row = tl.minimum(tl.arange(0, ROWS), num_rows - 1)[:, None]
    shift = tl.load(offset)
    entry = _entry_of_lane(value_map) if COMPILED else value_map
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in tl.range(first_byte, last_byte, BYTES, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        at = start + tl.arange(0, BYTES)[None, :]
        inside = at < last_byte
        pair = tl.load(packed + column.to(tl.int64) * row_bytes + at, mask=inside, other=0)
        block = start // 32 + tl.arange(0, BLOCKS)[None, :]
        real = block * 32 < last_byte
        block = column * (row_bytes // 32) + block
        code = tl.load(scales + block, mask=real, other=0).to(tl.int32)
        scale = tl.load(scale_map + code) * tl.load(group_scales + block // 256, mask=real, other=0.0) + shift
        scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (COLUMNS, BLOCKS, 32)), (COLUMNS, BYTES))
        if COMPILED:
            high, low = _look_up_lanes(pair, entry)
        else:
            high = tl.load(value_map + (pair >> 4).to(tl.int32))
            low = tl.load(value_map + (pair & 15).to(tl.int32))
        # Two neighbouring inputs are one word: the low half goes with high nibbles. Beyond the end both are zero.
        two = tl.load(x + row * row_bytes + at, mask=inside, other=0)
        even = (two & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        odd = (two >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        acc = _dot(_to_bf16(high * scale, COMPILED), tl.trans(even), acc, COMPILED)
        acc = _dot(_to_bf16(low * scale, COMPILED), tl.trans(odd), acc, COMPILED)
    return acc


@triton.jit
def _adapted(acc, thin, up, alpha, first_column, num_columns, num_rows, thin_width, COLUMNS: tl.constexpr,
             ROWS: tl.constexpr, RANK: tl.constexpr, COMPILED: tl.constexpr):  # fmt: skip
    """acc + alpha * up thin', rounded to bf16 once and given back in fp32. `up` starts at this linear's first output."""
    if RANK > 0:
        columns, rows, ranks = first_column + tl.arange(0, COLUMNS), tl.arange(0, ROWS), tl.arange(0, RANK)
        up_tile = tl.load(
            up + columns[:, None] * RANK + ranks[None, :], mask=(columns < num_columns)[:, None], other=0.0
        )
        thin_tile = tl.load(
            thin + rows[None, :] * thin_width + ranks[:, None], mask=(rows < num_rows)[None, :], other=0.0
        )
        acc += _dot(up_tile, thin_tile, tl.zeros((COLUMNS, ROWS), tl.float32), COMPILED) * alpha
    return _to_bf16(acc, COMPILED).to(tl.float32)


@triton.jit
def _all_parts(parts, block, num_blocks, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """The sum of all parts of one block of columns, always in the same order. They were written by other programs: past
    the first cache, which does not see them."""
    inside = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + (split * num_blocks + block) * (COLUMNS * ROWS) + inside, cache_modifier=".cg")
    return total


@triton.jit
def project_rows(
    x, packed_a, packed_b, packed_c, scales_a, scales_b, scales_c, groups_a, groups_b, groups_c,
    offset_a, offset_b, offset_c, scale_map, value_map, thin, up, residual, out, parts, tickets,
    num_rows, width_a, width_b, width_c, row_bytes, split_bytes, alpha_a, alpha_b, alpha_c, thin_width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr,
    GATED: tl.constexpr, HAS_RESIDUAL: tl.constexpr, COMPILED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (block of columns over all linears, split). GATED: each block is one of `a` (gate) and the same of `b`."""
    block, split = tl.program_id(0), tl.program_id(1)
    num_blocks = tl.num_programs(0)
    blocks_a, blocks_b = tl.cdiv(width_a, COLUMNS), tl.cdiv(width_b, COLUMNS)
    packed, scales, groups, offset = packed_a, scales_a, groups_a, offset_a
    width, alpha, which, first, before = width_a, alpha_a, 0, block * COLUMNS, 0
    if not GATED:
        if block >= blocks_a + blocks_b:
            packed, scales, groups, offset = packed_c, scales_c, groups_c, offset_c
            width, alpha, which = width_c, alpha_c, 2
            first, before = (block - blocks_a - blocks_b) * COLUMNS, width_a + width_b
        elif block >= blocks_a:
            packed, scales, groups, offset = packed_b, scales_b, groups_b, offset_b
            width, alpha, which = width_b, alpha_b, 1
            first, before = (block - blocks_a) * COLUMNS, width_a
    first_byte = split * split_bytes
    last_byte = tl.minimum(first_byte + split_bytes, row_bytes)
    acc = _multiply(
        x, packed, scales, scale_map, groups, offset, value_map, first, width, num_rows, row_bytes,
        first_byte, last_byte, ROWS, COLUMNS, BLOCKS, COMPILED, STAGES,
    )  # fmt: skip
    gated = acc
    if GATED:
        gated = _multiply(
            x, packed_b, scales_b, scale_map, groups_b, offset_b, value_map, first, width, num_rows, row_bytes,
            first_byte, last_byte, ROWS, COLUMNS, BLOCKS, COMPILED, STAGES,
        )  # fmt: skip
    last = True
    if SPLITS > 1:
        inside = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        mine = parts + (split * num_blocks + block) * (COLUMNS * ROWS) + inside
        beside = SPLITS * num_blocks * (COLUMNS * ROWS)
        tl.store(mine, acc)
        if GATED:
            tl.store(mine + beside, gated)
        # All of this program's threads have written before one of them says so; the ticket orders what others wrote.
        tl.debug_barrier()
        last = tl.atomic_add(tickets + block, 1, sem="acq_rel") == SPLITS - 1
        if last:
            tl.store(tickets + block, 0)
            acc = _all_parts(parts, block, num_blocks, COLUMNS, ROWS, SPLITS)
            if GATED:
                gated = _all_parts(parts + beside, block, num_blocks, COLUMNS, ROWS, SPLITS)
    if last:
        y = _adapted(
            acc, thin + which * RANK, up + before * RANK, alpha, first, width, num_rows, thin_width,
            COLUMNS, ROWS, RANK, COMPILED,
        )  # fmt: skip
        total = width_a + width_b + width_c
        if GATED:
            other = _adapted(
                gated, thin + RANK, up + width_a * RANK, alpha_b, first, width, num_rows, thin_width,
                COLUMNS, ROWS, RANK, COMPILED,
            )  # fmt: skip
            y = _to_bf16(y / (1 + tl.exp(-y)), COMPILED).to(tl.float32) * other
            total = width_a
        columns, rows = first + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
        at = rows[None, :] * total + before + columns[:, None]
        stored = (columns < width)[:, None] & (rows < num_rows)[None, :]
        if HAS_RESIDUAL:
            y += tl.load(residual + at, mask=stored, other=0.0).to(tl.float32)
        tl.store(out + at, _to_bf16(y, COMPILED), mask=stored)


@triton.jit
def thin_rows(x, down, parts, tickets, out, num_rows, num_inputs, thin_width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
          INPUTS: tl.constexpr, SPLITS: tl.constexpr, COMPILED: tl.constexpr):  # fmt: skip
    """x down' in bf16 for all adapters of one launch: [num_rows, thin_width]. Each program takes INPUTS inputs."""
    split = tl.program_id(0)
    rows, ranks = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = split * INPUTS + tl.arange(0, INPUTS)
    x_tile = tl.load(
        x + rows[:, None] * num_inputs + at[None, :],
        mask=(rows < num_rows)[:, None] & (at < num_inputs)[None, :],
        other=0.0,
    )
    down_tile = tl.load(
        down + ranks[None, :] * num_inputs + at[:, None],
        mask=(ranks < thin_width)[None, :] & (at < num_inputs)[:, None],
        other=0.0,
    )
    acc = _dot(x_tile, down_tile, tl.zeros((ROWS, WIDTH), tl.float32), COMPILED)
    tl.store(parts + split * (ROWS * WIDTH) + rows[:, None] * WIDTH + ranks[None, :], acc)
    tl.debug_barrier()
    if tl.atomic_add(tickets, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(tickets, 0)
        total = _all_parts(parts, 0, 1, ROWS, WIDTH, SPLITS)
        kept = (rows < num_rows)[:, None] & (ranks < thin_width)[None, :]
        tl.store(out + rows[:, None] * thin_width + ranks[None, :], _to_bf16(total, COMPILED), mask=kept)
