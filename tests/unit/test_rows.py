"""Rows of every format come out one at a time, named by file and line; broken files say what is wrong with them."""

import csv
import gc
import io
import json
import pickle
import tracemalloc

import pytest
from PIL import Image

from lensmith.data.rows import open_rows
from lensmith.errors import DataError, RowError

ROWS = [
    {"image": "a.png", "question": 'Has "quotes", commas\nand two lines?', "answer": "yes"},
    {"image": "b.png", "question": "Größe? 漢字 ]{[", "answer": "no"},
    {"image": "c.png", "question": "", "answer": "\\ and \\n"},
]


def write(path, rows=ROWS):
    """The rows in the format that the file's name says."""
    suffix = path.suffix
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows_here_and_in_a_worker(tmp_path, suffix):
    rows = open_rows(write(tmp_path / f"rows{suffix}"))
    assert len(rows) == 3
    assert [dict(row.fields) for row in rows] == ROWS
    assert [dict(row.fields) for row in pickle.loads(pickle.dumps(rows))] == ROWS
    assert dict(rows[-1].fields) == ROWS[-1]
    assert [dict(row.fields) for row in rows[1:]] == ROWS[1:]
    assert (rows.name, rows.root) == (f"rows{suffix}", tmp_path)
    with pytest.raises(IndexError, match=r"has 3 rows, no row 3"):
        rows[3]


def test_where_is_the_line_in_the_file_also_behind_blank_and_broken_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n   \n{"a": 3}\n')
    assert [row.where for row in open_rows(tmp_path / "rows.jsonl")] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5"]
    (tmp_path / "rows.csv").write_text('a,b\n1,"two\nlines"\n\n2,x\n')
    assert [row.where for row in open_rows(tmp_path / "rows.csv")] == ["rows.csv:2", "rows.csv:5"]
    assert [row.where for row in open_rows(write(tmp_path / "rows.json"))][:2] == ["rows.json#0", "rows.json#1"]


def test_byte_order_marks_and_carriage_returns_are_not_data(tmp_path):
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfimage;answer\r\na.png;x, y\r\n")
    assert dict(open_rows(tmp_path / "rows.csv")[0].fields) == {"image": "a.png", "answer": "x, y"}
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [row.fields["a"] for row in open_rows(tmp_path / "rows.jsonl")] == [1, 2]
    (tmp_path / "rows.json").write_bytes(b'\xef\xbb\xbf [{"a": 1},\r\n{"a": 2}]')
    assert [row.fields["a"] for row in open_rows(tmp_path / "rows.json")] == [1, 2]


def test_json_file_with_one_object_per_line_is_read_as_lines(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert [row.where for row in open_rows(tmp_path / "rows.json")] == ["rows.json:1", "rows.json:2"]


def test_folder_is_read_by_the_one_data_file_in_it(tmp_path):
    write(tmp_path / "rows.jsonl")
    (tmp_path / "a.png").touch()
    (tmp_path / "README.md").write_text("about")
    rows = open_rows(tmp_path)
    assert (len(rows), rows.root) == (3, tmp_path)
    write(tmp_path / "more.csv")
    with pytest.raises(DataError, match=r"holds 2 data files \(more\.csv, rows\.jsonl\); name the one to read"):
        open_rows(tmp_path)


def test_shards_of_one_parquet_set_are_read_together(tmp_path):
    for number in range(2):
        write(tmp_path / f"train-0000{number}-of-00002.parquet", [ROWS[number]])
    rows = open_rows(tmp_path)
    assert [row.fields["image"] for row in rows] == ["a.png", "b.png"]
    assert rows[1].where == "train.parquet#1"


def test_saved_data_set_gives_labels_by_name_and_images_as_stored(tmp_path):
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    stored = {"bytes": buffer.getvalue(), "path": None}
    data = {"images": [[stored, stored], []], "image": [stored, None], "label": [1, 0]}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "set")
    rows = open_rows(tmp_path / "set")
    assert rows[0].fields == {"images": [stored, stored], "image": stored, "label": "dog"}
    assert rows[1].fields["image"] is None
    split = datasets.DatasetDict(
        {"a": datasets.Dataset.from_dict({"x": [1]}), "b": datasets.Dataset.from_dict({"x": [1]})}
    )
    split.save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"has the splits a, b, and none named 'train'"):
        open_rows(tmp_path / "splits")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", "", r"rows\.jsonl: is empty \(0 bytes\); write the rows to it"),
        ("rows.jsonl", " \n\n", r"rows\.jsonl: no rows in 3 bytes"),
        ("rows.json", "[]", r"rows\.json: no rows in 2 bytes"),
        ("rows.csv", "a,b\n", r"rows\.csv: no rows in 4 bytes"),
        ("rows.csv", "a,a\n1,2\n", r"names the column 'a' twice; it must name each column once"),
        ("rows.csv", "\n", r"names no columns"),
        ("rows.json", '[{"a": 1}, {"a": ', r"not closed; the file ends inside element 1"),
        ("rows.xlsx", "x", r"is a \.xlsx file; Lensmith reads \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
        ("rows.parquet", "not parquet", r"rows\.parquet: cannot be read as Parquet"),
    ],
)
def test_file_without_usable_rows_says_why(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=sentence):
        open_rows(tmp_path / name)


def test_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train_rows.jsonl")
    with pytest.raises(DataError, match=r"there is no such file or folder; did you mean train_rows\.jsonl\?"):
        open_rows(tmp_path / "train_row.jsonl")
    with pytest.raises(DataError, match=r"nor is there a folder .*/elsewhere"):
        open_rows(tmp_path / "elsewhere" / "rows.jsonl")
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match=r"holds no data file; put one of \.jsonl"):
        open_rows(tmp_path / "pictures")


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        (b'{"a": 1', "not_json", r"rows\.jsonl:2: not JSON \(Expecting .*, column \d+\): .* Each row is one object"),
        (b"[1]", "malformed_row", r"rows\.jsonl:2: holds a JSON list; a row is an object of columns"),
        (b"{}", "malformed_row", r"rows\.jsonl:2: holds an empty object"),
        (b"\xff\xfe", "not_json", r"rows\.jsonl:2: is not UTF-8 text"),
        (b"[" * 100_000, "not_json", r"rows\.jsonl:2: not JSON"),
    ],
)
def test_broken_line_spoils_only_itself(tmp_path, line, code, sentence):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    rows = open_rows(tmp_path / "rows.jsonl")
    assert (rows[0].fields, rows[2].fields) == ({"a": 1}, {"a": 3})
    with pytest.raises(RowError, match=sentence) as caught:
        rows[1]
    assert caught.value.code == code


def test_record_with_the_wrong_number_of_cells_is_told_with_both_numbers(tmp_path):
    (tmp_path / "rows.csv").write_text("image,question,answer\na.png,yes, or no?,x\n")
    with pytest.raises(RowError, match=r'rows\.csv:2: has 4 cells but the first line names 3 columns; put .* "double'):
        open_rows(tmp_path / "rows.csv")[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_memory_is_an_index_however_long_the_rows(tmp_path, suffix):
    """100,000 rows of 300 bytes: 30 MB of text, of which 24 bytes per row stay."""
    count = 100_000
    write(tmp_path / f"rows{suffix}", [{"image": f"{n}.png", "answer": "x" * 270} for n in range(count)])
    gc.collect()
    tracemalloc.start()
    rows = open_rows(tmp_path / f"rows{suffix}")
    for row in rows[:3]:
        assert row.fields["answer"]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == count
    assert held / count < 26
    assert peak / count < 64, "not even while indexing"
