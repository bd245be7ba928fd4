"""Pictures as people have them: rotated, clear, grey, deep, broken; and what each costs before it is decoded."""

import copy
import io
import time

import numpy as np
import pytest
from PIL import Image

from lensmith.data.images import (
    check_whole,
    header_px,
    open_image,
    read_geometry,
    read_patches,
    size_image,
    write_policy,
)
from lensmith.errors import RowError
from lensmith.types import ImageRef


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def ref(content: bytes) -> ImageRef:
    return ImageRef(content, "test")


def corners(image: Image.Image) -> list[str]:
    """Names of the colours near the four corners, row by row."""
    names = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue", (255, 255, 255): "white"}
    width, height = image.size
    points = [(2, 2), (width - 3, 2), (2, height - 3), (width - 3, height - 3)]
    return [names[tuple(round(v / 255) * 255 for v in image.getpixel(point))] for point in points]


@pytest.fixture
def flag() -> Image.Image:
    """60 wide, 40 high: red and green above blue and white."""
    image = Image.new("RGB", (60, 40), "white")
    image.paste("red", (0, 0, 30, 20))
    image.paste("lime", (30, 0, 60, 20))
    image.paste("blue", (0, 20, 30, 40))
    return image


STORED_AS = {
    1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
    7: "TRANSVERSE", 8: "ROTATE_270",
}  # fmt: skip
"""How a camera that writes this orientation has turned the picture: the opposite of what makes it upright."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_orientation_is_upright_in_size_and_pixels(flag, orientation, kind):
    turned = flag.transpose(Image.Transpose[STORED_AS[orientation]]) if STORED_AS[orientation] else flag
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = ref(encoded(turned, kind, exif=exif, quality=95))
    assert header_px(picture) == (40, 60)
    assert open_image(picture).size == (60, 40)
    assert corners(open_image(picture)) == ["red", "green", "blue", "white"]


def test_clear_pixels_are_white():
    black_text_on_clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    black_text_on_clear.putpixel((0, 0), (0, 0, 0, 255))
    palette = black_text_on_clear.quantize(4)
    for image in (black_text_on_clear, black_text_on_clear.convert("LA"), palette):
        opened = open_image(ref(encoded(image)))
        assert opened.mode == "RGB"
        assert opened.getpixel((0, 0)) == (0, 0, 0)
        assert opened.getpixel((5, 5)) == (255, 255, 255)


def test_sixteen_bit_greys_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    opened = np.asarray(open_image(ref(encoded(Image.fromarray(ramp)))))[..., 0]
    np.testing.assert_allclose(opened, ramp / 257, atol=0.5)


def test_float_and_cmyk_and_black_and_white_pictures_become_rgb():
    grey = Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    assert np.asarray(open_image(ref(encoded(grey, "TIFF"))))[-1, -1].tolist() == [255, 255, 255]
    assert open_image(ref(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))).getpixel((4, 4))[0] > 200
    assert open_image(ref(encoded(Image.new("1", (8, 8), 1)))).getpixel((0, 0)) == (255, 255, 255)


def fault(action) -> RowError:
    with pytest.raises(RowError) as caught:
        action()
    return caught.value


def test_broken_pictures_have_their_codes_and_sentences(flag, tmp_path):
    whole = encoded(flag.resize((600, 400)), "JPEG")
    cut = fault(lambda: open_image(ref(whole[: len(whole) // 2])))
    assert cut.code == "truncated_image"
    assert "pixels cannot be decoded" in str(cut)
    assert "fetch it again" in str(cut)
    text = fault(lambda: header_px(ref(b"not a picture at all")))
    assert text.code == "unreadable_image"
    assert "is not a picture that Pillow can read; convert it to PNG or JPEG" in str(text)
    assert "is empty (0 bytes)" in str(fault(lambda: header_px(ref(b""))))
    missing = fault(lambda: header_px(ImageRef(tmp_path / "gone.png", "gone")))
    assert missing.code == "missing_file"
    assert str(missing) == f"{tmp_path / 'gone.png'}: there is no such file."
    folder = fault(lambda: header_px(ImageRef(tmp_path, "folder")))
    assert folder.code == "unreadable_image"


def test_decompression_bomb_is_refused_from_its_header(monkeypatch, flag):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit, as an application sets it
    bomb = fault(lambda: header_px(ref(encoded(flag))))
    assert bomb.code == "decompression_bomb"
    assert "reduce it, or remove the row" in str(bomb)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_cut_off_pictures_are_found_and_whole_ones_are_not(flag, kind):
    whole = encoded(flag.resize((600, 400)), kind)
    check_whole(ref(whole))
    check_whole(ref(whole + b"what some cameras write behind the picture"))
    for length in (len(whole) * 9 // 10, len(whole) // 2):
        assert fault(lambda length=length: check_whole(ref(whole[:length]))).code == "truncated_image"


def test_strip_is_refused_with_its_sides(processor):
    strip = ref(encoded(Image.new("RGB", (4020, 20))))
    refused = fault(lambda: size_image(strip, read_geometry(processor), min_tokens=4, max_tokens=64))
    assert refused.code == "extreme_aspect"
    assert "is 4020 x 20 px, longer than 200 : 1" in str(refused)


def test_policy_is_read_back_from_a_saved_processor(processor, tmp_path):
    from transformers import AutoProcessor

    changed = copy.deepcopy(processor)
    write_policy(changed, 9, 77)
    changed.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert read_geometry(again).min_tokens == 9
    assert again.image_processor.size["longest_edge"] == 77 * 1024


def test_scale_says_how_much_of_a_side_is_left(processor):
    size = size_image(ref(encoded(Image.new("RGB", (640, 320)))), read_geometry(processor), min_tokens=4, max_tokens=50)
    assert (size.original_px, size.seen_px, size.tokens) == ((320, 640), (160, 320), 50)
    assert size.scale == 0.5


def test_small_pictures_are_read_in_a_fraction_of_a_millisecond(processor, flag, tmp_path):
    """Measured at 0.15 ms; the bound is for machines under load."""
    flag.resize((64, 64)).save(tmp_path / "small.png")
    geometry = read_geometry(processor)
    size = size_image(ImageRef(tmp_path / "small.png", ""), geometry, min_tokens=4, max_tokens=64)
    read_patches(size, geometry)
    started = time.perf_counter()
    for _ in range(100):
        read_patches(size, geometry)
    assert (time.perf_counter() - started) / 100 < 2e-3
