"""From what stands on the command line to a plan: which card, which rows, which flags stand in for rows.

With data, every row is measured by its headers; without, a pack is what the flags or the settings say. What could not be
looked at is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lensmith.config.tree import PACK_TOKENS, RunConfig
from lensmith.config.write import config_diff, render_yaml
from lensmith.errors import ConfigError
from lensmith.plan.answer import Asked, Plan, answer_plan, answer_rollout, answer_scan, ask_rollout, on_smallest_card
from lensmith.plan.cards import Card, card_of_size, find_card, find_own_card
from lensmith.plan.facts import SIZES, TINY, ModelFacts, read_facts
from lensmith.plan.work import (
    PROMPT_TEXT_TOKENS,
    PromptSize,
    Rollout,
    Work,
    full_pack,
    largest_prompt,
    rollout_of,
    scaled_work,
    work_of,
)

if TYPE_CHECKING:
    from lensmith.data.encode import Encoder
    from lensmith.data.scan import Scan

Say = Callable[[Any], None]


@dataclass(frozen=True, slots=True)
class Question:
    """The flags of `lensmith plan`; None where one is not given."""

    gpu: str | None = None
    gib: float | None = None
    gpus: int = 1
    images: int | None = None
    """Pictures in one pack; in one prompt with task grpo."""
    image_tokens: int | None = None
    task: Literal["sft", "grpo"] | None = None
    group: int | None = None
    completion_tokens: int | None = None
    share_prefix: bool | None = None
    rollout: Literal["builtin", "vllm"] | None = None


def model_setting(model: str) -> str:
    """`8b` as the setting that names the checkpoint of that size; any other name as it is."""
    if model.upper() in SIZES:
        return f"Qwen/Qwen3-VL-{model.upper()}-Instruct"
    return model


def ask_plan(config: RunConfig, question: Question, say: Say) -> Plan:
    """The plan of a config; without a card on the command line or in the machine, on the smallest that it fits.

    Raises LensmithError children for whatever the user can mend.
    """
    if config.engine != "lensmith":
        raise ConfigError(
            f"engine={config.engine}: a plan is of Lensmith's engine, whose memory and time are known. Add engine=lensmith to "
            "the command to plan the same run with it."
        )
    card = _choose_card(question)
    answer = _answer(config, question, say)
    if card is None:
        say("No GPU here and none named (--gpu 24): planned for the smallest card that the run fits.")
        return on_smallest_card(answer)
    return answer(card)


def write_fitting(plan: Plan, path: Path) -> None:
    """Write the settings that fit, those that are not defaults, each under its meaning.

    Raises ConfigError where nothing fits, the file exists, or its folder does not.
    """
    if plan.fitting is None:
        raise ConfigError(f"--fit {path}: nothing to write, because no settings make the run fit: {plan.way_out}.")
    assert plan.fitted is not None, "what fits has been planned"
    head = (
        f"# Planned for {plan.card.name} ({plan.card.gib:g} GiB): {plan.fitted.peak_gib:.1f} GiB reserved of "
        f"{plan.card.usable_gib:.1f} that can be used.\n\n"
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(head + render_yaml(config_diff(plan.fitting)))
    except FileExistsError as cause:
        raise ConfigError(f"--fit {path}: exists already and stays as it is. Name another file.") from cause
    except FileNotFoundError as cause:
        raise ConfigError(
            f"--fit {path}: there is no folder {path.parent}. Make it, or choose another place."
        ) from cause


def _choose_card(question: Question) -> Card | None:
    if question.gpu is not None and question.gib is not None:
        raise ConfigError(f"--gpu {question.gpu} and --gib {question.gib:g} name two cards. Give one of them.")
    if question.gib is not None:
        return card_of_size(question.gib)
    return find_card(question.gpu) if question.gpu is not None else find_own_card()


def _answer(config: RunConfig, question: Question, say: Say) -> Callable[[Card], Plan]:
    """The question about the run, still without a card."""
    facts = read_facts(config.model)
    if (question.task or config.task) == "grpo":
        return _answer_rollout(config, question, facts, say)
    if question.images is not None or question.image_tokens is not None:
        work = _flagged_work(config, question)
        scaled = functools.partial(scaled_work, work)
        return lambda card: answer_plan(config, Asked(facts, card, scaled, gpus=question.gpus))
    encoder = _encoder(config, say)
    if encoder is None:
        return lambda card: answer_plan(config, Asked(facts, card, gpus=question.gpus))

    def rescan(changed: RunConfig) -> Scan:
        return _scan(changed, encoder(changed))

    scan = rescan(config)
    say(scan.sentences()[-1])
    return lambda card: answer_scan(config, card, scan, rescan=rescan, gpus=question.gpus)


def _flagged_work(config: RunConfig, question: Question) -> Work:
    likely = full_pack(config)
    images = likely.images if question.images is None else question.images
    size = config.data.image.max_tokens if question.image_tokens is None else question.image_tokens
    tokens = config.pack.tokens or max(likely.tokens, images * size)
    if images * size > tokens:
        raise ConfigError(
            f"{images} images of {size} tokens are {images * size:,} tokens, and a pack has {tokens:,}. "
            "Raise --pack-tokens, or lower --images or --image-tokens."
        )
    return work_of(tokens, images=images, image_tokens=size, effective_samples=config.optim.effective_samples)


def _answer_rollout(config: RunConfig, question: Question, facts: ModelFacts, say: Say) -> Callable[[Card], Plan]:
    """A run of rewards: the settings' groups and lengths unless flags say others, the rows' longest prompt unless flags do."""
    flagged = question.images is not None or question.image_tokens is not None
    encoder = None if flagged else _encoder(config, say)
    if encoder is not None:
        scan = _scan(config, encoder(config))
        say(scan.sentences()[-1])
        prompt, longest = largest_prompt(scan)
        where = scan.source.encoded(int(scan.rows[longest])).where
        say(f"Planned for prompts of {prompt.tokens:,} tokens, the longest there is: {where}.")
        rollout = _flagged_rollout(config, question, prompt)
        return lambda card: answer_rollout(config, card, scan, rollout=rollout, gpus=question.gpus)
    images = 1 if question.images is None else question.images
    size = config.data.image.max_tokens if question.image_tokens is None else question.image_tokens
    prompt = PromptSize(PROMPT_TEXT_TOKENS, images, images * size)
    rollout = _flagged_rollout(config, question, prompt)
    return lambda card: answer_plan(config, ask_rollout(facts, card, prompt, rollout, gpus=question.gpus))


def _flagged_rollout(config: RunConfig, question: Question, prompt: PromptSize) -> Rollout:
    given = {
        "group": question.group,
        "completion_tokens": question.completion_tokens,
        "share_prefix": question.share_prefix,
        "engine": question.rollout,
    }
    return replace(rollout_of(config, prompt), **{name: value for name, value in given.items() if value is not None})


def _encoder(config: RunConfig, say: Say) -> Callable[[RunConfig], Encoder] | None:
    """What measures rows; None, with the reason said, where there are none or the model's tokenizer is not here."""
    if config.data.train is None:
        return None
    if not _processor_is_here(config.model):
        say(
            f"The rows were not looked at: the tokenizer of {config.model} is not on this machine and a plan downloads "
            "nothing. Planned for full packs. Run `hf download` for it, or give --images and --image-tokens."
        )
        return None
    from lensmith.data.encode import Encoder
    from lensmith.model.load import load_processor

    processor = load_processor(config.model)
    return lambda changed: Encoder.from_processor(processor, changed.data.image, changed.data.video)


def _processor_is_here(model: str) -> bool:
    if model == TINY or Path(model).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "preprocessor_config.json"), str)


def _scan(config: RunConfig, encoder: Encoder) -> Scan:
    from lensmith.data.scan import hold_out, scan_source
    from lensmith.data.source import open_source

    scan = scan_source(
        open_source(config.data, encoder, which="train"),
        budget_tokens=config.pack.tokens or PACK_TOKENS["cuda"],
        on_long=config.data.on_long,
        on_bad_row=config.data.on_bad_row,
        seed=config.seed,
    )
    return hold_out(scan, config.data.test, config.seed)[0] if isinstance(config.data.test, float) else scan
