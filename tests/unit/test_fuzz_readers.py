"""No data file, however broken, makes a reader stumble: it is read, or refused by a sentence, in time.

A small share of what tools/fuzz.py does; docs/log.md says how many cases were run by hand.
"""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tools.fuzz import Fuzzer, bend
from tools.fuzz_targets import CHATS, LAYOUTS, PATHS, TABLES, TARGETS, furnish, lines, read_file

from lensmith.data.refs import RefReader
from lensmith.data.samples import to_sample
from lensmith.data.spans import csv_spans, line_spans
from lensmith.errors import LensmithError, RowError, readable
from lensmith.types import Row, Sample, Text

CASES = 2_200
SEED = 20261124


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return furnish(tmp_path_factory.mktemp("fuzz"))


def test_what_is_bent_is_read_when_it_is_straight(folder):
    """Else the cases would all end at the same first check."""
    for target in TARGETS:
        if target.name in ("picture", "pdf", "zip", "boxes", "video"):
            for content in target.inputs:
                target.read(content, folder)
    for row in (*CHATS, *TABLES):
        read_file("rows.jsonl", lines((row,)), folder)
    assert len(CHATS) + len(TABLES) == 13
    assert sum(len(target.inputs) for target in TARGETS) > 100
    assert len(PATHS) > 5


@pytest.mark.parametrize("guide", [False, True])
def test_nothing_but_our_own_errors_comes_out(tmp_path, guide):
    found = Fuzzer(list(TARGETS), tmp_path, seed=SEED + guide, guide=guide).run(cases=CASES // 2, seconds=None)
    told = "\n".join(f"{what} ({label}): {content[:200]!r}" for what, (label, content) in found.stumbles.items())
    assert not found.stumbles, told
    assert sum(found.cases.values()) == CASES // 2
    assert sum(found.refused.values()) > CASES // 4, "bending breaks most inputs"
    assert sum(found.fine.values()) > CASES // 20, "and leaves some"


def test_cases_follow_from_seed_and_number():
    inputs = list(TARGETS[0].inputs)
    first, second = ([bend(inputs[0], inputs, (), random.Random(f"1/{n}")) for n in range(50)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 40


WORDS = st.text(max_size=20) | st.sampled_from(["<image>", "a.png", "<think>"])
KEYS = st.sampled_from(["role", "content", "from", "value", "type", "image", "text", "video", "bytes", "path"])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
NAMES = ("image", "images", "question", "answer", "messages", "conversations", "system", "video")


@settings(max_examples=200, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1), layout=st.sampled_from(LAYOUTS))
def test_any_row_becomes_a_sound_sample_or_a_sentence(folder, fields, layout):
    row = Row("rows.jsonl:1", fields)
    sample, refusal = outcome(row, layout, folder)
    if sample is None:
        assert (refusal.where, str(refusal).isprintable()) == (row.where, True)
        faults: list[RowError] = []
        _, last = outcome(row, layout, folder, faults)
        assert refusal.code in {fault.code for fault in (*faults, last) if fault}, (
            "the list holds the one that is raised"
        )
        return
    assert sample.messages
    marks = [part for message in sample.messages for part in message.parts if not isinstance(part, Text)]
    assert len(marks) == len(sample.images) + len(sample.videos)
    assert all("<think>" not in message.text for message in sample.messages if message.role == "assistant")


def outcome(row, layout, folder, faults=None) -> tuple[Sample | None, RowError | None]:
    try:
        return to_sample(row, layout, RefReader(folder), reasoning="drop", faults=faults), None
    except RowError as refusal:
        return None, refusal


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), min_size=1, max_size=5))
def test_spans_of_lines_hold_the_rows_that_were_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("spans") / "rows.jsonl"
    content = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(content)
    assert [json.loads(content[start:stop]) for start, stop, _ in line_spans(path)] == rows


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200), delimiter=st.sampled_from(",;\t"))
def test_spans_of_tables_are_in_order_and_inside_the_file(tmp_path_factory, content, delimiter):
    path = tmp_path_factory.mktemp("spans") / "rows.csv"
    path.write_bytes(content)
    try:
        spans = list(csv_spans(path, delimiter))
    except LensmithError:
        return
    edges = [edge for start, stop, _ in spans for edge in (start, stop)]
    assert edges == sorted(edges)
    assert not edges or edges[-1] <= len(content)


@given(st.text())
def test_sentences_are_one_printable_line(text):
    assert readable(text).isprintable()
    assert len(readable("x" * 100_000)) < 1_000
    assert readable("é 字 \n") == "é 字 \\n"
