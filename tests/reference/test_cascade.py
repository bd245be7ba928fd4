"""Attention in two parts is attention: result and all three gradients, over random prefixes and branches, in float64.

The other side is the padded form under torch's own autograd, which test_engine.py compares with transformers. In
float64 on a CPU each part goes through plain products; merging, backward and sums are those around the flash kernels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lensmith.model.attention import (
    Padded,
    attend,
    attend_backward,
    attend_by_hand,
    build_layout,
    kept_runs,
    segment_runs,
)
from lensmith.model.cascade import (
    ASKED_US,
    COPIED_US,
    FIXED_US,
    Cascade,
    _merge,
    count_shared,
    prefers_cascade,
)
from lensmith.model.flash import Run, plain_forward
from lensmith.types import Segment

CPU = {"device": torch.device("cpu"), "dtype": torch.float64}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SCALE = 0.3
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def lay(groups: Sequence[tuple[int, Sequence[int]]]) -> list[Segment]:
    """Of each group the prefix's length and its branches'; without branches a sample of its own."""
    segments: list[Segment] = []
    for prefix, branches in groups:
        parent, start = len(segments), segments[-1].stop if segments else 0
        segments.append(Segment(start, prefix))
        for length in branches:
            segments.append(Segment(segments[-1].stop, length, parent))
    return segments


def draw(segments: Sequence[Segment], queries: int, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> list[Any]:
    """Query, key, value and the result's gradient."""
    generator = torch.Generator().manual_seed(seed)
    rows = segments[-1].stop
    shapes = (queries, heads), (rows, kv_heads), (rows, kv_heads), (queries, heads)
    return [torch.randn(*shape, 8, generator=generator, dtype=torch.float64) for shape in shapes]


def both_ways(runs: Sequence[Run], inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> None:
    """The padded form's numbers from the two parts, as a step of the graph and by hand."""
    rows = len(inputs[1])
    padded = build_layout(runs, num_keys=rows, causal=True, form="concatenated", **CPU)
    layout = build_layout(runs, num_keys=rows, causal=True, form="cascade", **CPU)
    assert isinstance(padded, Padded)
    assert isinstance(layout, Cascade)
    leaves = [part.clone().requires_grad_() for part in inputs]
    expected = attend(leaves[0], leaves[1], leaves[2], padded, SCALE)
    wanted = torch.autograd.grad(expected, leaves, grad)
    ours = attend(leaves[0], leaves[1], leaves[2], layout, SCALE)
    assert_close(ours, expected, **EXACT)
    assert_close(torch.autograd.grad(ours, leaves, grad), wanted, **EXACT)
    kept = [part.clone() for part in inputs]
    by_hand, attended = attend_by_hand(kept[0], kept[1], kept[2], layout, SCALE, keeps=True)
    assert attended is not None
    assert_close(by_hand, expected.detach(), **EXACT)
    assert_close(attend_backward(grad, attended), wanted, **EXACT)
    assert_close(kept, list(inputs), rtol=0, atol=0)
    assert attend_by_hand(kept[0], kept[1], kept[2], layout, SCALE, keeps=False)[1] is None


TREES = {
    "one group": [(9, [4, 1, 6])],
    "groups and samples between them": [(5, []), (7, [3, 2]), (1, []), (4, [1]), (6, [5, 2, 2])],
    "groups side by side": [(7, [3, 2]), (4, [1, 6])],
    "single tokens": [(1, [1, 1]), (1, []), (1, [1])],
}


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
@pytest.mark.parametrize("name", TREES)
def test_two_parts_are_the_padded_form(name, heads):
    segments = lay(TREES[name])
    *inputs, grad = draw(segments, segments[-1].stop, *heads)
    both_ways(segment_runs(segments), inputs, grad)


@pytest.mark.parametrize("seed", range(8))
def test_any_prefixes_and_branches_and_any_kept_rows_are_the_padded_form(seed):
    random = np.random.default_rng(seed)
    groups = [(int(p), random.integers(1, 9, random.integers(0, 5)).tolist()) for p in random.integers(1, 12, 4)]
    segments = lay([*groups, (3, [2])])
    rows = segments[-1].stop
    *inputs, grad = draw(segments, rows, seed=seed)
    both_ways(segment_runs(segments), inputs, grad)
    kept = np.union1d(np.flatnonzero(random.random(rows) < random.choice([0.2, 0.8])), [rows - 1])
    query, *_, grad = draw(segments, len(kept), seed=seed)
    both_ways(kept_runs(segments, kept), [query, *inputs[1:]], grad)


def test_rows_that_predict_an_answer_are_the_padded_form():
    """As in the last layer: the prefix's last row, and of each branch all rows but its last."""
    segments = lay([(8, [4, 1, 5]), (6, [3, 3])])
    last = [segment.stop - 1 for segment in segments if segment.parent is not None]
    inside = [row for s in segments for row in range(s.start if s.parent is not None else s.stop - 1, s.stop)]
    kept = np.setdiff1d(inside, last)
    *inputs, grad = draw(segments, len(kept))
    both_ways(kept_runs(segments, kept), inputs, grad)


def test_in_16_bits_the_merged_result_is_rounded_once():
    segments = lay([(40, [9, 30, 20])])
    *inputs, _ = draw(segments, segments[-1].stop)
    rounded = [part.bfloat16() for part in inputs]
    forms = {}
    for name, parts in (("exact", [part.double() for part in rounded]), ("rounded", rounded)):
        options = {"num_keys": segments[-1].stop, "causal": True, "form": "cascade", "device": CPU["device"]}
        layout = build_layout(segment_runs(segments), dtype=parts[0].dtype, **options)
        forms[name] = attend(parts[0], parts[1], parts[2], layout, SCALE).double()
    # Two parts of bf16 and their sum, each rounded: less than two roundings of the larger part.
    assert (
        float((forms["rounded"] - forms["exact"]).norm() / forms["exact"].norm()) < torch.finfo(torch.bfloat16).eps / 2
    )


def test_merging_by_autograd_without_the_log_sum_exps_gradient_is_right_and_its_gradients_are_wrong():
    """What flash kernels do with it: drop it. The reason why the backward pass is written by hand."""
    segments = lay([(9, [4, 6])])
    runs = segment_runs(segments)
    *inputs, grad = draw(segments, segments[-1].stop)
    layout = build_layout(runs, num_keys=segments[-1].stop, causal=True, form="cascade", **CPU)
    assert isinstance(layout, Cascade)
    query, key, value = leaves = [part.requires_grad_() for part in inputs]
    out, lse, _ = plain_forward(query, key, value, layout.own.spans, SCALE)
    parts = query[layout.asking], key[layout.prefixes], value[layout.prefixes]
    shared, shared_lse, _ = plain_forward(*parts, layout.shared, SCALE)
    merged = out.clone()
    _merge(merged, lse.detach(), shared, shared_lse.detach(), layout.asking)
    ours = attend(query, key, value, layout, SCALE)
    assert_close(merged, ours, **EXACT)
    right, wrong = (torch.autograd.grad(result, leaves, grad) for result in (ours, merged))
    assert_close(wrong[2], right[2], **EXACT)
    for ours, theirs in zip(right[:2], wrong[:2], strict=True):
        assert float((theirs - ours).norm() / ours.norm()) > 0.1


def test_only_one_level_of_prefixes_is_taken_in_two_parts():
    deep = [Segment(0, 4), Segment(4, 3, 0), Segment(7, 2, 1)]
    for segments in (deep, lay([(4, []), (3, [])])):
        runs = segment_runs(segments)
        layout = build_layout(runs, num_keys=segments[-1].stop, causal=True, form="cascade", **CPU)
        assert isinstance(layout, Padded)
    runs = segment_runs(lay([(4000, [2] * 40)]))
    assert prefers_cascade(runs)
    # Without the kernels nothing is gained.
    assert isinstance(build_layout(runs, num_keys=4080, causal=True, **CPU), Padded)


def measured() -> dict[str, Any]:
    return json.loads((RESULTS / "attention-forms.json").read_text(encoding="utf-8"))


def test_the_form_that_is_preferred_was_the_quicker_one_or_within_a_twentieth():
    shapes = measured()["shapes"]
    assert len(shapes) > 30
    for shape in shapes:
        tokens, branches, groups = (shape[name] for name in ("asking", "branches", "groups"))
        lengths = [tokens // (branches * groups) + (n < tokens % (branches * groups)) for n in range(branches * groups)]
        runs = segment_runs(lay([(shape["prefix"], lengths[n::groups]) for n in range(groups)]))
        assert count_shared(runs) == (shape["copied"], tokens)
        taken = shape["cascade" if prefers_cascade(runs) else "concatenated"]["ms"]
        assert taken <= 1.05 * min(shape[form]["ms"] for form in ("cascade", "concatenated")), shape


def test_the_constants_are_those_that_were_solved():
    assert measured()["solved"] == {"copied_us": COPIED_US, "asked_us": ASKED_US, "fixed_us": FIXED_US}


def test_samples_without_company_are_never_taken_in_two_parts():
    assert not prefers_cascade(segment_runs(lay([(5000, []), (3000, [])])))
