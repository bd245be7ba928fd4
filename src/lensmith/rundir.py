"""One run's folder: what was asked for, with what, how it went, and where to go on from.

    runs/charts/
        config.yaml               the resolved settings, written before anything is loaded
        environment.json          versions and hardware
        metrics.jsonl             one optimizer step per line
        oom.jsonl                 only where GPU memory ran out: which step, which rows, what was done
        completions.jsonl         of a GRPO run: what was answered and how it was judged; completions.html shows the newest
        best.json                 the checkpoint with the best score or, of a GRPO run, reward, kept besides the newest ones
        predictions-before.jsonl  answers to the held-out questions; -after, and -step-000200 on the way
        eval.html                 the largest gains and losses among them, with pictures
        checkpoints/step-000200/  whole or not there: written under another name, then renamed

A checkpoint that a kill or a full disk cut short keeps its temporary name and is swept away by the next one. Only one
process of a run writes here; with torchrun that is rank 0.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensmith.config.read import read_config, resolve_paths
from lensmith.config.schema import list_settings
from lensmith.config.tree import RunConfig
from lensmith.config.write import config_diff, dump_config, write_value
from lensmith.errors import LensmithError, RunError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MIB = 2**20
STEP_NAME = re.compile(r"step-(\d{6,})")
BEFORE_START = re.compile(r"predictions-.*\.jsonl|rows|warm-up|checkpoints|\..*")
"""What may stand in a run folder before the run starts: answers before training, rows and warm-up of demos, leftovers."""
MAY_CHANGE = (
    "run",
    "optim.epochs",
    "optim.steps",
    "data.workers",
    "eval.every_steps",
    "eval.patience",
    "eval.samples",
    "eval.max_new_tokens",
    "eval.batch",
    "rollout.show_every_steps",
    "rollout.engine",
    "rollout.vllm_mode",
    "rollout.vllm_gpu_share",
    "rollout.vllm_server",
    "log.every_steps",
    "log.report_to",
    "save.every_steps",
    "save.keep",
    "memory.recompute",
    "memory.offload",
    "memory.embedding",
    "memory.head",
    "memory.tower",
    "memory.stream_layers",
    "memory.vision_cache_gib",
    "memory.vision_cache_dir",
)
"""Settings that may differ on resuming: they do not change what the steps already taken would have been, except that
the learning rates of a schedule stretch with its length, which `check_same` says."""
SCHEDULE_LENGTH = {"optim.epochs", "optim.steps"}


class RunDir:
    """The folder of one run. Making the object touches nothing; `start` writes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.environment_path = self.path / "environment.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.oom_path = self.path / "oom.jsonl"
        self.completions_path = self.path / "completions.jsonl"
        self.page_path = self.path / "completions.html"
        self.best_path = self.path / "best.json"
        self.eval_page_path = self.path / "eval.html"
        self.checkpoints_path = self.path / "checkpoints"

    def __repr__(self) -> str:
        return f"RunDir('{self.path}')"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_path.is_file()

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run.

        Raises:
            RunError: there is no run in this folder.
        """
        run = cls(path)
        if not run.exists:
            raise RunError(
                f"{path}: no run here, because there is no config.yaml in it. "
                "Give the folder that `lensmith train` named at its end; by default it is runs/sft."
            )
        return run

    def check_free(self) -> None:
        """Make sure that the folder is a run's or may become one.

        Raises:
            RunError: it holds somebody's files and no run.
        """
        if self.exists or not self.path.is_dir():
            return
        if foreign := sorted(path.name for path in self.path.iterdir() if not BEFORE_START.fullmatch(path.name)):
            raise RunError(
                f"{self.path}: holds {', '.join(foreign[:3])} but no run, and is left alone. "
                "Choose another folder: run=runs/another-name."
            )

    def start(self, config: RunConfig, environment: Mapping[str, Any]) -> None:
        """Write the resolved config and the environment; on resuming, the newest ones.

        Raises:
            RunError: the folder holds something else than a run, or cannot be written to.
        """
        self.check_free()
        with naming_full_disk(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.checkpoints_path.mkdir(exist_ok=True)
            self._sweep()
            _write_whole(self.config_path, dump_config(resolve_paths(config)))
            _write_whole(self.environment_path, json.dumps(environment, indent=2, default=str) + "\n")

    def read_config(self) -> RunConfig:
        """The settings this run was started with."""
        return read_config(self.config_path)

    def read_environment(self) -> dict[str, Any]:
        """Versions and hardware of the latest start."""
        return json.loads(self.environment_path.read_text(encoding="utf-8")) if self.environment_path.is_file() else {}

    def check_same(self, config: RunConfig) -> list[str]:
        """Make sure that resuming with `config` goes on with the same run; returns sentences to print.

        Before the first checkpoint there is nothing to go on with, and any settings will do. Later those in MAY_CHANGE
        may differ. A different length moves the rest of the learning-rate schedule, so the run
        equals neither a short nor a long one; that is said.

        Raises:
            RunError: other settings differ.
        """
        if self.latest_checkpoint() is None:
            return [f"{self.path}: no checkpoint there yet, so the run starts from its beginning."]
        before, config = self.read_config(), resolve_paths(config)
        now, then = config_diff(config, before), config_diff(before, config)
        differ = [s.path for s in list_settings() if s.path in {*now, *then}]
        if changed := [path for path in differ if path not in MAY_CHANGE]:
            listed = "; ".join(f"{path} was {_told(then, path)} and is now {_told(now, path)}" for path in changed)
            raise RunError(
                f"{self.path}: holds a run with other settings: {listed}. "
                "Start this one in a folder of its own with run=runs/another-name, or resume with the same settings: "
                f"lensmith train {self.config_path}"
            )
        sentences = [
            f"{path} was {_told(then, path)} and is now {_told(now, path)}." for path in differ if path != "run"
        ]
        if SCHEDULE_LENGTH & set(differ) and config.optim.schedule != "constant":
            sentences.append(
                "The rest of the learning-rate schedule follows the new length; the steps already taken had the old one."
            )
        return sentences

    def append_metrics(self, stats: DataclassInstance) -> None:
        """One optimizer step as one line, on disk before the next step begins."""
        self._append(self.metrics_path, stats)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All steps so far; a last line that a kill cut short is left out."""
        return _read_lines(self.metrics_path)

    def append_oom(self, shortage: DataclassInstance) -> None:
        """One pack that did not fit the GPU as one line; see `lensmith.train.oom.Shortage`."""
        self._append(self.oom_path, shortage)

    def read_oom(self) -> list[dict[str, Any]]:
        """Every pack so far that did not fit, oldest first."""
        return _read_lines(self.oom_path)

    def truncate_metrics(self, step: int) -> None:
        """Forget the steps after `step`: resuming from its checkpoint takes them again."""
        with naming_full_disk(self.path):
            for path in (self.metrics_path, self.oom_path, self.completions_path):
                if path.is_file():
                    kept = [line for line in _read_lines(path) if line["step"] <= step]
                    _write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
            if (best := self.read_best()) is None or best["step"] > step:
                self.best_path.unlink(missing_ok=True)

    def _append(self, path: Path, noun: DataclassInstance) -> None:
        line = json.dumps(dataclasses.asdict(noun)) + "\n"
        with naming_full_disk(self.path), path.open("a", encoding="utf-8") as file:
            file.write(line)

    def predictions_path(self, name: str) -> Path:
        """Where the answers of one evaluation belong: `before`, `after`, `step-000200`."""
        return self.path / f"predictions-{name}.jsonl"

    def list_predictions(self) -> list[Path]:
        """All evaluations so far, in the order they were made."""
        return sorted(self.path.glob("predictions-*.jsonl"), key=lambda path: path.stat().st_mtime_ns)

    @contextmanager
    def save_checkpoint(self, step: int, keep: int) -> Iterator[Path]:
        """An empty folder to write a checkpoint into; it becomes `checkpoints/step-000123` when the block ends.

        Everything is on disk before the rename, so whatever ends the process, a folder of that name is whole. Older
        checkpoints beyond the newest `keep` and the best go afterwards, never before.

        Raises:
            RunError: no space left; older checkpoints are untouched.
        """
        final = self.checkpoint_path(step)
        with naming_full_disk(self.path):
            self.checkpoints_path.mkdir(parents=True, exist_ok=True)
            self._sweep()
            started = self.checkpoints_path / f".saving-{final.name}"
            started.mkdir()
            try:
                yield started
                _flush(started)
            except BaseException:  # also Ctrl-C: a half checkpoint only costs space; the cause goes on its way
                shutil.rmtree(started, ignore_errors=True)
                raise
            if final.exists():
                final.rename(self.checkpoints_path / f".old-{final.name}")
            started.rename(final)
            _flush_folder(self.checkpoints_path)
        self._sweep()
        self._prune(keep)

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of that step is, or would be."""
        return self.checkpoints_path / f"step-{step:06d}"

    def read_best(self) -> dict[str, Any] | None:
        """What `keep_best` was told last; None where nothing was, or where that checkpoint is gone."""
        if not self.best_path.is_file():
            return None
        best = json.loads(self.best_path.read_text(encoding="utf-8"))
        return best if self.checkpoint_path(best["step"]).is_dir() else None

    def keep_best(self, best: DataclassInstance, *, keep: int) -> None:
        """Spare the checkpoint of `best.step` from now on, and no longer the one named before it."""
        with naming_full_disk(self.path):
            _write_whole(self.best_path, json.dumps(dataclasses.asdict(best)) + "\n")
        self._prune(keep)

    def _prune(self, keep: int) -> None:
        """Remove all checkpoints but the newest `keep` and the best; best.json is whole before anything goes."""
        best = self.read_best()
        for old in self.list_checkpoints()[:-keep]:
            if best is None or checkpoint_step(old) != best["step"]:
                shutil.rmtree(old)

    def list_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.checkpoints_path.is_dir():
            return []
        found = [path for path in self.checkpoints_path.iterdir() if STEP_NAME.fullmatch(path.name)]
        return sorted(found, key=checkpoint_step)

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, or None before the first."""
        return next(reversed(self.list_checkpoints()), None)

    def _sweep(self) -> None:
        for pattern in (".saving-*", ".old-*"):
            for left in self.checkpoints_path.glob(pattern):
                shutil.rmtree(left)


def find_run(subject: str | Path) -> tuple[RunDir, Path]:
    """The run that `subject` is, or whose checkpoint it is, and the folder that holds the tuned weights meant."""
    path = Path(subject)
    if STEP_NAME.fullmatch(path.name) and path.is_dir() and RunDir(path.parent.parent).exists:
        return RunDir(path.parent.parent), path
    return RunDir(path), path


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps taken when this checkpoint was written, from its name."""
    name = STEP_NAME.fullmatch(checkpoint.name)
    if name is None:
        raise RunError(f"{checkpoint}: not a checkpoint, whose names are like step-000123. Give one from checkpoints/.")
    return int(name[1])


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Turns 'no space left' in whatever library was writing into a RunError that names the folder and the space."""
    try:
        yield
    except LensmithError:  # said already, by whoever was writing
        raise
    except Exception as cause:
        if sentence := explain_full_disk(cause, folder):
            raise RunError(sentence) from cause
        raise


def explain_full_disk(cause: BaseException | None, folder: Path) -> str | None:
    """A sentence if the disk, a quota or a size limit ended the writing, else None.

    Looks through the chain of causes. Errors of safetensors and of torch's own writer carry no number; their text does.
    """
    while cause is not None:
        code = cause.errno if isinstance(cause, OSError) else None
        text = str(cause)
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text or "os error 28" in text:
            place = next((parent for parent in (folder, *folder.resolve().parents) if parent.exists()), Path.cwd())
            free = shutil.disk_usage(place).free / MIB
            return (
                f"{folder}: no space left to write in; {free:,.1f} MiB are free there. What was saved before is whole. "
                "Make room, or choose a folder on another disk with run=..., and start the same command again."
            )
        if code == errno.EFBIG or "os error 27" in text:
            return (
                f"{folder}: a file would be larger than this system lets one be ({text}). What was saved before is whole. "
                "Raise the limit (ulimit -f), or choose a folder on another disk with run=..., and start again."
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _told(values: Mapping[str, Any], path: str) -> str:
    return write_value(values[path]) if path in values else "without effect"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _write_whole(path: Path, text: str) -> None:
    """Write beside, then rename: a reader sees the old file or the new one, never half of either."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    """Force the names in a folder to disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
