"""A made-up pack is the pack that the planner reckons with, and a shared prompt in it changes no number."""

from __future__ import annotations

import pytest
import torch

from lensmith.data.images import read_geometry
from lensmith.errors import ConfigError
from lensmith.model.attention import segment_runs
from lensmith.model.load import load_processor
from lensmith.plan.work import Rollout, Work, group_work, shared_work
from lensmith.train.measure import make_pack
from lensmith.types import IGNORE, Pack

GROUPED = {"tokens": 1200, "images": 4, "image_tokens": 30, "learned": 320, "samples": 8}


@pytest.fixture(scope="module")
def geometry():
    return read_geometry(load_processor("lensmith/tiny"))


@pytest.fixture(scope="module")
def tiny():
    from lensmith.config.tree import RunConfig
    from lensmith.model.load import load_model

    return load_model(RunConfig.model_validate({"precision": "fp32"})).model


def pairs(pack: Pack) -> float:
    """Query-key pairs of causal attention, half of one's own counted."""
    return sum(run.length * (run.num_keys - run.length) + run.length**2 / 2 for run in segment_runs(pack.segments))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_a_made_up_pack_has_the_numbers_that_were_asked_for(geometry, tiny, group):
    pack = make_pack(geometry, tiny.config, **GROUPED, group=group)
    work = Work(1200, 320, samples=8, images=4, image_tokens=120)
    work = shared_work(work, prefixes=8 // group) if group > 1 else work
    assert pack.num_tokens == work.tokens
    assert int((pack.labels != IGNORE).sum()) == work.learned
    assert (pack.num_samples, len(pack.grids)) == (work.samples, work.images)
    assert int((pack.input_ids == tiny.config.image_token_id).sum()) == work.image_tokens
    assert work.group == group
    runs = segment_runs(pack.segments)
    assert sum(run.num_keys for run in runs) == (work.key_tokens or work.tokens)
    # Half of the eight samples have a picture, so not all are equally long where each is a sample of its own.
    assert work.pairs == pytest.approx(pairs(pack), rel=0.1 if group == 1 else 1e-9)


def test_a_planned_group_is_the_pack_of_its_prompt_and_completions(geometry, tiny):
    rollout = Rollout(group=4, completion_tokens=50, prompt_tokens=100)
    work = group_work(rollout, images=1, image_tokens=60, budget_tokens=4096, effective_samples=4)
    pack = make_pack(
        geometry, tiny.config, tokens=work.tokens, images=1, image_tokens=60, learned=work.learned, samples=4, group=4
    )
    assert [segment.length for segment in pack.segments] == [100, 50, 50, 50, 50]
    assert [segment.parent for segment in pack.segments] == [None, 0, 0, 0, 0]
    assert pairs(pack) == pytest.approx(work.pairs)


def test_completions_behind_a_shared_prompt_have_the_logprobs_of_whole_samples(geometry, tiny):
    tiny.eval()
    shared = make_pack(geometry, tiny.config, **GROUPED, group=4)
    with torch.no_grad():
        found = tiny(pack=shared)
        for number, (prefix, branch) in enumerate(
            (shared.segments[branch.parent], branch) for branch in shared.segments if branch.parent is not None
        ):
            rows = torch.cat([torch.arange(prefix.start, prefix.stop), torch.arange(branch.start, branch.stop)])
            alone = Pack(
                shared.input_ids[rows],
                shared.labels[rows],
                shared.positions[:, rows],
                (type(branch)(0, len(rows)),),
                shared.pixels.chunk(2)[number // 4],
                shared.grids.chunk(2)[number // 4],
                ("alone",),
            )
            # fp32 on both sides, other kernels for other lengths
            torch.testing.assert_close(tiny(pack=alone), found[number * 40 : number * 40 + 40], rtol=1e-4, atol=1e-4)
    assert len(found) == 320


def test_what_does_not_fit_is_said(geometry, tiny):
    with pytest.raises(ConfigError, match=r"8 samples are no whole number of groups of 3\. Give a multiple"):
        make_pack(geometry, tiny.config, **GROUPED, group=3)
    with pytest.raises(ConfigError, match=r"4 images of 300 tokens and 320 learned tokens do not fit 1200 tokens"):
        make_pack(geometry, tiny.config, **{**GROUPED, "image_tokens": 300})
