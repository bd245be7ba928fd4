"""On a GPU in bf16 attention in two parts is as close to float64 as over concatenated keys, and copies no prefix."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from test_engine_gpu import relative, samples, wide_config  # noqa: F401
from test_layer_gpu import adapted, run, with_branches

from lensmith.model import engine as engine_module
from lensmith.model.attention import (
    Form,
    Padded,
    attend,
    attend_backward,
    attend_by_hand,
    build_layout,
    kept_runs,
    segment_runs,
)
from lensmith.model.cascade import Cascade
from lensmith.model.engine import Engine
from lensmith.model.flash import Run, Varlen
from lensmith.types import Segment

GPU = torch.device("cuda", 0)
FORMS: dict[Form, type] = {"concatenated": Varlen, "cascade": Cascade}

TWICE = 1.5
"""Error in two parts over that of concatenated keys. Each part is rounded to bf16, and so is their sum: two roundings
of one size are 1.41 times the error of one, and the rest is chance."""
NOT_WORSE = 1.15
"""The same for a whole model's gradients and log-probabilities, where attention's last digit is one of many."""

ONE_GROUP = [Segment(0, 935), *(Segment(935 + 200 * n, 200, 0) for n in range(8))]
GROUPS = [
    Segment(0, 300),
    Segment(300, 70, 0),
    Segment(370, 1, 0),
    Segment(371, 129, None),
    Segment(500, 257),
    Segment(757, 5, 4),
    Segment(762, 140, 4),
]
"""Two prefixes with a sample between them, one branch of a single token."""
FEW = np.array([299, 310, 311, 400, 756, 901])
"""Of GROUPS: a prefix's last row, rows within a branch, of a sample, and single rows."""
ONE_QUERY = [Run(300, ((0, 300),)), Run(1, ((0, 300), (300, 340)))]
"""The one branch asks with a single row, where the kernel has a form of its own."""

CASES: dict[str, list[Run]] = {
    "one group": segment_runs(ONE_GROUP),
    "groups and a sample": segment_runs(GROUPS),
    "kept rows": kept_runs(GROUPS, FEW),
    "one query": ONE_QUERY,
}


def draw_case(runs: list[Run], heads: int, kv_heads: int) -> tuple[list[torch.Tensor], torch.Tensor, int]:
    """Query, key, value; the result's gradient; how many rows of keys there are."""
    rows, queries = max(span[1] for run in runs for span in run.keys), sum(run.length for run in runs)
    generator = torch.Generator(GPU).manual_seed(0)
    shapes = (queries, heads), (rows, kv_heads), (rows, kv_heads), (queries, heads)
    *inputs, grad = (torch.randn(*shape, 128, generator=generator, device=GPU).bfloat16() for shape in shapes)
    return inputs, grad, rows


def by_hand(inputs: list[torch.Tensor], grad: torch.Tensor, layout: Any) -> list[torch.Tensor]:
    out, attended = attend_by_hand(inputs[0], inputs[1], inputs[2], layout, 128**-0.5, keeps=True)
    assert attended is not None
    return [out, *attend_backward(grad, attended)]


@pytest.mark.parametrize("heads", [(32, 8), (6, 3)])
@pytest.mark.parametrize("name", CASES)
def test_two_parts_are_as_close_to_float64_as_concatenated_keys(name, heads):
    runs = CASES[name]
    inputs, grad, rows = draw_case(runs, *heads)
    build = functools.partial(build_layout, runs, num_keys=rows, causal=True, device=GPU)
    exact = build(dtype=torch.float64)
    assert isinstance(exact, Padded)
    truth = by_hand([part.double() for part in inputs], grad.double(), exact)
    found = {}
    for form, kind in FORMS.items():
        layout = build(dtype=torch.bfloat16, form=form)
        assert isinstance(layout, kind)
        found[form] = by_hand(inputs, grad, layout)
        leaves = [part.clone().requires_grad_() for part in inputs]
        out = attend(leaves[0], leaves[1], leaves[2], layout, 128**-0.5)
        as_step = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
        assert max(map(off, as_step, truth)) < 2 * max(map(off, found[form], truth)), "as a step of torch's graph"
    for number, what in enumerate(("result", "query", "key", "value")):
        one, two = (off(found[form][number], truth[number]) for form in FORMS)
        print(f"{name}, heads {heads}, {what}: error concatenated {one:.2e}, in two parts {two:.2e}: {two / one:.2f}")
        assert two <= TWICE * one


def off(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((ours.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("recompute", ["none", "layers"])
def test_a_model_is_as_close_to_fp32_in_either_form(wide_config, samples, monkeypatch, recompute):  # noqa: F811
    """Fused layers and the last one, whose rows are few. Over several draws of weights, as in test_layer_gpu.py."""
    squares = {form: [0.0, 0.0] for form in FORMS}
    for seed in range(4):
        models = {}
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(seed)
            model: Any = Engine(wide_config)
            models[dtype] = model.to(GPU, dtype), adapted(model)
            model.recompute = recompute
        exact, truth = models[torch.float32]
        pack = with_branches(exact, samples[3], cut=500)
        logprobs, wanted = run(truth, pack)
        for form, kind in FORMS.items():
            monkeypatch.setattr(engine_module, "build_layout", functools.partial(build_layout, form=form))
            model, tuned = models[torch.bfloat16]
            route = model._route(pack)
            assert isinstance(route.layout, kind)
            assert isinstance(route.last_layout, kind)
            found, ours = run(tuned, pack)
            squares[form][0] += relative(ours, wanted) ** 2
            squares[form][1] += float((found - logprobs).square().mean())
        monkeypatch.undo()
    for number, what in enumerate(("gradient error", "log-probability rms")):
        one, two = (squares[form][number] ** 0.5 for form in FORMS)
        print(f"{what}, recompute {recompute}: concatenated {one:.4f}, in two parts {two:.4f}")
        assert two <= NOT_WORSE * one


def test_a_long_prefix_is_not_copied():
    segments = [Segment(0, 2500), *(Segment(2500 + 64 * n, 64, 0) for n in range(16))]
    runs = segment_runs(segments)
    inputs, grad, rows = draw_case(runs, 32, 8)
    peaks = {}
    for form in FORMS:
        layout = build_layout(runs, num_keys=rows, causal=True, device=GPU, dtype=torch.bfloat16, form=form)
        by_hand(inputs, grad, layout)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        by_hand(inputs, grad, layout)
        peaks[form] = (torch.cuda.max_memory_allocated() - before) / 2**20
    print(
        f"peak of one layer's attention: concatenated {peaks['concatenated']:.0f} MiB, two parts {peaks['cascade']:.0f}"
    )
    # By shapes: 43,524 rows of keys, four tensors of 2 KiB and two of 8 KiB each in the backward pass, about 1,100 MiB
    # with what both have; in two parts 3,524 rows and then 2,500, about 250.
    assert peaks["cascade"] < 0.4 * peaks["concatenated"]
    measured = build_layout(runs, num_keys=rows, causal=True, device=GPU, dtype=torch.bfloat16)
    assert isinstance(measured, Cascade)
