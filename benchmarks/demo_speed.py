"""Questions per second of the demo's training job, ours and stock TRL's in turns, so that both meet the same machine.

    python benchmarks/demo_speed.py --out benchmarks/results/demo-speed.json

Both are timed alike: whole optimizer steps after the first three, without loading or saving. Each round runs ours and TRL
at each of its better batch sizes (demo_peer_trl.py tries them all); what counts is the median of the rounds, TRL's at its
best setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from demo_peer_trl import WARMUP_STEPS, measure, read_peer_rows
from record import make_record

PEER_SETTINGS = ((64, 1), (128, 0), (128, 1))
"""Batch size and loader workers: the three best of demo_peer_trl.py's tries."""


def measure_ours(rows: str, samples: int) -> float:
    """Questions per second of `samples` questions with the demo's settings."""
    from lensmith.config.tree import Data
    from lensmith.demo import demo_config, picture_folder
    from lensmith.train.sft import train_model

    config = demo_config()
    with tempfile.TemporaryDirectory() as folder:
        steps = samples // config.optim.effective_samples
        run = Path(folder) / "run"
        train_model(
            config.model_copy(
                update={
                    "data": Data(train=rows, test=None, image_root=picture_folder()),
                    "run": run,
                    "pack": config.pack.model_copy(update={"check_packs": 0}),
                    "optim": config.optim.model_copy(update={"steps": steps}),
                }
            )
        )
        timed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARMUP_STEPS:]
    return sum(step["samples"] for step in timed) / sum(step["step_s"] for step in timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="timed, per TRL setting and round")
    parser.add_argument("--samples", type=int, default=5120, help="of ours, per round")
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()

    from lensmith.demo import write_rows
    from lensmith.model.names import resolve_model

    peer_rows, found = read_peer_rows(), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = write_rows(Path(folder), seed=0)
        for _ in range(wanted.rounds):
            found["ours"].append(measure_ours(str(rows), wanted.samples))
            for batch, workers in PEER_SETTINGS:
                tried = measure(
                    peer_rows, path=resolve_model("lensmith/tiny"), batch=batch, workers=workers, seconds=wanted.seconds
                )
                found[f"TRL, batch {batch}, {workers} workers"].append(tried["samples_per_s"])
            print({name: [round(value, 1) for value in values] for name, values in found.items()}, file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ours, (peer, best) = medians.pop("ours"), max(medians.items(), key=lambda item: item[1])
    command = f"python benchmarks/demo_speed.py --rounds {wanted.rounds}"
    records = [
        make_record("demo-samples-per-s", "the demo's training, steady", round(ours, 1), "questions/s", command=command,
                    rounds=dict(found), times_stock_trl=round(ours / best, 2)),
        make_record("demo-samples-per-s-trl", f"the demo's job with stock {peer}", round(best, 1), "questions/s",
                    command=command, rounds=dict(found)),
    ]  # fmt: skip
    wanted.out.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    print(f"ours {ours:.1f}, {peer} {best:.1f}: {ours / best:.2f} times", file=sys.stderr)


if __name__ == "__main__":
    main()
