"""SFTTrainer and GRPOTrainer of the recipe: the run that `lensmith train` would make of the same settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from transformers.trainer_utils import TrainOutput

from lensmith.config.tree import RunConfig
from lensmith.console import say
from lensmith.errors import ConfigError, DataError, RunError
from lensmith.model.adapters import save_tuned
from lensmith.recipe.arguments import Arguments, GRPOConfig, SFTConfig, training_settings
from lensmith.recipe.collator import VisionDataCollator
from lensmith.recipe.dataset import Dataset
from lensmith.recipe.keywords import Keyword, read_keywords
from lensmith.recipe.model import prepared_model
from lensmith.recipe.names_training import GRPO_TRAINER, SFT_TRAINER, TRAINER_RENAMED
from lensmith.recipe.rows import keep_rows
from lensmith.recipe.session import Settings, Wanted, only, session_of, to_config
from lensmith.recipe.speech import quiet_libraries, say_once, warn_renamed
from lensmith.rundir import RunDir
from lensmith.train.evaluate import Compared, train_and_compare
from lensmith.train.prepare import Given
from lensmith.train.progress import CountProgress, TrainProgress
from lensmith.train.reward_set import RewardSet
from lensmith.train.rewards import load_rewards

OF_THE_MODEL = (
    "model", "precision", "tune", "memory.embedding", "memory.head", "memory.head_bits", "memory.tower", "memory.stream_layers",
)  # fmt: skip
"""Settings that loading and get_peft_model have decided already."""
DIFFERENCES = (
    "Two things are done otherwise than in Unsloth, for your good: images keep their size up to {tokens:,} tokens each "
    "(Unsloth's collator shrinks them to 512 px; max_pixels limits them here), and only answers are learned (there every "
    "token, unless train_on_responses_only=True). docs/recipe.md has all differences."
)
FROM_A_FOLDER = "relative paths start from"
"""What lensmith.data.places says of a file that is missing."""
ON_ERROR = "rollout.on_reward_error"
NOT_IN_A_FILE = "a function given to GRPOTrainer"


class _Trainer:
    """What both have in common."""

    call: ClassVar[str]
    known: ClassVar[Mapping[str, Keyword]]
    arguments: ClassVar[type[Arguments]]

    def __init__(self, model: Any = None, args: Any = None, **keywords: Any) -> None:
        """Everything is checked, and the rows are written into the run folder; nothing is trained yet.

        Raises:
            ConfigError: a keyword or a setting is wrong, unknown or cannot be honoured.
            DataError: the rows cannot be written.
            RunError: output_dir holds something else than a run, or a run of other rows.
        """
        keywords, args = self._split(keywords, args)
        given = read_keywords(self.call, keywords, self.known, TRAINER_RENAMED)
        self.session, self.args = session_of(model, self.call), args
        self.model, self.processing_class = prepared_model(self.session, self.call), self.session.loaded.processor
        _check_processor(self.call, given.get("processing_class"), self.processing_class)
        self.train_dataset, self.eval_dataset = given.get("train_dataset"), given.get("eval_dataset")
        if self.train_dataset is None:
            raise ConfigError(f"{self.call}: train_dataset is missing. Give a list of rows, a Dataset or a path.")
        self.working_directory = Path.cwd()
        self.config = self._config(given)
        self.rewards = self._rewards(given)
        self.run_dir = RunDir(self.config.run)
        self.compared: Compared | None = None
        self._check_same_run()
        say_once(DIFFERENCES.format(tokens=self.config.data.image.max_tokens))

    @property
    def tokenizer(self) -> Any:
        """Its old name."""
        return self.processing_class

    @property
    def state(self) -> SimpleNamespace:
        """`global_step` and `log_history`, one entry per optimizer step."""
        steps = self.run_dir.read_metrics()
        return SimpleNamespace(global_step=len(steps), log_history=steps, max_steps=self.config.optim.steps)

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Trains, and resumes where output_dir holds a checkpoint of this run; its last weights are the model's.

        Raises LensmithError children for whatever the user can mend; `Interrupted` after Ctrl-C, with everything saved.
        """
        if Path.cwd() != self.working_directory:  # a relative output_dir is where the rows were written
            self.config = self.config.model_copy(update={"run": self.working_directory / self.config.run})
            self.run_dir = RunDir(self.config.run)
        self._check_resume(resume_from_checkpoint)
        given = Given(self.session.loaded, self.model, self.rewards)
        try:
            with (
                quiet_libraries(),
                TrainProgress() as progress,
                CountProgress("answering", progress.console) as answered,
            ):
                self.compared = train_and_compare(
                    self.config, say=progress.say, train_progress=progress, eval_progress=answered, given=given
                )
        except DataError as cause:
            if FROM_A_FOLDER not in str(cause):
                raise
            raise DataError(f"{cause} {self._about_paths()}") from cause
        self.session.run = self.run_dir.path.resolve()
        say(f"Done: {self.run_dir.path}. Look at it: lensmith show {self.run_dir.path}")
        return self._output(self.compared)

    def evaluate(self) -> dict[str, float]:
        """How the rows of eval_dataset were answered after training, as `eval_<metric>`.

        Raises:
            RunError: nothing was trained, or there is no eval_dataset.
        """
        if self.compared is None or self.compared.evaluated is None:
            missing = "train() has not run yet" if self.compared is None else "there is no eval_dataset"
            raise RunError(
                f"{self.call}.evaluate: {missing}. It tells the answers to eval_dataset before and after training; "
                "`lensmith eval` asks a model at any time."
            )
        score = self.compared.evaluated.after.score
        return {f"eval_{score.metric}": score.value}

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """The tuned weights and the processor; without a folder, where train() has put them already."""
        folder = Path(output_dir) if output_dir is not None else self.run_dir.path / "tuned"
        save_tuned(self.model, folder)
        self.processing_class.save_pretrained(str(folder))

    # --- from keywords to one RunConfig -------------------------------------------------------------------------------

    def _split(self, keywords: Mapping[str, Any], args: Any) -> tuple[dict[str, Any], Arguments]:
        """Keywords of the trainer, and arguments with those that once were the trainer's."""
        if args is None:
            args = self.arguments()
        if not isinstance(args, self.arguments):
            home = f"{type(args).__module__.partition('.')[0]}.{type(args).__name__}"
            raise ConfigError(
                f"{self.call}: args is a {home}, but must be a {self.arguments.call} of Lensmith: "
                f"from lensmith import {self.arguments.call}"
            )
        own = {*self.known, *TRAINER_RENAMED}
        moved = {name: value for name, value in keywords.items() if name not in own and _is_argument(args, name)}
        if moved:
            names = ", ".join(moved)
            warn_renamed(f"{self.call}: understood {names} as of {args.call}, where it belongs; please write it there.")
            args = type(args)(
                **{**args.given, **{args.renamed.get(name, name): value for name, value in moved.items()}}
            )
        return {name: value for name, value in keywords.items() if name not in moved}, args

    def _config(self, given: Mapping[str, Any]) -> RunConfig:
        collator = given.get("data_collator")
        if collator is not None and not isinstance(collator, VisionDataCollator):
            raise ConfigError(
                f"{self.call}: data_collator is a {type(collator).__name__}, but rows are packed here, not collated. Leave it "
                "out, or give VisionDataCollator(model, tokenizer); rows are changed with formatting_func."
            )
        formatting = given.get("formatting_func") or (collator.formatting_func if collator is not None else None)
        run = RunDir(self.args.output_dir)
        train = keep_rows(self.train_dataset, run, "train_dataset", formatting)
        asked = None if self.eval_dataset is None else keep_rows(self.eval_dataset, run, "eval_dataset", formatting)
        settings = dict(self.session.settings)
        settings |= collator.settings if collator is not None else {}
        settings |= {
            "data.train": Wanted(train.path, f"{self.call}(train_dataset=)"),
            "data.test": Wanted(asked and asked.path, f"{self.call}(eval_dataset=)"),
        }
        if not isinstance(self.train_dataset, str | Path):
            # The rows come from the program itself, which may name any file that it may read.
            settings["data.image_root"] = Wanted(str(self.working_directory), f"{self.call}(train_dataset=)")
            settings["data.allow_outside"] = Wanted(True, f"{self.call}(train_dataset=)")
        if self.session.run is not None and self.session.run != run.path.resolve():
            settings["tune.start_from"] = Wanted(str(self.session.run), f"{self.call}(model=)")
        settings |= training_settings(
            self.args, self.session.loaded, num_rows=train.num_rows, evaluates=asked is not None
        )
        settings |= self._more_settings(given)
        config = to_config(settings)
        self._check_model_settings(settings)
        return config

    def _more_settings(self, given: Mapping[str, Any]) -> Settings:
        return {}

    def _rewards(self, given: Mapping[str, Any]) -> RewardSet | None:
        return None

    def _check_model_settings(self, settings: Settings) -> None:
        """Raise ConfigError for a setting that comes after it was decided."""
        own = only(OF_THE_MODEL, self.session.settings)
        for path, wanted in only(OF_THE_MODEL, settings).items():
            if path != "tune.start_from" and (path not in own or own[path].value != wanted.value):
                raise ConfigError(
                    f"{wanted.written}: {path} was decided when the model was loaded or given its adapter. Give it to "
                    "FastVisionModel.from_pretrained or get_peft_model."
                )

    def _check_same_run(self) -> None:
        """Raise RunError for a folder that holds a run of other settings, before anything else is said."""
        if not self.run_dir.exists:
            return
        try:
            self.run_dir.check_same(self.config)
        except RunError as cause:
            raise RunError(f"{cause} From Python: {self.args.call}(output_dir='another-name').") from cause

    def _check_resume(self, asked: bool | str | None) -> None:
        there = self.run_dir.latest_checkpoint()
        if asked is False and there is not None:
            raise RunError(
                f"{self.run_dir.path}: resume_from_checkpoint=False, but a run is there, up to {there.name}. Give another "
                "output_dir for a new run; nothing is overwritten."
            )
        if isinstance(asked, str | os.PathLike) and (there is None or Path(asked).resolve() != there.resolve()):
            raise RunError(
                f"resume_from_checkpoint={asked}: this run goes on from {there or 'its beginning'}. To start from other "
                f"weights, load them: FastVisionModel.from_pretrained({str(asked)!r})."
            )

    def _about_paths(self) -> str:
        """Where relative paths started from, and where the rows were made if that is elsewhere."""
        here, data = self.working_directory, self.train_dataset
        sentence = f"Relative image paths start from {here}, the working directory when {self.call} was called."
        if isinstance(data, Dataset) and data.made_in != here:
            sentence += f" The rows were made in {data.made_in}: give absolute paths, or call {self.call} there."
        return sentence

    def _output(self, compared: Compared) -> TrainOutput:
        """As transformers tells it."""
        trained = compared.trained
        losses = [step["loss"] for step in self.run_dir.read_metrics()]
        mean = sum(losses) / len(losses) if losses else float("nan")
        taken_s = trained.train_s or float("nan")
        metrics = {
            "train_runtime": trained.train_s,
            "train_samples_per_second": trained.samples / taken_s,
            "train_steps_per_second": trained.steps / taken_s,
            "train_loss": mean,
        }
        if compared.evaluated is not None:
            metrics |= self.evaluate()
        return TrainOutput(trained.steps, mean, metrics)


class SFTTrainer(_Trainer):
    """Supervised fine-tuning; see the module."""

    call, known, arguments = "SFTTrainer", SFT_TRAINER, SFTConfig


class GRPOTrainer(_Trainer):
    """Reinforcement learning from rewards; see the module."""

    call, known, arguments = "GRPOTrainer", GRPO_TRAINER, GRPOConfig

    def _specs(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rewards with their weights, as `load_rewards` takes them."""
        functions: Any = given.get("reward_funcs")
        listed: Sequence[str | Callable[..., Any]] = (
            [functions] if isinstance(functions, str) or callable(functions) else list(functions or ())
        )
        weights = self.args.reward_weights or [1.0] * len(listed)
        if not listed or len(weights) != len(listed):
            raise ConfigError(
                f"{self.call}: {len(listed)} reward_funcs and {len(weights)} reward_weights; give at least one function, and "
                "one weight for each or none."
            )
        return [{"name": name, "weight": float(weight)} for name, weight in zip(listed, weights, strict=True)]

    def _rewards(self, given: Mapping[str, Any]) -> RewardSet:
        specs = [self._with_limit(spec) for spec in self._specs(given)]
        return load_rewards(specs, root=self.working_directory, on_error=self.config.rollout.on_reward_error)

    def _with_limit(self, spec: dict[str, Any]) -> dict[str, Any]:
        return {"max_tokens": self.config.grpo.max_new_tokens, **spec} if spec["name"] == "length" else spec

    def _more_settings(self, given: Mapping[str, Any]) -> Settings:
        """The rewards by name. A function gets one that no file answers to: resuming without it then says what is missing."""
        named = [
            {
                **spec,
                "name": spec["name"] if isinstance(spec["name"], str) else f"{_name(spec['name'])} ({NOT_IN_A_FILE})",
            }
            for spec in self._specs(given)
        ]
        written = f"{self.call}(reward_funcs=)"
        # As at home: a function with a slip in it would otherwise say nothing about any completion, to the end of the run.
        raises = {} if ON_ERROR in (self.args.settings or {}) else {ON_ERROR: Wanted("raise", written)}
        return {"grpo.rewards": Wanted(named, written), **raises}


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _is_argument(args: Arguments, name: str) -> bool:
    return name in args.known or name in args.renamed


def _check_processor(call: str, given: Any, own: Any) -> None:
    if given is not None and given is not own and given is not own.tokenizer:
        raise ConfigError(
            f"{call}: processing_class is a {type(given).__name__} of another model; give the one that "
            "FastVisionModel.from_pretrained returned, or leave it out."
        )
