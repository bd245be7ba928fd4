"""A scan says what every row costs and where all rows went; nothing is lost on the way and nothing leaks between parts."""

import functools
import gc
import json
import pathlib
import pickle
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from lensmith.config.tree import Data, Images, Source
from lensmith.data.encode import Encoder
from lensmith.data.images import read_patches
from lensmith.data.measure import Measurer
from lensmith.data.pool import in_chunks
from lensmith.data.scan import Scan, hold_out, scan_source
from lensmith.data.source import open_source
from lensmith.errors import DataError
from lensmith.types import IGNORE

MAX_TOKENS = 64
BUDGET = 200


@pytest.fixture(scope="module")
def encoder(processor) -> Encoder:
    return Encoder.from_processor(processor, Images(max_tokens=MAX_TOKENS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten small pictures p0.png to p9.png, one of 640 x 320 px, one of 20 x 20 px, one cut off, one that is text."""
    place = tmp_path_factory.mktemp("data")
    for number in range(10):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(place / f"p{number}.png")
    Image.new("RGB", (640, 320)).save(place / "large.jpg")
    Image.new("RGB", (20, 20)).save(place / "tiny.png")
    whole = (place / "large.jpg").read_bytes()
    (place / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (place / "text.png").write_text("no picture")
    return place


def ask(image, question="What is it?", answer="a colour"):
    return {"image": image, "question": question, "answer": answer}


GOOD = [ask(f"p{number // 2}.png", f"Question {number}?") for number in range(12)] + [ask(None, "2 + 2?", "4")]
BAD = [ask("gone.png"), ask("p1.png", answer=" "), ask("cut.jpg"), ask("text.png")]


@pytest.fixture
def scan_of(folder, encoder, tmp_path):
    """`scan_of(rows, ...)` -> the scan of a file with these rows."""

    def scan(rows, *, budget=BUDGET, on_long="shrink", on_bad_row="error", data=None, **others) -> Scan:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = open_source(
            data or Data(train=str(tmp_path / "rows.jsonl"), image_root=folder), encoder, which="train"
        )
        return scan_source(
            source, budget_tokens=budget, on_long=on_long, on_bad_row=on_bad_row, seed=others.pop("seed", 0), **others
        )

    return scan


def test_numbers_are_those_of_the_encoded_samples(scan_of):
    scan = scan_of(GOOD)
    encoded = [scan.source.encoded(row) for row in scan.rows.tolist()]
    assert scan.rows.tolist() == list(range(len(GOOD)))
    assert scan.tokens.tolist() == [sample.num_tokens for sample in encoded]
    assert scan.learned.tolist() == [sample.num_learned for sample in encoded]
    assert scan.prefix_tokens.tolist() == [sample.prefix_tokens for sample in encoded]
    assert scan.image_tokens.tolist() == [sum(image.tokens for image in sample.images) for sample in encoded]
    for a, one in enumerate(encoded):
        for b, other in enumerate(encoded):
            same = one.prefix_key is not None and one.prefix_key == other.prefix_key
            assert (scan.groups[a] == scan.groups[b]) == (same or a == b)


def test_rows_in_are_kept_and_refused_with_reasons(scan_of):
    scan = scan_of(GOOD + BAD, on_bad_row="skip")
    assert len(scan.rows) == len(GOOD)
    assert [(refusal.where, refusal.code) for refusal in scan.refused.named] == [
        ("rows.jsonl:14", "missing_file"),
        ("rows.jsonl:15", "empty_answer"),
        ("rows.jsonl:16", "truncated_image"),
        ("rows.jsonl:17", "unreadable_image"),
    ]
    *_, refused, identity = scan.sentences()
    assert identity == "17 rows in = 13 kept + 4 refused."
    assert refused.startswith("Left out: 1 missing_file (rows.jsonl:14); 1 empty_answer (rows.jsonl:15); 1 truncated")


def test_bad_rows_stop_the_scan_with_the_first_few_and_the_way_out(scan_of):
    with pytest.raises(DataError) as caught:
        scan_of(GOOD + BAD * 2)
    first, *lines, last = str(caught.value).splitlines()
    assert first == "8 of 21 rows cannot be used:"
    assert lines[0].startswith("  rows.jsonl:14: ")
    assert "gone.png is missing" in lines[0]
    assert lines[5] == "  and 3 more"
    assert last == "Mend them (`lensmith check` lists them all), or set data.on_bad_row=skip to leave them out."


def test_no_usable_row_stops_the_scan_even_when_bad_rows_are_skipped(scan_of):
    with pytest.raises(DataError, match=r"none of the 4 rows can be used:\n  rows\.jsonl:1: .*gone\.png is missing"):
        scan_of(BAD, on_bad_row="skip")


LONG = ask(["large.jpg", "large.jpg", "large.jpg", "p0.png"])


def test_row_over_the_budget_gets_smaller_images_until_it_fits(scan_of):
    wide = scan_of([*GOOD, LONG], budget=1000)
    assert (wide.shrunk, wide.tokens[-1] > 150) == ((), True)
    scan = scan_of([*GOOD, LONG], budget=100)
    assert scan.shrunk == (13,)
    assert scan.tokens[-1] <= 100 < wide.tokens[-1]
    encoded = scan.source.encoded(13)
    assert encoded.num_tokens == scan.tokens[-1]
    assert encoded.images[3].tokens == 4, "the small one is as it was"
    assert (encoded.labels != IGNORE).sum() == wide.learned[-1], "text is never cut"
    assert pickle.loads(pickle.dumps(scan.source)).encoded(13).num_tokens == scan.tokens[-1]
    sentence = next(text for text in scan.sentences() if "over the token budget" in text)
    assert sentence.startswith("1 row over the token budget: their images get at most 31 tokens each")
    assert "(rows.jsonl:14). Raise pack.tokens to keep them whole." in sentence


def test_row_over_the_budget_is_dropped_or_an_error_where_that_is_asked(scan_of):
    scan = scan_of([*GOOD, LONG], budget=100, on_long="drop")
    assert (len(scan.rows), scan.dropped.named[0].where, scan.dropped.named[0].code) == (
        13,
        "rows.jsonl:14",
        "too_long",
    )
    assert scan.sentences()[-1] == "14 rows in = 13 kept + 0 refused + 1 dropped."
    with pytest.raises(
        DataError, match=r"rows\.jsonl:14: needs \d+ tokens, 1\d\d of them for images, but pack\.tokens is 100"
    ):
        scan_of([*GOOD, LONG], budget=100, on_long="error", on_bad_row="skip")
    with pytest.raises(DataError, match=r"pack\.tokens is 100 and smaller images would not do\. Raise pack\.tokens"):
        scan_of([*GOOD, ask("large.jpg", answer="word " * 200)], budget=100)


def test_pictures_that_the_limits_change_are_counted_once_each(scan_of):
    scan = scan_of([ask("large.jpg"), ask("large.jpg", "And now?"), ask("tiny.png"), ask("p0.png")])
    assert (scan.images.pictures, scan.images.reduced, scan.images.enlarged) == (3, 1, 1)
    assert scan.images.median_scale == pytest.approx(scan.source.encoded(0).images[0].scale)
    assert scan.sentences()[0].startswith("3 pictures; 1 reduced to data.image.max_tokens=64: sides to 5")
    assert "1 enlarged to data.image.min_tokens=4" in scan.sentences()[0]
    assert scan_of(GOOD).sentences()[0] == "6 pictures; none reduced, none enlarged."


def test_weights_repeat_rows_and_draw_a_seeded_part(scan_of, tmp_path, folder):
    for name, count in (("a", 10), ("b", 10)):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(ask("p0.png", f"{name}{n}")) for n in range(count))
        )
    sources = [
        Source(path=str(tmp_path / "a.jsonl"), weight=2.5),
        Source(path=str(tmp_path / "b.jsonl"), weight=0.3),
    ]
    data = Data(train=sources, image_root=folder)
    scan, again, other = (scan_of([], data=data, seed=seed) for seed in (0, 0, 1))
    counts = np.bincount(scan.rows, minlength=20)
    assert sorted(counts[:10]) == [2] * 5 + [3] * 5
    assert sorted(counts[10:]) == [0] * 7 + [1] * 3
    assert scan.source.sample(10).where == "b.jsonl:1"
    np.testing.assert_array_equal(scan.rows, again.rows)
    assert (scan.rows != other.rows).any()
    assert scan.sentences()[-1] == "20 rows in = 20 kept + 0 refused, which data.train's weights make 28 samples."
    assert len(scan.source.sentences) == 2


def test_held_out_pictures_are_never_trained_on(scan_of):
    rng = np.random.default_rng(0)
    rows = [ask([f"p{n}.png" for n in rng.choice(10, rng.integers(1, 3))], f"{k}") for k in range(12)]
    rows += [ask(None, f"text {k}") for k in range(20)]
    scan = scan_of(rows)
    for seed in range(5):
        train, held = hold_out(scan, 0.3, seed)
        assert sorted([*train.rows, *held.rows]) == list(range(len(rows)))
        assert 0.3 * len(rows) <= len(held.rows) < len(rows)
        pictures = [
            {image.ref.key for row in part.rows.tolist() for image in part.source.encoded(row).images}
            for part in (train, held)
        ]
        assert not pictures[0] & pictures[1]
        np.testing.assert_array_equal(held.rows, hold_out(scan, 0.3, seed)[1].rows)
    assert train.sentences()[-1] == f"{len(train.rows)} rows in = {len(train.rows)} kept + 0 refused."


def test_rows_are_connected_through_chains_of_pictures(scan_of):
    chain = [ask([f"p{n}.png", f"p{n + 1}.png"]) for n in (4, 0, 3, 1, 2)]
    scan = scan_of([*chain, ask("p8.png"), ask(None), ask("p9.png"), ask("p8.png")])
    a, b, text, c, d = scan.pictures[4:].tolist()
    assert len(set(scan.pictures[:5].tolist())) == 1
    assert b == d
    assert len({a, b, c, text}) == 4
    assert text < 0


def test_one_picture_for_all_cannot_be_held_out(scan_of):
    with pytest.raises(DataError, match=r"data\.test=0\.1: all 3 samples are about the same pictures.*data\.test=test"):
        hold_out(scan_of([ask("p0.png", f"{n}") for n in range(3)]), 0.1, 0)


def test_progress_is_told_up_to_the_last_row(scan_of):
    seen = []
    scan_of(GOOD, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(GOOD), len(GOOD))


def test_many_rows_are_scanned_by_several_processes_to_the_same_end(scan_of, folder, monkeypatch):
    small = functools.partial(in_chunks, chunk_rows=5, parallel_rows=10)  # instead of 2,000 and 20,000
    monkeypatch.setattr("lensmith.data.scan.in_chunks", small)
    rows = (GOOD + BAD) * 3
    one, two = (scan_of(rows, on_bad_row="skip", workers=workers) for workers in (1, 2))
    for name in ("rows", "tokens", "learned", "prefix_tokens", "groups", "image_tokens", "pictures"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.refused == two.refused
    assert one.sentences() == two.sentences()


def test_pixels_of_a_shrunk_row_have_as_many_patches_as_its_ids_have_room_for(scan_of):
    scan = scan_of([LONG], budget=100)
    encoded, geometry = scan.source.encoded(0), scan.source.encoder.geometry
    for image in encoded.images:
        assert len(read_patches(image, geometry)) == image.tokens * geometry.merge**2


def test_memory_of_a_scan_does_not_grow_with_what_rows_hold(folder, encoder, tmp_path):
    """100,000 rows are indexed and 4,000 measured: 24 bytes a row for the index, and numbers only for the measured."""
    count, measured = 100_000, 4_000
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(count):
            file.write(json.dumps(ask(f"p{number % 10}.png", f"Question {number}? " * 10)) + "\n")
    source = open_source(Data(train=str(tmp_path / "rows.jsonl"), image_root=folder), encoder, which="train")
    measurer = Measurer(source, BUDGET, "shrink")
    measurer.measure(0, 100)  # fills what is kept once: skeletons, tokenizer caches, image sizes
    gc.collect()
    tracemalloc.start()
    chunk = measurer.measure(0, measured)
    gc.collect()
    # Without pathlib: Python's table of interned strings, which it fills, doubles at a moment that other tests decide.
    kept = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, pathlib.__file__)])
    tracemalloc.stop()
    held = sum(trace.size for trace in kept.traces)
    assert len(chunk.numbers["rows"]) == measured
    assert held / measured < 2 * (32 + 21), "32 bytes a row and 21 an image, with room for arrays to grow"
