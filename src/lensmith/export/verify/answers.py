"""Checks of answers: the pictures are really used, and merging did not change what is answered."""

from __future__ import annotations

from typing import Any

from lensmith.errors import DataError
from lensmith.evals.blind import blind_test
from lensmith.evals.predict import EvalResult, compare_results
from lensmith.export.verify.check import Check, not_run
from lensmith.export.verify.material import Material

SIGNIFICANT = 0.05
"""p-value of McNemar's test below which two sets of answers are called different."""
LEAST_QUESTIONS = 6
"""With fewer the test cannot fail: 5 answers that all became wrong have p = 0.0625, 6 have 0.031."""
BLIND_SAMPLES = (32, 256)
"""Rows asked at first, and where that leaves open whether the pictures are used."""


def check_blind(model: Any, material: Material, seed: int) -> Check:
    """Whether a wrong picture makes the answers less likely, over and above chance. `model`: an Engine, tuned."""
    if material.source is None:
        return not_run("blind", f"Not run: {material.why}.")
    try:
        few, many = BLIND_SAMPLES
        tested = blind_test(model, material.source, material.rows, samples=few, seed=seed)
        if tested.gap > 0 and not tested.is_used and len(material.rows) > few:
            tested = blind_test(model, material.source, material.rows, samples=many, seed=seed)
    except DataError as fault:  # fewer than two rows with pictures, or all with the same
        return not_run("blind", f"Not run: {fault}")
    fix = (
        f"{tested.sentence} Either the answers of these rows can be told without their pictures, or the model has not "
        "learned to look: see the rows with `lensmith check run.yaml --blind`, ask what only the picture tells, or adapt "
        "the merger as well (tune.merger=adapted)."
    )
    told = (
        f"another row's picture costs {tested.gap:+.3f} nats per token, at least {tested.gap_low:+.3f}; a grey one "
        f"{tested.loss_grey - tested.loss_right:+.3f}; n = {tested.n}"
    )
    return Check("blind", tested.is_used, tested.gap_low, 0, told, "" if tested.is_used else fix)


def check_metric(adapter: EvalResult, merged: EvalResult) -> Check:
    """Whether the merged model is as often right as the adapter, question by question (McNemar's exact test)."""
    compared = compare_results(adapter, merged)
    pairs = zip(adapter.predictions, merged.predictions, strict=True)
    same = sum(ours.answer == theirs.answer for ours, theirs in pairs)
    ok = compared.p_value >= SIGNIFICANT
    told = (
        f"{adapter.score.value:.1%} right as trained, {merged.score.value:.1%} merged (p = {compared.p_value:.2g}); {same} of "
        f"{adapter.score.n} answers are the same word for word"
    )
    fix = (
        f"The merged model does not answer like the trained one: {compared.losses} right answers became wrong and "
        f"{compared.wins} wrong ones right. Do not ship it: export again from this run; after training on 4-bit weights, merge "
        "into those (see docs/verify.md)."
    )
    return Check("metric", ok, compared.p_value, SIGNIFICANT, told, "" if ok else fix)
