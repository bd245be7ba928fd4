"""What the verbs print for a person: tables and a run at a glance. Returns text and rich tables; prints nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lensmith.config.schema import list_settings, read_value
from lensmith.config.tree import RunConfig
from lensmith.config.write import config_diff, write_value
from lensmith.types import counted

if TYPE_CHECKING:
    from rich.table import Table

    from lensmith.rundir import RunDir

BARS = "▁▂▃▄▅▆▇█"
CURVE_COLUMNS = 60
SHOWN_ANSWERS = 5
ANSWER_COLUMNS = 60


def settings_table() -> Table:
    """Every setting with what it accepts, its default and its meaning."""
    from rich.table import Column, Table

    table = Table(Column("setting", no_wrap=True), "accepts", "default", "meaning", box=None, pad_edge=False)
    for setting in list_settings():
        table.add_row(setting.path, setting.allowed, write_default(setting.path), setting.doc)
    return table


def write_default(path: str) -> str:
    """A setting's default as YAML has it."""
    return write_value(read_value(RunConfig(), path))


def sparkline(values: Sequence[float], columns: int = CURVE_COLUMNS) -> str:
    """A curve as one line of text: means of equal stretches, lowest to highest bar."""
    if not values:
        return ""
    columns = min(columns, len(values))
    edges = [round(column * len(values) / columns) for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] if span else BARS[0] for mean in means)


def describe_run(run: RunDir) -> dict[str, Any]:
    """A run as plain values: settings that differ from the defaults, progress, cost, and answers."""
    metrics = run.read_metrics()
    latest, best = run.latest_checkpoint(), run.read_best()
    train_s = sum(stats["step_s"] for stats in metrics)
    samples = sum(stats["samples"] for stats in metrics)
    told = {
        "run": str(run.path),
        "settings": config_diff(run.read_config()),
        "versions": run.read_environment().get("versions", {}),
        "steps": metrics[-1]["step"] if metrics else 0,
        "samples": samples,
        "train_s": train_s,
        "samples_per_s": samples / train_s if train_s else None,
        "peak_gib": max((stats["peak_gib"] for stats in metrics), default=None),
        "oom": run.read_oom(),
        "last": metrics[-1] if metrics else None,
        "loss": [stats["loss"] for stats in metrics],
        "checkpoint": str(latest) if latest else None,
        "predictions": {path.stem.removeprefix("predictions-"): str(path) for path in run.list_predictions()},
        "best": best and {**best, "checkpoint": str(run.checkpoint_path(best["step"]))},
    }
    return told | _describe_rewards(run, metrics) if metrics and "reward" in metrics[-1] else told


def _describe_rewards(run: RunDir, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a GRPO run has besides: curves per step, failures of rewards, the page and the best checkpoint."""
    failures: dict[str, int] = {}
    for stats in metrics:
        for name, count in stats.get("failures", {}).items():
            failures[name] = failures.get(name, 0) + count
    return {
        "reward": [stats["reward"] for stats in metrics],
        "rewards": {name: [stats["rewards"].get(name) for stats in metrics] for name in metrics[-1]["rewards"]},
        "completion_tokens": [stats["completion_tokens"] for stats in metrics],
        "truncated": [stats["truncated"] for stats in metrics],
        "zero_variance": [stats["zero_variance"] for stats in metrics],
        "failures": failures,
        "page": str(run.page_path) if run.page_path.is_file() else None,
    }


def run_screen(run: RunDir) -> Iterator[str]:
    """A run at a glance, line by line."""
    told = describe_run(run)
    yield str(run.path)
    yield "\nsettings that differ from the defaults"
    yield from (f"  {path}: {write_value(value)}" for path, value in told["settings"].items())
    if not told["last"]:
        yield "\nno step taken yet"
        yield from _shortages(told["oom"])
        return
    last = told["last"]
    if "reward" in told:
        yield from _rewards(told)
    else:
        yield f"\nloss, {told['loss'][0]:.3f} -> {last['loss']:.3f} over {told['steps']} steps"
        yield f"  {sparkline(told['loss'])}"
    yield "\ncost"
    yield f"  {told['samples']:,} samples in {told['train_s']:,.1f} s: {told['samples_per_s']:,.1f} samples/s"
    cause, field = ("making completions", "rollout_s") if "reward" in told else ("waiting for data", "data_wait_s")
    waited_s = sum(stats[field] for stats in run.read_metrics())
    memory = f", {told['peak_gib']:.1f} GiB at most" if told["peak_gib"] else ""
    yield f"  {waited_s / told['train_s'] if told['train_s'] else 0:.0%} of it {cause}{memory}"
    yield from _shortages(told["oom"])
    yield f"\nnewest checkpoint: {told['checkpoint'] or 'none yet'}"
    if best := told["best"]:
        how = f"{best['metric']} {best['score']:.1%}" if "metric" in best else ""
        how = how or f"reward {best['reward']:.3f} ± {best['spread']:.3f} before it"
        yield f"best checkpoint: {best['checkpoint']}, {how}"
    yield from _answers(run)


def _rewards(told: Mapping[str, Any]) -> Iterator[str]:
    """How rewards went, and what stands in their way."""
    yield f"\nreward, {told['reward'][0]:.3f} -> {told['reward'][-1]:.3f} over {told['steps']} steps"
    yield f"  {sparkline(told['reward'])}"
    for name, values in told["rewards"].items():
        known = [value for value in values if value is not None]
        went = f"{known[0]:.3f} -> {known[-1]:.3f}" if known else "said nothing in any step"
        failed = f", failed for {counted(told['failures'][name], 'completion')}" if name in told["failures"] else ""
        yield f"  {name}: {went}{failed}"
    lengths, cut, flat = (told[name] for name in ("completion_tokens", "truncated", "zero_variance"))
    yield f"  tokens per completion: {lengths[0]:,.0f} -> {lengths[-1]:,.0f}"
    yield f"  cut off: {cut[0]:.0%} -> {cut[-1]:.0%}; groups without signal: {flat[0]:.0%} -> {flat[-1]:.0%}"
    if told["page"]:
        yield f"  what was answered: {told['page']}"


def _shortages(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """How often GPU memory ran out, and what came of it."""
    if not lines:
        return
    last = lines[-1]
    times = "once" if len(lines) == 1 else f"{len(lines):,} times, last"
    lowered = last["budget_after_tokens"] < lines[0]["budget_before_tokens"]
    since = f"; packs hold at most {last['budget_after_tokens']:,} tokens since" if lowered else ""
    yield f"  GPU memory ran out {times} in step {last['step']}{since}; oom.jsonl names the rows"


def _answers(run: RunDir) -> Iterator[str]:
    """The first questions with the answers of the first and the last evaluation side by side."""
    files = run.list_predictions()
    if not files:
        return
    first, last = ([json.loads(line) for line in path.open(encoding="utf-8")] for path in (files[0], files[-1]))
    name = files[-1].stem.removeprefix("predictions-")
    before = {(answer["where"], answer["question"]): answer["answer"] for answer in first}
    yield f"\nanswers ({len(last)} in {files[-1].name})"
    for answer in last[:SHOWN_ANSWERS]:
        yield f"  {answer['where']}  {_short(answer['question'])}"
        yield f"    right: {_short(answer['reference'])}"
        key = (answer["where"], answer["question"])
        if len(files) > 1 and key in before:
            yield f"    {files[0].stem.removeprefix('predictions-')}: {_short(before[key])}"
        yield f"    {name}: {_short(answer['answer'])}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= ANSWER_COLUMNS else line[: ANSWER_COLUMNS - 1] + "…"
