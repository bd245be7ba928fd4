"""Pixels and sizes are those of transformers' Qwen3-VL image processor, under the limits that training writes into it."""

import copy
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from lensmith.data.images import fit_px, grid_of, read_geometry, read_patches, size_image, write_policy
from lensmith.errors import RowError
from lensmith.types import ImageRef

NUM_SIZES = 10_000


def noise(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def ref_of(image: Image.Image) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return ImageRef(buffer.getvalue(), "test")


@pytest.fixture(scope="module")
def geometry(processor):
    return read_geometry(processor)


@pytest.fixture(scope="module")
def theirs(processor):
    """`theirs(image, min_tokens, max_tokens)` -> pixel_values and grid of a processor that `write_policy` wrote to."""
    saved = copy.deepcopy(processor)

    def cut(image, min_tokens, max_tokens):
        write_policy(saved, min_tokens, max_tokens)
        out = saved.image_processor(image, return_tensors="pt")
        return out["pixel_values"], tuple(out["image_grid_thw"][0].tolist())

    return cut


@pytest.mark.parametrize(
    ("height", "width"),
    [(64, 64), (61, 47), (33, 500), (500, 33), (1, 1), (31, 97), (240, 320), (333, 777), (1000, 1), (640, 481)],
)
@pytest.mark.parametrize(("min_tokens", "max_tokens"), [(4, 1280), (1, 40), (64, 96)])
def test_patches_are_those_of_transformers_bit_for_bit(geometry, theirs, height, width, min_tokens, max_tokens):
    picture = noise(height, width)
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(RowError, match="longer than 200 : 1"):
            size_image(ref_of(picture), geometry, min_tokens=min_tokens, max_tokens=max_tokens)
        return
    size = size_image(ref_of(picture), geometry, min_tokens=min_tokens, max_tokens=max_tokens)
    pixels, grid = theirs(picture, min_tokens, max_tokens)
    assert grid_of(size, geometry) == grid
    assert size.tokens == np.prod(grid) // geometry.merge**2
    ours = read_patches(size, geometry)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, pixels, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_patches_of_greys_and_clear_pictures_are_those_of_the_same_picture_in_rgb(geometry, theirs, mode):
    picture = noise(50, 90, mode=mode)
    size = size_image(ref_of(picture), geometry, min_tokens=4, max_tokens=64)
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    torch.testing.assert_close(read_patches(size, geometry), theirs(flat, 4, 64)[0], rtol=0, atol=0)


def test_sizes_are_those_of_smart_resize_wherever_it_keeps_to_its_maximum(geometry):
    rng = np.random.default_rng(0)
    area = geometry.token_px**2
    over = 0
    for _ in range(NUM_SIZES):
        height, width = np.exp(rng.uniform(0, 9, 2)).astype(int).tolist()
        if max(height, width) > 200 * min(height, width):
            continue
        least = int(rng.integers(1, 80))
        most = least + int(np.exp(rng.uniform(0, 8)))
        ours = fit_px(height, width, geometry, least, most)
        reference = smart_resize(height, width, geometry.token_px, least * area, most * area)
        assert 1 <= ours[0] * ours[1] // area <= most
        if reference[0] * reference[1] > most * area:
            over += 1
        else:
            assert ours == reference
    assert 0 < over < NUM_SIZES / 4, "both kinds were met"


def test_normalising_uses_the_mean_and_std_of_the_checkpoint(processor):
    other = copy.deepcopy(processor)
    other.image_processor.image_mean, other.image_processor.image_std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    geometry = read_geometry(other)
    picture = noise(70, 40)
    write_policy(other, 4, 64)
    size = size_image(ref_of(picture), geometry, min_tokens=4, max_tokens=64)
    pixels = other.image_processor(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(read_patches(size, geometry), pixels, rtol=0, atol=0)
