"""HEIC and AVIF are upright once, whichever of their two places says so, and told where they cannot be read."""

import io
import subprocess
import sys

import numpy as np
import pillow_heif
import pytest
from PIL import Image, features

from lensmith.data import heif
from lensmith.data.images import header_px, open_image
from lensmith.errors import RowError
from lensmith.types import ImageRef

STORED_AS = {1: None, 3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270", 5: "TRANSPOSE"}


@pytest.fixture(scope="module")
def flag() -> Image.Image:
    """64 wide, 48 high: red and green above blue and white."""
    image = Image.new("RGB", (64, 48), "white")
    image.paste("red", (0, 0, 32, 24))
    image.paste("lime", (32, 0, 64, 24))
    image.paste("blue", (0, 24, 32, 48))
    return image


def encoded(image: Image.Image, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(buffer, quality=95, exif=exif.tobytes())
    else:
        image.save(buffer, kind, quality=95, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_pictures_are_upright_once(flag, kind, orientation):
    turned = flag.transpose(Image.Transpose[STORED_AS[orientation]]) if STORED_AS[orientation] else flag
    ref = ImageRef(encoded(turned, kind, orientation), "x")
    assert header_px(ref) == (48, 64)
    opened = open_image(ref)
    assert opened.size == (64, 48)
    quarters, expected = (np.asarray(image.resize((2, 2), Image.Resampling.BOX)) for image in (opened, flag))
    np.testing.assert_allclose(quarters, expected, atol=40)  # lossy, and its colours at half the resolution


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_cut_off_pictures_are_refused(flag, kind):
    whole = encoded(flag, kind, 1)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(RowError) as caught:
            open_image(ImageRef(whole[: int(len(whole) * share)], "x"))
        assert caught.value.code in ("unreadable_image", "truncated_image")


def test_heic_without_its_plug_in_names_the_extra(flag, tmp_path):
    """In a process of its own, since Pillow does not forget a plug-in."""
    (tmp_path / "photo.heic").write_bytes(encoded(flag, "HEIF", 1))
    program = (
        "import sys; sys.modules['pillow_heif'] = None\n"
        "from pathlib import Path\n"
        "from lensmith.data.images import header_px\n"
        "from lensmith.errors import RowError\n"
        "from lensmith.types import ImageRef\n"
        "try:\n    header_px(ImageRef(Path(sys.argv[1]), 'x'))\n"
        "except RowError as fault:\n    print(fault.code, fault)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "photo.heic")], capture_output=True, text=True, check=True
    ).stdout
    assert told.startswith("unreadable_image")
    assert "is HEIC, which needs pillow-heif, and that is not installed; pip install 'lensmith[heic]'" in told


def test_avif_without_its_decoder_says_what_to_install(flag, monkeypatch):
    from PIL import AvifImagePlugin

    content = encoded(flag, "AVIF", 1)
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    monkeypatch.setattr(heif.features, "check", lambda feature: feature != "avif" and features.check(feature))
    with pytest.raises(RowError, match="is AVIF, which this Pillow was built without; pip install -U pillow"):
        header_px(ImageRef(content, "x"))
