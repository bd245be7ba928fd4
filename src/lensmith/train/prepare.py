"""Everything before the first step: the run folder, the model, every row once, the order of the steps, what trains.

`Prepared` is where training and the evaluation before it meet: model and rows are loaded once for both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from lensmith.config.tree import PACK_TOKENS, RunConfig
from lensmith.data.encode import Encoder
from lensmith.data.loader import StepDataset, StepPlan, plan_steps
from lensmith.data.scan import Scan, hold_out, scan_source
from lensmith.data.source import open_source
from lensmith.errors import ConfigError
from lensmith.model.adapters import check_tune, prepare_trainable
from lensmith.model.components import census_table, learning_rates, states_of, take_census, tower_warning
from lensmith.model.features import open_features
from lensmith.model.load import Loaded, choose_device, load_model, load_processor
from lensmith.model.residence import check_frozen, let_segments_grow, settle_inputs
from lensmith.model.unsloth import adapt_unsloth, import_unsloth, load_unsloth
from lensmith.model.versions import check_versions, environment
from lensmith.plan.answer import check_fits
from lensmith.plan.cards import usable_gib
from lensmith.rundir import RunDir, checkpoint_step
from lensmith.train.ranks import rank, refuse_data_parallel, world_size
from lensmith.train.reward_set import RewardSet
from lensmith.train.rewards import run_rewards
from lensmith.train.selfcheck import check_packs
from lensmith.train.vllm_ready import check_vllm, check_vllm_installed, check_vllm_room
from lensmith.types import counted

GIB = 2**30

Say = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Given:
    """What a caller has in hand already, where the config could only name it. The config still says how it was made."""

    loaded: Loaded | None = None
    model: nn.Module | None = None
    """`loaded.model`, made trainable as config.tune says."""
    rewards: RewardSet | None = None
    """Judges in the place of those that grpo.rewards names."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run ready for its first step, or for the first after its checkpoint."""

    config: RunConfig
    run: RunDir
    checkpoint: Path | None
    """Where to go on from; its weights are not in `model` yet."""
    loaded: Loaded
    encoder: Encoder
    model: nn.Module
    """With fresh adapters, so it still answers as it did when it was loaded or given."""
    plan: StepPlan
    dataset: StepDataset
    held_out: Scan | None
    rewards: RewardSet | None
    """With task=grpo."""

    @property
    def steps_done(self) -> int:
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


def prepare_run(config: RunConfig, say: Say, *, given: Given | None = None) -> Prepared:
    """Open the run folder, load the model, read every row once, decide what trains when; says each of these.

    `given`: what need not be loaded any more.

    Raises LensmithError children for whatever the user can mend.
    """
    check_versions()
    check_tune(config.tune)
    if config.engine == "unsloth":
        if given is not None and given.loaded is not None:
            raise ConfigError(
                "engine=unsloth: the model given here was loaded by Lensmith's engine. Leave engine out, or start the run by "
                "`lensmith train`, which loads Unsloth's."
            )
        import_unsloth()
    given, rewards = given or Given(), None
    if config.task == "grpo":
        # A name that is not there is known before gigabytes of weights are read.
        rewards = given.rewards or run_rewards(config)
        check_vllm_installed(config)
        config = _with_default_rate(config)
    refuse_data_parallel()
    let_segments_grow()
    run = RunDir(config.run)
    checkpoint = _open_run(run, config, say)
    # Rows and memory first: what is wrong with them is known before gigabytes of weights are read.
    device = choose_device() if given.loaded is None else given.loaded.device
    processor = load_processor(config.model) if given.loaded is None else given.loaded.processor
    encoder = Encoder.from_processor(processor, config.data.image, config.data.video)
    if config.task == "grpo":
        check_vllm(config, device, processor)
    train, held_out = scan_rows(config, encoder, device, say)
    if config.task == "grpo":
        check_vllm_room(config, train, device)
    unsloth = config.engine == "unsloth"
    if device.type == "cuda" and not unsloth:
        say(_planned_memory(config, train, device))
    loaded = given.loaded
    if loaded is None:
        load = load_unsloth if unsloth else load_model
        loaded = load(config, device=device, processor=processor)
        for sentence in (*loaded.sentences, *_tower_sentences(config)):
            say(sentence)
    else:
        settle_inputs(loaded.model, config.memory, device)
    plan, dataset = _plan(config, loaded, encoder, train, say)
    model = _make_trainable(loaded, config) if given.model is None else given.model
    check_frozen(model)
    if not unsloth:
        loaded.model.keeps_random = config.tune.dropout > 0
        loaded.model.features = open_features(config.memory, loaded.model.model.visual, loaded.device)
    say(census_table(take_census(model)))
    return Prepared(config, run, checkpoint, loaded, encoder, model, plan, dataset, held_out, rewards)


def _tower_sentences(config: RunConfig) -> list[str]:
    state = states_of(config.tune)["vision"]
    return [] if state == "frozen" else [tower_warning(state)]


def _make_trainable(loaded: Loaded, config: RunConfig) -> nn.Module:
    if config.engine == "unsloth":
        return adapt_unsloth(loaded.model, config)
    return prepare_trainable(loaded.model, config.tune, seed=config.seed)


def _with_default_rate(config: RunConfig) -> RunConfig:
    """A learning rate for policies where none is set: a tenth of what supervised answers get."""
    if config.optim.learning_rate is not None:
        return config
    rate = learning_rates(config.optim, config.tune.method)["language"] / 10
    return config.model_copy(update={"optim": config.optim.model_copy(update={"learning_rate": rate})})


def _planned_memory(config: RunConfig, train: Scan, device: torch.device) -> str:
    """What the planner expects, as a sentence. Raises ConfigError where the run cannot fit the card."""
    gib = torch.cuda.get_device_properties(device).total_memory / GIB
    plan = check_fits(config, gib, train)
    return (
        f"Planned: {plan.memory.peak_gib:.1f} GiB reserved at most, of {usable_gib(gib):.1f} usable ones on this card; "
        "`lensmith plan` shows the parts."
    )


def _open_run(run: RunDir, config: RunConfig, say: Say) -> Path | None:
    """Start or reopen the run folder; returns the checkpoint to go on from."""
    if run.exists:
        for sentence in run.check_same(config):
            say(sentence)
    checkpoint = run.latest_checkpoint()
    if rank() == 0:
        run.start(config, environment())
        run.truncate_metrics(checkpoint_step(checkpoint) if checkpoint else 0)
    say(f"Going on from {checkpoint}." if checkpoint else f"Run folder: {run.path}")
    return checkpoint


def scan_rows(config: RunConfig, encoder: Encoder, device: torch.device, say: Say) -> tuple[Scan, Scan | None]:
    """What trains and what is held out: a share of data.train by image, or the rows of data.test."""
    train = scan_one(config, encoder, device, "train", say)
    if config.data.test is None:
        return train, None
    if isinstance(config.data.test, str):
        return train, scan_one(config, encoder, device, "test", say)
    train, held_out = hold_out(train, config.data.test, config.seed)
    say(f"Held out {len(held_out.rows)} of them, by image; {len(train.rows)} train.")
    return train, held_out


def scan_one(config: RunConfig, encoder: Encoder, device: torch.device, which: Any, say: Say) -> Scan:
    """Every row of data.train or data.test once, with what there is to say about it."""
    source = open_source(config.data, encoder, which=which)
    for sentence in source.sentences:
        say(sentence)
    scan = scan_source(
        source,
        budget_tokens=longest_row(config, device),
        on_long=config.data.on_long,
        on_bad_row=config.data.on_bad_row,
        seed=config.seed,
        workers=config.data.workers,
    )
    for sentence in scan.sentences():
        say(sentence)
    return scan


def longest_row(config: RunConfig, device: torch.device) -> int:
    """Most tokens of a row: what a pack holds, with task=grpo less room for one completion.

    Raises ConfigError where nothing is left.
    """
    whole = config.pack.tokens or PACK_TOKENS[device.type]
    if config.task == "sft":
        return whole
    if whole <= config.grpo.max_new_tokens:
        raise ConfigError(
            f"grpo.max_new_tokens={config.grpo.max_new_tokens}: a pack holds {whole:,} tokens, so no prompt has room beside "
            "such a completion. Lower it, or raise pack.tokens."
        )
    return whole - config.grpo.max_new_tokens


def _plan(config: RunConfig, loaded: Loaded, encoder: Encoder, scan: Scan, say: Say) -> tuple[StepPlan, StepDataset]:
    share_prefix = config.pack.share_prefix and not config.tune.dropout and config.engine == "lensmith"
    if config.pack.share_prefix and config.tune.dropout:
        say(
            f"Prefix sharing is off because tune.dropout is {config.tune.dropout:g}: questions about one image would get "
            "one dropout mask for its tokens instead of one each. Set tune.dropout=0 to have it back."
        )
    per_step = config.optim.effective_samples
    if config.task == "grpo":  # a sample is a completion, a row of the scan a prompt
        per_step //= config.grpo.group
    plan = plan_steps(
        scan,
        effective_samples=per_step,
        seed=config.seed,
        epochs=config.optim.epochs,
        steps=config.optim.steps,
        share_prefix=share_prefix,
        world=world_size(),
    )
    dataset = StepDataset(
        scan,
        plan,
        encoder.geometry,
        image_token_id=loaded.model.config.image_token_id,
        video_token_id=loaded.model.config.video_token_id,
        budget_tokens=config.pack.tokens or PACK_TOKENS[loaded.device.type],
        share_prefix=share_prefix,
        padded=config.engine == "unsloth",
        together=config.pack.together,
        pixel_dtype=loaded.dtype,
        digest_pictures=config.memory.vision_cache_gib is not None,
        rank=rank(),
        world=world_size(),
    )
    if config.optim.in_backward:
        _check_single_packs(dataset, config)
    if config.task == "grpo":
        plan = _whole_steps(plan, per_step, config.grpo.iterations)
    per_step_told = counted(config.optim.effective_samples, "sample")
    steps = f"{counted(len(plan.steps), 'step')} of {per_step_told}, {plan.per_epoch:,} an epoch"
    if config.task == "grpo":
        say(f"{steps}: {counted(per_step, 'prompt')} with {config.grpo.group} completions each.")
    else:
        first = counted(len(dataset.members(0)), "pack")
        say(f"{steps}; the first is {first} of at most {dataset.budget_tokens:,} tokens.")
    return plan, dataset


def _whole_steps(plan: StepPlan, prompts: int, iterations: int) -> StepPlan:
    """As many steps, each of exactly `prompts` prompts, in the plan's order; `iterations` steps in a row see the same ones."""
    order = itertools.cycle(int(sample) for step in plan.steps for sample in step)
    draws = [np.array(list(itertools.islice(order, prompts))) for _ in range(-(-len(plan.steps) // iterations))]
    return StepPlan(tuple(draws[step // iterations] for step in range(len(plan.steps))), plan.per_epoch)


def _check_single_packs(dataset: StepDataset, config: RunConfig) -> None:
    """Raise ConfigError where a step takes several packs: their gradients would have to be added up before the update."""
    if world_size() > 1:
        raise ConfigError(
            f"optim.in_backward=true with {world_size()} processes: each would move its weights by its own gradients before "
            "they are added up. Start one process, or set optim.in_backward=false."
        )
    for step in range(len(dataset)):
        if (packs := len(dataset.members(step))) > 1:
            raise ConfigError(
                f"optim.in_backward=true: step {step + 1} needs {packs} packs of {dataset.budget_tokens:,} tokens, and a "
                f"weight that is updated inside the backward pass cannot wait for the second. Lower "
                f"optim.effective_samples (now {config.optim.effective_samples}) or raise pack.tokens."
            )


def check_first_packs(prepared: Prepared) -> str:
    """The self-check of `pack.check_packs` packs, as a sentence. Raises RunError on a difference."""
    dataset = prepared.dataset
    packs = itertools.islice(_first_packs(dataset), prepared.config.pack.check_packs)
    checked = check_packs(
        prepared.model,
        [[dataset.encoded(sample) for sample in members] for members in packs],
        dataset.geometry,
        image_token_id=prepared.encoder.image_token_id,
        video_token_id=prepared.encoder.video_token_id,
        share_prefix=dataset.share_prefix,
    )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return checked.sentence()


def _first_packs(dataset: StepDataset) -> Iterator[Int[np.ndarray, " samples"]]:
    """Samples of each pack, from the first step on."""
    for step in range(len(dataset)):
        yield from dataset.members(step)
