"""What a person sees of a GRPO run in a terminal: the progress line, and `lensmith show`."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from lensmith import cli
from lensmith.config.tree import Grpo, RunConfig
from lensmith.rundir import RunDir
from lensmith.train.best import Standing
from lensmith.train.grpo_alarms import IN_A_ROW, Alarms
from lensmith.train.grpo_stats import GrpoMeter, GrpoStats
from lensmith.train.progress import TrainProgress
from lensmith.train.reward_set import RewardFailure


def stats(step: int, **changed: Any) -> GrpoStats:
    values: dict[str, Any] = {
        "loss": 0.1, "grad_norm": 1.0, "learning_rate": 1e-5, "samples": 8, "tokens": 9000, "learned_tokens": 900,
        "step_s": 10.0, "data_wait_s": 0.0, "peak_gib": 41.25, "reward": 0.05 * step, "reward_std": 0.2,
        "rewards": {"exact": 0.05 * step, "length": None}, "zero_variance": 0.25, "entropy": 0.8, "kl": None, "clipped": 0.0,
        "completion_tokens": 1200.0 + step, "truncated": 0.5 - 0.05 * step, "repetition": 0.0, "rollout_s": 6.0,
        "policy_s": 3.0, "rollout_tokens_per_s": 2000.0, "policy_tokens_per_s": 3000.0, "logprob_gap": None,
    }  # fmt: skip
    return GrpoStats(step=step, **(values | changed))


def test_progress_of_grpo_says_reward_length_both_speeds_lost_groups_memory_and_time_left():
    text, now = io.StringIO(), [0.0]
    with TrainProgress(Console(file=text, width=200), clock=lambda: now[0]) as progress:
        for step in range(1, 4):
            now[0] += 10.0
            progress.update(stats(step, reward=0.5, completion_tokens=1202.0), 10)
    assert text.getvalue().splitlines()[-1] == (
        "step 3/10  reward 0.500 ± 0.200  1,202 tokens long  rollout 2,000 tokens/s  policy 3,000 tokens/s  "
        "no signal in 25%  41.2 GiB  1:10 left"
    )


def test_a_step_that_computed_nothing_has_a_speed_of_nothing():
    progress = TrainProgress(Console(file=io.StringIO()))
    progress.update(stats(1, policy_s=0.0, tokens=0, rollout_s=0.0, peak_gib=0.0), 2)
    assert "policy 0 tokens/s" in progress.describe()
    assert "GiB" not in progress.describe()


@pytest.fixture
def run(tmp_path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.start(RunConfig.model_validate({"task": "grpo", "run": run.path}), {})
    for step in range(1, 6):
        run.append_metrics(stats(step, failures={"exact": 2} if step == 3 else {}))
    run.page_path.write_text("<html>")
    with run.save_checkpoint(5, 1) as folder:
        (folder / "weights").write_text("x")
    run.keep_best(Standing(5, 0.15, 0.079), keep=1)
    return run


def test_show_tells_rewards_first_and_last_failures_cuts_and_where_to_look(run, capsys):
    assert cli.main(["show", str(run.path)]) == 0
    told = capsys.readouterr().err
    assert "reward, 0.050 -> 0.250 over 5 steps\n  ▁▃▅▆█\n" in told.replace("▄", "▅")
    assert "  exact: 0.050 -> 0.250, failed for 2 completions\n" in told
    assert "  length: said nothing in any step\n" in told
    assert "  tokens per completion: 1,201 -> 1,205\n" in told
    assert "  cut off: 45% -> 25%; groups without signal: 25% -> 25%\n" in told
    assert f"  what was answered: {run.page_path}\n" in told
    assert "  60% of it making completions, 41.2 GiB at most\n" in told
    assert f"best checkpoint: {run.checkpoint_path(5)}, reward 0.150 ± 0.079 before it\n" in told
    assert "loss" not in told


def test_show_as_json_has_every_step(run, capsys):
    assert cli.main(["show", str(run.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reward"] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25])
    assert told["rewards"]["length"] == [None] * 5
    assert told["failures"] == {"exact": 2}
    assert told["page"] == str(run.page_path)
    assert told["best"]["checkpoint"] == str(run.checkpoint_path(5))


def test_a_line_of_metrics_is_the_step_again(run):
    assert [GrpoStats(**line) for line in run.read_metrics()][2] == stats(3, failures={"exact": 2})


def test_failures_of_rewards_are_counted_over_the_batches_of_a_step():
    meter = GrpoMeter()
    for count in (2, 3):
        meter.judged({"exact": RewardFailure(count, "why")})
    logs = {"loss": 0.1, "learning_rate": 1e-5}
    from lensmith.train.rollout import RolloutCost

    assert meter.stats(logs, {}, RolloutCost(), 1).failures == {"exact": 5}
    assert meter.stats(logs, {}, RolloutCost(), 2).failures == {}


def test_alarms_remember_that_a_collapse_rang():
    import torch

    alarms = Alarms(Grpo(), torch.bfloat16)
    for step in range(1, IN_A_ROW + 1):
        alarms.look(stats(step, completion_tokens=500.0))
    assert alarms.collapsed == ()
    said = [s for step in range(6, 6 + IN_A_ROW) for s in alarms.look(stats(step, completion_tokens=5.0))]
    assert len(said) == 1
    assert "shrunk to 5 tokens from 500" in said[0]
    for step in range(20, 30):
        alarms.look(stats(step, completion_tokens=500.0))
    assert alarms.collapsed == ("length",)
