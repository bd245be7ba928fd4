"""`lensmith demo grpo` on this machine with three seeds, as records: rewards and accuracy before and after, seconds.

python benchmarks/demo_grpo.py --out benchmarks/results/demo-grpo.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from record import make_record

COMMAND = "python benchmarks/demo_grpo.py"
SEEDS = (0, 1, 2)
LEAST_REWARD, LEAST_POINTS = 0.2, 10
"""What each seed has to gain: mean reward, and points of accuracy."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo-grpo-benchmark"))
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()
    measured = [measure_seed(wanted.run, seed) for seed in SEEDS]
    wanted.out.write_text(json.dumps(make_records(measured), indent=2) + "\n", encoding="utf-8")
    for one in measured:
        points = 100 * (one["after"]["accuracy"] - one["before"]["accuracy"])
        gained = one["after"]["reward"] - one["before"]["reward"]
        if gained < LEAST_REWARD or points < LEAST_POINTS:
            sys.exit(f"seed {one['seed']}: {gained:+.3f} reward and {points:+.1f} points, too little")


def measure_seed(run: Path, seed: int) -> dict[str, Any]:
    """One whole demo: what its JSON says, and how long all of it took."""
    from lensmith.demo_grpo import run_grpo_demo

    start = time.perf_counter()
    result = run_grpo_demo(run=run / f"seed-{seed}", seed=seed, say=lambda said: print(said, file=sys.stderr))
    whole_s = round(time.perf_counter() - start, 1)
    told = {**result.to_json(), "seed": seed, "whole_s": whole_s, "test_sums": result.after.accuracy().n}
    return {key: value for key, value in told.items() if key != "run"}


def make_records(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst seed of each number, with those of all seeds beside it."""

    def values(when: str, what: str) -> list[float]:
        return [one[when][what] for one in measured]

    gains = {
        what: [after - before for before, after in zip(values("before", what), values("after", what), strict=True)]
        for what in ("reward", "accuracy")
    }
    told = [
        ("reward-gain", "smallest gain of mean reward, of three seeds", min(gains["reward"]), "reward"),
        ("accuracy-gain", "smallest gain of accuracy, of three seeds", min(gains["accuracy"]), "share"),
        ("train-s", "seconds of training with its warm-up, slowest of three", max(m["train_s"] for m in measured), "s"),
        ("whole-s", "seconds of the whole demo, slowest of three", max(m["whole_s"] for m in measured), "s"),
    ]
    return [
        make_record(f"demo-grpo-{name}", what, round(value, 4), unit, command=COMMAND, seeds=measured)
        for name, what, value, unit in told
    ]


if __name__ == "__main__":
    main()
