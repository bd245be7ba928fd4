"""The benchmark of attention's forms, on small shapes: it runs, both forms are right, and its constants are solved."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import benchmarks
import pytest
from benchmarks.table import NEEDED


@pytest.fixture(scope="module")
def forms():
    """benchmarks/attention_forms.py, which finds its neighbours beside itself."""
    folder = str(Path(*benchmarks.__path__))
    sys.path.insert(0, folder)
    try:
        import attention_forms

        yield attention_forms
    finally:
        sys.path.remove(folder)


def test_both_forms_are_what_one_softmax_per_run_computes(forms, tmp_path, monkeypatch, capsys):
    for name in ("WARM_UPS", "ROUNDS", "CALLS"):
        monkeypatch.setattr(forms, name, 1)
    out = tmp_path / "forms.json"
    forms.main(["--cpu", "--out", str(out), "--commit", "abc1234"])
    record = json.loads(out.read_text(encoding="utf-8"))
    assert set(NEEDED) <= record.keys()
    assert len(record["shapes"]) == len(forms.SMALL_SHAPES)
    for row in record["shapes"]:
        assert row["asking"] + row["groups"] * row["prefix"] == row["tokens"]
        for form in forms.FORMS:
            assert row[form]["error"] < 1e-6
            assert row[form]["ms"] > 0
    assert capsys.readouterr().out.count("\n") == len(forms.SMALL_SHAPES) + 2


def test_the_constants_come_out_of_times_that_follow_them(forms):
    rows = [
        {"copied": copied, "asking": asking, "concatenated": {"ms": 5.0}, "cascade": {"ms": 5 + more / 1000}}
        for copied, asking in ((8000, 1552), (40000, 914), (2400, 7760), (16000, 3104))
        for more in [260 + 0.187 * asking - 0.0295 * copied]
    ]
    assert forms.solve_constants(rows) == {"copied_us": 0.0295, "asked_us": 0.187, "fixed_us": 260}


def test_the_shapes_that_were_measured_first_come_first_and_none_comes_twice(forms):
    assert forms.SHAPES[: len(forms.FIRST)] == forms.FIRST
    assert len(set(forms.SHAPES)) == len(forms.SHAPES)
    assert set(forms.GRID) <= set(forms.SHAPES)
