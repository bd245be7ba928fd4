"""What loading needs at its worst: GPU memory and anonymous host memory while a checkpoint is read.

    python benchmarks/load_peak.py CHECKPOINT --out result.json [--set A.B=C ...]
    python benchmarks/load_peak.py --random KIT --size 8b --out result.json

--random writes a checkpoint of the size's published architecture first, where there is none yet.
Anonymous memory (RssAnon) is what a machine without swap must have; pages of a memory-mapped file are not in it.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

from record import make_record

GIB = 2**30


class AnonymousPeak(threading.Thread):
    """Looks at this process's RssAnon every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_kib, self.running = 0, True

    def run(self) -> None:
        while self.running:
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak_kib = max(self.peak_kib, now)
            time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--random", type=Path, metavar="KIT")
    parser.add_argument("--size", default="8b")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="load-8b-nf4")
    parser.add_argument("--set", nargs="*", default=["tune.method=qlora"], metavar="A.B=C")
    parser.add_argument("--commit")
    options = parser.parse_args()

    import torch

    from lensmith.config.read import read_config
    from lensmith.model.load import load_model
    from lensmith.model.residence import let_segments_grow
    from random_weights import write_checkpoint

    size = options.size.lower()
    if options.random:
        options.checkpoint = write_checkpoint(options.random, size, options.work / f"checkpoint-{size}")
    let_segments_grow()
    torch.zeros(1, device="cuda")
    config = read_config(None, [f"model={options.checkpoint}", "data.train=none.jsonl", *options.set])
    watch, start = AnonymousPeak(), time.perf_counter()
    watch.start()
    loaded = load_model(config)
    torch.cuda.synchronize()
    seconds, watch.running = time.perf_counter() - start, False
    final, peak = torch.cuda.memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    record = make_record(
        options.name,
        f"loading {' '.join(options.set)}: GPU memory beyond the final size at its worst",
        round(peak - final, 3),
        "GiB",
        command=f"python benchmarks/load_peak.py {f'--random KIT --size {size}' if options.random else 'CHECKPOINT'} "
        f"--set {' '.join(options.set)}",
        commit=options.commit,
        final_gib=round(final, 3),
        peak_reserved_gib=round(peak, 3),
        peak_anonymous_gib=round(watch.peak_kib / 2**20, 3),
        load_s=round(seconds, 1),
        sentences=[said.replace(str(options.checkpoint), options.checkpoint.name) for said in loaded.sentences],
    )
    print(json.dumps(record, indent=2))
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
