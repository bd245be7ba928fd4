"""The before/after page: complete in itself, safe to open, and honest about right and wrong."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from lensmith.evals.page import Example, Gallery, Line, _example, draw_loss_curve, render_page, smooth
from lensmith.evals.score import Comparison, Score

BEFORE, AFTER = Score("normalised", 0.4, 0.37, 0.43, 1000), Score("normalised", 0.97, 0.958, 0.979, 1000)
COMPARISON = Comparison(wins=580, losses=10, ties=410, p_value=1e-150, difference=0.57, low=0.54, high=0.6)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "wide.jpg"
    Image.new("RGB", (1200, 30), "teal").save(path)
    return path


@pytest.fixture
def page(tmp_path, picture):
    curve = tmp_path / "loss.png"
    draw_loss_curve([16] * 40, [3 / (step + 1) for step in range(40)], curve, title="Loss")
    example = Example(picture, "<script>alert(1)</script> & is it teal?", "yes", "", "yes", False, True)
    return render_page(
        title="tiny & data",
        summary="Tested.",
        facts={"training": "171 s"},
        table=[Line("all", BEFORE, AFTER)],
        comparison=COMPARISON,
        curve=curve,
        curve_text="Loss falls.",
        galleries=[Gallery("Drawn", "One of 1,000.", [example]), Gallery("Still wrong", "None.", [])],
        footer="Made by a test.",
    )


class Reader(HTMLParser):
    """Collects open tags and everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.tags = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_fetches_nothing(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(reader.fetched) == 2
    assert all(address.startswith("data:image/png;base64,") for address in reader.fetched)
    assert "url(" not in page
    assert "$" not in page, "every blank of the template is filled in"


def test_questions_and_answers_cannot_inject_markup(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; is it teal?" in page
    assert "<script" not in page
    assert "<title>tiny &amp; data</title>" in page


def test_table_shows_both_scores_with_their_intervals(page):
    text = re.sub(r"<[^>]+>", " ", page).replace("\u00a0", " ")
    for shown in ("n = 1,000", "40.0 %", "37.0 to 43.0", "97.0 %", "95.8 to 97.9"):
        assert shown in text
    assert "580 wrong answers became right and 10 right ones became wrong (p &lt; 0.0001" in text


def test_right_and_wrong_are_told_without_colour(page):
    before, after = re.findall(r'<dd class="(?:right|wrong)">.*?</dd>', page)
    assert "✗" in before
    assert "wrong: " in before
    assert "(nothing)" in before, "an empty answer is shown as such"
    assert "✓" in after
    assert "right: " in after


def test_a_rambling_answer_is_cut_on_the_page(tmp_path, picture):
    example = Example(picture, "what?", "yes", "shape" * 1000, "yes", False, True)
    assert len(_example(example)) < 2000


def test_a_gallery_without_examples_leaves_no_heading(page):
    assert "Drawn" in page
    assert "Still wrong" not in page


def test_large_pictures_are_embedded_small(page):
    assert len(page) < 100_000


def test_smoothing_starts_and_ends_on_the_data_and_keeps_a_straight_line():
    values = [float(value) for value in range(100)]
    assert smooth(values) == pytest.approx(values)
    assert smooth([3.0]) == [3.0]


def test_loss_curve_is_a_light_picture_of_the_stated_size(tmp_path):
    path = tmp_path / "loss.png"
    draw_loss_curve([7], [0.5], path, title="One step")
    with Image.open(path) as image:
        assert image.size == (1280, 640)
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
