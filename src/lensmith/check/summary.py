"""The numbers of a report, from the arrays that reading left behind. All pure; only the largest rows are named from disk."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lensmith.check.compare import find_copies
from lensmith.check.judge import most_common_answer
from lensmith.check.report import (
    HISTOGRAM_BINS,
    LARGEST_ROWS,
    AnswerReport,
    FileReport,
    Histogram,
    ImageReport,
    LargeRow,
    PackReport,
    Spread,
    TokenReport,
)
from lensmith.check.texts import SCRIPTS
from lensmith.data.box_evidence import BoxTally, judge
from lensmith.data.loader import plan_steps, steps_per_epoch
from lensmith.data.pack import plan_packs
from lensmith.data.scan import hold_out, weighted
from lensmith.errors import DataError
from lensmith.types import counted

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped

    from lensmith.check.gather import Gathered
    from lensmith.config.tree import RunConfig
    from lensmith.data.scan import Scan

PACKED_ROWS, PACKED_BLOCKS = 6_400, 16
"""Rows that packing is tried on, in blocks of neighbours from all over the data: neighbours share pictures, and the fill of
a few hundred steps is that of all of them to a fraction of a percent."""


def report_files(sides: Sequence[Gathered]) -> tuple[FileReport, ...]:
    """Rows of each file; names that occur twice get a number."""
    seen: Counter[str] = Counter()
    reports = []
    for side in sides:
        samples = side.scan.source.samples
        for number, ((span, _), file) in enumerate(zip(samples.spans, samples.files, strict=True)):
            name = file.rows.name
            seen[name] += 1
            reports.append(
                FileReport(
                    name=name if seen[name] == 1 else f"{name} ({seen[name]})",
                    side=side.side,
                    rows=len(range(span.start, min(span.stop, side.num_rows))),
                    refused=int(((side.refused >= span.start) & (side.refused < span.stop)).sum()),
                    layout=file.layout.sentence,
                    boxes=judge(side.boxes.get(number, BoxTally()), file.boxes),
                )
            )
    return tuple(reports)


def report_tokens(sides: Sequence[Gathered], budget_tokens: int) -> TokenReport:
    """What usable rows cost, as the model will see them."""
    tokens = _joined([side.scan.tokens for side in sides])
    image = _joined([side.scan.image_tokens for side in sides])
    learned = _joined([side.scan.learned for side in sides])
    return TokenReport(
        budget=budget_tokens,
        total=int(tokens.sum()),
        image=int(image.sum()),
        learned=int(learned.sum()),
        per_row=Spread.of(tokens),
        image_per_row=Spread.of(image),
        learned_per_row=Spread.of(learned),
        histogram=_histogram(tokens, image),
        largest=tuple(heapq.nlargest(LARGEST_ROWS, _large_rows(sides), key=lambda row: row.tokens)),
    )


def report_images(sides: Sequence[Gathered]) -> ImageReport:
    """Pictures of usable rows, original and seen."""
    numbers = {
        name: _joined([side.numbers[name] for side in sides])
        for name in ("contents", "heights", "widths", "seen_heights", "seen_widths")
    }
    scales = _joined([side.scales for side in sides])
    formats: Counter[str] = sum((side.formats for side in sides), Counter())
    area, seen = (
        numbers[h].astype(np.int64) * numbers[w] for h, w in (("heights", "widths"), ("seen_heights", "seen_widths"))
    )
    # Rounding to whole tokens moves a side by half a token; only what goes beyond that is meant.
    side_px = sides[0].scan.source.encoder.geometry.token_px if sides else 1
    natural = np.round(numbers["heights"] / side_px) * np.round(numbers["widths"] / side_px) * side_px**2
    return ImageReport(
        uses=len(area),
        pictures=len(np.unique(numbers["contents"])),
        formats=dict(formats.most_common()),
        reduced=int((seen < natural).sum()),
        enlarged=int((seen > natural).sum()),
        original_height_px=Spread.of(numbers["heights"]),
        original_width_px=Spread.of(numbers["widths"]),
        seen_height_px=Spread.of(numbers["seen_heights"]),
        seen_width_px=Spread.of(numbers["seen_widths"]),
        scale=Spread.of(scales),
    )


def report_answers(sides: Sequence[Gathered]) -> AnswerReport:
    """The last answers of usable rows, and the scripts of all texts."""
    answered = _joined([side.numbers["answered"] for side in sides])
    letters = sum((side.scripts for side in sides), np.zeros(len(SCRIPTS), np.int64))
    shares = dict(zip(SCRIPTS, (letters / max(1, letters.sum())).tolist(), strict=True))
    most = most_common_answer(sides)
    return AnswerReport(
        characters=Spread.of(_joined([side.numbers["characters"] for side in sides])),
        different=len(np.unique(answered)),
        most_common=(most.text, most.rows) if most else None,
        scripts={name: share for name, share in sorted(shares.items(), key=lambda item: -item[1]) if share},
    )


def training_rows(sides: Sequence[Gathered], config: RunConfig) -> tuple[Scan | None, list[str]]:
    """What an epoch is made of, files by their weight and the held-out share left out; and what to say about that share.

    None where no row can be trained on.
    """
    train = next((side.scan for side in sides if side.side == "train" and len(side.scan.rows)), None)
    if train is None:
        return None, []
    try:
        train = weighted(train, config.seed)
        if not isinstance(config.data.test, float):
            return train, []
        train, held_out = hold_out(train, config.data.test, config.seed)
    except DataError as fault:
        return train, [f"Training would stop here: {fault}."]
    return train, [
        f"data.test={config.data.test:g} would hold out {counted(len(held_out.rows), 'row')} by picture, and train on "
        f"{len(train.rows):,}."
    ]


def report_packs(scan: Scan | None, config: RunConfig, budget_tokens: int, tokens_per_s: float | None) -> PackReport:
    """Steps and packs of a run over this scan, some of its rows packed as training would pack them."""
    optim, share = config.optim, config.pack.share_prefix and not config.tune.dropout
    if scan is None:
        return PackReport(samples=0, packs=0, fill=0.0, shared_tokens=0, steps=0, hours=None)
    num_samples = len(scan.rows)
    per_epoch = steps_per_epoch(num_samples, optim.effective_samples)
    steps = optim.steps or max(1, round(per_epoch * optim.epochs))
    scan = _some_rows(scan)
    plan = plan_steps(scan, effective_samples=optim.effective_samples, seed=config.seed, epochs=1, share_prefix=share)
    packs = tokens = shared = 0
    for samples in plan.steps:
        numbers = scan.tokens[samples], scan.prefix_tokens[samples], scan.groups[samples]
        together = plan_packs(*numbers, budget_tokens=budget_tokens, share_prefix=share)
        members = together if config.pack.together else list(np.arange(len(samples))[:, None])
        packs += len(members)
        tokens += int(numbers[0].sum())
        shared += sum(_shared_tokens(*(part[pack] for part in numbers)) for pack in members) if share else 0
    return PackReport(
        samples=num_samples,
        packs=round(packs * per_epoch / len(plan.steps)),
        fill=(tokens - shared) / (packs * budget_tokens),
        shared_tokens=round(shared * per_epoch / len(plan.steps)),
        steps=steps,
        hours=None if tokens_per_s is None else tokens * steps / len(plan.steps) / tokens_per_s / 3600,
    )


def _some_rows(scan: Scan) -> Scan:
    """At most PACKED_ROWS of the rows."""
    if len(scan.rows) <= PACKED_ROWS:
        return scan
    starts = np.linspace(0, len(scan.rows) - PACKED_ROWS // PACKED_BLOCKS, PACKED_BLOCKS).astype(np.int64)
    chosen = (starts[:, None] + np.arange(PACKED_ROWS // PACKED_BLOCKS)).reshape(-1)
    names = ("rows", "tokens", "learned", "prefix_tokens", "groups", "image_tokens", "pictures")
    return replace(scan, **{name: getattr(scan, name)[chosen] for name in names})


def _shared_tokens(tokens: np.ndarray, prefix_tokens: np.ndarray, groups: np.ndarray) -> int:
    """Tokens that stand once in a pack though several of its samples begin with them."""
    is_repeat = find_copies(groups.astype(np.uint64)) != np.arange(len(groups))
    return int(prefix_tokens[is_repeat].sum())


def _histogram(tokens: Int[np.ndarray, " rows"], image: Int[np.ndarray, " rows"]) -> Histogram:
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    bins = max(1, min(HISTOGRAM_BINS, high - low))
    edges = np.unique(np.linspace(low, max(high, low + 1), bins + 1).round().astype(np.int64))
    rows, image_tokens, all_tokens = (
        np.histogram(tokens, edges, weights=weights)[0].astype(np.int64) for weights in (None, image, tokens)
    )
    return Histogram(
        edges=tuple(edges.tolist()),
        rows=tuple(rows.tolist()),
        image_tokens=tuple(image_tokens.tolist()),
        text_tokens=tuple((all_tokens - image_tokens).tolist()),
    )


def _large_rows(sides: Sequence[Gathered]) -> list[LargeRow]:
    """The largest rows of each side."""
    found = []
    for side in sides:
        scan = side.scan
        for at in np.argsort(-scan.tokens, kind="stable")[:LARGEST_ROWS].tolist():
            row = int(scan.rows[at])
            found.append(LargeRow(side.side, row, side.where(row), int(scan.tokens[at]), int(scan.image_tokens[at])))
    return found


def _joined(arrays: Sequence[Shaped[np.ndarray, " numbers"]]) -> Shaped[np.ndarray, " numbers"]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
