"""What people do with `lensmith check`: look at a file they were given, mend it, and train on what is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.fixtures.make_broken import jpeg, make_broken, photo, raw, row, save

from lensmith import cli
from lensmith.check.findings import CODES
from lensmith.data.source import read_samples

COLUMNS = 80
FLOOD_ROWS = 200_000
"""More than a fast machine reads before its first line of progress."""
LONG_WAIT_S = 120
"""For a process that loads torch on a busy machine."""


@pytest.fixture
def check(capsys, tmp_path, monkeypatch):
    """`check("rows.jsonl", ...)` -> exit code, the JSON object, what a person reads; in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, dict, str]:
        code = cli.main(["check", *arguments, "--json", "data.workers=0"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return call


@pytest.fixture
def broken(tmp_path) -> Path:
    make_broken(tmp_path / "set")
    return tmp_path / "set" / "made"


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(one.line for one in rows))
    return str(path)


def test_a_sound_file_is_clean_and_the_page_is_written(check, tmp_path):
    rows = [row(save(tmp_path, f"{n}.jpg", jpeg(photo(n))), f"Number {n}?", f"It is {n}.") for n in range(4)]
    code, told, screen = check(write(tmp_path / "rows.jsonl", rows))
    assert code == 0
    assert {"rows", "ok", "refused", "files", "findings", "tokens", "images"} <= set(told)
    assert (told["rows"], told["ok"], told["refused"], told["findings"]) == (4, 4, 0, [])
    assert told["files"]["rows.jsonl"] | {"layout": ""} == {
        "side": "train", "rows": 4, "ok": 4, "refused": 0, "layout": "", "boxes": None,
    }  # fmt: skip
    assert told["tokens"]["image"] + told["tokens"]["text"] == told["tokens"]["total"]
    assert sum(told["tokens"]["histogram"]["rows"]) == 4
    assert sum(told["tokens"]["histogram"]["image_tokens"]) == told["tokens"]["image"]
    assert told["images"]["formats"] == {"JPEG": 4}
    assert screen.splitlines()[-2:] == [
        "4 rows = 4 ok + 0 refused; nothing found.",
        "Wrote report.html: rows as the model sees them.",
    ]
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_a_broken_file_exits_with_1_and_one_object_that_adds_up(check, broken, tmp_path):
    code, told, screen = check(str(broken / "train.jsonl"), f"data.test={broken / 'test.jsonl'}", "--no-html")
    assert code == 1
    assert told["ok"] + told["refused"] == told["rows"] == sum(file["rows"] for file in told["files"].values())
    assert set(told["files"]) == {"train.jsonl", "test.jsonl"}
    for finding in told["findings"]:
        assert set(finding) == {"code", "severity", "count", "where", "fix"}
        assert finding["fix"] == CODES[finding["code"]].fix
        assert all(place.startswith(("train.jsonl:", "test.jsonl:")) for place in finding["where"])
        assert finding["code"] in screen
    assert "Traceback" not in screen
    assert not (tmp_path / "report.html").exists()


def test_what_a_person_reads_fits_80_columns(check, broken):
    screen = check(str(broken / "train.jsonl"), "--no-html")[2]
    report = screen[screen.index("\nfound") :]
    too_wide = [line for line in report.splitlines() if len(line) > COLUMNS and " " in line.strip()]
    assert not too_wide
    for part in ("tokens", "images", "answers", "training", "boxes", "█", "░", "rows = "):
        assert part in report


def test_a_clean_copy_is_clean_and_holds_the_same_good_rows(check, broken, tmp_path):
    before = {path: path.read_bytes() for path in broken.iterdir()}
    config = write_config(tmp_path, train=broken / "train.jsonl", test=broken / "test.jsonl")
    code, told, screen = check(config, "--fix", "clean", "--no-html")
    assert code == 1  # of the data that was checked
    assert {path: path.read_bytes() for path in broken.iterdir()} == before
    assert "the original is as it was." in screen
    left_out = [json.loads(line) for line in (tmp_path / "clean" / "left-out.ndjson").open()]
    copies = next(finding["count"] for finding in told["findings"] if finding["code"] == "duplicate_row")
    assert len(left_out) == told["refused"] + copies
    assert f"Left out {len(left_out)} rows: " in screen
    assert all(set(line) == {"where", "code", "why"} and line["why"].endswith(".") for line in left_out)

    again = write_config(tmp_path, train=tmp_path / "clean" / "train.jsonl", test=tmp_path / "clean" / "test.jsonl")
    code, clean, _ = check(again, "--no-html")
    assert code == 0
    assert (clean["refused"], clean["rows"]) == (0, told["ok"] - copies)
    left = {finding["code"] for finding in clean["findings"]}
    # What only their owner can decide.
    assert left == {
        "leak_train_test", "conflicting_answer", "near_duplicate", "media_token_in_text", "endless_answer", "too_long",
    }  # fmt: skip


def test_copied_pictures_are_what_the_model_saw(check, tmp_path):
    pictures = {
        "turned.jpg": jpeg(photo(1), orientation=6),
        "cmyk.jpg": jpeg(photo(2).convert("CMYK")),
        "plain.jpg": jpeg(photo(3)),
    }
    rows = [row(save(tmp_path, name, content), f"What is {name}?", name) for name, content in pictures.items()]
    source = write(tmp_path / "rows.jsonl", rows)
    assert check(source, "--fix", "clean", "--no-html")[0] == 0
    from lensmith.data.images import open_image

    for old, new in zip(read_samples(source), read_samples(tmp_path / "clean" / "rows.jsonl"), strict=True):
        assert (old.question, old.answer) == (new.question, new.answer)
        np.testing.assert_array_equal(open_image(old.images[0]), open_image(new.images[0]))
    copies = sorted((tmp_path / "clean" / "images").iterdir())
    assert [path.suffix for path in copies] == [".png", ".jpg", ".png"]
    assert copies[1].read_bytes() == pictures["plain.jpg"]
    assert Image.open(copies[2]).size == photo(1).size[::-1]


def test_boxes_that_all_prove_one_convention_are_converted(check, tmp_path):
    name = save(tmp_path, "large.jpg", jpeg(photo(1, (2000, 1000))))
    boxes = [[1200, 40, 1500, 90], [1100, 500, 1900, 900], [100, 40, 1500, 90]]
    rows = [row(name, f"Where is {n}?", json.dumps([{"bbox_2d": box, "label": "x"}])) for n, box in enumerate(boxes)]
    source = write(tmp_path / "rows.jsonl", rows)
    code, told, _ = check(source, "--no-html")
    assert code == 1
    assert [(finding["code"], finding["count"]) for finding in told["findings"]] == [("box_convention", 3)]
    _, _, screen = check(source, "--fix", "clean", "--no-html")
    assert "boxes are now from 0 to 1000; they were xyxy_px. Take data.boxes out of your settings." in screen
    found = [json.loads(sample.answer)[0]["bbox_2d"] for sample in read_samples(tmp_path / "clean" / "rows.jsonl")]
    assert found == [[600, 40, 750, 90], [550, 500, 950, 900], [50, 40, 750, 90]]
    assert check("clean/rows.jsonl", "--no-html")[0] == 0


def test_every_layout_is_copied_as_it_was(check, tmp_path):
    names = [save(tmp_path, f"{n}.jpg", jpeg(photo(n))) for n in range(3)]
    parts = [{"type": "image", "image": names[0]}, {"type": "text", "text": "Which?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "This."}]}
    files = {
        "parts.jsonl": raw({"id": 7, "messages": [{"role": "user", "content": parts}, answer]}).line,
        "llava.json": json.dumps(
            [
                {
                    "image": names[1],
                    "conversations": [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "That."}],
                }
            ]
        ),
        "table.csv": f"image,question,answer\n{names[2]},Which?,Those.\n",
        "several.jsonl": row([names[0], names[1]], "Both?", "Both.").line,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert check(name, "--fix", f"clean-{name}", "--no-html")[0] == 0, name
        copy = tmp_path / f"clean-{name}" / f"{Path(name).stem}.jsonl"
        (old,), (new,) = read_samples(tmp_path / name), read_samples(copy)
        assert old.messages == new.messages
        assert [ref.source.read_bytes() for ref in old.images] == [ref.source.read_bytes() for ref in new.images]
    assert json.loads((tmp_path / "clean-parts.jsonl" / "parts.jsonl").read_text())["id"] == 7


def test_a_folder_with_files_is_not_written_to(check, tmp_path):
    source = write(tmp_path / "rows.jsonl", [row([], "2 + 2?", "4")])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    code, told, _ = check(source, "--fix", "full")
    assert code == 1
    assert told["error"] == (
        "--fix full: holds files already; name a folder that does not exist or is empty, so that nothing is lost."
    )


def test_a_page_of_someone_else_is_not_written_over(check, tmp_path):
    source = write(tmp_path / "rows.jsonl", [row([], "2 + 2?", "4")])
    (tmp_path / "report.html").write_text("<p>the annual report</p>")
    code, told, _ = check(source)
    assert code == 1
    assert told["error"].startswith("report.html: is there already and is no page of `lensmith check`.")
    assert (tmp_path / "report.html").read_text() == "<p>the annual report</p>"
    assert check(source, "--html", "mine.html")[0] == 0
    assert check(source, "--html", "mine.html")[0] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sends Ctrl-C to a process group")
def test_ctrl_c_ends_with_a_part_of_the_report(tmp_path):
    content = jpeg(photo(1, (1600, 1200)))
    names = [save(tmp_path, f"{n}.jpg", content) for n in range(20)]
    rows = [row(names[n % 20], f"Question {n}?", f"{n}") for n in range(FLOOD_ROWS)]
    source = write(tmp_path / "rows.jsonl", rows)
    process = subprocess.Popen(
        [sys.executable, "-m", "lensmith", "check", source, "--json", "--no-html"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("reading "):
            break
    asked_at = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LONG_WAIT_S)
    told = json.loads(out)
    assert process.returncode == 1, err
    assert told["partial"] is True
    assert 0 < told["rows"] < FLOOD_ROWS
    assert told["ok"] + told["refused"] == told["rows"]
    assert f"Stopped by Ctrl-C, so this is only a part: {told['rows']:,} of {FLOOD_ROWS:,} rows read" in err.replace(
        "\n", " "
    )
    assert time.monotonic() - asked_at < LONG_WAIT_S / 4


def write_config(folder: Path, *, train: Path, test: Path) -> str:
    path = folder / "run.yaml"
    path.write_text(f"data: {{train: {train}, test: {test}}}\npack: {{tokens: 2048}}\n")
    return str(path)
