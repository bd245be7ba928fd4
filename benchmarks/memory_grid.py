"""Peak memory and seconds per step over a grid of settings, on a GPU: what the planner's coefficients are fitted on.

    python benchmarks/memory_grid.py KIT --sizes 2b 4b 8b --out grid.json [--only SUBSTRING]

KIT is the folder with the published architectures and a tokenizer; weights are random, so nothing is downloaded. Each
case is a model of its own in one process: weights, adapter, optimizer, five steps on one made-up pack.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from random_weights import RandomShards, write_shell
from record import make_record

LOW = ["memory.offload=inputs", "memory.embedding=host", "memory.tower=host"]
FULL = [
    "tune.method=full",
    "optim.in_backward=true",
    "optim.max_grad_norm=null",
    "memory.offload=inputs",
    "memory.tower=host",
]
EIGHT_BIT = ["optim.name=adamw_8bit"]
IMAGE_TOKENS, LEARNED_SHARE = 700, 0.08


def ladder() -> list[dict[str, Any]]:
    """8B: each technique on top of the last, then what could stand in for one of them."""
    steps = [
        "memory.recompute=none",
        "memory.recompute=layers",
        "memory.offload=inputs",
        "memory.embedding=host",
        "memory.tower=host",
        "memory.head=host",
        "memory.stream_layers=36",
    ]
    rungs = [steps[0:1]] + [steps[1 : count + 1] for count in range(1, len(steps))]
    rungs += [[*steps[1:5], "memory.head_bits=8"], [*steps[1:5], "memory.head_bits=4"]]
    full = ["tune.method=full", "memory.offload=inputs", "memory.tower=host"]
    inside = [*full, "optim.in_backward=true", "optim.max_grad_norm=null"]
    work = {"size": "8b", "image_tokens": 697, "learned": 488, "samples": 8, "tokens": 6144, "images": 8}
    half = {"size": "8b", "image_tokens": 700, "learned": 328, "samples": 4, "tokens": 4096, "images": 4}
    return [
        *({**work, "settings": ["tune.method=qlora", *rung]} for rung in rungs),
        *({**half, "settings": settings} for settings in (full, inside, [*inside, "optim.name=paged_adamw_8bit"])),
    ]


def list_cases(size: str) -> list[dict[str, Any]]:
    """Settings and pack of each case of a size."""

    def case(tokens: int, images: int, *settings: str, samples: int | None = None) -> dict[str, Any]:
        learned = round(tokens * LEARNED_SHARE / 8) * 8
        return {
            "size": size,
            "tokens": tokens,
            "images": images,
            "image_tokens": min(IMAGE_TOKENS, (tokens - learned - 64) // images - 2),
            "learned": learned,
            "samples": samples or max(1, images),
            "settings": list(settings),
        }

    qlora, lora = "tune.method=qlora", "tune.method=lora"
    cases = [
        case(1024, 1, qlora),
        case(6144, 8, qlora),
        case(1024, 1, qlora, *LOW),
        case(6144, 8, qlora, *LOW),
        case(16384, 8, qlora, *LOW),
        case(4096, 1, qlora, "memory.recompute=none"),
        case(6144, 8, qlora, "memory.recompute=16"),
        case(2048, 1, lora),
        case(8192, 8, lora, *LOW),
        case(4096, 4, lora, "memory.recompute=none"),
        case(4096, 4, qlora, *LOW, "memory.stream_layers=28"),
        case(2048, 1, *FULL),
        case(4096, 4, *FULL),
    ]
    if size == "2b":
        cases += [case(16384, 8, qlora), case(2048, 1, qlora, "tune.rank=64")]
    if size == "8b":
        cases += [case(1264, 1, qlora, *LOW, "memory.head=host"), case(4096, 8, qlora, *LOW, samples=1)]
        cases += [case(6144, 8, lora, *LOW)]
    if size == "32b":  # the 67 GB of its weights in 16 bits fit no other case
        cases = [case(4096, 4, qlora, *LOW)]
    return cases


def measure(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case: what came out, or the error's first line."""
    import torch

    from lensmith.config.read import read_config
    from lensmith.data.images import read_geometry
    from lensmith.errors import LensmithError
    from lensmith.model.names import read_architecture
    from lensmith.train.measure import make_pack, measure_steps

    device = torch.device("cuda")
    names = ("tokens", "images", "image_tokens", "learned", "samples")
    config = read_config(None, [f"model={folder}", "data.train=none.jsonl", *EIGHT_BIT, *case["settings"]])

    def make(loaded: Any) -> Any:
        return make_pack(
            read_geometry(loaded.processor), loaded.model.config, dtype=loaded.dtype, **{n: case[n] for n in names}
        )

    start = time.perf_counter()
    try:
        shards = RandomShards(read_architecture(str(folder)), device)
        found = measure_steps(config, make, device=device, shards=shards)
        result = {name: round(getattr(found, name), 4) for name in found.__slots__}
    except (RuntimeError, ValueError, LensmithError) as cause:  # one failure must not lose the others
        result = {"error": f"{type(cause).__name__}: {str(cause).splitlines()[0]}"}
    gc.collect()
    torch.cuda.empty_cache()
    return {
        **case,
        **result,
        "left_gib": round(torch.cuda.memory_reserved() / 2**30, 3),
        "wall_s": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["2b", "4b", "8b"])
    parser.add_argument("--only", default="", help="cases whose settings contain this")
    parser.add_argument("--skip", type=int, default=0, help="cases of the first size, where a run was cut short")
    parser.add_argument(
        "--ladder", action="store_true", help="instead of the grid: technique by technique, for docs/memory.md"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/grid"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    options = parser.parse_args()

    import torch

    torch.cuda.memory._set_allocator_settings("expandable_segments:True")  # as training does
    results = []
    if options.ladder:
        folder = write_shell(options.kit, "8b", options.work / "8b")
        for case in ladder():
            results.append(measure(case, folder))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    for size in [] if options.ladder else options.sizes:
        folder = write_shell(options.kit, size, options.work / size)
        for case in list_cases(size)[options.skip if size == options.sizes[0] else 0 :]:
            if options.only in " ".join(case["settings"]):
                results.append(measure(case, folder))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    record = make_record(
        "memory-ladder" if options.ladder else "memory-grid",
        "Peak reserved memory and seconds per optimizer step, "
        + ("each technique on top of the last" if options.ladder else "over a grid of settings"),
        len(results),
        "cases",
        command="python benchmarks/memory_grid.py KIT --out out.json "
        + ("--ladder" if options.ladder else f"--sizes {' '.join(options.sizes)}"),
        commit=options.commit,
        cases=results,
    )
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
