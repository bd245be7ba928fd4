"""completions.html and .jsonl: complete, bounded, safe whatever a model says, and at rest when the run is."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lensmith.config.tree import RunConfig
from lensmith.rundir import RunDir
from lensmith.train.completions import CompletionLog
from lensmith.train.grpo_stats import Batch, GrpoStats
from lensmith.train.page import MOST_STEPS, PAGE_BYTES, CompletionPage
from lensmith.train.page.curves import POINTS, Plot, draw_plot
from lensmith.train.page.step import MOST_COMPLETIONS, MOST_PROMPTS, STEP_BYTES, Asked, Judged, write_step
from lensmith.train.page.thumbnails import THUMBNAIL_PX, Thumbnails
from lensmith.train.reward_set import RewardFailure, RewardTable
from lensmith.types import ImageRef, ImageSize

HOSTILE = "<script>alert(1)</script> &amp; \u202edesrever\u202c \x00 \ud800 " + "unbreakable" * 20
VOID = {"meta", "img", "path", "br"}
PARTS = {"script", "iframe", "object", "link", "form"}


class Strict(HTMLParser):
    """Notes elements, ids, texts and addresses, and fails where an element is not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.addresses: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"


def parse(html: str) -> Strict:
    parser = Strict()
    parser.feed(html)
    assert parser.open == []
    return parser


def stats(step: int, **changed: Any) -> GrpoStats:
    values: dict[str, Any] = {
        "loss": 0.1, "grad_norm": 1.0, "learning_rate": 1e-5, "samples": 8, "tokens": 4000, "learned_tokens": 900,
        "step_s": 4.0, "data_wait_s": 0.0, "peak_gib": 40.0, "reward": 0.5, "reward_std": 0.2, "rewards": {"exact": 0.5},
        "zero_variance": 0.25, "entropy": 0.8, "kl": None, "clipped": 0.0, "completion_tokens": 120.0, "truncated": 0.1,
        "repetition": 0.0, "rollout_s": 2.0, "policy_s": 1.0, "rollout_tokens_per_s": 480.0, "policy_tokens_per_s": 4000.0,
        "logprob_gap": None,
    }  # fmt: skip
    return GrpoStats(step=step, **(values | changed))


def judged(text: str = "yes", total: float | None = 1.0, **changed: Any) -> Judged:
    fields = {"tokens": 3, "stopped": True, "rewards": {"exact": total}, "advantage": 0.5} | changed
    return Judged(text=text, total=total, **fields)


def asked(*completions: Judged, **changed: Any) -> Asked:
    fields: dict[str, Any] = {"where": "rows.jsonl:3", "question": "Which bar?", "reference": "March", "images": ()}
    return Asked(completions=completions, **(fields | changed))


def picture(path: Path, size: tuple[int, int] = (640, 480)) -> ImageSize:
    Image.new("RGB", size, (200, 30, 30)).save(path)
    return ImageSize(ImageRef(path, str(path)), size[::-1], size[::-1], 1)


def no_picture(size: ImageSize) -> tuple[str | None, str]:
    return None, "there is no such file."


def test_completions_stand_sorted_by_reward_with_those_that_none_judged_last():
    html = write_step(7, [asked(judged("low", -1.0), judged("unjudged", None), judged("high", 2.0))], no_picture)
    assert re.findall(r">(low|unjudged|high)<", html) == ["high", "low", "unjudged"]
    assert 'id="step-7"' in html
    parse(html)


def test_rewards_advantage_tokens_and_cuts_are_told_in_words():
    one = judged("x", 0.25, rewards={"exact": 0.5, "length": None}, advantage=-1.5, tokens=512, stopped=False)
    html = write_step(1, [asked(one, judged(advantage=3.0))], no_picture)
    text = re.sub(r"<[^>]+>", " ", html)
    told = ("exact", "0.5", "length", "none", "-1.50", "512 tokens", "cut off")
    assert all(part in text for part in told), text
    assert "--share:25.0" in html, "half as far as the largest advantage of the step"


def test_whatever_a_model_says_is_text():
    name = "<i>" + "n" * 99
    one = judged(HOSTILE, rewards={name: 1.0})
    html = write_step(1, [asked(one, where=HOSTILE, question=HOSTILE, reference=HOSTILE)], no_picture)
    seen = parse(html)
    assert PARTS.isdisjoint(seen.seen)
    assert "<i>" not in html
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert "\u202e" not in html, "nothing turns the direction of what follows"
    assert "⟨U+202E⟩" in html
    html.encode()


def test_a_long_completion_is_folded_and_whole():
    text = "Thinking about it. " * 700 + "The answer is March."
    html = write_step(1, [asked(judged(text, tokens=3000))], no_picture)
    assert html.count("<details") == 1
    assert text in html
    summary = re.search(r"<summary>(.*?)</summary>", html).group(1)
    assert "The answer is March." in summary, "an answer stands at the end"
    assert len(summary) < 400


def test_an_empty_completion_is_said_to_be_empty():
    assert "(nothing)" in write_step(1, [asked(judged(" \n"))], no_picture)


def test_a_step_of_any_size_stays_within_its_bytes():
    many = [asked(*(judged("\u202e" * 30_000, n) for n in range(64))) for _ in range(20)]
    html = write_step(1, many, no_picture)
    assert len(html.encode()) <= STEP_BYTES
    assert html.count('<ol class="completions">') == MOST_PROMPTS
    assert html.count('<p class="total">') == MOST_PROMPTS * MOST_COMPLETIONS
    assert "And 12 more prompts in completions.jsonl" in html
    assert "The best and the worst; 48 between them" in html
    assert "more characters in completions.jsonl" in html


def test_a_group_without_signal_is_named():
    assert "teaches nothing" in write_step(1, [asked(judged("a"), judged("b"))], no_picture)
    assert "teaches nothing" not in write_step(1, [asked(judged("a"), judged("b", 0.0))], no_picture)


def test_a_picture_is_read_once_and_reduced(tmp_path, monkeypatch):
    sizes = [picture(tmp_path / "a.png"), picture(tmp_path / "b.jpg", (2000, 3000))]
    thumbnails = Thumbnails()
    first = [thumbnails(size) for size in sizes]
    for path in tmp_path.iterdir():
        path.unlink()
    assert [thumbnails(size) for size in sizes] == first
    for address, _ in first:
        assert address.startswith("data:image/jpeg;base64,")
        assert len(address) < 40_000
    again = Image.open(io.BytesIO(base64.b64decode(first[1][0].partition(",")[2])))
    assert max(again.size) == THUMBNAIL_PX
    assert again.size[1] > again.size[0]


def test_a_photograph_lying_on_its_side_is_shown_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (2000, 1000)).save(tmp_path / "side.jpg", exif=exif)
    ref = ImageRef(tmp_path / "side.jpg", "side")
    address, _ = Thumbnails()(ImageSize(ref, (2000, 1000), (960, 480), 1))
    width, height = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size
    assert height > width


def test_a_picture_that_has_vanished_is_said_and_stops_nothing(tmp_path):
    size = picture(tmp_path / "a.png")
    (tmp_path / "a.png").unlink()
    html = write_step(1, [asked(judged(), images=(size,))], Thumbnails())
    assert "there is no such file" in html


def test_curves_pass_through_the_means_and_say_both_ends():
    values = [float(step) for step in range(1000)]
    html = draw_plot(Plot("Reward", {"exact": values, "silent": [None] * 1000}), range(1, 1001), [500])
    parse(html)
    path = re.search(r'class="line-0" d="(M0[^"]+)"', html).group(1)
    assert len(re.findall(r"[ML]\d", path)) == POINTS
    assert "silent" not in html
    assert f"<b>{np.mean(values[:4]):.3g} → {np.mean(values[-4:]):.3g}</b>" in html
    assert re.search(r'class="alarm" d="M11[89]\.', html), "step 500 of 1,000 is in the middle of 240 points"


def test_a_curve_with_a_gap_is_broken_and_one_step_is_a_dot():
    html = draw_plot(Plot("Entropy", {"nats": [1.0, None, 0.5, 0.25]}), [1, 2, 3, 4])
    assert 'd="M0 0.0h0M2 66.7h0L3 100.0"' in html
    assert 'd="M0 50.0h0"' in draw_plot(Plot("Entropy", {"nats": [1.0]}), [1])
    assert draw_plot(Plot("Entropy", {"nats": [None, float("nan")]}), [1, 2]) == ""


@pytest.fixture
def page(tmp_path: Path) -> CompletionPage:
    return CompletionPage(tmp_path / "completions.html", "<charts>", 100)


def read(page: CompletionPage) -> str:
    return page.path.read_text(encoding="utf-8")


def test_the_page_refreshes_while_the_run_goes_on_and_then_rests(page):
    page.look(stats(1))
    page.write(running=True, failures={})
    assert '<meta http-equiv="refresh"' in read(page)
    page.write(running=False, failures={})
    assert "http-equiv" not in read(page)
    assert "The run has ended" in read(page)
    assert [path.name for path in page.path.parent.iterdir()] == ["completions.html"], "nothing half written is left"


def test_the_page_is_complete_in_itself(page, tmp_path):
    sizes = [picture(tmp_path / f"{n}.png") for n in range(6)]
    page.add(1, [asked(judged(HOSTILE), judged("a" * 9000, 0.0), images=sizes)])
    page.look(stats(1, rewards={HOSTILE: 0.5, "exact": None}), [f"Step 1: {HOSTILE}"])
    page.write(running=True, failures={HOSTILE: 3})
    seen = parse(read(page).split("<body>")[1].split("</body>")[0])
    assert PARTS.isdisjoint(seen.seen)
    assert all(address.startswith("data:image/") for address in seen.addresses)
    assert len(seen.addresses) == 4
    assert "and 2 more" in read(page)
    assert "failed for 3 completions" in read(page)


def test_only_the_newest_steps_stay_and_the_rest_is_counted(page):
    for step in range(1, 2 * MOST_STEPS + 1):
        page.look(stats(step))
        page.add(step, [asked(judged("word " * 20))])
    page.write(running=True, failures={})
    found = re.findall(r'id="step-(\d+)"', read(page))
    assert found == [str(step) for step in range(2 * MOST_STEPS, MOST_STEPS, -1)]
    assert f"{MOST_STEPS} earlier ones left the page" in read(page)
    assert "Curves from step 1 on, over 40 steps" in read(page)


def test_the_page_is_bounded_whatever_is_said(page):
    for step in range(1, MOST_STEPS + 1):
        page.add(step, [asked(*(judged("<&>" * 9000, n) for n in range(16))) for _ in range(8)])
    page.write(running=True, failures={})
    assert page.path.stat().st_size < PAGE_BYTES + 200_000
    assert f'id="step-{MOST_STEPS}"' in read(page)


class Words:
    """Stands for a tokenizer."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def batch(step: int, **failures: RewardFailure) -> Batch:
    """Two prompts with two completions each; the last one has no number."""
    values = np.array([[1.0], [0.0], [0.5], [np.nan]])
    prompts: list[Any] = [
        SimpleNamespace(
            sample=SimpleNamespace(where=f"rows.jsonl:{n}", question=f"Question {n}?", answer="a", images=()),
            encoded=SimpleNamespace(images=()),
        )
        for n in (1, 2)
    ]
    completions: list[Any] = [SimpleNamespace(ids=(n, n, n), stopped=n != 2) for n in range(4)]
    table = RewardTable(("exact",), values, values[:, 0], failures)
    return Batch(step, tuple(prompts[n] for n in (0, 0, 1, 1)), tuple(completions), table, (1.0, -1.0, 0.5, -0.5))


def open_log(run: RunDir, said: list[str], **rollout: Any) -> CompletionLog:
    run.path.mkdir(parents=True, exist_ok=True)
    config = RunConfig.model_validate({"task": "grpo", "grpo": {"group": 2}, "rollout": rollout, "run": run.path})
    return CompletionLog(run, config, Words(), said.append, total_steps=10)


def test_a_step_is_lines_at_once_and_on_the_page_when_it_is_taken(tmp_path):
    run = RunDir(tmp_path / "r")
    log = open_log(run, [])
    log.add(batch(1))
    lines = [json.loads(line) for line in run.completions_path.read_text().splitlines()]
    assert [line["total"] for line in lines] == [1.0, 0.0, 0.5, None]
    assert [line["where"] for line in lines] == ["rows.jsonl:1"] * 2 + ["rows.jsonl:2"] * 2
    assert [line["stopped"] for line in lines] == [True, True, False, True]
    assert not run.page_path.exists()
    log.look(stats(1))
    html = run.page_path.read_text()
    assert html.count("<article") == 2
    assert html.index("Question 1?") < html.index(">0 0 0<") < html.index(">1 1 1<") < html.index("Question 2?")


def test_steps_between_are_neither_kept_nor_drawn_but_their_failures_count(tmp_path):
    run, said = RunDir(tmp_path / "r"), []
    log = open_log(run, said, show_every_steps=2)
    for step in (1, 2, 3):
        log.add(batch(step, exact=RewardFailure(2, "rows.jsonl:1: reward exact: ValueError: no judge")))
        log.look(stats(step))
    log.close()
    kept = {json.loads(line)["step"] for line in run.completions_path.read_text().splitlines()}
    assert kept == {1, 3}
    assert re.findall(r'id="step-(\d+)"', run.page_path.read_text()) == ["3", "1"]
    assert said == [
        "rows.jsonl:1: reward exact: ValueError: no judge. Such completions have no number from it; failures are counted.",
        "Reward exact failed for 6 completions of this run.",
    ]
    assert "over 3 steps" in run.page_path.read_text()


def test_a_start_that_answers_nothing_leaves_the_page_of_the_one_before(tmp_path):
    run = RunDir(tmp_path / "r")
    log = open_log(run, [])
    log.add(batch(1))
    log.look(stats(1))
    log.close()
    before = run.page_path.read_text()
    again = open_log(run, [])
    again.look(stats(1), before=True)
    again.close()
    assert run.page_path.read_text() == before


def test_resuming_takes_back_the_completions_of_steps_that_are_taken_again(tmp_path):
    run = RunDir(tmp_path / "r")
    log = open_log(run, [])
    for step in (1, 2, 3):
        log.add(batch(step))
    run.truncate_metrics(2)
    assert [json.loads(line)["step"] for line in run.completions_path.read_text().splitlines()] == [1] * 4 + [2] * 4
