"""The page of a check: complete in itself, safe with any data, small, and true to what is learned."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lensmith.check.findings import CODES
from lensmith.check.page import write_page
from lensmith.check.page.choice import choose_rows
from lensmith.check.page.picture import Box, write_picture
from lensmith.check.report import (
    AnswerReport,
    CheckReport,
    Example,
    FileReport,
    Finding,
    Histogram,
    ImageReport,
    LargeRow,
    PackReport,
    Spread,
    TokenReport,
)
from lensmith.config.tree import Boxes, Data, Images
from lensmith.data.encode import Encoder
from lensmith.data.source import open_source
from lensmith.errors import RowError
from lensmith.evals.markup import show

MOST_BYTES = 20_000_000
HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m & \"quoted\" 'so' <img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def encoder(processor) -> Encoder:
    return Encoder.from_processor(processor, Images(max_tokens=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten pictures p0.png to p9.png of growing size, one JPEG cut off, and one that is text."""
    place = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(10):
        shape = (40 + 40 * number, 64 + 30 * number, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(place / f"p{number}.png")
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / "whole.jpg")
    (place / "cut.jpg").write_bytes((place / "whole.jpg").read_bytes()[:2000])
    (place / "text.png").write_text("no picture")
    return place


@pytest.fixture
def source_of(folder, encoder, tmp_path):
    """`source_of(rows)` -> the source of a file with these rows."""

    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return open_source(Data(train=str(path), image_root=folder), encoder, which="train")

    return write


def ask(image, question="What is it?", answer="a colour"):
    return {"image": image, "question": question, "answer": answer}


ROWS = [ask(f"p{number % 10}.png", f"Question {number}?", f"Answer {number}.") for number in range(40)]


def report_of(source, *findings: Finding) -> CheckReport:
    """A report of the usable rows, with those findings."""
    encoded = {}
    for row in range(len(source)):
        try:
            encoded[row] = source.encoded(row)
        except RowError:
            continue
    tokens = np.array([sample.num_tokens for sample in encoded.values()])
    image = np.array([sum(i.tokens for i in sample.images) for sample in encoded.values()])
    learned = np.array([sample.num_learned for sample in encoded.values()])
    counts, edges = np.histogram(tokens, bins=np.linspace(tokens.min(), tokens.max() + 16, 17).astype(int))
    shares = image.sum() / tokens.sum()
    largest = max(encoded, key=lambda row: encoded[row].num_tokens)
    sizes = [i for sample in encoded.values() for i in sample.images]
    spread = Spread.of(np.array([i.original_px[0] for i in sizes]))
    return CheckReport(
        rows=len(source),
        refused=len(source) - len(encoded),
        files=(FileReport("rows.jsonl", "train", len(source), len(source) - len(encoded), "Columns as named."),),
        findings=findings,
        tokens=TokenReport(
            budget=2048,
            total=int(tokens.sum()),
            image=int(image.sum()),
            learned=int(learned.sum()),
            per_row=Spread.of(tokens),
            image_per_row=Spread.of(image),
            learned_per_row=Spread.of(learned),
            histogram=Histogram(
                tuple(edges.tolist()),
                tuple(counts.tolist()),
                tuple((counts * 50 * shares).astype(int).tolist()),
                tuple((counts * 50 * (1 - shares)).astype(int).tolist()),
            ),
            largest=(
                LargeRow("train", largest, encoded[largest].where, int(tokens.max()), int(image.max())),
            ),
        ),
        images=ImageReport(
            len(sizes), len({i.ref.key for i in sizes}), {"PNG": len(sizes)}, 3, 1, spread, spread, spread, spread,
            Spread.of(np.array([i.scale for i in sizes])),
        ),
        packs=PackReport(len(encoded), 3, 0.93, 120, 9, None),
        answers=AnswerReport(Spread.of(learned), 40, ("Answer <1>.", 2), {"Latin": 0.98, "Han": 0.02}),
        sentences=("Token counts assume <Qwen3-VL>.",),
        decoded=True,
        rows_in_all=len(source),
        took_s=1.5,
    )  # fmt: skip


def finding(code, *examples: Example) -> Finding:
    kind = CODES[code]
    return Finding(code, kind.severity, len(examples), tuple(e.where for e in examples), kind.fix, examples)


def example(row: int, sentence: str, where: str | None = None) -> Example:
    return Example("train", row, where or f"rows.jsonl:{row + 1}", sentence)


@pytest.fixture
def page_of(source_of, tmp_path):
    """`page_of(rows, *findings, **options)` -> the page as text."""

    def page(rows, *findings, **options):
        source = source_of(rows)
        write_page(report_of(source, *findings), {"train": source}, tmp_path / "report.html", seed=0, **options)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return page


class Reader(HTMLParser):
    """Collects open tags, everything that a browser would fetch or run, and the targets and ends of links."""

    VOID = ("meta", "img", "br", "input", "path", "rect")

    def __init__(self, page):
        super().__init__()
        self.open, self.fetched, self.links, self.ids, self.handlers, self.alts = [], [], set(), [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag not in ("script", "iframe", "object", "link", "form"), tag
        if tag not in self.VOID:
            self.open.append(tag)
        names = dict(attrs)
        self.fetched += [names["src"]] if "src" in names else []
        self.links |= {names["href"]} if "href" in names else set()
        self.ids += [names["id"]] if "id" in names else []
        self.handlers += [name for name in names if name.startswith("on")]
        if tag == "img":
            self.alts.append(names["alt"])

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def words(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page[page.index("<body") :]))


def test_page_is_well_formed_fetches_nothing_and_runs_nothing(page_of):
    page = page_of(ROWS, finding("exif_rotated", example(3, "Turned.")), finding("duplicate_row", example(4, "Twice.")))
    reader = Reader(page)
    assert len(reader.fetched) > 20
    assert all(address.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for address in reader.fetched)
    assert "url(" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert reader.handlers == []
    assert len(reader.ids) == len(set(reader.ids))
    assert {link.removeprefix("#") for link in reader.links} <= set(reader.ids), "every link leads somewhere"
    assert all(reader.alts), "every picture has words"


def test_hostile_rows_show_as_text(page_of):
    rows = [ask("p0.png", HOSTILE, HOSTILE), *ROWS[:3], ask("text.png", HOSTILE, HOSTILE)]
    where = "<b>rows</b>.jsonl:5"
    page = page_of(rows, finding("unreadable_image", example(4, HOSTILE, where)), blind=HOSTILE)
    reader = Reader(page)
    assert reader.handlers == []
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page, "no text turns the direction of what follows"
    assert "⟨U+202E⟩␛" in page.replace("</i><i>", "")
    assert "&lt;b&gt;rows&lt;/b&gt;.jsonl:5" in page


def test_halves_of_characters_do_not_stop_the_page(page_of):
    page = page_of(ROWS[:3], finding("empty_answer", example(1, "\ud83d is half a character")))
    assert "⟨U+D83D⟩ is half a character" in page


def test_learned_tokens_are_marked_and_nothing_else(page_of):
    page = page_of([ask("p0.png", "Which colour?", "Deep red."), ask(None, "2 + 2?", "4")])
    marked = [
        re.sub(r'<span class="hidden">.*?</span>|<[^>]+>', "", mark) for mark in re.findall(r"<mark>(.*?)</mark>", page)
    ]
    assert sorted(marked[1:]) == ["4&lt;|im_end|&gt;", "Deep red.&lt;|im_end|&gt;"], "the first is the legend's"


def test_image_tokens_are_counted_not_repeated(page_of, source_of):
    tokens = source_of(ROWS[9:10]).encoded(0).images[0].tokens
    assert f"&lt;|image_pad|&gt; × {tokens}" in page_of(ROWS[9:10])
    assert page_of(ROWS[9:10]).count("|image_pad|") == 1


def test_captions_say_size_on_disk_size_seen_and_tokens(page_of, source_of):
    size = source_of(ROWS[9:10]).encoded(0).images[0]
    (height, width), (H, W) = size.original_px, size.seen_px
    said = words(page_of(ROWS[9:10]))
    assert f"{width:,} × {height:,} → {W:,} × {H:,} px, {size.scale:.0%} of the side: {size.tokens} tokens" in said


def test_refused_rows_are_shown_as_on_disk_with_their_reason(page_of):
    rows = [*ROWS[:3], ask("text.png", "What is this?", "unknown")]
    page = page_of(rows, finding("unreadable_image", example(3, "text.png: is not a picture.")))
    said = words(page)
    assert "Not ready to train" in said
    assert "4 rows = 3 ok + 1 refused; 1 error." in said
    assert "cannot be used; as it is on disk:" in said
    assert "unreadable_image text.png: is not a picture." in said
    assert "question: What is this?" in said
    assert '<a href="#train-3">' in page, "the finding leads to the row"
    assert "rows.jsonl:4: text.png: is not a picture." in said


def test_a_refused_row_drawn_at_random_tells_its_own_fault(page_of):
    assert "unreadable_image" in words(page_of([ask("text.png"), ROWS[0]]))


def test_a_picture_whose_pixels_cannot_be_decoded_leaves_its_reason_and_the_prompt(page_of):
    said = words(page_of([ask("cut.jpg", "What was it?", "a photo"), ROWS[0]]))
    assert "the file was probably cut off" in said
    assert "What was it?" in said


def test_of_many_rows_with_a_finding_some_are_named_and_all_are_counted(page_of):
    said = words(page_of(ROWS, finding("exif_rotated", *(example(row, "was turned upright.") for row in range(12)))))
    assert "rows.jsonl:1: was turned upright." in said
    assert "Also rows.jsonl:2, rows.jsonl:3, rows.jsonl:4, rows.jsonl:5 and 7 more" in said


def test_clean_data_is_ready_and_says_that_nothing_was_found(page_of):
    said = words(page_of(ROWS))
    assert "Ready to train" in said
    assert "40 rows = 40 ok + 0 refused; nothing found." in said
    assert "Nothing found." in said
    assert "Token counts assume &lt;Qwen3-VL&gt;." in said


def test_every_finding_is_named_with_its_meaning_and_its_fix(page_of):
    findings = [finding(code, example(number % 40, f"sentence {number}")) for number, code in enumerate(CODES)]
    said = words(page_of(ROWS, *findings))
    for code, kind in CODES.items():
        assert code in said
        assert show(kind.meaning) in said
        assert show(kind.fix) in said


def test_rows_are_chosen_by_seed_at_the_edges_and_from_every_finding(source_of):
    source = source_of(ROWS)
    findings = [
        finding("duplicate_row", *(example(row, "copy") for row in range(20))),
        finding("mode_converted", example(33, "grey")),
    ]
    report = report_of(source, *findings)
    choices = choose_rows(report, {"train": source}, seed=0, rows=24)
    groups = {group: [c.row for c in choices if c.group == group] for group in ("drawn", "edges", "found")}
    assert len({c.row for c in choices}) == len(choices) == 24
    assert 33 in groups["found"], "the only row of a finding is there, however many rows the other has"
    assert len(groups["found"]) == 12
    told = [reason.text for choice in choices for reason in choice.reasons]
    assert f"Most tokens: {report.tokens.largest[0].tokens:,}." in told
    assert {"Fewest tokens of all rows.", "Most reduced picture of all rows.", "Longest answer of all rows."} <= set(
        told
    )
    assert choices == choose_rows(report, {"train": source}, seed=0, rows=24)
    assert choices != choose_rows(report, {"train": source}, seed=1, rows=24)


def test_a_page_of_few_rows_shows_each_once(source_of):
    source = source_of(ROWS[:3])
    assert sorted(c.row for c in choose_rows(report_of(source), {"train": source}, seed=0, rows=24)) == [0, 1, 2]


def test_the_page_stays_under_its_limit_whatever_the_rows(page_of):
    """Six noisy pictures a row, which no JPEG makes small, and more of every text than is shown, all of it escaped."""
    row = {
        "images": [f"p{number}.png" for number in (9, 8, 7, 6, 5, 4)],
        "messages": [
            {"role": "user", "content": "<image>" * 6 + '"' * 5_000},
            {"role": "assistant", "content": "<&" * 3_000},
        ],
    }
    findings = [finding(code, *(example(row, "<" * 100_000, "&" * 10_000) for row in range(20))) for code in CODES]
    page = page_of([row] * 24, *findings)
    Reader(page)
    assert len(page.encode()) < MOST_BYTES
    assert "and 2 more pictures" in words(page)
    assert "more tokens" in words(page)


BOXES = json.dumps([{"bbox_2d": [100, 200, 500, 600], "label": "<cat>"}, {"point_2d": [250, 750], "label": "nose"}])


def test_boxes_are_those_of_the_decoded_ids(page_of):
    page = page_of([ask("p9.png", 'Is it inside {"bbox_2d": [10, 20, 30, 40]}?', BOXES), ROWS[0]])
    assert re.findall(r'<path class="over (\w+)" d="(.*?)"', page) == [
        ("question", "M10 20H30V40H10z"),
        ("answer", "M100 200H500V600H100z"),
        ("answer", "M250 750h0"),
    ]
    assert "<code>100, 200, 500, 600</code>" in page


def test_declared_boxes_are_drawn_as_converted(folder, encoder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ask("p9.png", "Where?", '{"bbox_2d": [67, 40, 167, 200]}')))  # p9.png has 334 x 400 px
    for target in ("xyxy_1000", "resized_px"):
        data = Data(train=str(path), image_root=folder, boxes=Boxes(convention="xyxy_px", target=target))
        source = open_source(data, encoder, which="train")
        write_page(report_of(source), {"train": source}, tmp_path / "report.html", seed=0)
        (outline,) = re.findall(r'<path class="over answer" d="(.*?)"', (tmp_path / "report.html").read_text())
        numbers = [float(number) for number in re.findall(r"[\d.]+", outline)]
        # Resized pixels are whole, so a thousandth of 256 px and more may be two away.
        assert numbers == pytest.approx([201, 100, 500, 500, 201], abs=2)


def test_of_many_pictures_a_box_lies_in_the_one_that_it_names(page_of):
    named = json.dumps([{"bbox_2d": [1, 2, 3, 4], "image_index": 1}, {"bbox_2d": [5, 6, 7, 8]}])
    row = {"images": ["p0.png", "p1.png"], "messages": [
        {"role": "user", "content": "<image><image>Where?"}, {"role": "assistant", "content": named}]}  # fmt: skip
    first, second = re.findall(r"<figure>(.*?)</figure>", page_of([row, ROWS[0]]), re.DOTALL)[:2]
    assert "<path" not in first
    assert "M1 2H3V4H1z" in second
    assert "M5 6" not in second, "a box that names no picture is not drawn just anywhere"


def test_large_noise_is_embedded_within_its_bytes():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    assert len(write_picture(noise, [], alt="noise", most_bytes=60_000)) < 60_000 * 4 / 3 + 500


def test_boxes_lie_over_the_picture_in_thousandths_and_say_whose_they_are():
    picture = write_picture(
        Image.new("RGB", (64, 32)),
        [Box("box", (100, 200, 500, 600), True), Box("point", (250, 750), False)],
        alt="two",
        most_bytes=1000,
    )
    assert 'viewBox="0 0 1000 1000" preserveAspectRatio="none"' in picture
    assert '<path class="over answer" d="M100 200H500V600H100z"/>' in picture
    assert '<path class="over question" d="M250 750h0"/>' in picture
    assert 'style="left:10.00%;top:20.00%">1</b>' in picture


def test_small_pictures_are_enlarged_by_whole_pixels_and_kept_lossless():
    picture = write_picture(Image.new("RGB", (64, 32)), [], alt="small", most_bytes=10_000)
    assert "--w:256;--h:128" in picture
    assert 'class="pixels" src="data:image/png' in picture
