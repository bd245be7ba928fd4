"""Pictures: what one costs, told from its file header alone, and its pixels exactly as transformers cuts them.

Two promises meet here. The size that `size_image` predicts is the size that `read_patches` delivers, and both are what
transformers' Qwen2VLImageProcessor (the one every Qwen3-VL ships) would make of the same upright picture under the same
limits, bit for bit (tests/reference/test_patches.py). So plans made from headers hold, and serving sees what training saw.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from lensmith.data.documents import draw_page
from lensmith.data.headers import (
    DEEP_MODES,
    PILLOW_FAULTS,
    SIXTEEN_BIT_MODES,
    bomb,
    open_undecoded,
    orientation_of,
    read_header,
    reporting_gone,
)
from lensmith.errors import ConfigError, RowError
from lensmith.types import ImageRef, ImageSize, Moment, VisionGeometry

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

MAX_ASPECT = 200
"""Longer : shorter side beyond which transformers' smart_resize refuses a picture."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by the value of its EXIF orientation tag (0x0112 in the EXIF standard); 1 already is."""


def read_geometry(processor: Any) -> VisionGeometry:
    """How this checkpoint cuts pictures, from its loaded Qwen3VLProcessor."""
    images = processor.image_processor
    token_px = images.patch_size * images.merge_size
    return VisionGeometry(
        patch_px=images.patch_size,
        merge=images.merge_size,
        frames=images.temporal_patch_size,
        mean=tuple(images.image_mean),
        std=tuple(images.image_std),
        # `shortest_edge` is an area in this processor, despite its name.
        min_tokens=max(1, images.size["shortest_edge"] // token_px**2),
    )


def write_policy(processor: Any, min_tokens: int, max_tokens: int) -> None:
    """Make the processor resize as training did, so that a saved copy serves with the same pictures."""
    images = processor.image_processor
    token_area = (images.patch_size * images.merge_size) ** 2
    images.size = {"shortest_edge": min_tokens * token_area, "longest_edge": max_tokens * token_area}


def check_policy(min_tokens: int, max_tokens: int, *, setting: str = "data.image") -> None:
    """Raise ConfigError where no picture could satisfy both limits, which `setting` holds."""
    if min_tokens > max_tokens:
        raise ConfigError(
            f"{setting}.min_tokens is {min_tokens} but {setting}.max_tokens is {max_tokens}; "
            f"raise max_tokens to {min_tokens} or more, or set min_tokens (its default is the checkpoint's own)."
        )


def fit_px(height: int, width: int, geometry: VisionGeometry, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Height and width after resizing, in pixels: multiples of token_px, at most max_tokens, nearly the same shape.

    This is `smart_resize` of transformers' image_processing_qwen2_vl.py, which goes over its own maximum in two corners:
    a strip longer than max_tokens : 1, and a picture enlarged when the two limits are close. There we stay within.

    Raises:
        RowError: `extreme_aspect`, for sides of over 200 : 1.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise RowError(
            "picture",
            "extreme_aspect",
            f"is {width} x {height} px, longer than {MAX_ASPECT} : 1, which the model cannot see; crop it or cut it up.",
        )
    side = geometry.token_px
    rows, columns = round(height / side), round(width / side)
    if rows * columns < min_tokens:
        stretch = math.sqrt(min_tokens * side**2 / (height * width))
        rows, columns = math.ceil(height * stretch / side), math.ceil(width * stretch / side)
    if rows * columns > max_tokens:
        shrink = math.sqrt(height * width / (max_tokens * side**2))
        rows = max(1, math.floor(height / shrink / side))
        columns = max(1, math.floor(width / shrink / side))
        rows, columns = min(rows, max_tokens // min(columns, max_tokens)), min(columns, max_tokens)
    return rows * side, columns * side


def size_image(
    ref: ImageRef,
    geometry: VisionGeometry,
    *,
    min_tokens: int,
    max_tokens: int,
    original_px: tuple[int, int] | None = None,
) -> ImageSize:
    """What the picture will cost; reads its header, unless its upright height and width are already known.

    Raises:
        RowError: its file is missing or is no picture, or its sides are over 200 : 1.
    """
    original = original_px or header_px(ref)
    try:
        seen = fit_px(*original, geometry, min_tokens, max_tokens)
    except RowError as cause:
        raise RowError(str(ref), cause.code, cause.sentence) from None
    return ImageSize(ref, original, seen, seen[0] * seen[1] // geometry.token_px**2)


def grid_of(size: ImageSize, geometry: VisionGeometry) -> tuple[int, int, int]:
    """Patches in time, height and width; a still picture is one step of time."""
    height, width = size.seen_px
    return 1, height // geometry.patch_px, width // geometry.patch_px


def header_px(ref: ImageRef) -> tuple[int, int]:
    """Upright height and width in pixels, from the file's header; no pixel is decoded."""
    return read_header(ref).upright_px


def check_whole(ref: ImageRef) -> None:
    """Raise RowError where a JPEG or PNG was cut off: what its header cannot tell.

    Some sound files carry something after their end mark, so one without the mark in its place is decoded to be sure.
    """
    if not read_header(ref).is_whole:
        open_image(ref)


def open_image(ref: ImageRef) -> Image.Image:
    """The picture in RGB and upright, at its own size.

    Transparency is laid on white, as transformers' newer processors do: the hidden colour of transparent pixels is most
    often black, so that dropping the alpha channel turns black text on a clear page into a black rectangle.
    Sixteen-bit greys are scaled to eight, where Pillow's own conversion would clip them to white.

    Raises:
        RowError: `missing_file`, `unreadable_image`, `truncated_image` or `decompression_bomb`.
    """
    if ref.page is not None:
        with reporting_gone(ref):
            return draw_page(ref)
    with open_undecoded(ref) as image:
        turn = UPRIGHT.get(orientation_of(image))
        try:
            image.load()
        except Image.DecompressionBombError as cause:
            raise bomb(ref, cause) from cause
        except PILLOW_FAULTS as cause:
            raise RowError(
                str(ref),
                "truncated_image",
                f"the picture's header is sound but its pixels cannot be decoded ({cause}); "
                "the file was probably cut off in a copy or download: fetch it again.",
            ) from cause
        flat = _to_rgb(image)
    return flat.transpose(turn) if turn is not None else flat


def read_patches(size: ImageSize, geometry: VisionGeometry) -> Float[Tensor, "patches values"]:
    """Pixels as the image tower takes them: resized, normalised, one row per patch, in the order of merged tokens.

    Resizing is torchvision's antialiased bicubic on bytes; normalising fuses the division by 255, as transformers does,
    because (x - 255 mean) / (255 std) in float32 is not bit for bit (x / 255 - mean) / std.
    """
    import torch

    if isinstance(size.ref, Moment):
        from lensmith.data.frames import read_moment  # which resizes frames as pictures are here

        frames = read_moment(size.ref, size.seen_px)
    else:
        frames = resize_pictures(np.array(open_image(size.ref))[None], size.seen_px)
    patch, merge = geometry.patch_px, geometry.merge
    rows, columns = size.seen_px[0] // geometry.token_px, size.seen_px[1] // geometry.token_px
    # [frame, channel, token row, row in token, y, token column, column in token, x]
    # -> tokens, their patches, channel, frame, y, x
    frames = frames.reshape(-1, 3, rows, merge, patch, columns, merge, patch).permute(2, 5, 3, 6, 1, 0, 4, 7)
    values = frames.reshape(rows * columns * merge**2, 3, -1, patch, patch).to(torch.float32)
    mean, std = _byte_scale(geometry.mean), _byte_scale(geometry.std)
    values.sub_(mean).div_(std)
    return values.expand(-1, -1, geometry.frames, -1, -1).reshape(-1, geometry.patch_values)


def seen_picture(size: ImageSize) -> Image.Image:
    """A still picture with exactly the bytes that `read_patches` cuts up: for whoever cuts it up himself."""
    assert isinstance(size.ref, ImageRef), "moments of videos are no still pictures"
    (picture,) = resize_pictures(np.array(open_image(size.ref))[None], size.seen_px)
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def resize_pictures(
    pictures: UInt8[np.ndarray, "pictures rows columns 3"], seen_px: tuple[int, int]
) -> UInt8[Tensor, "pictures 3 height width"]:
    """Pictures of one size at another one, as the processors of transformers resize them."""
    import torch

    stacked = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    if stacked.shape[2:] == seen_px:
        return stacked
    return torch.nn.functional.interpolate(
        stacked.contiguous(), seen_px, mode="bicubic", align_corners=False, antialias=True
    )


@functools.lru_cache(maxsize=8)
def _byte_scale(numbers: tuple[float, float, float]) -> Float[Tensor, "3 1 1 1"]:
    """Per-channel numbers meant for 0 .. 1, for 0 .. 255."""
    import torch

    return torch.tensor(numbers).mul_(255).view(3, 1, 1, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in DEEP_MODES:
        return Image.fromarray(_to_bytes(np.asarray(image), image.mode)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    return image.convert("RGB")


def _to_bytes(values: np.ndarray, mode: str) -> np.ndarray:
    """Greys of any depth as 0 .. 255; where the mode leaves the depth open, the smallest one that holds the values."""
    with np.errstate(invalid="ignore"):  # broken files hold what is not a number: black
        values = np.nan_to_num(values.astype(np.float64), nan=0, posinf=0, neginf=0)
    if mode in SIXTEEN_BIT_MODES:
        full = 65535.0
    else:
        depths = (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
        full = next((depth for depth in depths if values.max(initial=0) <= depth), values.max(initial=0))
    return (values.clip(0, full) * (255 / full)).round().astype(np.uint8)
