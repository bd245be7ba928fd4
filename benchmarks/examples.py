"""The examples as their READMEs tell them, on this machine: scores before and after, and seconds of training, as records.

python benchmarks/examples.py latex-ocr --out benchmarks/results/example-latex-ocr.json
python benchmarks/examples.py visual-math-grpo --out benchmarks/results/example-visual-math-grpo.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import make_record

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RUNS = {"latex-ocr": ("run.yaml",), "visual-math-grpo": ("form.yaml", "run.yaml")}
"""The settings of each, in the order in which they are trained; the last one asks before and after."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=list(RUNS))
    parser.add_argument("--folder", type=Path, default=None, help="Where to work; by default runs/NAME.")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    folder = asked.folder or Path("runs") / f"example-{asked.example}"
    record = measure_example(asked.example, folder)
    asked.out.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"{record['before']['accuracy']:.1%} -> {record['after']['accuracy']:.1%} in {record['train_s']:.0f} s")


def measure_example(name: str, folder: Path) -> dict[str, Any]:
    """Draw the rows and train, in a copy of the example, one command after the other."""
    shutil.copytree(EXAMPLES / name, folder)
    subprocess.run([sys.executable, "make_data.py"], cwd=folder, check=True)
    told: list[dict[str, Any]] = []
    for settings in RUNS[name]:
        command = [sys.executable, "-m", "lensmith", "train", settings, "--json"]
        ended = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        told.append(json.loads(ended.stdout))
    last = told[-1]
    return make_record(
        f"example-{name}",
        f"examples/{name}: {last['after']['metric']} after training",
        round(last["after"]["accuracy"], 4),
        "share",
        command=f"python benchmarks/examples.py {name}",
        before=last["before"],
        after=last["after"],
        train_s=round(sum(one["train_s"] for one in told), 1),
        steps=[one["steps"] for one in told],
    )


if __name__ == "__main__":
    main()
