"""Kept features are the computed ones bit for bit, distinct pictures go through the tower once, groups change nothing."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lensmith.config.tree import Memory, Tune
from lensmith.data.pack import digest_pixels, pack_samples, split_pack
from lensmith.errors import ConfigError
from lensmith.model.adapters import prepare_trainable
from lensmith.model.engine import Engine
from lensmith.model.features import ABANDONED_S, GIB, PAGE_TOKENS, DiskStore, RamStore, image_features, open_features
from lensmith.model.vision import encode_images
from lensmith.types import IGNORE, Encoded, ImageRef, ImageSize, Pack, Segment, VisionGeometry

GEOMETRY = VisionGeometry(16, 2, 2, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), min_tokens=1)
IMAGE_ID = 290
CPU = torch.device("cpu")
SIZES = {"a": (2, 3), "b": (4, 2), "c": (3, 5), "d": (1, 1)}
"""Height and width in tokens of four pictures."""


def picture(name: str) -> torch.Tensor:
    height, width = SIZES[name]
    generator = torch.Generator().manual_seed(ord(name))
    return torch.randn(4 * height * width, 1536, generator=generator, dtype=torch.float64)


def pack_of(names: str, dtype: torch.dtype = torch.float64, *, digests: bool = True) -> Pack:
    """One sample per picture: the picture, then five words of which three are learned."""
    ids, labels, segments, places = [], [], [], []
    for name in names:
        tokens = SIZES[name][0] * SIZES[name][1]
        row = [292, *[IMAGE_ID] * tokens, 293, *range(10 + ord(name) % 7, 15 + ord(name) % 7)]
        segments.append(Segment(len(ids), len(row)))
        ids += row
        labels += [IGNORE] * (len(row) - 3) + row[-3:]
        places += range(len(row))
    return Pack(
        input_ids=torch.tensor(ids),
        labels=torch.tensor(labels),
        positions=torch.tensor(places).expand(4, -1),
        segments=tuple(segments),
        pixels=torch.cat([picture(name) for name in names]).to(dtype),
        grids=torch.tensor([(1, 2 * SIZES[name][0], 2 * SIZES[name][1]) for name in names]),
        wheres=tuple(names),
        pictures=tuple(f"digest-{name}" for name in names) if digests else (),
    )


class Counted:
    """How many patches went through a tower, by a hook on the real one."""

    def __init__(self, tower: Any) -> None:
        self.patches: list[int] = []
        tower.blocks[0].norm1.register_forward_pre_hook(lambda _, inputs: self.patches.append(len(inputs[0])))


def levels(features: Any) -> torch.Tensor:
    return torch.stack([features.tokens, *features.deepstack])


def encoded(tower: Any, pack: Pack) -> torch.Tensor:
    return levels(encode_images(tower, pack.pixels, pack.grids))


@pytest.fixture
def model(build_tiny) -> Any:
    return build_tiny(cls=Engine).requires_grad_(False)


@pytest.fixture(params=["ram", "disk"])
def build_store(request, tmp_path):
    """`build_store(tower, pages=1000)`: with room for so many pages of the tiny model's float64 features."""

    def build(tower: Any, pages: int = 1000, dtype: torch.dtype = torch.float64) -> Any:
        budget_bytes = pages * PAGE_TOKENS * 4 * 64 * dtype.itemsize
        return RamStore(budget_bytes) if request.param == "ram" else DiskStore(budget_bytes, tmp_path / "kept", tower)

    return build


def test_without_a_store_features_are_the_towers(model):
    tower, pack = model.model.visual, pack_of("abcd")
    assert torch.equal(levels(image_features(tower, pack, CPU)), encoded(tower, pack))


def test_groups_of_pictures_change_nothing(model):
    tower, pack = model.model.visual, pack_of("abcda")
    counted = Counted(tower)
    grouped = levels(image_features(tower, pack, CPU, tower_patches=60))
    assert counted.patches == [56, 60, 4], "c alone is as large as a group may be; a comes again for nothing"
    assert_close(grouped, encoded(tower, pack))


def test_a_picture_that_repeats_goes_through_the_tower_once(build_tiny):
    model, pack = build_tiny(cls=Engine), pack_of("abab")
    counted = Counted(model.model.visual)

    def gradients(pack: Pack) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        logprobs = model(pack=pack)
        (-logprobs.sum()).backward()
        return logprobs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    once, ours = gradients(pack)
    assert counted.patches == [24 + 32]
    each, theirs = gradients(replace(pack, pictures=()))
    assert counted.patches[1:] == [2 * (24 + 32)]
    assert_close(once, each)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_found_are_those_computed_bit_by_bit(model, build_store, dtype):
    tower = model.to(dtype).model.visual
    store, pack, counted = build_store(tower, dtype=dtype), pack_of("abcd", dtype), Counted(tower)
    computed = levels(image_features(tower, pack, CPU, store))
    found = levels(image_features(tower, pack, CPU, store))
    assert len(counted.patches) == 1
    assert found.dtype is dtype
    assert torch.equal(found, computed)
    assert torch.equal(computed, encoded(tower, pack))
    assert (store.hits, store.misses) == (4, 4)
    assert "4 of 8 pictures found" in store.sentence()


def test_found_and_computed_ones_stand_in_the_order_of_the_pack(model, build_store):
    tower = model.model.visual
    store, counted = build_store(tower), Counted(tower)
    image_features(tower, pack_of("bd"), CPU, store)
    for names in ("dabacb", "cc", "abd"):
        assert_close(levels(image_features(tower, pack_of(names), CPU, store)), encoded(tower, pack_of(names)))
    assert counted.patches[0] == 36
    assert counted.patches[1] == 24 + 60


def test_pictures_without_digests_are_not_kept(model, build_store):
    tower = model.model.visual
    store = build_store(tower)
    image_features(tower, pack_of("ab", digests=False), CPU, store)
    assert store.hits == store.misses == 0


def test_three_steps_end_at_the_same_weights_with_and_without_a_store(build_tiny, build_store):
    def train(kept: bool) -> tuple[list[torch.Tensor], Any]:
        model: Any = prepare_trainable(build_tiny(cls=Engine, dtype=torch.float32), Tune(rank=4), seed=1)
        engine = model.base_model.model
        engine.features = build_store(engine.model.visual, dtype=torch.float32) if kept else None
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(3):
            loss = -model(pack=pack_of("abca", torch.float32)).sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in trained], engine.features

    (computed, _), (kept, store) = train(kept=False), train(kept=True)
    assert all(torch.equal(a, b) for a, b in zip(computed, kept, strict=True))
    assert (store.hits, store.misses) == (6, 3)


def test_what_was_not_used_for_longest_goes_first(model):
    tower, store = model.model.visual, RamStore(2 * PAGE_TOKENS * 4 * 64 * 8)
    for names in ("a", "b", "a", "c"):  # a page each; a is used again before c needs room
        image_features(tower, pack_of(names), CPU, store)
    assert store.get("digest-b", CPU) is None
    assert store.get("digest-a", CPU) is not None
    assert store.get("digest-c", CPU) is not None
    assert store.sentence().endswith("1 had to make room. Raise memory.vision_cache_gib.")


def test_a_picture_larger_than_the_budget_is_computed_each_time(model):
    tower, store, counted = model.model.visual, RamStore(1000), Counted(model.model.visual)
    for _ in range(2):
        assert torch.equal(levels(image_features(tower, pack_of("c"), CPU, store)), encoded(tower, pack_of("c")))
    assert store.hits == 0
    assert len(counted.patches) == 4


def test_pictures_of_several_pages_come_back_whole():
    store = RamStore(10 * PAGE_TOKENS * 4 * 8 * 4)
    for tokens in (1, PAGE_TOKENS, PAGE_TOKENS + 1, 5 * PAGE_TOKENS - 1):
        kept = torch.randn(4, tokens, 8)
        store.put(str(tokens), kept)
        found = store.get(str(tokens), CPU)
        assert found is not None
        assert torch.equal(found, kept)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def test_another_run_finds_what_is_on_disk_and_another_model_does_not(build_tiny, tmp_path):
    tower = build_tiny(cls=Engine).requires_grad_(False).model.visual
    image_features(tower, pack_of("ab"), CPU, DiskStore(GIB, tmp_path, tower))
    again = build_tiny(cls=Engine).requires_grad_(False).model.visual
    counted, store = Counted(again), DiskStore(GIB, tmp_path, again)
    found = levels(image_features(again, pack_of("ab"), CPU, store))
    assert not counted.patches
    assert torch.equal(found, encoded(tower, pack_of("ab")))
    with torch.no_grad():
        again.merger.norm.bias[0] += 1e-3
    other = DiskStore(GIB, tmp_path, again)
    assert other.get("digest-a", CPU) is None


def test_the_folder_stays_within_its_budget(tmp_path, model):
    budget_bytes = 200_000
    store = DiskStore(budget_bytes, tmp_path, model.model.visual)
    for number in range(40):
        store.put(f"{number:02}", torch.zeros(4, 10, 64))
        os.utime(next(tmp_path.rglob(f"{number:02}.safetensors")), (number, number))
        assert size_of(tmp_path) <= budget_bytes + 2 * 4 * 10 * 64 * 4
    assert store.get("39", CPU) is not None
    assert store.get("00", CPU) is None
    DiskStore(50_000, tmp_path, model.model.visual)
    assert size_of(tmp_path) <= 50_000, "a smaller budget in a later run"


def test_half_written_and_broken_files_are_computed_again(tmp_path, model):
    tower = model.model.visual
    store = DiskStore(GIB, tmp_path, tower)
    computed = levels(image_features(tower, pack_of("ab"), CPU, store))
    whole = next(tmp_path.rglob("digest-a.safetensors"))
    whole.write_bytes(whole.read_bytes()[:-100])
    left, fresh = whole.with_name("left.part"), whole.with_name("fresh.part")
    for path in (left, fresh):
        path.write_bytes(b"half of a file")
    long_ago = time.time() - 2 * ABANDONED_S
    os.utime(left, (long_ago, long_ago))
    store = DiskStore(GIB, tmp_path, tower)
    assert not left.exists()
    assert fresh.exists(), "another process may be writing it"
    assert_close(levels(image_features(tower, pack_of("ab"), CPU, store)), computed)
    assert (store.hits, store.misses) == (1, 1)
    assert store.get("digest-a", CPU) is not None


def test_a_folder_that_cannot_be_made_is_said(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"memory\.vision_cache_dir=.*file/kept: no folder can be made .*in host memory"
    ):
        open_features(Memory(vision_cache_gib=1, vision_cache_dir=tmp_path / "file" / "kept"), model.model.visual, CPU)


def test_features_are_kept_only_of_a_frozen_tower(model, tmp_path):
    tower = model.model.visual
    assert open_features(Memory(), tower, CPU) is None
    assert isinstance(open_features(Memory(vision_cache_gib=0.5), tower, CPU), RamStore)
    assert isinstance(open_features(Memory(vision_cache_gib=0.5, vision_cache_dir=tmp_path), tower, CPU), DiskStore)
    tower.merger.norm.bias.requires_grad_(True)
    assert open_features(Memory(vision_cache_gib=0.5), tower, CPU) is None


def test_digests_are_of_pixels_and_shape_not_of_files():
    blank = torch.zeros(8, 1536)
    assert digest_pixels(blank, (32, 64)) == digest_pixels(blank.clone(), (32, 64))
    assert digest_pixels(blank, (32, 64)) != digest_pixels(blank, (64, 32))
    assert digest_pixels(blank, (32, 64)) != digest_pixels(blank.bfloat16(), (32, 64))
    assert digest_pixels(blank, (32, 64)) != digest_pixels(blank + 1, (32, 64))


def test_packs_carry_digests_where_a_picture_repeats_or_features_are_kept():
    reads = []

    def read(image: ImageSize, geometry: VisionGeometry) -> torch.Tensor:
        reads.append(image.ref.key)
        return picture(image.ref.key)

    def sample(name: str, words: int) -> Encoded:
        height, width = SIZES[name]
        ids = torch.tensor([*range(5, 5 + words), 292, *[IMAGE_ID] * (height * width), 293, 20, 21]).numpy()
        size = ImageSize(ImageRef("", name), (32 * height, 32 * width), (32 * height, 32 * width), height * width)
        return Encoded(f"{name}{words}", ids, ids.copy(), (size,), words + height * width + 2)

    distinct = [sample("a", 2), sample("b", 3)]
    assert pack_samples(distinct, GEOMETRY, image_token_id=IMAGE_ID, read=read).pictures == ()
    kept = pack_samples(distinct, GEOMETRY, image_token_id=IMAGE_ID, read=read, digest_pictures=True)
    assert len(set(kept.pictures)) == 2
    reads.clear()
    twice = pack_samples([*distinct, sample("a", 4)], GEOMETRY, image_token_id=IMAGE_ID, read=read)
    assert reads == ["a", "b"]
    assert [twice.pictures.index(digest) for digest in twice.pictures] == [0, 1, 0]
    assert len(twice.pixels) == 24 + 32 + 24
    halves = split_pack(twice, picture_ids=(IMAGE_ID,))
    assert halves is not None
    assert tuple(itertools.chain.from_iterable(half.pictures for half in halves)) == twice.pictures
