"""The labelled set of broken files is found exactly: nothing missed, no false alarm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from tests.fixtures.make_broken import Expected, chat, jpeg, make_broken, photo, raw, row, save

from lensmith.check.findings import CODES, SEVERITIES, CheckCode
from lensmith.check.inspect import Inspector
from lensmith.check.report import CheckReport
from lensmith.check.run import run_check
from lensmith.check.screen import check_screen
from lensmith.config.read import read_config
from lensmith.errors import RowCode

BLIND_TO_PIXELS = {"near_duplicate"}
"""What --quick says it cannot find."""
ELSEWHERE = {"private_address", "template_refused", "shrunk_images", "same_answers"}
"""Codes that the set does not hold: two need an address or another checkpoint, two are about a whole data set."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> tuple[Path, Expected]:
    folder = tmp_path_factory.mktemp("broken") / "set"
    return folder / "made", make_broken(folder)


@pytest.fixture
def check(tmp_path) -> Callable[..., CheckReport]:
    """`check(rows, "a.b=c", ...)` -> the report about a file with these rows, beside the pictures of `tmp_path`."""

    def report(rows: list[Any], *overrides: str, **how: Any) -> CheckReport:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row.line for row in rows))
        return run_check(read_config(None, ["data.workers=0", *overrides], data=str(path)), **how).report

    return report


def check_set(data: Path, *overrides: str, **how: Any) -> CheckReport:
    settings = [f"data.test={data / 'test.jsonl'}", "pack.tokens=2048", *overrides]
    return run_check(read_config(None, settings, data=str(data / "train.jsonl")), **how).report


def found(report: CheckReport) -> dict[str, tuple[int, list[str]]]:
    return {finding.code: (finding.count, list(finding.where)) for finding in report.findings}


@pytest.mark.parametrize("workers", [0, 2])
def test_the_broken_set_is_found_exactly(broken, workers):
    data, expected = broken
    report = check_set(data, workers=workers)
    assert found(report) == expected.findings
    assert (report.rows, report.refused) == (expected.rows, expected.refused)
    assert report.ok + report.refused == report.rows == sum(file.rows for file in report.files)
    assert not report.is_clean


def test_the_set_holds_every_code_but_those_of_whole_data_sets(broken):
    assert set(broken[1].findings) == set(CODES) - ELSEWHERE


def test_headers_alone_find_everything_but_what_pixels_tell(broken):
    data, expected = broken
    report = check_set(data, decode=False)
    assert found(report) == {code: rows for code, rows in expected.findings.items() if code not in BLIND_TO_PIXELS}
    assert report.refused == expected.refused
    assert any("near duplicates are not found" in sentence for sentence in report.sentences)


def test_every_finding_names_its_first_rows_and_says_what_is_wrong_with_them(broken):
    report = check_set(broken[0])
    for finding in report.findings:
        assert [example.where for example in finding.examples] == list(finding.where[: len(finding.examples)])
        for example in finding.examples:
            assert example.sentence.endswith((".", "!")), (finding.code, example.sentence)
            assert len(example.sentence) > 15
    missing = report.finding("missing_file")
    assert missing is not None
    assert "gone.png is missing; relative paths start from" in missing.examples[0].sentence
    copied = report.finding("duplicate_row")
    assert copied is not None
    assert copied.examples[0].sentence == "is a copy of train.jsonl:1."
    leaked = report.finding("leak_train_test")
    assert leaked is not None
    assert leaked.examples[0].sentence == "shows a picture of train.jsonl:7, which is trained on."


def test_sound_rows_alone_are_clean(broken, tmp_path):
    data, _ = broken
    shutil.copytree(data, tmp_path / "sound")
    lines = (data / "train.jsonl").read_text().splitlines()[:38]
    (tmp_path / "sound" / "train.jsonl").write_text("\n".join(lines))
    report = run_check(read_config(None, ["pack.tokens=2048"], data=str(tmp_path / "sound" / "train.jsonl"))).report
    assert report.findings == ()
    assert report.is_clean
    assert report.verdict == "38 rows = 38 ok + 0 refused; nothing found."


def test_the_catalogue_covers_every_code_once_and_ends_its_sentences():
    assert set(CODES) == {*get_args(RowCode), *get_args(CheckCode)}
    for kind in CODES.values():
        assert kind.severity in SEVERITIES
        assert kind.meaning.endswith(".")
        assert kind.fix.endswith(".")


def test_a_budget_that_halves_most_pictures_is_an_error_until_acknowledged(check, tmp_path):
    names = [save(tmp_path, f"{number}.jpg", jpeg(photo(number, (640, 480)))) for number in range(3)]
    rows = [row(name, f"What is {name}?", f"It is {name}.") for name in names]
    report = check(rows, "data.image.max_tokens=64")
    finding = report.finding("shrunk_images")
    assert (finding.severity, finding.count) == ("error", 3)
    assert finding.examples[0].sentence == "a picture of 640 x 480 px is seen at 288 x 192 px."
    assert not report.is_clean
    assert report.refused == 0
    allowed = check(rows, "data.image.max_tokens=64", "data.image.allow_shrink=true")
    assert allowed.finding("shrunk_images").severity == "note"
    assert allowed.is_clean
    assert check(rows, "data.image.max_tokens=128").finding("shrunk_images") is None  # 416 x 288: 62 percent


def test_answers_that_are_all_alike_are_told_with_their_share(check):
    rows = [row([], f"Question {number}?", "Yes." if number else "No.") for number in range(20)]
    finding = check(rows).finding("same_answers")
    assert finding.count == 19
    assert finding.examples[0].sentence == "answers 'Yes.', as 19 of 20 rows do."
    assert check([*rows, row([], "And this?", "No.")]).finding("same_answers") is None


def test_long_rows_are_reduced_refused_or_left_out_as_on_long_says(check, tmp_path):
    names = [save(tmp_path, f"{number}.jpg", jpeg(photo(number, (640, 480)))) for number in range(2)]
    rows = [row(names, "What are they?", "Two photographs.")]
    severities = {}
    for choice, sentence in {
        "shrink": " Its images are reduced until it has ",
        "drop": " It is left out, as data.on_long=drop says.",
        "error": " pack.tokens is 400. Raise pack.tokens, ",
    }.items():
        report = check(rows, "pack.tokens=400", f"data.on_long={choice}")
        finding = report.finding("too_long")
        assert finding.examples[0].sentence.startswith("needs 6")
        assert sentence in finding.examples[0].sentence
        severities[choice] = finding.severity, report.refused
    assert severities == {"shrink": ("warning", 0), "drop": ("warning", 0), "error": ("error", 1)}


def test_a_file_of_nothing_but_bad_rows_gives_a_report(check):
    report = check([raw({"images": ["gone.png"], "messages": chat("<image>What?", "That.")})] * 2)
    assert (report.rows, report.ok, report.refused) == (2, 0, 2)
    assert report.tokens.total == report.images.uses == report.packs.samples == 0
    assert [finding.code for finding in report.findings] == ["missing_file"]


def test_pictures_count_once_however_many_rows_and_names_they_have(check, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    report = check([row(name, f"{question}?", question) for name in ("a.png", "b.png") for question in ("What", "Who")])
    assert (report.images.uses, report.images.pictures) == (4, 1)
    assert report.images.formats == {"PNG": 4}


def test_ctrl_c_leaves_a_report_of_the_rows_so_far(check, tmp_path):
    rows = [row([], f"Question {number}?", f"{number}") for number in range(100)]

    def stop(done: int, total: int) -> None:
        assert total == 100
        raise KeyboardInterrupt

    report = check(rows, progress=stop)
    assert report.is_partial
    assert not report.is_clean
    assert 0 < report.rows < 100
    assert report.verdict.startswith(f"Stopped by Ctrl-C, so this is only a part: {report.rows} of 100 rows read = ")
    assert report.to_json()["partial"] is True


def test_ctrl_c_before_the_first_row_leaves_an_empty_report(check, monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Inspector, "inspect", stop)
    report = check([row([], "2 + 2?", "4")])
    assert (report.rows, report.rows_in_all, report.findings) == (0, 1, ())
    assert report.is_partial
    assert list(check_screen(report))[-1] == "nothing found."
