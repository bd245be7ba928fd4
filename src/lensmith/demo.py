"""The main job in minutes on any machine: lensmith/tiny learns easy-VQA, and a page shows what changed.

easy-VQA (the `easy-vqa` package, Victor Zhou 2019, MIT) has 5,000 small pictures with 48,248 questions and its own split
into training and test pictures. Nothing of it is in the pretraining of lensmith/tiny. Here are only the rows, the
settings and the report; training and evaluation are what `lensmith train` and `lensmith eval` run.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensmith.config.tree import Data, Eval, Memory, Optim, Packing, RunConfig, Save, Tune
from lensmith.evals.page import Example, Gallery, Line, draw_loss_curve, render_page
from lensmith.evals.predict import Progress as EvalProgress
from lensmith.evals.results import EvalResult, compare_results
from lensmith.evals.score import Score
from lensmith.rundir import RunDir
from lensmith.train.evaluate import Compared, train_and_compare

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress

TEST_QUESTIONS = 1000
"""Drawn by the seed from the 9,673 of the official test split."""
SHOWN_WRONG, SHOWN_DRAWN = 12, 36
"""Test pictures on the page: wrong after training, and drawn without looking."""
SHAPES = frozenset({"circle", "rectangle", "triangle"})

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class DemoResult:
    before: Score
    after: Score
    train_s: float
    """Training alone: without loading, evaluation and the page."""
    samples_per_s: float
    run: Path
    page: Path

    def to_json(self) -> dict[str, Any]:
        """What `lensmith demo --json` ends with."""
        return {
            "before": {"accuracy": self.before.value, "n": self.before.n},
            "after": {"accuracy": self.after.value, "n": self.after.n},
            "train_s": self.train_s,
            "samples_per_s": self.samples_per_s,
            "run": str(self.run),
        }


def run_demo(
    *,
    run: Path,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    train_progress: TrainProgress | None = None,
    eval_progress: EvalProgress | None = None,
    config: RunConfig | None = None,
    questions: int = TEST_QUESTIONS,
) -> DemoResult:
    """Evaluate, train, evaluate again and write the page into the run folder.

    Args:
        run: where everything goes; where something is there already, a numbered folder beside it.
        train_progress, eval_progress: handed to `train_model` and `evaluate_model`.
        config: other settings than those of `demo_config`; its data, seed and run are replaced.
        questions: how many of the official test split's to ask.
    """
    say = say or (lambda _: None)
    run = unused_folder(run)
    train, test = write_rows(run / "rows", seed, questions)
    data = Data(train=str(train), test=str(test), image_root=picture_folder())
    config = (config or demo_config()).model_copy(update={"data": data, "seed": seed, "run": run})
    compared = train_and_compare(config, say=say, train_progress=train_progress, eval_progress=eval_progress)
    page = write_report(RunDir(run), test, compared, seed)
    say(f"Pictures, questions and answers before and after: {page}")
    before, after = _both(compared)
    return DemoResult(before.score, after.score, compared.trained.train_s, compared.trained.samples_per_s, run, page)


def demo_config() -> RunConfig:
    """Settings for two CPU cores.

    The model is so narrow that adapters weigh, hence rank 8; six tenths of an epoch are enough (benchmarks/results/demo.json).
    """
    return RunConfig(
        model="lensmith/tiny",
        tune=Tune(method="lora", rank=8),
        pack=Packing(tokens=8192, share_prefix=True),
        optim=Optim(learning_rate=4e-3, epochs=0.6, effective_samples=256),
        memory=Memory(recompute="none"),
        eval=Eval(metric="normalised", samples=None, max_new_tokens=8, batch=128),
        save=Save(keep=1),
    )


def unused_folder(run: Path) -> Path:
    """`run` if nothing is there, else the first of run-2, run-3, ... that is free: nobody's run is overwritten."""
    candidates = (run if number == 1 else run.with_name(f"{run.name}-{number}") for number in range(1, 10_000))
    return next(folder for folder in candidates if not folder.exists() or not any(folder.iterdir()))


def picture_folder() -> Path:
    """Where easy-VQA keeps its pictures: in its package."""
    import easy_vqa

    return Path(easy_vqa.__file__).parent


def write_rows(folder: Path, seed: int, questions: int = TEST_QUESTIONS) -> tuple[Path, Path]:
    """easy-VQA as train.jsonl and test.jsonl with image, question and answer: all training questions, the drawn test ones."""
    import easy_vqa

    folder.mkdir(parents=True, exist_ok=True)
    train = _rows(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
    test = _rows(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
    drawn = sorted(random.Random(seed).sample(range(len(test)), questions))
    return (
        _write_jsonl(folder / "train.jsonl", train),
        _write_jsonl(folder / "test.jsonl", [test[index] for index in drawn]),
    )


def _rows(questions: tuple[list[str], list[str], list[int]], pictures: dict[int, str]) -> list[Row]:
    return [
        {"image": pictures[image], "question": question, "answer": answer}
        for question, answer, image in zip(*questions, strict=True)
    ]


def _write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_report(run: RunDir, test: Path, compared: Compared, seed: int) -> Path:
    """loss.png and page.html in the run folder; returns the page."""
    trained, (before, after) = compared.trained, _both(compared)
    metrics = run.read_metrics()
    curve = run.path / "loss.png"
    samples, losses = [step["samples"] for step in metrics], [step["loss"] for step in metrics]
    draw_loss_curve(samples, losses, curve, title="Training loss: lensmith/tiny on easy-VQA")
    examples = _examples(test, before, after)
    wrong = [example for example in examples if not example.right_after]
    drawn = random.Random(seed).sample(examples, min(SHOWN_DRAWN, len(examples)))
    page = run.path / "page.html"
    page.write_text(
        render_page(
            title=f"lensmith/tiny learned easy-VQA in {trained.train_s:.0f} seconds",
            summary=(
                f"{trained.steps:,} steps over {trained.samples:,} training questions, tested before and after on "
                f"{len(examples):,} questions of the official test split, about pictures never trained on."
            ),
            facts={
                "right answers": f"{100 * before.score.value:.1f} → {100 * after.score.value:.1f} %",
                "training": f"{trained.train_s:.0f} s",
                "speed": f"{trained.samples_per_s:,.0f} questions/s",
            },
            table=_table(before, after),
            comparison=compare_results(before, after),
            curve=curve,
            curve_text=f"The loss fell from {losses[0]:.2f} to {losses[-1]:.3f} nats per learned token.",
            galleries=[
                Gallery("A draw of the test questions", _count(SHOWN_DRAWN, len(examples), "drawn by the seed"), drawn),
                Gallery("Still wrong", _count(SHOWN_WRONG, len(wrong), "wrong after training"), wrong[:SHOWN_WRONG]),
            ],
            footer=f"lensmith {version('lensmith')}, seed {seed}, {before.why}. All answers: predictions-*.jsonl.",
        ),
        encoding="utf-8",
    )
    return page


def _count(most: int, there: int, which: str) -> str:
    return f"All {there:,} {which}." if there <= most else f"{most} of {there:,}, {which}."


def _both(compared: Compared) -> tuple[EvalResult, EvalResult]:
    """The results before and after, which a run with data.test always has."""
    assert compared.evaluated is not None
    assert compared.evaluated.before is not None
    return compared.evaluated.before, compared.evaluated.after


def _examples(test: Path, before: EvalResult, after: EvalResult) -> list[Example]:
    """Every test question with its picture and both answers."""
    with test.open(encoding="utf-8") as lines:
        pictures = [Path(json.loads(line)["image"]) for line in lines]
    return [
        Example(
            picture=pictures[int(then.where.rpartition(":")[2]) - 1],
            question=then.question,
            reference=then.reference,
            before=then.answer,
            after=now.answer,
            right_before=was_right == 1,
            right_after=is_right == 1,
        )
        for then, now, was_right, is_right in zip(
            before.predictions, after.predictions, before.values, after.values, strict=True
        )
    ]


def _table(before: EvalResult, after: EvalResult) -> list[Line]:
    kinds = ("all questions", *sorted({kind_of(prediction.reference) for prediction in before.predictions}))
    lines = []
    for kind in kinds:
        chosen = [
            index
            for index, prediction in enumerate(before.predictions)
            if kind in ("all questions", kind_of(prediction.reference))
        ]
        lines.append(Line(kind, before.score_of(chosen), after.score_of(chosen)))
    return lines


def kind_of(answer: str) -> str:
    """What an easy-VQA question asks for, from its right answer."""
    if answer in ("yes", "no"):
        return "yes or no"
    return "which shape" if answer in SHAPES else "which colour"
