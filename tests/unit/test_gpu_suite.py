"""The GPU suite without a GPU: what it runs is complete and can run, and a failure or an empty budget loses nothing else."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu_suite
from benchmarks.table import ROWS

from lensmith.plan.cards import find_card
from lensmith.plan.coefficients import load_coefficients
from lensmith.plan.records import read_records

BENCHMARKS = Path(gpu_suite.__file__).parent
SIZES = ("2b", "4b", "8b", "32b")


@pytest.fixture(scope="module")
def grid():
    """benchmarks/memory_grid.py, which like all of them finds its neighbours beside itself."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import memory_grid

        yield memory_grid
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_cases_that_share_a_model_follow_one_another_and_none_is_lost(grid):
    loads = 0
    for size in SIZES:
        cases = grid.list_cases(size)
        ordered = grid.together(cases)
        assert sorted(map(json.dumps, ordered)) == sorted(map(json.dumps, cases))
        keys = [grid.loading(case) for case in ordered]
        changes = sum(one != other for one, other in itertools.pairwise(keys))
        assert changes == len(set(keys)) - 1
        loads += len(set(keys))
    assert (loads, sum(len(grid.list_cases(size)) for size in SIZES)) == (23, 60)


def test_every_case_is_a_record_that_the_planner_can_predict_and_that_fits_the_card(grid, tmp_path):
    cases = [case for size in SIZES for case in grid.list_cases(size)] + grid.ladder()
    measured = {"peak_gib": 1.0, "step_s": 1.0}
    path = tmp_path / "grid.json"
    path.write_text(json.dumps({"gpu_or_cpu": "NVIDIA H100 80GB HBM3", "cases": [case | measured for case in cases]}))
    records = read_records(path)
    assert len(records) == len(cases)
    for record in records:
        peak_gib, step_s = record.predict(load_coefficients())
        assert 0 < peak_gib < find_card("H100").usable_gib, record.name
        assert 0 < step_s < 10, record.name
    shared = [record for record in records if record.work.key_tokens]
    assert len(shared) == 9
    assert all(record.work.group * record.work.prefixes == record.work.samples for record in shared)


def test_cases_run_on_one_model_and_an_error_loses_only_its_own(grid):
    bench = grid.Bench(Path(read_tiny()), torch.device("cpu"))
    common = ("tune.method=lora", "optim.name=adamw")
    case = {"size": "tiny", "tokens": 300, "images": 2, "image_tokens": 20, "learned": 40, "samples": 4}
    first = bench.measure({**case, "settings": [*common, "memory.recompute=none"]})
    model = bench._prepared
    again = bench.measure({**case, "group": 2, "settings": [*common, "memory.recompute=layers"]})
    assert bench._prepared is model
    assert (first["load_s"] > 0, again["load_s"]) == (True, 0)
    assert model.loaded.model.recompute == "layers"
    assert min(first["step_s"], again["step_s"]) > 0
    failed = bench.measure({**case, "tokens": 50, "settings": [*common]})
    assert failed["error"].startswith("ConfigError: 2 images of 20 tokens")
    assert "step_s" in bench.measure({**case, "settings": [*common]})


def read_tiny() -> str:
    from lensmith.model.names import resolve_model

    return resolve_model("lensmith/tiny")


def test_all_scripts_and_all_rows_of_the_table_that_need_a_gpu_are_in_the_suite():
    for task in gpu_suite.TASKS.values():
        assert (BENCHMARKS / task.arguments[0]).is_file()
    # In calls of their own: GRPO's rows are measured beside TRL's, evaluation's beside generate's. Merging needs no GPU.
    elsewhere = ("demo", "grpo", "eval-speed", "merge")
    ours = {name for name in ROWS if not name.startswith(elsewhere) and not name.endswith(("-unsloth", "-trl"))}
    assert ours <= gpu_suite.TASKS.keys()
    assert sum(task.about_s for task in gpu_suite.TASKS.values()) <= 9 * 60 + 30


FAKE = """
import argparse, json, sys, time
p = argparse.ArgumentParser()
for flag in ("--out", "--work", "--commit", "--do"):
    p.add_argument(flag)
p.add_argument("kit")
o = p.parse_args()
if o.do == "fail":
    print("what went wrong"); sys.exit(3)
open(o.out, "w").write(json.dumps({"value": 1.25, "unit": "s", "peak_reserved_gib": 5.5, "kit": o.kit, "commit": o.commit}))
if o.do == "hang":
    time.sleep(60)
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """`suite("good", "fail", ...)` -> exit code, with fake benchmarks in place of the real ones."""
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "common.py").write_text("")
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu_suite, "HERE", tmp_path)
    names = ("good", "fail", "hang", "late")
    tasks = {name: gpu_suite.Task(name, ("fake.py", "KIT", "--do", name), 1) for name in names}
    monkeypatch.setattr(gpu_suite, "TASKS", tasks)

    def run(*only: str, budget_s: float = 60.0) -> int:
        timing = ["--budget-s", str(budget_s), "--grace-s", "1"]
        places = [str(tmp_path / "kit"), "--out", str(tmp_path / "out"), "--commit", "abc"]
        return gpu_suite.main([*places, *timing, "--only", *only])

    return run


def test_a_failure_is_told_and_the_rest_goes_on(suite, tmp_path, capsys):
    assert suite("fail", "good") == 1
    told = capsys.readouterr().out
    assert "what went wrong" in told
    failed, good = told.splitlines()[-2:]
    assert "failed with exit code 3" in failed
    assert good.split()[:4] == ["good", "1.25", "s", "5.50"]
    assert json.loads((tmp_path / "out" / "good.json").read_text())["commit"] == "abc"
    assert suite("good") == 0


def test_when_the_budget_is_spent_what_runs_is_stopped_and_the_rest_is_left_out(suite, capsys):
    assert suite("hang", "late", budget_s=1.5) == 1
    hung, late = capsys.readouterr().out.splitlines()[-2:]
    # What it had written by then counts.
    assert "1.25 s" in hung
    assert "stopped after" in hung
    assert "left out: the budget was spent" in late
