"""What `lensmith eval` shows: the table by columns, gains and losses, and a page that holds strangers' texts safely."""

import json
import re

import pytest
from PIL import Image
from rich.console import Console

from lensmith.config.tree import Eval
from lensmith.errors import DataError
from lensmith.evals.probe import ProbeQuestion, ProbeResult
from lensmith.evals.report import Evaluated, write_report
from lensmith.evals.results import Prediction, score_predictions
from lensmith.types import ImageRef, Message, Sample, Text

ASKED = [  # question, reference, before, after, source
    ("colour?", "red", "blue", "red", "web"),
    ("colour?", "blue", "blue", "red", "web"),
    ("colour?", "teal", "teal", "teal", "scan"),
    ("how many?", "3", "4", "5", "scan"),
    ("<b>what</b>?", "<i>this</i>", "", "<i>this</i>", "scan"),
] * 4


def predictions(column):
    return [
        Prediction(f"rows.jsonl:{n + 1}", row[0], row[1], row[column], 3, True, {"source_name": row[4]})
        for n, row in enumerate(ASKED)
    ]


def evaluated(metric="normalised", **more):
    before, after = (score_predictions(predictions(column), Eval(metric=metric)) for column in (2, 3))
    return Evaluated(before, after, None, ("source_name",), **more)


def written(found, samples):
    """The page as text."""
    write_report(found, samples, title="runs/x: what it answers")
    return found.page.read_text(encoding="utf-8")


@pytest.fixture
def samples(tmp_path):
    """What was asked: a picture each, but the last has none and the first one's has gone."""
    paths = [tmp_path / f"{n}.png" for n in range(len(ASKED))]
    for path in paths[1:]:
        Image.new("RGB", (64, 32), "teal").save(path)
    made = [Sample(path.name, (Message("user", (Text("q"),)),), (ImageRef(path, key=str(path)),)) for path in paths]
    made[-1] = Sample("none", (Message("user", (Text("q"),)),), ())
    return made


def test_the_table_has_the_same_groups_before_and_after():
    groups = evaluated().breakdown
    assert list(groups) == ["answer_type", "source_name"]
    assert [(line.name, line.after.n) for line in groups["source_name"]] == [("scan", 12), ("web", 8)]
    assert [line.before.value for line in groups["source_name"]] == [pytest.approx(1 / 3), 0.5]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(evaluated().table())
    assert re.search(r"web +8 +50\.0 % \(\d+ to \d+\) +50\.0 %", captured.get())


def test_a_column_that_no_row_has_is_named():
    with pytest.raises(DataError, match="none of 20 rows has such a column"):
        Evaluated(evaluated().before, evaluated().after, None, ("sauce_name",)).table()


def test_the_page_shows_gains_and_losses_and_what_is_still_wrong(tmp_path, samples):
    page = written(evaluated(page=tmp_path / "eval.html"), samples)
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["Before and after", "Gained", "Lost", "Still wrong", "Right"]
    assert "8, better than before" in page
    assert "4, worse than before" in page
    assert page.count('<li class="card">') == len(ASKED)
    assert "&lt;i&gt;this&lt;/i&gt;" in page
    assert "<i>this</i>" not in page
    assert "no picture" in page
    assert "there is no such file" in page or "0.png" in page
    assert "<script" not in page
    assert "http" not in re.sub(r"data:[^\"]*", "", page)


def test_of_an_error_rate_less_is_a_gain(tmp_path, samples):
    page = written(evaluated("cer", page=tmp_path / "eval.html"), samples)
    gained = page[page.index("<h2>Gained</h2>") : page.index("<h2>Lost</h2>")]
    assert gained.count('<li class="card">') == 8
    assert "partly" in page


def test_one_model_alone_has_a_score_and_no_before(tmp_path, samples):
    alone = Evaluated(None, evaluated().after, None, page=tmp_path / "eval.html")
    page = written(alone, samples)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Score", "Wrong", "Right"]
    assert "<dt>before</dt>" not in page
    assert alone.to_json()["before"] is None
    assert alone.to_json()["comparison"] is None


def test_the_json_holds_all_that_is_shown():
    question = ProbeQuestion("facts", "What?", ("this",))
    told = json.loads(json.dumps(evaluated(probe=ProbeResult((question,), ("this",), ("that",))).to_json()))
    assert list(told) == ["before", "after", "comparison", "breakdown", "probe", "predictions", "page"]
    assert told["breakdown"]["source_name"][0] == {
        "name": "scan", "n": 12, "before": pytest.approx(1 / 3), "after": pytest.approx(2 / 3),
    }  # fmt: skip
    assert (told["probe"]["base_right"], told["probe"]["tuned_right"]) == (1, 0)
