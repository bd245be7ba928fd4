"""GPU benchmarks in one call: each in a process of its own, one JSON each, the most wanted first, within a budget.

    python benchmarks/gpu_suite.py KIT --out results --commit abc1234 --budget-s 540
    python benchmarks/gpu_suite.py KIT --out results --commit abc1234 --only 8b-qlora-1 ladder load-8b-nf4
    python benchmarks/gpu_suite.py --list

KIT is the folder with the published architectures and a tokenizer; weights are random. Names run in the order given.
When the budget is spent nothing new starts, and one that runs on is stopped when `--grace-s` more are over; a ladder that
was stopped keeps the cases it has. A failure is told with the last lines of its log, and the rest goes on. The last thing
printed is a table. The planner's grid takes five minutes more and a call of its own: memory_grid.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHOWN_LINES = 6
"""Of the log of what failed."""


@dataclass(frozen=True, slots=True)
class Task:
    """One process; KIT, OUT and WORK in its arguments stand for this run's own."""

    name: str
    arguments: tuple[str, ...]
    about_s: int
    """Wall time on an H100, starting and drawing weights included (ladder and load: on an H200), for choosing a budget."""


def one_sample(size: str) -> Task:
    """One sample a step in as little memory as goes without streaming layers."""
    name = f"{size}-qlora-1"
    arguments = ("run.py", "--random", "KIT", "--size", size.upper(), "--samples", "1", "--steps", "20", "--low")
    return Task(name, (*arguments, "--name", name), 65)


def w1(name: str, *arguments: str) -> Task:
    """Work W1 at 8B: eight samples a step."""
    return Task(name, ("run.py", "--random", "KIT", "--size", "8B", "--steps", "14", "--name", name, *arguments), 75)


TASKS = {
    task.name: task
    for task in (
        one_sample("8b"),
        w1("w1-8b-qlora-recompute-layers", "--recompute", "layers"),
        w1("w1-8b-qlora-recompute-none", "--recompute", "none"),
        w1("w1-8b-qlora-low", "--low"),
        one_sample("4b"),
        one_sample("2b"),
        Task("ladder", ("memory_grid.py", "KIT", "--ladder"), 85),
        Task("load-8b-nf4", ("load_peak.py", "--random", "KIT", "--size", "8b"), 50),
    )
}


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a task."""

    name: str
    outcome: str
    wall_s: float
    record: dict[str, Any] | None = None


def run_task(task: Task, options: argparse.Namespace, limit_s: float) -> Ended:
    """Run one benchmark to its end or to the limit; its log stands beside its JSON."""
    out, log = options.out / f"{task.name}.json", options.out / f"{task.name}.log"
    stand = {"KIT": str(options.kit)}
    script, *rest = (stand.get(argument, argument) for argument in task.arguments)
    own = ["--out", str(out), "--work", str(options.work), "--commit", options.commit]
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as told:
        process = subprocess.Popen(
            [sys.executable, str(HERE / script), *rest, *own], stdout=told, stderr=subprocess.STDOUT, env=environment()
        )
        try:
            code = process.wait(timeout=limit_s)
            outcome = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            outcome = f"stopped after {limit_s:.0f} s"
    record = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else None
    ended = Ended(task.name, outcome, time.perf_counter() - start, record)
    if outcome != "done":
        print("\n".join(log.read_text(encoding="utf-8").splitlines()[-SHOWN_LINES:]), flush=True)
    return ended


def environment() -> dict[str, str]:
    """This process's, with the scripts and the sources importable."""
    paths = [str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}


def run_all(tasks: Sequence[Task], options: argparse.Namespace) -> list[Ended]:
    """In order, as long as the budget lasts."""
    options.out.mkdir(parents=True, exist_ok=True)
    start, ended = time.perf_counter(), []
    for task in tasks:
        left_s = options.budget_s - (time.perf_counter() - start)
        if left_s <= 0:
            ended.append(Ended(task.name, "left out: the budget was spent", 0.0))
            continue
        print(f"{task.name}: about {task.about_s} s, {left_s:.0f} s left", flush=True)
        ended.append(run_task(task, options, left_s + options.grace_s))
    return ended


def draw_table(ended: Sequence[Ended]) -> str:
    """One line per task: value, peak, seconds it took, what came of it."""
    lines = [f"{'name':30} {'result':>24} {'peak GiB':>9} {'wall s':>7}  outcome"]
    for one in ended:
        record = one.record or {}
        result = f"{record['value']:.4g} {record['unit']}" if record else "-"
        if failed := sum("error" in case for case in record.get("cases", ())):
            result += f", {failed} failed"
        peak = record.get("peak_reserved_gib")
        shown = "-" if peak is None else f"{peak:.2f}"
        lines.append(f"{one.name:30} {result:>24} {shown:>9} {one.wall_s:7.0f}  {one.outcome}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where everything asked for was measured, 1 where something failed or was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", choices=TASKS, metavar="NAME", help="in this order; by default all")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--budget-s", type=float, default=540, help="nothing new starts after so many seconds")
    parser.add_argument("--grace-s", type=float, default=30, help="what runs on then is stopped after so many more")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-suite"))
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--commit", default="unknown", help="where there is no git to ask")
    options = parser.parse_args(arguments)
    if options.list:
        print(
            "\n".join(f"{task.name:30} about {task.about_s:3} s  {' '.join(task.arguments)}" for task in TASKS.values())
        )
        return 0
    if options.kit is None or not (options.kit / "common.py").is_file():
        parser.error(f"KIT is {options.kit}: there is no common.py with the architectures in it.")
    ended = run_all([TASKS[name] for name in options.only or TASKS], options)
    print(draw_table(ended))
    return 0 if all(one.outcome == "done" for one in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
