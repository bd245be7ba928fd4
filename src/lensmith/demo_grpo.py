"""Reinforcement in minutes on any machine: lensmith/tiny practises sums with rewards alone, and a page shows what changed.

    sums ──> warm-up ──> before ──> GRPO ──> after ──> page
    drawn    task=sft    answers    task=grpo

The embedded model has never seen a `\\boxed{}`, and its embedding does not tell a brace from any other token it never saw.
No reward can be earned by what is never said, so a short supervised warm-up on rows of its own teaches the form and a
little adding. "Before" is what that left behind, measured; from there on only rewards teach: math_boxed for the result, and
`length`, because math_boxed reads nothing but the last box and a policy finds out that it may ramble on behind it. The rows,
the settings and the report are here; both trainings are what `lensmith train` runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensmith.config.tree import Data, Eval, Grpo, Memory, Optim, Packing, RunConfig, Save, Tune
from lensmith.demo import unused_folder
from lensmith.demo_sums import write_sums
from lensmith.evals.page import Example, Gallery, Line, draw_reward_curve, render_page
from lensmith.evals.predict import Prediction, answer_samples, write_predictions
from lensmith.evals.predict import Progress as EvalProgress
from lensmith.evals.score import Comparison, Score, compare_answers, judge_answers, score_answers
from lensmith.train.grpo import train_grpo
from lensmith.train.prepare import Prepared, prepare_run
from lensmith.train.rewards import RewardBatch, load_rewards
from lensmith.train.sft import TrainResult, train_model
from lensmith.types import Sample

if TYPE_CHECKING:
    from lensmith.train.progress import TrainProgress

NUM_SUMS = {"test": 400, "warm-up": 2048, "train": 3200}
"""Pictures of each part."""
SHOWN_WRONG, SHOWN_DRAWN = 12, 24
"""Test pictures on the page: wrong after training, and drawn without looking."""
MAX_NEW_TOKENS = 12
"""An answer has five to seven."""
REWARDS: tuple[str | dict[str, Any], ...] = (
    "math_boxed",
    {"name": "length", "max_tokens": MAX_NEW_TOKENS, "cache_tokens": 0},
)
WARM_UP = "warm-up"
"""The warm-up's own run folder, inside the run's."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to all test sums, and what they earned."""

    predictions: tuple[Prediction, ...]
    rewards: tuple[float, ...]
    """By REWARDS: 1 for the right box, -0.5 for a wrong one, -1 for none; 1 less where the answer did not end."""

    @property
    def cut_off(self) -> int:
        """Answers that did not end by themselves."""
        return sum(not prediction.stopped for prediction in self.predictions)

    @property
    def reward(self) -> float:
        """Mean over all."""
        return sum(self.rewards) / len(self.rewards)

    @property
    def answers(self) -> list[str]:
        return [prediction.answer for prediction in self.predictions]

    @property
    def references(self) -> list[str]:
        return [prediction.reference for prediction in self.predictions]

    @property
    def right(self) -> list[bool]:
        """Answers that are the reference from the first character to the last."""
        return judge_answers(self.answers, self.references, "exact")

    def accuracy(self, chosen: Sequence[int] | None = None) -> Score:
        """Share of right answers, of all questions or some."""
        picked = [self.predictions[n] for n in range(len(self.predictions)) if chosen is None or n in chosen]
        return score_answers([p.answer for p in picked], [p.reference for p in picked], "exact")

    def to_json(self) -> dict[str, float]:
        return {"reward": self.reward, "accuracy": self.accuracy().value}

    def __str__(self) -> str:
        return f"mean reward {self.reward:+.3f}, right answers {self.accuracy()}"


@dataclass(frozen=True, slots=True)
class GrpoDemoResult:
    before: Judged
    """After the warm-up, before the first reward."""
    after: Judged
    train_s: float
    """Training alone, the warm-up included: without loading, evaluation and the page."""
    run: Path
    page: Path

    def to_json(self) -> dict[str, Any]:
        """What `lensmith demo grpo --json` ends with."""
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "train_s": self.train_s,
            "run": str(self.run),
        }


def run_grpo_demo(
    *,
    run: Path,
    seed: int = 0,
    say: Say | None = None,
    train_progress: TrainProgress | None = None,
    eval_progress: EvalProgress | None = None,
    steps: tuple[int, int] | None = None,
    num_sums: dict[str, int] | None = None,
) -> GrpoDemoResult:
    """Draw the sums, warm up, ask, reinforce, ask again and write the page into the run folder.

    Args:
        run: where everything goes; where something is there already, a numbered folder beside it.
        train_progress, eval_progress: handed to both trainings and to `answer_samples`.
        steps: of the warm-up and of GRPO, instead of those of the settings.
        num_sums: pictures of each part, instead of NUM_SUMS.
    """
    say = say or (lambda _: None)
    run = unused_folder(run)
    files = write_sums(run / "rows", seed, num_sums or NUM_SUMS)
    warm_up, config = (
        _placed(settings, seed, count)
        for settings, count in zip(
            (warm_up_config(run, files), grpo_config(run, files)), steps or (None, None), strict=True
        )
    )
    say("Warm-up, supervised: what a boxed answer looks like, and a little adding. Its own pictures, never seen again.")
    warmed = train_model(warm_up, say=say, progress=train_progress)
    say("GRPO from there on: right or wrong, and whether the answer ends, is all that it is told.")
    prepared = prepare_run(config, say)
    before = judge_model(prepared, prepared.model, "before", eval_progress)
    say(f"Before GRPO, after the warm-up: {before}")
    trained = train_grpo(prepared, say=say, progress=train_progress)
    after = judge_model(prepared, trained.model, "after", eval_progress)
    say(f"After GRPO: {after}")
    say(compare_judged(before, after).sentence)
    page = write_grpo_report(prepared, before, after, warmed, trained)
    say(f"The reward's curve, pictures, and answers before and after: {page}")
    return GrpoDemoResult(before, after, warmed.train_s + trained.train_s, run, page)


def _placed(config: RunConfig, seed: int, steps: int | None) -> RunConfig:
    """The settings with that seed, and with other steps where some are given."""
    optim = config.optim.model_copy(update={"steps": steps}) if steps else config.optim
    return config.model_copy(update={"seed": seed, "optim": optim})


def warm_up_config(run: Path, files: dict[str, Path]) -> RunConfig:
    """Supervised, less than one pass, at a constant rate: stopped while the model is still wrong most of the time.

    All weights of the decoder, because the embedding has to learn the braces, and an adapter does not reach it.
    """
    return RunConfig(
        model="lensmith/tiny",
        task="sft",
        data=Data(train=str(files["warm-up"]), test=None),
        tune=Tune(method="full"),
        pack=Packing(tokens=8192),
        optim=Optim(learning_rate=1e-3, steps=64, effective_samples=32, schedule="constant"),
        memory=Memory(recompute="none"),
        save=Save(keep=1),
        run=run / WARM_UP,
    )


def grpo_config(run: Path, files: dict[str, Path]) -> RunConfig:
    """Settings for two CPU cores: 32 sums a step with eight answers each, most pictures seen once."""
    return RunConfig(
        model="lensmith/tiny",
        task="grpo",
        data=Data(train=str(files["train"]), test=str(files["test"])),
        tune=Tune(method="full", start_from=str(run / WARM_UP)),
        pack=Packing(tokens=8192),
        optim=Optim(learning_rate=2e-4, steps=100, effective_samples=256, schedule="constant"),
        memory=Memory(recompute="none"),
        grpo=Grpo(group=8, max_new_tokens=MAX_NEW_TOKENS, rewards=list(REWARDS)),
        eval=Eval(metric="exact", samples=None, max_new_tokens=MAX_NEW_TOKENS, batch=128),
        save=Save(keep=1),
        run=run,
    )


def judge_model(prepared: Prepared, model: Any, name: str, progress: EvalProgress | None = None) -> Judged:
    """Greedy answers to all test sums, kept as predictions-`name`.jsonl in the run folder, and their rewards."""
    samples = _test_samples(prepared)
    settings = prepared.config.eval
    predictions = answer_samples(
        model,
        prepared.encoder,
        prepared.loaded.processor,
        samples,
        max_new_tokens=settings.max_new_tokens,
        batch=settings.batch,
        progress=progress,
    )
    write_predictions(predictions, prepared.run.predictions_path(name))
    return judge_answers_by_reward(predictions, samples)


def judge_answers_by_reward(predictions: Sequence[Prediction], samples: Sequence[Sample]) -> Judged:
    """What REWARDS give for these answers; `length` asks only whether they ended."""
    table = load_rewards(REWARDS, root=Path.cwd(), on_error="raise").score(
        RewardBatch(
            completions=[prediction.answer for prediction in predictions],
            completion_ids=[(0,) * prediction.tokens for prediction in predictions],  # counted, not read
            samples=samples,
            truncated=[not prediction.stopped for prediction in predictions],
        )
    )
    return Judged(tuple(predictions), tuple(table.total.tolist()))


def compare_judged(before: Judged, after: Judged) -> Comparison:
    """Wins and losses, sum by sum."""
    return compare_answers(before.answers, after.answers, before.references, "exact")


def write_grpo_report(
    prepared: Prepared, before: Judged, after: Judged, warmed: TrainResult, trained: TrainResult
) -> Path:
    """reward.png and page.html in the run folder; returns the page."""
    run, seed, group = prepared.run, prepared.config.seed, prepared.config.grpo.group
    rewards = [float(step["reward"]) for step in run.read_metrics()]
    curve = run.path / "reward.png"
    draw_reward_curve(rewards, curve, title="Mean reward of each step: lensmith/tiny on pictures of sums")
    examples = _examples(prepared, before, after)
    wrong = [example for example in examples if not example.right_after]
    drawn = random.Random(seed).sample(examples, min(SHOWN_DRAWN, len(examples)))
    page = run.path / "page.html"
    page.write_text(
        render_page(
            title=f"lensmith/tiny practised sums with rewards for {trained.train_s:.0f} seconds",
            summary=_summary(len(examples), group, warmed, trained),
            facts={
                "mean reward": f"{before.reward:+.2f} → {after.reward:+.2f}",
                "right answers": f"{100 * before.accuracy().value:.1f} → {100 * after.accuracy().value:.1f} %",
                "cut off": f"{before.cut_off} → {after.cut_off}",
                "GRPO": f"{trained.train_s:.0f} s",
                "warm-up": f"{warmed.train_s:.0f} s",
            },
            table=_table(prepared, before, after),
            comparison=compare_judged(before, after),
            curve=curve,
            curve_heading="Reward",
            curve_text=(
                f"The mean reward of a step's sampled answers went from {rewards[0]:+.2f} to {rewards[-1]:+.2f}; "
                "-1 is no box, -0.5 a wrong one, 1 the right one, and 1 less for an answer that does not end."
            ),
            galleries=[
                Gallery("A draw of the test sums", f"{len(drawn)} of {len(examples):,}, drawn by the seed.", drawn),
                Gallery("Still wrong", f"The first of {len(wrong):,} wrong after GRPO.", wrong[:SHOWN_WRONG]),
            ],
            footer=(
                f"lensmith {version('lensmith')}, seed {seed}, rewards math_boxed and length, greedy answers. All answers: "
                "predictions-*.jsonl; what was sampled in training, with its rewards: completions.jsonl."
            ),
        ),
        encoding="utf-8",
    )
    return page


def _summary(questions: int, group: int, warmed: TrainResult, trained: TrainResult) -> str:
    return (
        f"“Before” is after a supervised warm-up on {warmed.samples:,} boxed answers ({warmed.train_s:.0f} s), which taught "
        f"the form and a little adding. From there {trained.steps:,} steps of GRPO over {trained.samples // group:,} sums "
        f"with {group} sampled answers each, told only whether the box is right and whether the answer ends. Tested before and "
        f"after on {questions:,} pictures in neither; six of the 36 sums are on no picture that either was trained on. A right "
        "answer is exact to the last character."
    )


def _examples(prepared: Prepared, before: Judged, after: Judged) -> list[Example]:
    """Every test sum with its picture, both answers and what each earned."""
    pictures = [sample.images[0] for sample in _test_samples(prepared)]
    return [
        Example(
            picture=Path(picture.key),
            question=then.question,
            reference=then.reference,
            before=then.answer,
            after=now.answer,
            right_before=before.right[number],
            right_after=after.right[number],
            note_before=f"reward {before.rewards[number]:+.1f}",
            note_after=f"reward {after.rewards[number]:+.1f}",
        )
        for number, (picture, then, now) in enumerate(zip(pictures, before.predictions, after.predictions, strict=True))
    ]


def _table(prepared: Prepared, before: Judged, after: Judged) -> list[Line]:
    held_back = [bool(sample.columns["held_back"]) for sample in _test_samples(prepared)]
    chosen = {
        "all sums": range(len(held_back)),
        "sums practised, on new pictures": [number for number, held in enumerate(held_back) if not held],
        "sums never practised": [number for number, held in enumerate(held_back) if held],
    }
    return [Line(kind, before.accuracy(some), after.accuracy(some)) for kind, some in chosen.items() if some]


def _test_samples(prepared: Prepared) -> list[Sample]:
    assert prepared.held_out is not None, "grpo_config names data.test"
    return [prepared.held_out.source.sample(row) for row in prepared.held_out.rows.tolist()]
