"""A pack as a padded batch through the stock forward is worth what it is worth to the engine: loss and every gradient.

transformers takes its loss in fp32 whatever the model's type is, so the two agree to fp32 here and not to float64.
"""

from __future__ import annotations

import pytest
import torch
from tests.reference.test_engine import gradients, join
from torch.testing import assert_close

from lensmith.model.engine import Engine
from lensmith.model.stock import stock_batch, stock_logprob
from lensmith.types import IGNORE, Pack, Segment

pytestmark = pytest.mark.usefixtures("float64_modules")


@pytest.fixture
def pack_of(build_sample):
    samples = [
        build_sample(images=[(2, 3), (4, 2)], text=[5, 4, 9], learned=6, seed=1),
        build_sample(images=[], text=[17], learned=8, seed=2),
        build_sample(images=[(3, 5)], text=[3, 12], learned=5, seed=3),
    ]
    return lambda model: join(model, samples, [(n, 0, None) for n in range(len(samples))])


def test_a_padded_batch_has_the_loss_and_the_gradients_of_the_pack(build_tiny, pack_of):
    model = build_tiny(cls=Engine)
    pack = pack_of(model)
    expected = model(pack=pack).sum()
    expected.backward()
    ours = gradients(model)
    found = stock_logprob(model, pack)
    found.backward()
    assert_close(found.double(), expected, rtol=1e-6, atol=0)
    theirs = gradients(model)
    assert theirs.keys() == ours.keys()
    for name, grad in ours.items():
        assert float((theirs[name] - grad).norm() / grad.norm()) < 1e-6, name


def test_padding_is_masked_not_learned_and_no_picture(build_tiny, pack_of):
    model = build_tiny(cls=Engine)
    pack = pack_of(model)
    batch = stock_batch(pack, model.config)
    assert batch["input_ids"].shape == (3, max(segment.length for segment in pack.segments))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORE).all()
    assert (batch["mm_token_type_ids"][padding] == 0).all()
    assert torch.equal(batch["input_ids"][~padding], pack.input_ids)
    assert torch.equal(batch["pixel_values"], pack.pixels)


def test_images_and_moments_of_videos_go_their_own_ways(build_tiny):
    config = build_tiny().config
    picture, moment = config.image_token_id, config.video_token_id
    ids = torch.tensor([5, moment, moment, 6, picture, 7, moment, 8])
    pack = Pack(
        input_ids=ids,
        labels=torch.where(ids == 8, ids, IGNORE),
        positions=torch.zeros(4, 8, dtype=torch.long),
        segments=(Segment(0, 8),),
        pixels=torch.arange(16.0)[:, None],
        grids=torch.tensor([[1, 2, 4], [1, 2, 2], [1, 2, 2]]),
        wheres=("row",),
    )
    batch = stock_batch(pack, config)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert batch["pixel_values"].flatten().tolist() == [8, 9, 10, 11]
    assert batch["video_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2]]
    assert batch["pixel_values_videos"].flatten().tolist() == [*range(8), 12, 13, 14, 15]
    assert batch["mm_token_type_ids"].tolist() == [[0, 2, 2, 0, 1, 0, 2, 0]]


def test_a_shared_prefix_has_no_row_of_its_own(build_tiny):
    config = build_tiny().config
    ids = torch.arange(6)
    pack = Pack(
        ids,
        ids,
        torch.zeros(4, 6, dtype=torch.long),
        (Segment(0, 2), Segment(2, 2, 0), Segment(4, 2, 0)),
        torch.empty(0, 1536),
        torch.empty(0, 3, dtype=torch.long),
        ("a", "b"),
    )
    with pytest.raises(ValueError, match="share a prefix"):
        stock_batch(pack, config)
