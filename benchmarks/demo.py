"""`lensmith demo` on this machine, as records: accuracy before and after, seconds of training, questions per second.

python benchmarks/demo.py --out benchmarks/results/demo.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from record import make_record

COMMAND = "python benchmarks/demo.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo-benchmark"))
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()

    from lensmith.demo import run_demo

    start = time.perf_counter()
    result = run_demo(run=wanted.run, say=lambda said: print(said, file=sys.stderr))
    whole_s = round(time.perf_counter() - start, 1)
    measured = [
        ("accuracy-before", "easy-VQA test accuracy before", result.before.value, "share"),
        ("accuracy-after", "easy-VQA test accuracy after", result.after.value, "share"),
        ("train-s", "seconds of training", round(result.train_s, 1), "s"),
    ]
    records = [
        make_record(
            f"demo-{name}", what, value, unit, command=COMMAND, test_questions=result.after.n, whole_demo_s=whole_s
        )
        for name, what, value, unit in measured
    ]
    wanted.out.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
