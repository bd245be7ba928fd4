"""What an evaluation found: sentences and a table for a person, JSON for programs, and a page with the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensmith.evals.breakdown import break_down, groupings_of
from lensmith.evals.degenerate import find_degenerate
from lensmith.evals.intervals import TIE
from lensmith.evals.page import Example, Gallery, Line, render_page
from lensmith.evals.probe import ProbeResult
from lensmith.evals.results import EvalResult, compare_results
from lensmith.evals.score import Comparison, Score
from lensmith.types import Sample

if TYPE_CHECKING:
    from jaxtyping import Float
    from rich.table import Table

SHOWN = 24
"""Examples under each heading of the page."""


@dataclass(frozen=True)
class Evaluated:
    """One model, or one run before and after, on one list of questions. What is resampled for it is resampled once."""

    before: EvalResult | None
    """None for a model that is not a run."""
    after: EvalResult
    predictions: Path | None
    """The answers behind `after`; None where there is no run folder to keep them in."""
    by: tuple[str, ...] = ()
    """Columns to break the score down by, besides what tells these questions apart."""
    probe: ProbeResult | None = None
    page: Path | None = None
    """Where `write_report` puts it; None for no page."""

    @cached_property
    def comparison(self) -> Comparison | None:
        return None if self.before is None else compare_results(self.before, self.after)

    def sentences(self) -> list[str]:
        """For a person: scores with intervals, what changed question by question, what is odd, what was forgotten."""
        told = [] if self.after.failure is None else [self.after.failure]
        told += find_degenerate(self.after.predictions)
        told += [] if self.probe is None else self.probe.sentences()
        compared = self.comparison
        if self.before is None or compared is None:
            return [f"{self.after.score} ({self.after.why})", *told]
        return [
            f"before training: {self.before.score}",
            f"after training:  {self.after.score} ({self.after.why})",
            compared.sentence,
            compared.difference_sentence,
            *told,
        ]

    @cached_property
    def breakdown(self) -> dict[str, list[Line]]:
        """Scores of groups of questions, by grouping or column; the same groups before and after.

        Raises:
            DataError: `by` names a column that no row has.
        """
        found = {}
        for by in dict.fromkeys((*groupings_of(self.after.predictions), *self.by)):
            groups = break_down(self.after, by)
            before = self.before
            found[by] = [
                Line(one.name, None if before is None else before.score_of(one.chosen), one.score) for one in groups
            ]
        return found

    def table(self) -> Table | None:
        """The breakdown; None where nothing tells the questions apart."""
        from rich.table import Column, Table

        found = self.breakdown
        if not found:
            return None
        scores = ["score"] if self.before is None else ["before", "after"]
        right = [Column(name, justify="right") for name in ("questions", *scores)]
        table = Table(Column("", overflow="fold"), *right, box=None, pad_edge=False)
        for by, lines in found.items():
            table.add_row(by.replace("_", " "))
            for line in lines:
                shown = [_short(score) for score in (line.before, line.after) if score is not None]
                table.add_row(f"  {line.name}", f"{line.after.n:,}", *shown)
        return table

    def to_json(self) -> dict[str, Any]:
        """What `lensmith eval --json` prints."""
        return {
            "before": None if self.before is None else _score_json(self.before),
            "after": _score_json(self.after),
            "comparison": None if (compared := self.comparison) is None else asdict(compared),
            "breakdown": {by: [_line_json(line) for line in lines] for by, lines in self.breakdown.items()},
            "probe": None if self.probe is None else self.probe.to_json(),
            "predictions": None if self.predictions is None else str(self.predictions),
            "page": None if self.page is None else str(self.page),
        }


def write_report(evaluated: Evaluated, samples: Sequence[Sample], *, title: str) -> None:
    """Write `evaluated.page`: the largest gains and losses, side by side.

    Args:
        samples: what was asked, in the order of the predictions.
    """
    assert evaluated.page is not None, "a page has a place"
    after, probe = evaluated.after, evaluated.probe
    page = render_page(
        title=title,
        summary=f"{len(after.predictions):,} questions; {after.why}.",
        facts=dict(_facts(evaluated)),
        table=[
            Line("all questions", None if evaluated.before is None else evaluated.before.score, after.score),
            *(
                replace(line, name=f"{by.replace('_', ' ')}: {line.name}")
                for by, lines in evaluated.breakdown.items()
                for line in lines
            ),
        ],
        comparison=evaluated.comparison,
        notes=[*find_degenerate(after.predictions), *([] if probe is None else probe.sentences())],
        galleries=list(_galleries(evaluated, samples)),
        footer=f"lensmith {version('lensmith')}. All answers: predictions-*.jsonl beside this page.",
    )
    evaluated.page.write_text(page, encoding="utf-8")


def _facts(evaluated: Evaluated) -> Iterator[tuple[str, str]]:
    before, after, compared = evaluated.before, evaluated.after, evaluated.comparison
    value = f"{100 * after.score.value:.1f} %"
    if before is None or compared is None:
        yield after.metric, value
    else:
        yield after.metric, f"{100 * before.score.value:.1f} → {value}"
        yield "better", f"{compared.wins:,}"
        yield "worse", f"{compared.losses:,}"
    if after.cut_off:
        yield "cut off", f"{after.cut_off:,}"


def _galleries(evaluated: Evaluated, samples: Sequence[Sample]) -> Iterator[Gallery]:
    """The largest gains, the largest losses, and what is still wrong; of one model alone, what is wrong and what right."""
    right = _rightness(evaluated.after)
    was_right = right if evaluated.before is None else _rightness(evaluated.before)
    gain = right - was_right
    gained = [int(n) for n in np.argsort(-gain, kind="stable") if gain[n] > TIE]
    lost = [int(n) for n in np.argsort(gain, kind="stable") if gain[n] < -TIE]
    unchanged = [n for n in range(len(gain)) if n not in {*gained, *lost}]
    wrong = sorted((n for n in unchanged if right[n] < 1), key=lambda n: right[n])
    told = [
        ("Gained", "better than before, the largest gains first", gained),
        ("Lost", "worse than before, the largest losses first", lost),
        (
            "Still wrong" if evaluated.before else "Wrong",
            "no better than before" if evaluated.before else "wrong",
            wrong,
        ),
        ("Right", "right both times" if evaluated.before else "right", [n for n in unchanged if right[n] == 1]),
    ]
    for heading, note, chosen in told:
        count = f"{len(chosen):,}" if len(chosen) <= SHOWN else f"{SHOWN} of {len(chosen):,}"
        examples = [_example(evaluated, samples[n], n, was_right[n], right[n]) for n in chosen[:SHOWN]]
        yield Gallery(heading, f"{count}, {note}.", examples)


def _example(evaluated: Evaluated, sample: Sample, number: int, was_right: float, right: float) -> Example:
    before, now = evaluated.before, evaluated.after.predictions[number]
    more = f"and {len(sample.images) - 1} more pictures" if len(sample.images) > 1 else ""
    return Example(
        picture=sample.images[0] if sample.images else None,
        question=now.question,
        reference=now.reference,
        before=None if before is None else before.predictions[number].answer,
        after=now.answer,
        right_before=float(was_right),
        right_after=float(right),
        note_after=", ".join(filter(None, ("" if now.stopped else "cut off", more, now.where))),
    )


def _rightness(result: EvalResult) -> Float[np.ndarray, " answers"]:
    """Values of which more is better, whatever the metric."""
    return 1 - result.judged.values if result.score.lower_is_better else result.judged.values


def _short(score: Score) -> str:
    return f"{100 * score.value:.1f} % ({100 * score.low:.0f} to {100 * score.high:.0f})"


def _score_json(result: EvalResult) -> dict[str, Any]:
    score = asdict(result.score)
    return {"accuracy": score.pop("value"), **score}


def _line_json(line: Line) -> dict[str, Any]:
    before = None if line.before is None else line.before.value
    return {"name": line.name, "n": line.after.n, "before": before, "after": line.after.value}
