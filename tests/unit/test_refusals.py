"""Of a million rows left out, all are counted and ten are kept."""

import pickle
from collections import Counter

from lensmith.data.refusals import NAMED_ROWS, Refusal, Refusals


def refusals(*codes: str, start: int = 1) -> Refusals:
    found = Refusals()
    for line, code in enumerate(codes, start):
        found.add(Refusal(f"rows.jsonl:{line}", code, f"{code} it is."))
    return found


def test_all_are_counted_and_the_first_of_each_code_are_named():
    found = refusals(*["missing_file"] * 1000, "not_json")
    assert len(found) == 1001
    assert found.counts == Counter(missing_file=1000, not_json=1)
    assert [refusal.where for refusal in found.named] == [
        f"rows.jsonl:{line}" for line in (*range(1, NAMED_ROWS + 1), 1001)
    ]
    assert len(pickle.dumps(found)) < 2000


def test_joining_parts_is_counting_all_at_once():
    codes = ["missing_file", "not_json", "missing_file"] * 20 + ["too_long"]
    joined = Refusals()
    for start in range(0, len(codes), 7):
        joined.extend(refusals(*codes[start : start + 7], start=start + 1))
    assert joined == refusals(*codes)
    assert Refusals() + joined == joined


def test_sentence_and_lines_name_the_first_and_count_the_rest():
    found = refusals(*["missing_file"] * 3, "not_json")
    assert found.sentence(2) == (
        "Left out: 3 missing_file (rows.jsonl:1, rows.jsonl:2 and 1 more); 1 not_json (rows.jsonl:4). "
        "First: missing_file it is."
    )
    assert found.lines(1) == "  rows.jsonl:1: missing_file it is.\n  and 3 more"
    assert found.of("not_json").lines(5) == "  rows.jsonl:4: not_json it is."
    assert (Refusals().sentence(5), len(found.of("too_long"))) == ("", 0)
    assert not found.of("too_long")
