"""Two halves of a pack hold its samples, each with its own prefix and pictures, and train as the whole pack does."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lensmith.data.pack import sample_tokens, split_pack
from lensmith.model.engine import Engine
from lensmith.types import IGNORE, Pack, Segment

pytestmark = pytest.mark.usefixtures("float64_modules")

IMAGE, VIDEO = 290, 291
MERGED = 4
"""Patches per token."""


def lay(*segments: tuple[int | None, list[int], int], learned: int = 2) -> Pack:
    """A pack from (parent, tokens of each picture, words behind them); pixels are numbered by patch, words by place."""
    ids, labels, places, laid, counts = [], [], [], [], []
    for parent, pictures, words in segments:
        row = [token for tokens in pictures for token in [292, *[IMAGE] * tokens, 293]] + [7 + n for n in range(words)]
        before = 0 if parent is None else laid[parent].length
        laid.append(Segment(len(ids), len(row), parent))
        labels += [IGNORE] * (len(row) - learned) + row[len(row) - learned :]
        places += range(before, before + len(row))
        ids += row
        counts += pictures
    num_patches = MERGED * sum(counts)
    prefixes = {segment.parent for segment in laid}
    return Pack(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        positions=torch.tensor(places).expand(4, -1),
        segments=tuple(laid),
        pixels=torch.linspace(-1, 1, num_patches * 1536, dtype=torch.float64).view(num_patches, 1536),
        grids=torch.tensor([(1, 2, 2 * count) for count in counts], dtype=torch.int64).reshape(-1, 3),
        wheres=tuple(f"rows.jsonl:{n}" for n in range(len(laid)) if n not in prefixes),
    )


def split(pack: Pack) -> tuple[Pack, Pack]:
    halves = split_pack(pack, picture_ids=(IMAGE, VIDEO))
    assert halves is not None
    return halves


def test_a_single_sample_is_not_split():
    assert split_pack(lay((None, [3], 5)), picture_ids=(IMAGE,)) is None


def test_halves_are_about_equal_and_keep_the_order():
    pack = lay((None, [], 9), (None, [], 3), (None, [], 4), (None, [], 5))
    left, right = split(pack)
    assert (left.wheres, right.wheres) == (pack.wheres[:1], pack.wheres[1:])
    assert (left.num_tokens, right.num_tokens) == (9, 12)
    assert right.segments == (Segment(0, 3), Segment(3, 4), Segment(7, 5))
    assert torch.equal(torch.cat([left.input_ids, right.input_ids]), pack.input_ids)
    assert torch.equal(torch.cat([left.labels, right.labels]), pack.labels)
    assert torch.equal(torch.cat([left.positions, right.positions], 1), pack.positions)


def test_pictures_go_with_their_samples():
    pack = lay((None, [2, 1], 4), (None, [], 3), (None, [5], 4))
    left, right = split(pack)
    assert left.grids.tolist() == [[1, 2, 4], [1, 2, 2]]
    assert right.grids.tolist() == [[1, 2, 10]]
    assert torch.equal(torch.cat([left.pixels, right.pixels]), pack.pixels)


def test_frames_of_a_video_are_pictures_too():
    pack = lay((None, [2], 4), (None, [5], 4))
    pack.input_ids[pack.segments[1].start + 1 : pack.segments[1].start + 6] = VIDEO
    left, right = split(pack)
    assert (len(left.pixels), len(right.pixels)) == (8, 20)


def test_without_pictures_nothing_is_missed():
    left, right = split(lay((None, [], 5), (None, [], 5)))
    assert left.pixels.shape == right.pixels.shape == (0, 1536)
    assert left.grids.shape == right.grids.shape == (0, 3)


def test_a_shared_prefix_goes_with_its_branches():
    pack = lay((None, [6], 2), (0, [], 3), (0, [], 4), (None, [2], 9))
    left, right = split(pack)
    assert left.segments == (Segment(0, 10), Segment(10, 3, 0), Segment(13, 4, 0))
    assert right.segments == (Segment(0, 13),)
    assert sample_tokens(pack) == [13, 14, 13]


def test_a_prefix_is_repeated_where_its_only_group_is_cut():
    pack = lay((None, [6], 2), (0, [], 8), (0, [], 8), (0, [], 8), (0, [], 8))
    left, right = split(pack)
    assert left.segments == right.segments == (Segment(0, 10), Segment(10, 8, 0), Segment(18, 8, 0))
    assert torch.equal(left.pixels, pack.pixels)
    assert torch.equal(right.pixels, pack.pixels)


def test_splitting_again_and_again_ends_with_single_samples():
    waiting, single = [lay((None, [6], 2), (0, [], 8), (0, [], 3), (None, [1, 2], 8), (None, [], 8))], []
    while waiting:
        halves = split_pack(pack := waiting.pop(0), picture_ids=(IMAGE,))
        waiting[:0] = halves or ()
        single += [] if halves else [pack]
    assert [pack.wheres for pack in single] == [
        ("rows.jsonl:1",),
        ("rows.jsonl:2",),
        ("rows.jsonl:3",),
        ("rows.jsonl:4",),
    ]
    assert [sample_tokens(pack) for pack in single] == [[18], [13], [15], [8]]


def test_the_halves_have_the_loss_and_the_gradient_of_the_whole(build_tiny):
    pack = lay((None, [6], 2), (0, [], 8), (0, [], 5), (0, [], 7), (None, [2, 4], 9), (None, [], 6))
    pack.labels[: pack.segments[0].stop] = IGNORE  # nothing in a prefix is learned
    model = build_tiny(cls=Engine)

    def gradients(*packs: Pack) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        losses = [-model(pack=part).sum() for part in packs]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum().detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    loss, whole = gradients(pack)
    halved_loss, halved = gradients(*split(pack))
    assert_close(halved_loss, loss)
    assert halved.keys() == whole.keys()
    for name, gradient in whole.items():
        assert_close(halved[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
