"""`lensmith export --to merged` on the processor: seconds, and anonymous memory at its worst.

    python benchmarks/merge.py --random KIT --size 8b --out benchmarks/results/merge-8b.json

Writes a checkpoint of the size's published architecture with random weights and a run with a random adapter of rank 16 on all
of the decoder's linears, merges it, and counts in the merged files what differs from the base. It needs twice the checkpoint's
room on disk: 35 GB at 8B.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from pathlib import Path

from load_peak import AnonymousPeak
from record import make_record

RANK = 16


def write_run(checkpoint: Path, folder: Path) -> None:
    """A run folder as training leaves one, its adapter random: no trained weights are needed to add them up."""
    import torch
    from safetensors.torch import save_file

    from lensmith.config.read import read_config
    from lensmith.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapted_modules
    from lensmith.model.names import read_architecture
    from lensmith.rundir import RunDir
    from random_weights import RandomShards

    config = read_config(None, [f"model={checkpoint}", f"run={folder}", f"tune.rank={RANK}"])
    RunDir(folder).start(config, {})
    pattern = adapted_modules(config.tune) or ""
    tensors = {}
    for name, shape in RandomShards(read_architecture(str(checkpoint)), torch.device("cpu")).shapes.items():
        module = name.removesuffix(".weight")
        if re.fullmatch(pattern, module):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.rand(RANK, shape[1])
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.rand(shape[0], RANK) / 1000
    tuned = folder / "tuned"
    tuned.mkdir()
    save_file(tensors, tuned / ADAPTER_WEIGHTS)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": pattern, "bias": "none"}
    (tuned / ADAPTER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=Path, metavar="KIT", required=True)
    parser.add_argument("--size", default="8b")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args()

    from lensmith.export.merge import merge_run
    from lensmith.rundir import RunDir
    from random_weights import write_checkpoint

    size = options.size.lower()
    checkpoint = write_checkpoint(options.random, size, options.work / f"checkpoint-{size}")
    folder = options.work / f"merge-run-{size}"
    shutil.rmtree(folder, ignore_errors=True)
    write_run(checkpoint, folder)
    run, watch, start = RunDir(folder), AnonymousPeak(), time.perf_counter()
    watch.start()
    merged = merge_run(run, run.path, folder / "merged")
    seconds, watch.running = time.perf_counter() - start, False
    record = make_record(
        f"merge-{size}",
        f"merging an adapter of rank {RANK} into {size.upper()} in bf16 on the processor: anonymous memory at its worst",
        round(watch.peak_kib / 2**20, 3),
        "GiB",
        command=f"python benchmarks/merge.py --random KIT --size {size}",
        commit=options.commit,
        merge_s=round(seconds, 1),
        tensors=merged.tensors,
        changed=len(merged.changed),
        weights_gib=round(merged.nbytes / 2**30, 2),
    )
    print(json.dumps(record, indent=2))
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
