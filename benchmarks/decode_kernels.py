"""What a token of decoding costs in the linears and the attention of 8B: microseconds per call, weights read from memory.

    python benchmarks/decode_kernels.py --out decode-kernels.json [--sweep]

Each time is that of a CUDA graph over many copies of a layer's part, more than the second cache holds, divided by their
number. Weights and adapters (rank 16) are random. Four ways of the linears:

    few rows    lensmith.model.few_rows: packed weights widened in registers; gate and up with silu(gate) * up
    widened     lora.project: weights widened to bf16 in memory, then torch's product
    bf16        the same as if weights were kept in bf16, four times the memory
    floor       packed bytes at the bandwidth in BANDWIDTH

`--sweep` tries the tiles in CANDIDATES for 16, 32 and 64 rows and says which was quickest: for few_rows.TILES.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from record import keep_record, make_record

BANDWIDTH = 3.0e12
"""Bytes per second that an H100 SXM reads at best: 3.35e12 on paper."""
LAYERS = 36
RANK = 16
ROTATED_BYTES = 256 * 2**20
"""Of packed weights per graph: five times an H100's second cache."""
REPLAYS = 20
PARTS = {
    "q, k, v": (4096, (4096, 1024, 1024), False),
    "o": (4096, (4096,), False),
    "gate, up": (4096, (12288, 12288), True),
    "down": (12288, (4096,), False),
}
"""Inputs, outputs, and whether silu(gate) * up follows: Qwen3-VL-8B's decoder layer."""
ROWS = (8, 16, 32, 64)
CANDIDATES = {
    16: [(64, 2, 3, 4, 3), (64, 2, 5, 4, 4), (64, 4, 2, 4, 3), (64, 4, 3, 4, 3), (128, 2, 2, 8, 3), (128, 4, 1, 8, 3)],
    32: [(64, 2, 3, 4, 3), (64, 2, 4, 4, 3), (64, 4, 2, 4, 3), (128, 2, 2, 8, 3)],
    64: [(64, 2, 2, 4, 3), (128, 1, 2, 8, 4, 128), (128, 2, 1, 8, 3), (128, 2, 2, 8, 3, 128)],
}
"""Columns, blocks per step, programs per multiprocessor, warps, stages, registers: see few_rows.Tile."""


def adapted(outputs: int, inputs: int, rank: int) -> Any:
    """A random NF4 linear on the GPU with a random adapter."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit
    from peft import LoraConfig, inject_adapter_in_model

    linear = Linear4bit(inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    weight = (torch.randn(outputs, inputs, device="cuda") * 0.02).bfloat16()
    stored: Any = Params4bit  # its arguments are read by __new__
    linear.weight = stored(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")._quantize("cuda")
    if not rank:
        return linear
    options = LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"], init_lora_weights=False)
    holder: Any = inject_adapter_in_model(options, torch.nn.ModuleDict({"linear": linear}))
    return holder.cuda()["linear"]


def graph_us(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> float:
    """Microseconds per call: the median over replays of one graph that calls `function` with each of the arguments."""
    calls = list(calls)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for arguments in calls:
            function(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for arguments in calls:
            function(*arguments)
    times = []
    for _ in range(REPLAYS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000 / len(calls))
    return statistics.median(times[2:])


def packed_bytes(part: str) -> int:
    """With the 8-bit scale of each block of 64."""
    inputs, widths, _ = PARTS[part]
    return inputs * sum(widths) * 33 // 64


def make_copies(part: str, rank: int = RANK, copies: int | None = None) -> list[list[Any]]:
    inputs, widths, _ = PARTS[part]
    copies = copies or math.ceil(ROTATED_BYTES / packed_bytes(part))
    return [[adapted(width, inputs, rank) for width in widths] for _ in range(copies)]


def compile_ahead(job: tuple[str, int, tuple[int, ...] | None]) -> None:
    """Fills Triton's cache on disk, in a process beside others: compiling takes longer than measuring."""
    from lensmith.model.few_rows import FewRows, Tile

    part, num_rows, tile = job
    (linears,) = make_copies(part, copies=1)
    x = torch.randn(num_rows, PARTS[part][0], device="cuda").bfloat16()
    FewRows(linears, gated=PARTS[part][2]).run(x, tile=Tile(*tile) if tile else None)
    torch.cuda.synchronize()


def measure_part(part: str, sweep: bool) -> list[dict[str, Any]]:
    """Rows of the table for one part of a layer."""
    from lensmith.model.few_rows import TILES, FewRows, Tile
    from lensmith.model.lora import Shadows, project

    inputs, widths, gated = PARTS[part]
    copies = make_copies(part)
    prepared = [FewRows(linears, gated=gated) for linears in copies]
    bare = [FewRows([linear.base_layer for linear in linears], gated=gated) for linears in copies]
    assert all(one.fused for one in (*prepared, *bare))
    Shadows(torch.nn.ModuleList(linear for linears in copies for linear in linears), torch.bfloat16).refresh()
    dense = [[torch.randn(w, inputs, device="cuda").bfloat16() for w in widths] for _ in copies]
    down, up = (
        torch.randn(RANK, inputs, device="cuda").bfloat16(),
        [torch.randn(w, RANK, device="cuda").bfloat16() for w in widths],
    )

    def follow(outputs: Any) -> Any:
        return F.silu(outputs[0]) * outputs[1] if gated else outputs

    def widened(linears: list[Any], x: Any) -> Any:
        return follow(project(linears, x))

    def in_bf16(weights: list[Any], x: Any) -> Any:
        return follow([(x @ w.T).addmm_(x @ down.T, u.T) for w, u in zip(weights, up, strict=True)])

    found = []
    for num_rows in ROWS:
        x = torch.randn(num_rows, inputs, device="cuda").bfloat16()
        times = {
            "few_rows": graph_us(FewRows.run, [(one, x) for one in prepared]),
            "without_adapters": graph_us(FewRows.run, [(one, x) for one in bare]),
            "widened": graph_us(widened, [(linears, x) for linears in copies]),
            "bf16": graph_us(in_bf16, [(weights, x) for weights in dense]),
        }
        row = {"part": part, "rows": num_rows, "floor": packed_bytes(part) / BANDWIDTH * 1e6, **times}
        if sweep and num_rows in CANDIDATES:
            tried = {
                tile: graph_us(functools.partial(FewRows.run, tile=Tile(*tile)), [(one, x) for one in prepared])
                for tile in CANDIDATES[num_rows]
            }
            row["tiles"] = {str(tile): round(us, 2) for tile, us in tried.items()}
            row["chosen"], row["quickest"] = str(TILES[num_rows]), str(min(tried, key=lambda tile: tried[tile]))
        found.append({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()})
    return found


def measure_attention(groups: int, group_size: int, prefix: int, own: int) -> dict[str, Any]:
    """Full caches; torch's attention reads keys that stand once per sequence."""
    from lensmith.model.decode_attention import attend_decode

    sequences, kv_heads, heads, width = groups * group_size, 8, 32, 128
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    read = 4 * kv_heads * width * (groups * prefix + sequences * own)
    copies = max(2, math.ceil(ROTATED_BYTES / read))
    query = draw(sequences, heads, width)
    lengths = [torch.full((n,), keys, device="cuda", dtype=torch.int32) for n, keys in ((groups, prefix), (1, own))]
    caches = [
        [draw(units, keys, kv_heads, width) for units, keys in ((groups, prefix), (sequences, own)) for _ in "kv"]
        for _ in range(copies)
    ]
    scale = width**-0.5
    ours = graph_us(attend_decode, [(query, *c[:2], lengths[0], *c[2:], lengths[1], scale) for c in caches])
    together = [draw(sequences, kv_heads, prefix + own, width) for _ in range(2)]
    plain: Any = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    theirs = graph_us(plain, [(query[:, :, None], *together)] * 3)
    shape = {"groups": groups, "group_size": group_size, "prefix": prefix, "own": own}
    return {**shape, "floor": round(read / BANDWIDTH * 1e6, 2), "shared": round(ours, 2), "torch": round(theirs, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--commit")
    options = parser.parse_args()

    jobs: list[Any] = [(part, num_rows, None) for part in PARTS for num_rows in ROWS[1:]]
    if options.sweep:
        jobs += [(part, num_rows, tile) for part in PARTS for num_rows, tiles in CANDIDATES.items() for tile in tiles]
    with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_ahead, jobs))
    torch.manual_seed(0)
    rows = [row for part in PARTS for row in measure_part(part, options.sweep)]
    print(f"{'part':10} rows   floor  few rows  (bare)  widened     bf16   us per call")
    for row in rows:
        print(
            f"{row['part']:10} {row['rows']:4} {row['floor']:7.1f} {row['few_rows']:9.1f} {row['without_adapters']:7.1f} "
            f"{row['widened']:8.1f} {row['bf16']:8.1f}"
        )
        for tile, us in row.get("tiles", {}).items():
            print(f"{'':15} {tile:24} {us:8.1f}{' <' if tile == row['quickest'] else ''}")
    per_token = {
        way: {n: round(sum(r[way] for r in rows if r["rows"] == n) * LAYERS / 1000, 3) for n in ROWS}
        for way in ("floor", "few_rows", "widened", "bf16")
    }
    for way, times in per_token.items():
        print(f"{LAYERS} layers, {way:9}" + "".join(f"  {n} rows {ms:.2f} ms" for n, ms in times.items()))
    attention = [measure_attention(*shape) for shape in ((1, 8, 1000, 256), (8, 8, 1000, 256), (2, 8, 3000, 512))]
    for row in attention:
        print("attention", row)
    record = make_record(
        "decode-kernels",
        f"linears of {LAYERS} layers of 8B in NF4, one token for each of 16 sequences",
        per_token["few_rows"][16],
        "ms",
        command="python benchmarks/decode_kernels.py",
        commit=options.commit,
        ms_per_token=per_token,
        us_per_call=rows,
        attention_us=attention,
    )
    keep_record(record, options.out)


if __name__ == "__main__":
    main()
