"""A metric by its name: one of METRICS, or a function of a user's own as `my_metrics.py:price_match`.

    def price_match(answer: str, reference: str, **columns) -> float            0 to 1, higher is better

`answer` is what the model said behind its thought, `reference` one accepted answer; where a row has several, the best counts.
`question` and the row's columns come by the names that the function asks for, or all of them with **columns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lensmith.errors import ConfigError, MetricError
from lensmith.evals.answer_text import final_answer
from lensmith.evals.metrics import Metric, Reference
from lensmith.evals.own_functions import find_function
from lensmith.evals.score import find_metric

PLACE = "eval.metric"
_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def load_metric(name: str, root: Path | None = None) -> Metric:
    """The metric that eval.metric names; a file is run here, and starts from `root`, or else from the current folder.

    Raises:
        ConfigError: there is no such metric, file or function, or the function cannot take an answer and a reference.
    """
    if ":" not in name:
        return find_metric(name)
    function = find_function(name, root=root or Path.cwd(), place=PLACE, example="my_metrics.py:price_match")
    file, _, attribute = name.rpartition(":")
    return own_metric(function, f"{Path(file).name}:{attribute}")  # the folder says nothing, and makes sentences long


def own_metric(function: Callable[..., Any], name: str) -> Metric:
    """A function `(answer, reference, **columns) -> 0 to 1` as a metric.

    Raises:
        ConfigError: it cannot be called like that.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as cause:
        raise ConfigError(
            f"{PLACE}: {name} does not tell its parameters ({cause}), so it cannot be called. Wrap it in a def."
        ) from cause
    if [one.name for one in parameters[:2]] != ["answer", "reference"]:
        held = ", ".join(one.name for one in parameters) or "none"
        raise ConfigError(
            f"{PLACE}: {name} takes {held}, but its first two parameters must be answer and reference. "
            "Write it as def price_match(answer, reference, **columns)."
        )
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    named = {one.name: one.default is one.empty for one in parameters[2:] if one.kind in _KEYWORD}

    def judge(answer: str, reference: Reference) -> float:
        offered = {"question": reference.question, **reference.columns}
        offered = {column: value for column, value in offered.items() if column not in ("answer", "reference")}
        for column, is_needed in named.items():
            if is_needed and column not in offered:
                raise MetricError(f"asks for the column {column!r}, but the row has {', '.join(offered)}")
        chosen = offered if takes_all else {column: offered[column] for column in named if column in offered}
        values = [function(final_answer(answer), final_answer(one), **chosen) for one in reference.answers]
        # A text or None has no best; it goes back as it is, to be refused with what it is.
        odd = [value for value in values if not hasattr(value, "__float__")]
        return odd[0] if odd else max(values, key=float)

    return Metric(name, judge)
