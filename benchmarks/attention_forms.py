"""What one layer's attention over prefixes and branches costs in each of its two forms, forward and backward.

    python benchmarks/attention_forms.py --out benchmarks/results/attention-forms.json

The heads of Qwen3-VL-8B in bf16, through `attend_by_hand` and `attend_backward` as a layer calls them, the two forms in
turns. The error of each is that of the worst of result and three gradients, relative to fp32 with one softmax per run.
At the end the three constants of lensmith.model.cascade are solved from all shapes by least squares. `--cpu` runs small
shapes in fp32, only to see that it runs. Shapes come in the order of their worth and nothing new starts when the budget
is spent.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensmith.model.attention import Form, Layout, Run, attend_backward, attend_by_hand, build_layout, segment_runs
from lensmith.model.cascade import ASKED_US, COPIED_US, FIXED_US, Cascade, count_shared
from lensmith.types import Segment
from record import keep_record, make_record

FORMS: tuple[Form, Form] = ("concatenated", "cascade")
FIRST = [(2500, 64, 16, 1), (1000, 200, 8, 1), (1000, 200, 8, 2), (300, 1000, 8, 1)]
"""Prefix, mean branch, branches, groups: what the constants were first solved from. The first is the headline."""
GRID = [(*shape, 1) for shape in itertools.product((2500, 1000, 300), (64, 200, 1000), (16, 8, 4))]
TWO_GROUPS = [(2500, 64, 8, 2), (1000, 64, 8, 2), (1000, 200, 4, 2)]
SHAPES = FIRST + [shape for shape in TWO_GROUPS + GRID if shape not in FIRST]
SMALL_SHAPES = [(30, 5, 4, 1), (20, 6, 3, 2), (5, 12, 2, 1), (40, 3, 8, 1)]
WARM_UPS, ROUNDS, CALLS = 3, 5, 8


@dataclass(frozen=True, slots=True)
class Heads:
    """What is computed on, and with how many heads."""

    device: torch.device
    dtype: torch.dtype
    query: int
    key: int
    width: int

    @property
    def scale(self) -> float:
        return self.width**-0.5


LARGE = Heads(torch.device("cuda", 0), torch.bfloat16, 32, 8, 128)
SMALL = Heads(torch.device("cpu"), torch.float32, 4, 2, 16)


def lay_out(prefix: int, branch: int, branches: int, groups: int) -> list[Segment]:
    """Branches of 0.4 to 1.6 times their mean, the same for every run of this script."""
    generator, segments, stop = torch.Generator().manual_seed(0), [], 0
    for _ in range(groups):
        parent = len(segments)
        lengths = [
            max(1, int(branch * (0.4 + 1.2 * float(share)))) for share in torch.rand(branches, generator=generator)
        ]
        for length, of in [(prefix, None), *((length, parent) for length in lengths)]:
            segments.append(Segment(stop, length, of))
            stop += length
    return segments


def attend_densely(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, runs: Sequence[Run], scale: float
) -> list[Any]:
    """Result and gradients of query, key and value in fp32: a softmax over each run's keys, torch's own graph."""
    query, key, value, grad = (part.float() for part in (query, key, value, grad))
    group, first = query.shape[1] // key.shape[1], 0
    found = [torch.zeros_like(part) for part in (query, query, key, value)]
    for run in runs:
        rows = slice(first, first := first + run.length)
        read = torch.cat([torch.arange(*span, device=key.device) for span in run.keys])
        leaves = [part.clone().requires_grad_() for part in (query[rows], key[read], value[read])]
        keys, values = (part.repeat_interleave(group, 1) for part in leaves[1:])
        seen = torch.ones(run.length, len(read), dtype=torch.bool, device=key.device).tril(len(read) - run.length)
        scores = torch.einsum("qhw,khw->hqk", leaves[0], keys) * scale
        out = torch.einsum("hqk,khw->qhw", scores.masked_fill(~seen, -torch.inf).softmax(-1), values)
        grads = torch.autograd.grad(out, leaves, grad[rows])
        found[0][rows], found[1][rows] = out.detach(), grads[0]
        for total, part in zip(found[2:], grads[1:], strict=True):
            total.index_add_(0, read, part)
    return found


def measure_shape(shape: tuple[int, int, int, int], heads: Heads) -> dict[str, Any]:
    """A row of the table."""
    segments = lay_out(*shape)
    runs, tokens = segment_runs(segments), segments[-1].stop
    generator = torch.Generator(heads.device).manual_seed(1)
    query, key, value, grad = (
        torch.randn(tokens, count, heads.width, generator=generator, device=heads.device).to(heads.dtype)
        for count in (heads.query, heads.key, heads.key, heads.query)
    )

    def step(layout: Layout) -> list[Tensor]:
        out, attended = attend_by_hand(query, key, value, layout, heads.scale, keeps=True)
        assert attended is not None
        return [out, *attend_backward(grad, attended)]

    build = {"num_keys": tokens, "causal": True, "device": heads.device, "dtype": heads.dtype}
    layouts = {form: build_layout(runs, **build, form=form) for form in FORMS}
    assert isinstance(layouts["cascade"], Cascade)
    truth, errors = attend_densely(query, key, value, grad, runs, heads.scale), {}
    for form, layout in layouts.items():
        pairs = zip(step(layout), truth, strict=True)
        errors[form] = max(float((ours.float() - wanted).norm() / wanted.norm()) for ours, wanted in pairs)
    del truth
    times = time_in_turns({form: lambda layout=layout: step(layout) for form, layout in layouts.items()}, heads.device)
    copied, asking = count_shared(runs)
    named = dict(zip(("prefix", "branch", "branches", "groups"), shape, strict=True))
    return {**named, "tokens": tokens, "copied": copied, "asking": asking} | {
        form: {"ms": round(ms, 3), "host_ms": round(host_ms, 3), "error": float(f"{errors[form]:.2e}")}
        for form, (ms, host_ms) in times.items()
    }


def time_in_turns(steps: dict[Form, Callable[[], Any]], device: torch.device) -> dict[Form, tuple[float, float]]:
    """Of each step the milliseconds from call to call and those of the host alone: medians over rounds."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step, _ in itertools.product(steps.values(), range(WARM_UPS)):
        step()
    found: dict[Form, list[tuple[float, float]]] = {form: [] for form in steps}
    for _, (form, step) in itertools.product(range(ROUNDS), steps.items()):
        wait()
        begun = time.perf_counter()
        for _ in range(CALLS):
            step()
        enqueued = time.perf_counter()
        wait()
        found[form].append((time.perf_counter() - begun, enqueued - begun))
    per_call = 1000 / CALLS
    return {
        form: (per_call * statistics.median(t for t, _ in times), per_call * statistics.median(t for _, t in times))
        for form, times in found.items()
    }


def solve_constants(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """COPIED_US, ASKED_US, FIXED_US of lensmith.model.cascade, from what two parts took more than concatenated keys."""
    terms = torch.tensor([[-row["copied"], row["asking"], 1.0] for row in rows], dtype=torch.float64)
    more = torch.tensor([row["cascade"]["ms"] - row["concatenated"]["ms"] for row in rows], dtype=torch.float64)
    solved = torch.linalg.lstsq(terms, 1000 * more[:, None], driver="gelsd").solution[:, 0]
    names = ("copied_us", "asked_us", "fixed_us")
    return {name: float(f"{us:.3g}") for name, us in zip(names, solved.tolist(), strict=True)}


def preferred(row: dict[str, Any]) -> str:
    """What lensmith.model.cascade takes, by its constants as they are."""
    return "cascade" if row["copied"] * COPIED_US > row["asking"] * ASKED_US + FIXED_US else "concatenated"


def quicker(row: dict[str, Any]) -> str:
    return min(FORMS, key=lambda form: row[form]["ms"])


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("prefix branch  n groups  tokens  copied |  ms: concatenated  cascade  (host) | error          | preferred")
    for row in rows:
        one, two = (row[form] for form in FORMS)
        right = (
            ""
            if preferred(row) == quicker(row)
            else f"  wrong by {max(one['ms'], two['ms']) / min(one['ms'], two['ms']):.2f}"
        )
        print(
            f"{row['prefix']:6} {row['branch']:6} {row['branches']:2} {row['groups']:6} "
            f"{row['tokens']:7} {row['copied']:7} | "
            f"{one['ms']:12.3f} ({one['host_ms']:.2f}) {two['ms']:7.3f} ({two['host_ms']:.2f}) | "
            f"{one['error']:.1e} {two['error']:.1e} | {preferred(row)}{right}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true", help="small shapes in fp32")
    parser.add_argument("--budget-s", type=float, default=25.0)
    parser.add_argument("--commit", help="where there is no git to ask")
    options = parser.parse_args(arguments)

    heads, shapes = (SMALL, SMALL_SHAPES) if options.cpu else (LARGE, SHAPES)
    begun, rows = time.perf_counter(), []
    for shape in shapes:
        if time.perf_counter() - begun > options.budget_s:
            print(
                f"left out: {len(shapes) - len(rows)} of {len(shapes)} shapes; --budget-s {options.budget_s:g} is spent"
            )
            break
        rows.append(measure_shape(shape, heads))
    print_table(rows)
    solved = solve_constants(rows)
    print("solved again:", solved)
    head = rows[0]
    record = make_record(
        "attention-forms",
        f"one layer's attention over a prefix of {head['prefix']} tokens and {head['branches']} branches of about "
        f"{head['branch']}, forward and backward, in the quicker of its two forms ({quicker(head)})",
        head[quicker(head)]["ms"],
        "ms",
        command="python benchmarks/attention_forms.py" + (" --cpu" if options.cpu else ""),
        commit=options.commit,
        heads={"query": heads.query, "key": heads.key, "width": heads.width, "dtype": str(heads.dtype)},
        solved=solved,
        shapes=rows,
    )
    keep_record(record, options.out)


if __name__ == "__main__":
    main()
