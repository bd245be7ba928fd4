"""Every way people write a row becomes the same sample; every way to get one wrong has its own sentence."""

import base64
import io
import json

import pytest
from PIL import Image

from lensmith.config.tree import Columns
from lensmith.data.refs import RefReader
from lensmith.data.rows import open_rows
from lensmith.data.samples import guess_layout, to_sample
from lensmith.data.source import read_samples
from lensmith.errors import ConfigError, DataError, RowError
from lensmith.types import ImageMark, Row, Sample, Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images/red.png and images/blue.png."""
    place = tmp_path_factory.mktemp("data")
    (place / "images").mkdir()
    for colour in ("red", "blue"):
        Image.new("RGB", (32, 32), colour).save(place / "images" / f"{colour}.png")
    return place


@pytest.fixture(scope="module")
def sample_of(folder):
    """`sample_of(fields, others...)` -> the sample of the first row of a file with these rows."""

    def read(*rows, columns: Columns | None = None, allow_urls: bool = False) -> Sample:
        path = folder / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        opened = open_rows(path)
        layout = guess_layout(opened, columns or Columns())
        return to_sample(opened[0], layout, RefReader(folder, allow_urls=allow_urls))

    return read


def shape(sample: Sample) -> list[tuple]:
    return [(m.role, *(p.text if isinstance(p, Text) else p.index for p in m.parts)) for m in sample.messages]


RED, BLUE = "images/red.png", "images/blue.png"
ASKED = [("user", 0, "What colour?"), ("assistant", "red")]


@pytest.mark.parametrize(
    "fields",
    [
        {"image": RED, "question": "What colour?", "answer": "red"},
        {"Image_Path": RED, "Prompt": "What colour?", "Response": "red"},
        {"file_name": RED, "text": "red", "instruction": "What colour?"},
        {"images": [RED], "query": "<image>What colour?", "label": "red"},
        {"images": json.dumps([RED]), "problem": "<image>\nWhat colour?", "solution": "red"},
        {"image": RED, "conversations": [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]},
        {"image": RED, "conversations": [{"from": "human", "value": "What colour?"}, {"from": "gpt", "value": "red"}]},
        {"images": [RED], "messages": [
            {"role": "user", "content": "<image>What colour?"}, {"role": "assistant", "content": "red"}]},
        {"images": [RED], "messages": [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "red"}]},
        {"image": RED, "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "What colour?"}]},
            {"role": "assistant", "content": "red"}]},
        {"messages": [
            {"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": RED}, "text": None},
                {"type": "text", "text": "What colour?", "image_url": None}]},
            {"role": "assistant", "content": "red"}]},
        {"messages": json.dumps([
            {"role": "user", "content": [{"image": RED}, {"text": "What colour?"}]},
            {"role": "assistant", "content": "red"}])},
    ],
)  # fmt: skip
def test_all_formats_say_the_same(sample_of, folder, fields):
    sample = sample_of(fields)
    assert shape(sample) == ASKED
    assert [image.source for image in sample.images] == [folder / RED]
    assert sample.images[0].key == str(folder / RED)
    assert (sample.question, sample.answer) == ("What colour?", "red")
    assert sample.where == "rows.jsonl:1"


def test_pictures_come_as_paths_bytes_base64_data_uris_and_pil(folder):
    content = (folder / RED).read_bytes()
    text = base64.b64encode(content).decode()
    cells = [content, text, f"data:image/png;base64,{text}", {"bytes": content, "path": "elsewhere.png"}]
    layout = guess_layout(open_rows(_file(folder, {"image": RED, "answer": "x"})), Columns())

    def image(cell):
        return to_sample(Row("here:1", {"image": cell, "answer": "x"}), layout, RefReader(folder)).images[0]

    assert len({image(cell).key for cell in cells}) == 1, "the same bytes are the same picture"
    assert all(image(cell).source == content for cell in cells)
    assert image({"bytes": None, "path": RED}).source == folder / RED
    assert image(f"file://{folder / RED}").source == folder / RED
    pictures = [Image.new(mode, (4, 4)) for mode in ("RGB", "CMYK", "P", "F", "I")]
    for picture in pictures:
        with Image.open(io.BytesIO(image(picture).source)) as stored:
            assert (stored.mode, stored.size) == (picture.mode, picture.size)


def _file(folder, *rows):
    path = folder / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_several_pictures_keep_their_places_and_order(sample_of, folder):
    marked = sample_of({"images": [RED, BLUE, RED], "question": "Is <image>\nlike <image> or <image>?", "answer": "no"})
    assert shape(marked)[0] == ("user", "Is ", 0, "like ", 1, " or ", 2, "?")
    assert [image.source.name for image in marked.images] == ["red.png", "blue.png", "red.png"]
    unmarked = sample_of({"image": f"{RED};{BLUE}", "question": "Same?", "answer": "no"})
    assert shape(unmarked)[0] == ("user", 0, 1, "Same?")
    turns = sample_of(
        {
            "images": [RED, BLUE],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<image>First?"},
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "And <image>"},
                {"role": "assistant", "content": "blue"},
            ],
        }
    )
    assert shape(turns)[1:] == [("user", 0, "First?"), ("assistant", "red"), ("user", "And ", 1), ("assistant", "blue")]


def test_rows_without_a_picture_and_system_texts_are_fine(sample_of):
    assert shape(sample_of({"question": "2 + 2?", "answer": 4})) == [("user", "2 + 2?"), ("assistant", "4")]
    nothing = sample_of({"image": None, "question": "Q", "answer": "A"}, {"image": RED, "question": "Q", "answer": "A"})
    assert shape(nothing) == [("user", "Q"), ("assistant", "A")]
    caption = sample_of({"image": RED, "caption": "a red square", "system": "Describe.", "id": 7})
    assert shape(caption) == [("system", "Describe."), ("user", 0), ("assistant", "a red square")]
    assert caption.columns == {"id": 7}


def test_image_marks_are_text_where_rows_hold_their_pictures_otherwise(sample_of):
    parts = [{"type": "image", "image": RED}, {"type": "text", "text": "What does <image> mean in HTML?"}]
    sample = sample_of({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "<image>!"}]})
    assert shape(sample) == [("user", 0, "What does <image> mean in HTML?"), ("assistant", "<image>!")]
    plain = sample_of(
        {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A tag."}]}
    )
    assert shape(plain)[0] == ("user", "<image>?")


def chat(*turns, **others):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **others}


ASK, TELL = ("user", "Q"), ("assistant", "A")


@pytest.mark.parametrize(
    ("fields", "code", "sentence"),
    [
        ({"images": [RED], "question": "<image> or <image>?", "answer": "x"}, "marks_mismatch",
         "2 <image> marks in the text but 1 images listed in 'images'. Add the missing path or remove a mark"),
        ({"images": [RED, BLUE], "question": "<image>?", "answer": "x"}, "marks_mismatch",
         "1 <image> marks in the text but 2 images listed in 'images'. Remove a path or add a mark"),
        (chat(("user", [{"type": "image"}, {"type": "image"}]), TELL, image=RED), "marks_mismatch",
         "2 image parts without a picture but 1 images listed in 'image'"),
        (chat(("user", [{"type": "image", "image": RED}]), TELL, image=BLUE), "marks_mismatch",
         "the messages hold 1 images themselves and 'image' lists 1 more"),
        (chat(ASK, ("assistant", [{"type": "image", "image": RED}, {"type": "text", "text": "A"}])), "marks_mismatch",
         "turn 2 is by the assistant and holds an image, but Qwen3-VL sees images in user turns only"),
        (chat(("tool", "x"), ASK, TELL), "unknown_role",
         "turn 1 is spoken by 'tool', but roles are system, user, human, assistant, gpt"),
        (chat(ASK, ("assistant", " \n")), "empty_answer", "the answer in turn 2 is empty (2 characters of white space)"),
        ({"question": "Q", "answer": ""}, "empty_answer", "the answer in turn 2 is empty (0 characters of white space)"),
        (chat(ASK), "no_answer", "1 turns but none by the assistant"),
        (chat(TELL, ASK, TELL), "empty_question", "the assistant speaks before any user turn"),
        (chat(("user", ""), TELL), "empty_question", "turn 1 holds neither text nor an image"),
        (chat(ASK, ("system", "late"), TELL), "malformed_row", "turn 2 is a system turn; only the first can be one"),
        (chat(("system", "a"), ASK, TELL, system="b"), "malformed_row", "a system text stands both in 'system' and in"),
        (chat(("user", [{"type": "audio", "audio": "x.mp3"}]), TELL), "malformed_row",
         "a part of a message has the type 'audio'; Lensmith reads parts of type text, image, image_url and video"),
        ({"image": "images/green.png", "answer": "x"}, "missing_file",
         "images/green.png is missing; relative paths start from"),
        ({"image": "pictures/red.png", "answer": "x"}, "missing_file", "is missing, and so is its folder"),
        ({"image": "https://example.org/a.png", "answer": "x"}, "url_not_allowed",
         "https://example.org/a.png is an address, and data.allow_urls is false"),
        ({"image": "data:image/png;base64,%%%", "answer": "x"}, "unreadable_image", "a picture's base64 is broken"),
        ({"image": 3, "answer": "x"}, "unreadable_image", "a value of type int stands where a picture should"),
        ({"question": "Q", "answer": ["a", "b"]}, "malformed_row", "a value of type list stands where one text should"),
    ],
)  # fmt: skip
def test_wrong_row_names_its_place_its_code_and_the_way_out(sample_of, fields, code, sentence):
    with pytest.raises(RowError) as caught:
        sample_of(fields)
    assert caught.value.code == code
    assert str(caught.value).startswith("rows.jsonl:1: ")
    assert sentence in str(caught.value)
    assert isinstance(caught.value, DataError)


def test_turns_that_are_no_turns_are_told(folder):
    layout = guess_layout(open_rows(_file(folder, chat(ASK, TELL))), Columns())
    for value, sentence in [
        ([], "'messages' holds no turns; it must be a list of turns"),
        ("hello", "'messages' is a text but not JSON"),
        (7, "'messages' holds a value of type int; it must be a list of turns"),
        ([{"content": "x"}], "turn 1 does not say who speaks"),
    ]:
        with pytest.raises(RowError) as caught:
            to_sample(Row("here:1", {"messages": value}), layout, RefReader(folder))
        assert sentence in str(caught.value)


def test_addresses_are_taken_when_allowed(sample_of):
    sample = sample_of({"image": "https://example.org/a.png", "answer": "x"}, allow_urls=True)
    assert sample.images[0].source == "https://example.org/a.png"


def test_guess_is_said_in_one_line_and_can_be_overridden(folder):
    rows = open_rows(_file(folder, {"picture": RED, "text": "Q", "comment": "A", "answer": "B", "id": 1}))
    layout = guess_layout(rows, Columns())
    assert layout.sentence == (
        "some.jsonl: images from 'picture', answers from 'answer'; not learned: 'text', 'comment', 'id'. "
        "Set data.columns to change this."
    )
    layout = guess_layout(rows, Columns(question="text", answer="comment"))
    sample = to_sample(rows[0], layout, RefReader(folder))
    assert shape(sample) == [("user", 0, "Q"), ("assistant", "A")]
    assert sample.columns == {"answer": "B", "id": 1}


def test_column_that_is_not_there_is_answered_with_those_that_are(folder):
    rows = open_rows(_file(folder, {"picture": RED, "note": "x"}))
    with pytest.raises(
        DataError, match=r"data\.columns\.image is 'pictures', but there are .* Did you mean 'picture'\?"
    ):
        guess_layout(rows, Columns(image="pictures"))
    with pytest.raises(
        DataError, match=r"no column looks like the answer among the columns 'picture', 'note'; name it"
    ):
        guess_layout(rows, Columns())


def test_file_in_which_no_row_can_be_read_shows_the_first_fault(folder):
    (folder / "broken.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match=r"none of the first 2 rows can be read\. broken\.jsonl:1: not JSON"):
        guess_layout(open_rows(folder / "broken.jsonl"), Columns())


def test_read_samples_is_a_lazy_list(folder):
    samples = read_samples(_file(folder, {"image": RED, "answer": "a"}, {"image": "gone.png", "answer": "b"}))
    assert len(samples) == 2
    assert samples[0].messages[0].parts == (ImageMark(0),)
    with pytest.raises(RowError, match=r"some\.jsonl:2: .*gone\.png is missing"):
        samples[-1]
    with pytest.raises(IndexError):
        samples[2]


def test_config_without_a_file_says_which_setting_names_one():
    from lensmith.config.tree import Data

    with pytest.raises(ConfigError, match=r"data\.train names no data file \(it is None\).*data\.train=rows\.jsonl"):
        read_samples(Data())
    with pytest.raises(ConfigError, match=r"data\.test names no data file \(it is 0\.1\)\. It is a share"):
        read_samples(Data(test=0.1), which="test")
