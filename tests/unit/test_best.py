"""The best checkpoint outlives the newest ones, and is offered where a run ends below it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lensmith.rundir import RunDir
from lensmith.train.best import SMOOTH_STEPS, BestCheckpoint, Standing


def train(run: RunDir, rewards: list[float], *, every: int = 5, keep: int = 1, start: int = 0) -> BestCheckpoint:
    """Steps with these rewards, saved as the trainer does: the step is told, then the checkpoint is written, then named."""
    best = BestCheckpoint(run, keep)
    for step, reward in enumerate(rewards, 1):
        stats: Any = SimpleNamespace(step=step, reward=reward)
        best.look(stats)
        if step > start and step % every == 0:
            with run.save_checkpoint(step, keep) as folder:
                (folder / "weights").write_text(str(step))
            best.on_save(None, SimpleNamespace(global_step=step), None)
    return best


def names(run: RunDir) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in run.list_checkpoints()]


def test_the_best_checkpoint_outlives_the_newest_ones(tmp_path):
    run = RunDir(tmp_path / "r")
    best = train(run, [0.1] * 5 + [0.9] * 5 + [0.2] * 10)
    assert names(run) == [10, 20]
    assert best.best == Standing(10, pytest.approx(0.9), pytest.approx(0))


def test_while_rewards_rise_only_the_newest_are_kept(tmp_path):
    run = RunDir(tmp_path / "r")
    train(run, [step / 20 for step in range(20)], keep=2)
    assert names(run) == [15, 20]
    assert run.read_best()["step"] == 20


def test_one_lucky_step_does_not_make_a_checkpoint_the_best(tmp_path):
    run = RunDir(tmp_path / "r")
    train(run, [0.5] * 4 + [1.0] + [0.65] * 5)
    assert SMOOTH_STEPS == 5
    assert run.read_best()["step"] == 10


def test_checkpoints_before_enough_steps_are_not_judged(tmp_path):
    run = RunDir(tmp_path / "r")
    assert train(run, [1.0] * 4, every=2).best is None
    assert not run.best_path.exists()


def test_a_run_that_fell_offers_its_best_checkpoint_with_both_numbers(tmp_path):
    run = RunDir(tmp_path / "r")
    best = train(run, [0.1] * 5 + [0.8, 0.9, 0.8, 0.9, 0.85] + [0.2] * 10)
    (sentence,) = best.sentences(20, ())
    checkpoint = tmp_path / "r" / "checkpoints" / "step-000010"
    assert sentence.startswith("The last steps have a mean reward of 0.200; those before step 10 had 0.850 ± 0.050")
    assert f"lensmith eval {checkpoint}" in sentence
    assert f"tune.start_from={checkpoint} run={tmp_path / 'r'}-from-10" in sentence


def test_a_fall_within_the_spread_is_not_told_unless_an_alarm_of_collapse_rang(tmp_path):
    run = RunDir(tmp_path / "r")
    best = train(run, [0.7, 0.9, 0.7, 0.9, 0.8] + [0.75] * 5)
    assert names(run) == [5, 10]
    assert best.sentences(10, ()) == []
    (sentence,) = best.sentences(10, ("entropy", "length"))
    assert sentence.startswith("An alarm rang (entropy, length): the last steps")


def test_a_run_that_ends_with_its_best_says_nothing(tmp_path):
    best = train(RunDir(tmp_path / "r"), [step / 10 for step in range(10)])
    assert best.sentences(10, ("length",)) == []


def test_a_kill_between_a_save_and_its_naming_leaves_the_best_before_it(tmp_path):
    """best.json is written after the checkpoint: until then the one named before is spared."""
    run = RunDir(tmp_path / "r")
    train(run, [0.5] * 5)
    with run.save_checkpoint(10, 1) as folder:
        (folder / "weights").write_text("10")
    assert names(run) == [5, 10]
    assert run.read_best()["step"] == 5


def test_a_best_checkpoint_that_was_removed_is_none(tmp_path):
    run = RunDir(tmp_path / "r")
    train(run, [0.5] * 5)
    for path in run.list_checkpoints()[0].iterdir():
        path.unlink()
    run.list_checkpoints()[0].rmdir()
    assert run.read_best() is None
    run.truncate_metrics(0)
    assert not run.best_path.exists(), "else a later step of that number would be taken for it"
