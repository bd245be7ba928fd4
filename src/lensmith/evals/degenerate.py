"""Answers that have gone wrong as a whole, named: repetition, never ending, one answer for all, nothing, another script.

Pure. A score alone may hide them: a model that always says "no" is right on half of many data sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from lensmith.evals.answer_text import final_answer
from lensmith.evals.breakdown import NOTHING, script_of
from lensmith.evals.normalise import normalise
from lensmith.evals.results import Prediction
from lensmith.evals.text_metrics import repeated_share
from lensmith.types import counted

NGRAM_WORDS, NGRAM_CHARACTERS = 4, 8
"""Characters for texts without spaces, such as Chinese ones."""
REPETITIVE = 0.5
"""Half of the n-grams occurred before: a loop. Ordinary prose has a few per cent."""
LEAST_NGRAMS = 8
"""Shorter answers repeat by chance, or because boxes in JSON do."""
WORTH_TELLING = 0.02
"""Share of answers from which repetition, empty answers or another script are no accident."""
MANY_CUT_OFF = 0.1
ONE_FOR_ALL = 0.5
ABOVE_REFERENCES = 0.2
"""How much more often the commonest answer is given than the commonest reference is right."""
LEAST_QUESTIONS = 10
"""Fewer questions may well have one answer."""
LEAST_LETTERS = 3


def find_degenerate(predictions: Sequence[Prediction]) -> list[str]:
    """A sentence for each way in which these answers, taken together, are degenerate; none where they are not."""
    return [
        sentence for look in (_repetition, _cut_off, _one_for_all, _empty, _scripts) for sentence in look(predictions)
    ]


def is_repetitive(text: str) -> bool:
    """Whether an answer goes round in circles: at least half of its n-grams occurred before."""
    words = text.split()
    # A long text of hardly any spaces has no words to count.
    units, ngram = (words, NGRAM_WORDS) if len(text) < 20 * len(words) else (list(text), NGRAM_CHARACTERS)
    return len(units) >= ngram + LEAST_NGRAMS and repeated_share(units, ngram) >= REPETITIVE


def _repetition(predictions: Sequence[Prediction]) -> Iterator[str]:
    # A reference that repeats itself, as tables and lists of boxes do, is not degenerate when it is learned.
    found = [one for one in predictions if is_repetitive(one.answer) and not is_repetitive(one.reference)]
    if found and len(found) >= WORTH_TELLING * len(predictions):
        yield (
            f"Repetition: {len(found):,} of {counted(len(predictions), 'answer')} go round in circles, the first at "
            f"{found[0].where}. Fewer epochs, a lower learning rate or more varied answers help."
        )


def _cut_off(predictions: Sequence[Prediction]) -> Iterator[str]:
    found = [one for one in predictions if not one.stopped]
    if found and len(found) >= MANY_CUT_OFF * len(predictions):
        yield (
            f"Never ending: {len(found):,} of {counted(len(predictions), 'answer')} were cut off at the most tokens they "
            f"could have, the first at {found[0].where}. Raise eval.max_new_tokens where the references are that long; "
            "otherwise the model has not learned to end."
        )


def _one_for_all(predictions: Sequence[Prediction]) -> Iterator[str]:
    n = len(predictions)
    if n < LEAST_QUESTIONS:
        return
    said, times = Counter(normalise(final_answer(one.answer)) for one in predictions).most_common(1)[0]
    _, right = Counter(normalise(final_answer(one.reference)) for one in predictions).most_common(1)[0]
    if said and times >= ONE_FOR_ALL * n and times - right >= ABOVE_REFERENCES * n:
        yield (
            f"One answer for all: {said[:60]!r} is given to {times / n:.0%} of {n:,} questions, while the commonest right "
            f"answer fits {right / n:.0%}. The model may not look at the pictures, or has learned too little."
        )


def _empty(predictions: Sequence[Prediction]) -> Iterator[str]:
    found = [one for one in predictions if not final_answer(one.answer) and one.reference.strip()]
    if found and len(found) >= WORTH_TELLING * len(predictions):
        thoughts = sum(bool(one.answer.strip()) for one in found)
        why = f", {thoughts:,} of them behind a thought that never ended" if thoughts else ""
        yield f"Empty: {len(found):,} of {counted(len(predictions), 'answer')} say nothing{why}; the first at {found[0].where}."


def _scripts(predictions: Sequence[Prediction]) -> Iterator[str]:
    found: list[tuple[Prediction, str, str]] = []
    for one in predictions:
        said, meant = (_script(final_answer(text)) for text in (one.answer, one.reference))
        if said != meant and NOTHING not in (said, meant):
            found.append((one, said, meant))
    if found and len(found) >= WORTH_TELLING * len(predictions):
        first, said, meant = found[0]
        yield (
            f"Another language: {len(found):,} of {counted(len(predictions), 'answer')} are in another script than their "
            f"reference, the first at {first.where} in {said} instead of {meant}."
        )


def _script(text: str) -> str:
    return script_of(text) if sum(map(str.isalpha, text)) >= LEAST_LETTERS else NOTHING
