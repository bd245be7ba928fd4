"""The README's table of measured numbers, from benchmarks/results/*.json; what nobody measured stays a visible hole.

A result file holds one object, or a list of them, with at least `name`, `what`, `value`, `unit`, `gpu_or_cpu`,
`versions`, `commit`, `command` and `date`. `tools/write_docs.py` writes the table and CI compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NEEDED = ("name", "what", "value", "unit", "gpu_or_cpu", "versions", "commit", "command", "date")
ELSEWHERE = (
    "memory-grid",
    "memory-grid-h200",
    "memory-grid-32b",
    "memory-ladder",
    "decode-kernels",
    "attention-forms",
    "example-latex-ocr",
    "example-visual-math-grpo",
)
"""Results of many cases, shown in docs/memory.md and docs/plan.md instead; and those that examples show themselves."""
START, END = "<!-- measured -->", "<!-- /measured -->"
HOLE = "not measured yet"

# Name of a result -> what it is, for the table while nobody has measured it. Order of the table.
ROWS = {
    "demo-accuracy-before": "`lensmith demo`: easy-VQA test accuracy before",
    "demo-accuracy-after": "`lensmith demo`: easy-VQA test accuracy after",
    "demo-train-s": "`lensmith demo`: training alone, on two CPU cores",
    "demo-samples-per-s": "`lensmith demo`: speed on two CPU cores",
    "demo-samples-per-s-trl": "the same job with stock TRL at its best batch size",
    "demo-grpo-reward-gain": "`lensmith demo grpo`: smallest gain of mean reward, of three seeds",
    "demo-grpo-accuracy-gain": "`lensmith demo grpo`: smallest gain of exact answers, of three seeds",
    "demo-grpo-whole-s": "`lensmith demo grpo`: all of it, on two CPU cores, slowest of three seeds",
    "w1-8b-qlora-recompute-layers": "Qwen3-VL-8B QLoRA, 8 samples of 256 to 1,200 image tokens a step, with recompute",
    "w1-8b-qlora-recompute-none": "the same without recompute",
    "w1-8b-qlora-unsloth": "the same with recompute, by `engine: unsloth`",
    "w1-8b-qlora-trl": "the same with recompute, by stock TRL",
    "w1-8b-qlora-low": "the same, ours, with embedding, tower and layer inputs in host memory",
    "8b-qlora-1": "Qwen3-VL-8B QLoRA, one sample a step, low memory",
    "4b-qlora-1": "Qwen3-VL-4B QLoRA, one sample a step, low memory",
    "2b-qlora-1": "Qwen3-VL-2B QLoRA, one sample a step, low memory",
    "grpo-w2-8b": "Qwen3-VL-8B QLoRA GRPO: 2 prompts x 4 completions of 256 tokens, one image of 1,024 tokens each",
    "grpo-w2-8b-trl": "the same with stock TRL (one timed step)",
    "grpo-long-8b": "Qwen3-VL-8B QLoRA GRPO: 16 completions of 64 tokens on one image of 2,500",
    "grpo-sharing-8b": "The policy pass over 8 completions of 200 tokens, prompt of 935 shared against separate",
    "eval-speed-8b": "Qwen3-VL-8B QLoRA: answering held-out questions, transformers' generate against ours",
    "merge-8b": "Merging an adapter into 8B in bf16 on the processor: anonymous memory at its worst",
    "load-8b-nf4": "Loading 8B in NF4: GPU memory beyond its final 6.7 GiB",
}


def read_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Name -> newest result of that name.

    Raises:
        ValueError: a result lacks something that a reader needs in order to repeat it.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for result in content if isinstance(content, list) else [content]:
            if missing := [name for name in NEEDED if name not in result]:
                raise ValueError(
                    f"{path.name}: lacks {', '.join(missing)}; see benchmarks/table.py for what a result holds"
                )
            known = found.get(result["name"])
            if known is None or result["date"] >= known["date"]:
                found[result["name"]] = {**result, "file": f"benchmarks/results/{path.name}"}
    return found


def draw_table(results: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown: one line per row of ROWS, then whatever else was measured."""
    lines = ["| What | Measured | On | Result |", "|---|--:|---|---|"]
    for name, what in ROWS.items():
        lines.append(_row(what, results[name]) if name in results else f"| {what} | {HOLE} | | |")
    others = (name for name in results if name not in ROWS and name not in ELSEWHERE)
    lines += [_row(results[name]["what"], results[name]) for name in others]
    return "\n".join(lines)


def draw_ladder(results: dict[str, dict[str, Any]]) -> str:
    """docs/memory.md: one row per case, and what its last setting changed of the case that it was added to."""
    result, lines = (
        results["memory-ladder"],
        ["| Settings | Peak reserved GiB | Change | Tokens/s |", "|---|--:|--:|--:|"],
    )
    cases = result["cases"]
    for number, case in enumerate(cases):
        base = _base(case, cases[:number])
        shown = [setting for setting in case["settings"] if base is None or setting not in base["settings"]]
        change = "" if base is None else f"{case['peak_gib'] / base['peak_gib'] - 1:+.0%}"
        added = "" if base is None else "+ " if base is cases[number - 1] else "instead: "
        lines.append(
            f"| {added}`{' '.join(shown)}` | {case['peak_gib']:.1f} | {change} | {case['tokens'] / case['step_s']:,.0f} |"
        )
    return "\n".join(
        [*lines, "", f"`{result['command']}` on one {result['gpu_or_cpu']}, {result['date']}: {result['file']}."]
    )


ENGINES = {
    # Result -> the settings that make it, beyond those that all have.
    "w1-8b-qlora-unsloth": "engine=unsloth",
    "w1-8b-qlora-recompute-layers": "engine=lensmith",
    "w1-8b-qlora-low": "engine=lensmith memory.offload=inputs memory.embedding=host memory.tower=host",
    "w1-8b-qlora-recompute-none": "engine=lensmith memory.recompute=none",
}


def draw_engines(results: dict[str, dict[str, Any]]) -> str:
    """docs/unsloth.md: the same rows by either engine."""
    lines = ["| Settings | Seconds | Peak reserved GiB | Measured |", "|---|--:|--:|---|"]
    for name, settings in ENGINES.items():
        one = results[name]
        link = f"[{one['date']}](../{one['file']}), {one['gpu_or_cpu']}"
        lines.append(f"| `{settings}` | {one['value']:.3f} | {one['peak_reserved_gib']:.1f} | {link} |")
    return "\n".join(lines)


def draw_example(result: dict[str, Any]) -> str:
    """An example's README: the score before and after with intervals, and what it took."""
    before, after = (
        f"{score['accuracy']:.1%} ({score['low']:.1%} to {score['high']:.1%})"
        for score in (result["before"], result["after"])
    )
    steps = " and ".join(f"{count:,}" for count in result["steps"])
    return "\n".join(
        [
            "| Right answers | Before | After |",
            "|---|--:|--:|",
            f"| {result['after']['metric']}, {result['after']['n']} pictures | {before} | {after} |",
            "",
            f"{steps} steps in {result['train_s']:.0f} s, on {result['gpu_or_cpu'].replace('|', '/')}, {result['date']}: "
            f"`{result['command']}`, [JSON](../../{result['file']}).",
        ]
    )


def _base(case: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The earlier case that this one adds most closely to, or differs from in its last setting only."""
    below = [other for other in earlier if set(other["settings"]) < set(case["settings"])]
    beside = [other for other in earlier if other["settings"][:-1] == case["settings"][:-1]]
    return max(below, key=lambda other: len(other["settings"]), default=next(iter(beside), None))


def fill_table(page: str, table: str | None = None) -> str:
    """A page with the table between its two marks brought up to date; the README's own, unless another is given.

    Raises:
        ValueError: the page lacks one of the marks.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page must hold {START} and {END} around the table")
    table = draw_table(read_results()) if table is None else table
    return f"{before}{START}\n{table}\n{END}{after}"


def _row(what: str, result: dict[str, Any]) -> str:
    value, unit = result["value"], result["unit"]
    shown = f"{value:.1%}" if unit == "share" else f"{value:,.4g} {unit}"
    reserved = f", {result['peak_reserved_gib']:.1f} GiB reserved" if "peak_reserved_gib" in result else ""
    link = f"[{result['date']}]({result['file']})"
    return f"| {what} | {shown}{reserved} | {str(result['gpu_or_cpu']).replace('|', '/')} | {link} |"
