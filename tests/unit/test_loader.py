"""What goes into which step, on which process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lensmith.data.loader import SAME_IMAGE_SHARE, StepDataset, choose_workers, plan_steps, steps_per_epoch


def scan_of(count: int, groups: int = 10) -> Any:
    """What the loader reads of a scan: arrays only."""
    generator = np.random.default_rng(3)
    group = generator.integers(0, groups, count)
    prefix = np.where(group % 3, 20, 0)
    return SimpleNamespace(
        rows=np.arange(count),
        tokens=prefix + generator.integers(5, 40, count),
        learned=np.full(count, 2),
        prefix_tokens=prefix,
        groups=group,
    )


def dataset_of(scan: Any, plan: Any, **options: Any) -> StepDataset:
    return StepDataset(
        scan,
        plan,
        geometry=None,
        image_token_id=0,
        budget_tokens=200,
        share_prefix=True,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("share_prefix", [True, False])
def test_every_sample_is_seen_once_per_epoch(share_prefix):
    plan = plan_steps(scan_of(103), effective_samples=16, seed=0, epochs=3, share_prefix=share_prefix)
    assert plan.per_epoch == 7
    assert len(plan.steps) == 21
    for epoch in range(3):
        seen = np.concatenate(plan.steps[7 * epoch : 7 * (epoch + 1)])
        assert sorted(seen.tolist()) == list(range(103))


def test_the_order_is_the_seeds_and_differs_between_epochs():
    plans = [plan_steps(scan_of(64), effective_samples=16, seed=seed, epochs=2) for seed in (5, 5, 6)]
    assert all((a == b).all() for a, b in zip(plans[0].steps, plans[1].steps, strict=True))
    assert any((a != b).any() for a, b in zip(plans[0].steps, plans[2].steps, strict=True))
    assert any((a != b).any() for a, b in zip(plans[0].steps[:4], plans[0].steps[4:], strict=True))


def test_a_longer_run_begins_with_the_steps_of_a_shorter_one():
    short = plan_steps(scan_of(50), effective_samples=8, seed=1, epochs=1, steps=5)
    long = plan_steps(scan_of(50), effective_samples=8, seed=1, epochs=1, steps=12)
    assert all((a == b).all() for a, b in zip(short.steps, long.steps[:5], strict=True))


def test_questions_about_one_image_come_together_but_never_fill_a_step():
    scan = scan_of(4000, groups=300)
    plan = plan_steps(scan, effective_samples=32, seed=0, epochs=1)
    most = 0
    pairs = []
    for step in plan.steps[:-1]:
        groups = scan.groups[step][scan.prefix_tokens[step] > 0]
        _, counts = np.unique(groups, return_counts=True)
        pairs.append(counts.mean())
        most = max(most, int(counts.max()))
    assert np.mean(pairs) > 4, "about 13 questions an image, pieces of up to 8"
    assert most <= 2 * 32 // SAME_IMAGE_SHARE


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("together", [True, False])
def test_processes_share_a_step_without_gaps_or_overlap(world, together):
    scan = scan_of(100)
    plan = plan_steps(scan, effective_samples=10, seed=0, epochs=1, world=world)
    shares = [dataset_of(scan, plan, rank=rank, world=world, together=together) for rank in range(world)]
    for step in range(len(plan.steps)):
        members = [np.concatenate(share.members(step)) for share in shares]
        assert all(len(part) for part in members)
        assert sorted(np.concatenate(members).tolist()) == sorted(plan.steps[step].tolist())


def test_what_is_left_of_an_epoch_joins_the_last_step_where_a_process_would_go_without():
    assert steps_per_epoch(101, 10, world=1) == 11
    assert steps_per_epoch(101, 10, world=2) == 10
    plan = plan_steps(scan_of(101), effective_samples=10, seed=0, epochs=1, world=2)
    assert [len(step) for step in plan.steps] == [10] * 9 + [11]


def test_workers_are_what_was_asked_for_else_none_on_a_cpu():
    assert choose_workers(3, gpu=False) == 3
    assert choose_workers(None, gpu=False) == 0
    assert choose_workers(None, gpu=True) >= 1
