"""What `check` shows is what the model is fed: pictures to the bit, texts to the token."""

import io
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from lensmith.check.seen import draw_seen, read_back
from lensmith.config.tree import Images
from lensmith.data.encode import Encoder
from lensmith.data.images import open_image, read_geometry, size_image
from lensmith.types import IGNORE, ImageMark, ImageRef, Message, Sample, Text

MAX_TOKENS = 60


@pytest.fixture(scope="module")
def encoder(processor) -> Encoder:
    return Encoder.from_processor(processor, Images(max_tokens=MAX_TOKENS))


def noise_ref(height: int, width: int, mode: str = "RGB", **save) -> ImageRef:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG", **save)
    return ImageRef(buffer.getvalue(), f"{height} x {width} {mode}")


def conversation(*turns: tuple[str, str | ImageRef]) -> Sample:
    images = tuple(content for _, content in turns if isinstance(content, ImageRef))
    marks = iter(range(len(images)))
    return Sample(
        "rows.jsonl:1",
        tuple(
            Message(role, (ImageMark(next(marks)) if isinstance(content, ImageRef) else Text(content),))
            for role, content in turns
        ),
        images,
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize(("height", "width"), [(64, 96), (61, 47), (500, 333), (9, 400)])
def test_patches_drawn_back_are_the_resized_picture_to_the_bit(processor, height, width, mode):
    geometry = read_geometry(processor)
    size = size_image(noise_ref(height, width, mode), geometry, min_tokens=4, max_tokens=MAX_TOKENS)
    upright = torch.from_numpy(np.array(open_image(size.ref))).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        upright, size.seen_px, mode="bicubic", align_corners=False, antialias=True
    )
    assert np.array_equal(np.asarray(draw_seen(size, geometry)), resized[0].permute(1, 2, 0).numpy())


def test_every_byte_survives_normalising_and_back(processor):
    geometry = read_geometry(processor)
    ramp = np.arange(32 * 32 * 3, dtype=np.int64).reshape(32, 32, 3).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    size = size_image(ImageRef(buffer.getvalue(), "ramp"), geometry, min_tokens=1, max_tokens=1)
    assert size.seen_px == (32, 32)
    assert np.array_equal(np.asarray(draw_seen(size, geometry)), ramp)


def test_pieces_cover_every_token_once_and_learned_ones_are_those_with_a_label(encoder):
    sample = conversation(
        ("system", "Short answers."),
        ("user", noise_ref(64, 96)),
        ("user", "Was ist das? 图"),
        ("assistant", "Ein Bär 🐻‍❄️ — 北极熊."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    )
    encoded = encoder.encode(sample)
    pieces = list(read_back(encoded, encoder.tokenizer))
    assert sum(piece.tokens for piece in pieces) == encoded.num_tokens
    assert (
        np.repeat([p.learned for p in pieces], [p.tokens for p in pieces]).tolist()
        == (encoded.labels != IGNORE).tolist()
    )
    learned = "".join(piece.text for piece in pieces if piece.learned)
    assert learned == "Ein Bär 🐻‍❄️ — 北极熊.<|im_end|>Yes.<|im_end|>"


def test_image_tokens_are_one_piece_per_picture(encoder):
    sample = conversation(("user", noise_ref(64, 96)), ("user", noise_ref(96, 96)), ("assistant", "Two."))
    encoded = encoder.encode(sample)
    pads = [p for p in read_back(encoded, encoder.tokenizer) if p.text == "<|image_pad|>"]
    assert [pad.tokens for pad in pads] == [image.tokens for image in encoded.images] == [6, 9]
    assert all(pad.special and not pad.learned for pad in pads)


def test_a_special_token_written_in_a_text_is_shown_as_text(encoder):
    sample = conversation(("user", "What is <|image_pad|>?"), ("assistant", "<|im_end|>"))
    pieces = list(read_back(encoder.encode(sample), encoder.tokenizer))
    assert not [p for p in pieces if p.special and p.text == "<|image_pad|>"]
    assert "What is <|image_pad|>?" in "".join(p.text for p in pieces if not p.special)
    assert "".join(p.text for p in pieces if p.learned and not p.special) == "<|im_end|>"


def test_a_replacement_character_in_the_data_is_shown_as_it_is(encoder):
    sample = conversation(("user", "Read it."), ("assistant", "a\ufffd\ufffd b \ufffd"))
    learned = [p.text for p in read_back(encoder.encode(sample), encoder.tokenizer) if p.learned]
    assert "".join(learned) == "a\ufffd\ufffd b \ufffd<|im_end|>"


def test_joined_pieces_are_what_the_tokenizer_decodes(encoder):
    every_kind = "".join(  # Qwen's tokenizer brings texts to NFC
        map(chr, (*range(32, 1200), *range(0x4E00, 0x4E80), *range(0x1F600, 0x1F640), 0xFFFD, 0x10FFFF))
    )
    sample = conversation(("user", "Read it."), ("assistant", every_kind))
    encoded = encoder.encode(sample)
    pieces = list(read_back(encoded, encoder.tokenizer))
    assert "".join(p.text for p in pieces) == encoder.tokenizer.decode(encoded.input_ids)
    assert "".join(p.text for p in pieces if p.learned) == unicodedata.normalize("NFC", every_kind) + "<|im_end|>"


def test_of_long_texts_the_rest_is_counted_and_what_follows_is_shown(encoder):
    sample = conversation(("user", "word " * 5_000), ("assistant", "An answer."))
    encoded = encoder.encode(sample)
    pieces = list(read_back(encoded, encoder.tokenizer, most_tokens=100))
    left_out = [p for p in pieces if p.text is None]
    assert len(left_out) == 1
    assert sum(p.tokens for p in pieces) == encoded.num_tokens
    assert sum(p.tokens for p in pieces if not p.special and not p.learned and p.text is not None) < 120
    assert "".join(p.text for p in pieces if p.learned) == "An answer.<|im_end|>"
