"""A run folder never lies: checkpoints are whole, a different run is refused, a full disk is said in words."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest

from lensmith.config.read import read_config
from lensmith.config.tree import RunConfig
from lensmith.errors import RunError
from lensmith.rundir import RunDir, checkpoint_step, explain_full_disk, naming_full_disk
from lensmith.types import StepStats


def step_stats(step: int, loss: float = 1.0) -> StepStats:
    return StepStats(
        step=step,
        loss=loss,
        grad_norm=0.5,
        learning_rate=1e-4,
        samples=16,
        tokens=1000,
        learned_tokens=50,
        step_s=0.5,
        data_wait_s=0.01,
        peak_gib=0.0,
    )


@pytest.fixture
def run(tmp_path) -> RunDir:
    folder = RunDir(tmp_path / "runs" / "charts")
    folder.start(RunConfig(run=folder.path), {"python": "3.11"})
    return folder


def save(run: RunDir, step: int, keep: int = 2, text: str = "weights") -> None:
    with run.save_checkpoint(step, keep) as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights.bin").write_text(text)


def test_a_run_can_be_opened_again(run):
    again = RunDir.open(run.path)
    assert again.read_config() == RunConfig(run=run.path)
    assert again.read_environment() == {"python": "3.11"}
    assert again.read_metrics() == []
    assert again.latest_checkpoint() is None
    assert again.list_predictions() == []


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(RunError, match=r"no run here, because there is no config.yaml in it. Give the folder"):
        RunDir.open(tmp_path)


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"holds thesis.tex but no run, and is left alone. Choose another folder: run="):
        RunDir(tmp_path).start(RunConfig(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_metrics_come_back_in_order_and_are_cut_at_a_step(run):
    for step in (1, 2, 3):
        run.append_metrics(step_stats(step, loss=1 / step))
    assert run.read_metrics() == [asdict(step_stats(step, loss=1 / step)) for step in (1, 2, 3)]
    run.truncate_metrics(2)
    run.append_metrics(step_stats(3, loss=9.0))
    assert [stats["loss"] for stats in run.read_metrics()] == [1.0, 0.5, 9.0]


def test_a_last_line_cut_short_is_left_out(run):
    run.append_metrics(step_stats(1))
    with run.metrics_path.open("a") as file:
        file.write(json.dumps(asdict(step_stats(2)))[:30])
    assert [stats["step"] for stats in run.read_metrics()] == [1]
    run.truncate_metrics(1)
    run.append_metrics(step_stats(2))
    assert [stats["step"] for stats in run.read_metrics()] == [1, 2]


def test_only_the_newest_checkpoints_are_kept(run):
    for step in (5, 10, 15, 1_000_000):
        save(run, step)
    assert [path.name for path in run.list_checkpoints()] == ["step-000015", "step-1000000"]
    assert checkpoint_step(run.latest_checkpoint()) == 1_000_000
    assert (run.latest_checkpoint() / "adapter" / "weights.bin").read_text() == "weights"


def test_saving_a_step_again_replaces_it(run):
    save(run, 5, text="old")
    save(run, 5, text="new")
    assert (run.latest_checkpoint() / "adapter" / "weights.bin").read_text() == "new"
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-000005"]


def test_an_error_while_saving_leaves_the_older_checkpoint_and_nothing_else(run):
    save(run, 5)

    def fail_halfway() -> None:
        with run.save_checkpoint(10, 1) as folder:
            (folder / "weights.bin").write_text("half")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (the very one raised above)
        fail_halfway()
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-000005"]


def test_a_kill_during_a_save_leaves_no_checkpoint_that_looks_whole(run):
    save(run, 5)
    script = f"""
        import os, signal
        from lensmith.rundir import RunDir
        with RunDir({str(run.path)!r}).save_checkpoint(10, 1) as folder:
            (folder / "weights.bin").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [path.name for path in run.list_checkpoints()] == ["step-000005"]
    save(run, 10)
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["step-000005", "step-000010"]


def test_before_the_first_checkpoint_any_settings_will_do(run):
    """A run that stopped at a bad row is mended by a setting, in the same folder."""
    run.append_metrics(step_stats(1))
    told = run.check_same(read_config(None, [f"run={run.path}", "data.on_bad_row=skip"]))
    assert told == [f"{run.path}: no checkpoint there yet, so the run starts from its beginning."]


def test_other_settings_are_refused_with_both_values(run):
    save(run, 1)
    changed = read_config(None, [f"run={run.path}", "tune.rank=32", "seed=1"])
    with pytest.raises(RunError) as caught:
        run.check_same(changed)
    text = str(caught.value)
    assert "tune.rank was 16 and is now 32; seed was 0 and is now 1" in text
    assert "run=runs/another-name" in text
    assert f"lensmith train {run.config_path}" in text


def test_settings_that_do_not_change_past_steps_may_differ_and_are_told(run):
    save(run, 1)
    changed = read_config(None, [f"run={run.path}", "optim.epochs=5", "save.keep=9"])
    told = run.check_same(changed)
    assert told[:2] == ["optim.epochs was 3.0 and is now 5.0.", "save.keep was 2 and is now 9."]
    assert "rest of the learning-rate schedule follows the new length" in told[2]
    assert run.check_same(RunConfig(run=run.path)) == []


def test_a_run_that_asked_vllm_goes_on_with_the_built_in_engine(tmp_path):
    """What the alarms of stale weights tell the user to do."""
    settings = [f"run={tmp_path / 'run'}", "task=grpo", "data.train=rows.jsonl"]
    run = RunDir(tmp_path / "run")
    run.start(read_config(None, [*settings, "rollout.engine=vllm", "rollout.vllm_gpu_share=0.4"]), {})
    save(run, 1)
    told = run.check_same(read_config(None, [*settings, "rollout.engine=builtin"]))
    assert told[0] == "rollout.engine was vllm and is now builtin."


def test_settings_without_effect_do_not_make_another_run(tmp_path):
    config = read_config(None, ["tune.method=full", f"run={tmp_path / 'r'}"])
    run = RunDir(config.run)
    run.start(config.model_copy(update={"tune": config.tune.model_copy(update={"rank": 99})}), {})
    save(run, 1)
    assert run.check_same(config) == []


def test_relative_and_absolute_data_paths_are_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("{}")
    config = RunConfig.model_validate({"data": {"train": "rows.jsonl"}, "run": "r"})
    run = RunDir("r")
    run.start(config, {})
    save(run, 1)
    assert run.check_same(config) == []
    assert run.read_config().data.train == str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    "cause",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_with_folder_space_and_way_out(tmp_path, cause):
    folder = tmp_path / "not" / "yet"
    sentence = r"no space left to write in; [\d,.]+ MiB are free there.*Make room"
    with pytest.raises(RunError, match=sentence) as caught, naming_full_disk(folder):
        raise cause
    assert str(caught.value).startswith(str(folder))
    assert explain_full_disk(caught.value, folder), "found through the chain of causes"


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(PermissionError), naming_full_disk(tmp_path):
        raise PermissionError
    assert explain_full_disk(ValueError("x"), tmp_path) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")  # noqa: PTH110
def test_a_real_full_device_is_recognised(tmp_path):
    with (
        pytest.raises(RunError, match="no space left"),
        naming_full_disk(tmp_path),
        Path("/dev/full").open("w") as file,
    ):
        file.write("x" * 100_000)
