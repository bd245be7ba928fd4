"""Peak memory and seconds per step over a grid of settings, on a GPU: what the planner's coefficients are fitted on.

    python benchmarks/memory_grid.py KIT --sizes 2b 4b 8b --out grid.json [--only SUBSTRING]

KIT is the folder with the published architectures and a tokenizer; weights are random, so nothing is downloaded. A case
is five steps on one made-up pack, the last three timed, the peak that of all five. Cases that differ only in the pack and
in what is recomputed share a loaded model with its adapters and optimizer, one after the other: between them torch gives
its free memory back and forgets its peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

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
PROMPT_TEXT, PROMPT_IMAGE = 106, 1024
"""Tokens of a GRPO prompt: marks and question, and its one picture of 1024 x 1024."""
PER_PACK = ("memory.recompute=", "memory.offload=")
"""Settings that may change between packs on one loaded model."""
NAMES = ("tokens", "images", "image_tokens", "learned", "samples", "group")


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
    cases += grpo_cases(size)
    if size == "2b":
        cases += [case(16384, 8, qlora), case(2048, 1, qlora, "tune.rank=64")]
    if size == "8b":
        cases += [case(1264, 1, qlora, *LOW, "memory.head=host"), case(4096, 8, qlora, *LOW, samples=1)]
        cases += [case(6144, 8, lora, *LOW)]
        # What a tower costs that is not frozen.
        cases += [case(4096, 4, qlora), case(4096, 4, qlora, "tune.vision=adapted")]
        cases += [case(4096, 4, qlora, "tune.vision=trained", "tune.merger=trained")]
    if size == "32b":  # the 67 GB of its weights in 16 bits fit no other case
        cases = [case(4096, 4, qlora, *LOW)]
    return cases


def grpo_cases(size: str) -> list[dict[str, Any]]:
    """Training packs of GRPO: completions that share their prompts, and the same with each a prompt of its own."""

    def case(prompts: int, group: int, completion: int, *settings: str, shared: bool = True) -> dict[str, Any]:
        samples, prompt = prompts * group, PROMPT_TEXT + PROMPT_IMAGE
        copies = prompts if shared else samples
        return {
            "size": size,
            "tokens": copies * prompt + samples * completion,
            "images": copies,
            "image_tokens": PROMPT_IMAGE,
            "learned": samples * completion,
            "samples": samples,
            "group": group if shared else 1,
            "settings": list(settings),
        }

    qlora = "tune.method=qlora"
    return [
        case(2, 4, 256, qlora),
        case(2, 4, 256, qlora, shared=False),
        case(1, 8, 512, qlora, *LOW),
        case(1, 16, 64, qlora, *LOW),
    ]


def loading(case: dict[str, Any]) -> tuple[str, ...]:
    """What a model is loaded with: cases with equal settings can share it."""
    return tuple(setting for setting in case["settings"] if not setting.startswith(PER_PACK))


class Bench:
    """A model of one size, loaded anew when settings ask for it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from lensmith.model.load import load_processor
        from lensmith.model.names import read_architecture

        self._folder, self._device = folder, device
        # Reading a tokenizer of 150,000 words takes a second.
        self._processor = load_processor(str(folder))
        self._shards = RandomShards(read_architecture(str(folder)), device)
        self._loaded_with: tuple[str, ...] | None = None
        self._prepared: Any = None

    def measure(self, case: dict[str, Any]) -> dict[str, Any]:
        """One case: what came out, or the error's first line."""
        from lensmith.config.read import read_config
        from lensmith.errors import LensmithError
        from lensmith.train.measure import make_pack, measure_pack, prepare_model

        config = read_config(None, [f"model={self._folder}", "data.train=none.jsonl", *EIGHT_BIT, *case["settings"]])
        start = time.perf_counter()
        load_s = 0.0
        try:
            if self._loaded_with != loading(case):
                self.forget()
                self._prepared = prepare_model(
                    config, device=self._device, shards=self._shards, processor=self._processor
                )
                self._loaded_with, load_s = loading(case), time.perf_counter() - start
            one = self._prepared
            numbers = {name: case[name] for name in NAMES if name in case}
            pack = make_pack(one.geometry, one.architecture, dtype=one.loaded.dtype, **numbers)
            found = measure_pack(one, pack, config)
            result = {name: round(getattr(found, name), 4) for name in found.__slots__}
        except (RuntimeError, ValueError, LensmithError) as cause:  # one failure must not lose the others
            result = {"error": f"{type(cause).__name__}: {str(cause).splitlines()[0]}"}
        if "error" in result:
            self.forget()
        return {**case, **result, "load_s": round(load_s, 1), "wall_s": round(time.perf_counter() - start, 1)}

    def forget(self) -> None:
        """Give the model's memory back."""
        from lensmith.model.quant import give_buffer_back

        self._prepared, self._loaded_with = None, None
        give_buffer_back()
        gc.collect()
        torch.cuda.empty_cache()


def together(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases in an order in which those that share a model follow one another."""
    first = {loading(case): number for number, case in reversed(list(enumerate(cases)))}
    return sorted(cases, key=lambda case: first[loading(case)])


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

    cases = {"8b": ladder()} if options.ladder else {size: together(list_cases(size)) for size in options.sizes}
    results = []
    for number, (size, listed) in enumerate(cases.items()):
        bench = Bench(write_shell(options.kit, size, options.work / size), torch.device("cuda"))
        for case in listed[0 if number else options.skip :]:
            if options.only in " ".join(case["settings"]):
                results.append(bench.measure(case))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
                # Written each time: what was measured stays, whatever ends the run.
                write(options, results)
        bench.forget()


def write(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """The record with all cases so far."""
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
