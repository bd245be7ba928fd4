"""Reference tests 4 and 5, from encoded samples on: what `pack_samples` lays out trains as the samples one by one do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lensmith.data.pack import pack_samples, plan_packs
from lensmith.model.engine import Engine
from lensmith.types import IGNORE, Encoded, ImageRef, ImageSize, Segment, VisionGeometry

pytestmark = pytest.mark.usefixtures("float64_modules")

GEOMETRY = VisionGeometry(16, 2, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), min_tokens=1)
IMAGE_ID = 290


def encoded(sample: dict[str, Any], name: str, pictures: str | None = None) -> Encoded:
    """The sample as the encoder would hand it on; its pixels are found again by their key."""
    grids = sample["image_grid_thw"]
    sizes = [(int(h) * 16, int(w) * 16) for _, h, w in (grids.tolist() if grids is not None else [])]
    images = tuple(
        ImageSize(ImageRef("", f"{pictures or name}/{n}"), size, size, size[0] * size[1] // 1024)
        for n, size in enumerate(sizes)
    )
    ids = sample["input_ids"].numpy()
    prefix = int(np.flatnonzero(ids == IMAGE_ID)[-1]) + 2 if images else 0
    return Encoded(name, ids, sample["labels"].numpy(), images, prefix)


def reader(samples: dict[str, dict[str, Any]]):
    def read(image: ImageSize, geometry: VisionGeometry) -> torch.Tensor:
        name, number = image.ref.key.split("/")
        counts = samples[name]["image_grid_thw"].prod(-1).tolist()
        return samples[name]["pixel_values"].split(counts)[int(number)]

    return read


@pytest.fixture
def samples(build_sample):
    return {
        "two": build_sample(images=[(2, 3), (4, 2)], text=[5, 4, 9], learned=6, seed=1),
        "none": build_sample(images=[], text=[17], learned=8, seed=2),
        "one": build_sample(images=[(3, 5)], text=[3, 12], learned=5, seed=3),
    }


def with_other_question(sample: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    prefix = int((sample["input_ids"] == IMAGE_ID).nonzero()[-1]) + 2
    return {
        **sample,
        "input_ids": torch.cat([sample["input_ids"][:prefix], other["input_ids"]]),
        "labels": torch.cat([torch.full((prefix,), IGNORE), other["labels"]]),
        "mm_token_type_ids": torch.cat([sample["mm_token_type_ids"][:prefix], other["mm_token_type_ids"]]),
    }


def loss_and_gradients(model, nats, tokens):
    loss = nats / tokens
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def assert_trains_the_same(model, pack, samples, stock_loss):
    expected, theirs = loss_and_gradients(model, stock_loss(model, samples), 1)
    logprobs = model(pack=pack)
    loss, ours = loss_and_gradients(model, -logprobs.sum(), len(logprobs))
    assert_close(loss, expected)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert_close(ours[name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_a_pack_trains_as_its_samples_one_by_one(build_tiny, samples, stock_loss):
    rows = [encoded(sample, name) for name, sample in samples.items()]
    pack = pack_samples(rows, GEOMETRY, image_token_id=IMAGE_ID, read=reader(samples))
    assert pack.segments == (Segment(0, 36), Segment(36, 17), Segment(53, 32))
    assert_trains_the_same(build_tiny(cls=Engine), pack, list(samples.values()), stock_loss)


def test_questions_about_the_same_images_share_them_exactly(build_tiny, build_sample, samples, stock_loss):
    for number, (name, length, learned) in enumerate([("two", 7, 2), ("one", 4, 4), ("two", 12, 5)]):
        other = build_sample(images=[], text=[length], learned=learned, seed=20 + number)
        samples[f"{name}-{number}"] = with_other_question(samples[name], other)
    rows = [encoded(sample, name, name.split("-")[0]) for name, sample in samples.items()]
    pack = pack_samples(rows, GEOMETRY, image_token_id=IMAGE_ID, read=reader(samples))
    assert sum(segment.parent is not None for segment in pack.segments) == 5
    assert len(pack.grids) == 3
    assert (
        pack.num_tokens
        == sum(map(len, (row.input_ids for row in rows))) - 2 * rows[0].prefix_tokens - rows[2].prefix_tokens
    )
    assert_trains_the_same(build_tiny(cls=Engine), pack, list(samples.values()), stock_loss)


def test_equal_words_before_different_pictures_share_nothing(samples):
    rows = [encoded(samples["one"], "one"), encoded(samples["one"], "twin")]
    pack = pack_samples(rows, GEOMETRY, image_token_id=IMAGE_ID, read=reader({**samples, "twin": samples["one"]}))
    assert [segment.parent for segment in pack.segments] == [None, None]
    assert len(pack.grids) == 2


@pytest.mark.parametrize("share_prefix", [True, False])
def test_plans_hold_every_sample_once_and_stay_under_the_budget(share_prefix):
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 60, 400)
    prefix = np.array([0, 12, 30, 45])[groups % 4]
    tokens = prefix + generator.integers(3, 50, 400)
    packs = plan_packs(tokens, prefix, groups, budget_tokens=256, share_prefix=share_prefix)
    assert sorted(np.concatenate(packs).tolist()) == list(range(400))
    for pack in packs:
        total = int(tokens[pack].sum())
        if share_prefix:
            for group in set(groups[pack].tolist()):
                members = pack[groups[pack] == group]
                total -= int(prefix[members[0]]) * (len(members) - 1)
        assert total <= 256
    filled = tokens.sum() / (256 * len(packs))
    assert filled > (0.9 if not share_prefix else 1.0), (
        "sharing lays more than the budget's worth of samples into a pack"
    )


def test_padded_packs_hold_their_rows_with_the_padding():
    tokens = np.array([3000, *[200] * 32, 700, 650])
    packs = plan_packs(tokens, np.zeros(35, int), np.arange(35), budget_tokens=8192, padded=True)
    assert sorted(np.concatenate(packs)) == list(range(35))
    assert max(len(pack) * tokens[pack].max() for pack in packs) <= 8192
    assert len(packs) == 3
    # A row over the budget still has a pack of its own.
    assert min(map(len, plan_packs(tokens, np.zeros(35, int), np.arange(35), budget_tokens=2000, padded=True))) == 1
