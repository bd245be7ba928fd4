"""Rows compared by keys: who is a copy, who looks alike, who contradicts whom; and what texts alone tell."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from tests.fixtures.make_broken import jpeg, photo, png

from lensmith.check.compare import (
    NEAR_BITS,
    find_conflicts,
    find_copies,
    find_leaks,
    find_near_copies,
)
from lensmith.check.keys import NOTHING, row_keys
from lensmith.check.pictures import digest_content, impression_of
from lensmith.check.report import Spread
from lensmith.check.texts import SCRIPTS, count_scripts, ends_in_loop, media_tokens, plain
from lensmith.data.headers import read_header
from lensmith.data.images import open_image
from lensmith.types import ImageMark, ImageRef, Message, Sample, Text

SMALL_KEYS = st.lists(st.integers(0, 5), max_size=30)


def keys(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


@given(SMALL_KEYS)
def test_a_copy_goes_with_the_first_row_of_its_key(values):
    assert find_copies(keys(values)).tolist() == [values.index(value) for value in values]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=30))
def test_conflicts_are_rows_whose_question_has_another_answer(rows):
    asked, answered = [pair[0] for pair in rows], [pair[1] for pair in rows]
    other, questions = find_conflicts(keys(asked), keys(answered))
    answers = {question: {b for a, b in rows if a == question} for question in asked if question != NOTHING}
    torn = {question for question, given in answers.items() if len(given) > 1}
    assert questions == len(torn)
    for number, partner in enumerate(other.tolist()):
        if asked[number] in torn:
            assert asked[partner] == asked[number]
            assert answered[partner] != answered[number]
        else:
            assert partner == number


@given(SMALL_KEYS, SMALL_KEYS)
def test_leaks_are_pictures_of_both_sides(train, test):
    leaked, source = find_leaks(keys(train), keys(test))
    assert leaked.tolist() == [number for number, value in enumerate(test) if value in train]
    assert [train[number] for number in source] == [test[number] for number in leaked]


@given(st.integers(0, 2**64 - 1), st.sets(st.integers(0, 63), max_size=NEAR_BITS + 2))
def test_hashes_that_differ_in_few_bits_are_near_wherever_the_bits_lie(bits, flipped):
    other = bits
    for place in flipped:
        other ^= 1 << place
    colours = np.array([0x808080, 0x828180])
    near = find_near_copies(keys([7, 7]), keys([bits, other]), colours).tolist()
    assert near == ([0, 0] if len(flipped) <= NEAR_BITS else [0, 1])


def test_near_copies_say_the_same_and_have_the_same_colour():
    said, colours = keys([1, 1, 2, 1]), np.array([0x101010, 0x101010, 0x101010, 0xF01010])
    assert find_near_copies(said, keys([9, 9, 9, 9]), colours).tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize("seed", range(8))
def test_a_photograph_saved_again_keeps_its_impression_and_others_do_not(seed):
    """The bound in compare.py: re-encoding and resizing change at most NEAR_BITS bits."""
    image = photo(seed)
    ours = impression_of(image)
    for changed in (
        Image.open(io.BytesIO(jpeg(image, quality=40))),
        image.resize((500, 375)),
        image.resize((160, 120)),
    ):
        theirs = impression_of(changed.convert("RGB"))
        assert (ours.bits ^ theirs.bits).bit_count() <= NEAR_BITS
    assert (ours.bits ^ impression_of(photo(seed + 100)).bits).bit_count() > 4 * NEAR_BITS
    assert ours.has_detail


def test_plain_pictures_prove_nothing():
    gradient = Image.linear_gradient("L").rotate(90).convert("RGB")
    for image in (Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue"), gradient):
        assert not impression_of(image).has_detail


def test_shapes_of_different_colours_look_different():
    def circle(colour: str) -> Image.Image:
        image = photo(1, (64, 64))
        ImageDraw.Draw(image).ellipse((4, 4, 60, 60), fill=colour)
        return image

    red, blue = impression_of(circle("red")), impression_of(circle("blue"))
    found = find_near_copies(keys([1, 1]), keys([red.bits, red.bits]), np.array([red.colour, blue.colour]))
    assert found.tolist() == [0, 1]


def sample(*texts: str, images: int = 0) -> Sample:
    parts = [ImageMark(number) for number in range(images)]
    roles = ("user", "assistant") * len(texts)
    messages = tuple(
        Message(role, (*(parts if number == 0 else ()), Text(text)))
        for number, (role, text) in enumerate(zip(roles, texts, strict=False))
    )
    return Sample("r:1", messages, tuple(ImageRef(b"", str(number)) for number in range(images)))


def test_keys_tell_rows_apart_as_people_would():
    ours = row_keys(sample("What is it?", "A cat.", images=1), [5])
    spelt = row_keys(sample("what is  it", "a cat", images=1), [5])
    assert (ours.loose, ours.asked, ours.answered) == (spelt.loose, spelt.asked, spelt.answered)
    assert ours.exact != spelt.exact
    other = row_keys(sample("What is it?", "A cat.", images=1), [6])
    assert ours.loose == other.loose
    assert ours.answered == other.answered
    assert ours.exact != other.exact
    assert ours.asked != other.asked
    assert row_keys(sample("2 + 2?", "4"), []).asked == NOTHING
    assert row_keys(sample("a", "bc"), []).exact != row_keys(sample("ab", "c"), []).exact


def test_files_are_the_same_by_their_bytes(tmp_path):
    image = photo(3)
    content = png(image)
    assert len(content) > 3 * 4096
    middle = len(content) // 2
    changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    files = {"a": content, "b": content, "longer": content + b"!", "changed": changed}
    refs = {}
    for name, held in files.items():
        (tmp_path / name).write_bytes(held)
        refs[name] = ImageRef(tmp_path / name, name)
    whole = {name: digest_content(ref, read_header(ref), whole=True) for name, ref in refs.items()}
    ends = {name: digest_content(ref, read_header(ref), whole=False) for name, ref in refs.items()}
    assert whole["a"] == whole["b"]
    assert len(set(whole.values())) == 3
    assert ends["a"] == ends["b"] == ends["changed"] != ends["longer"]  # what --quick says of itself
    assert open_image(refs["a"]).size == image.size


LOOP = "It shows a cat. " + "and the cat " * 40


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        (LOOP, True),
        (LOOP + "and th", True),  # cut off in the middle of the piece
        ("no" * 200, True),
        ("One sentence that comes again and again. " * 9, True),
        ("One sentence that comes again. " * 5, False),
        ("-" * 300, False),
        (". . . " * 80, False),
        ("no no no no", False),
        (" ".join(map(str, range(400))), False),
        ("", False),
    ],
)
def test_answers_without_an_end_are_those_that_end_in_a_loop(text, loops):
    assert (ends_in_loop(text) is not None) is loops


@given(st.text(max_size=300))
def test_any_text_can_be_looked_at(text):
    ends_in_loop(text)
    media_tokens(text)
    assert plain(plain(text)) == plain(text)
    assert count_scripts(text).sum() <= len(text)


def test_letters_are_counted_by_script():
    counts = dict(zip(SCRIPTS, count_scripts("Hello, Привет 你好 שלום ñ กข नम 42!").tolist(), strict=True))
    expected = {"Latin": 6, "Cyrillic": 6, "Han": 2, "Hebrew": 4, "Thai": 2, "Devanagari": 2}
    assert {name: count for name, count in counts.items() if count} == expected


def test_scripts_do_not_overlap():
    blocks = sorted(block for blocks in SCRIPTS.values() for block in blocks)
    assert all(start < stop for start, stop in blocks)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(blocks))


def test_a_spread_is_ends_middle_and_mean():
    assert Spread.of(np.array([])) is None
    assert Spread.of(np.arange(21)[::-1]) == Spread(0, 10, 19, 20, 10)
