"""The question a user asks, answered: memory by part, time, whether it fits, and what to change if it does not.

`answer_plan` puts together what the other modules of lensmith.plan work out; `check_fits` is what training asks first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lensmith.config.tree import PACK_TOKENS, RunConfig
from lensmith.config.write import plain, write_value
from lensmith.errors import ConfigError
from lensmith.plan.cards import BY_SIZE, Card, card_of_size, usable_gib
from lensmith.plan.facts import SIZES, ModelFacts, read_facts
from lensmith.plan.fit import Change, Situation, apply_changes, find_changes, find_spare
from lensmith.plan.memory import MemoryPlan, plan_memory
from lensmith.plan.time import TimePlan, plan_time
from lensmith.plan.work import (
    PromptSize,
    Rollout,
    ScannedWork,
    Work,
    full_pack,
    group_work,
    largest_prompt,
    rollout_of,
    scanned_work,
    worst_candidates,
)

if TYPE_CHECKING:
    from lensmith.data.scan import Scan

WorkOf = Callable[[RunConfig], Work]
"""The largest pack that a config makes of the data, or of the flags that stand for data."""


@dataclass(frozen=True, slots=True)
class Step:
    """A change with what it does: each after all those before it."""

    change: Change
    peak_gib: float
    slower: float
    """Seconds per sample, of what they are without any change: 1.1 is a tenth slower."""


@dataclass(frozen=True, slots=True)
class WorstPack:
    """The pack that needs most, and the picture in it that needs most."""

    wheres: tuple[str, ...]
    tokens: int
    largest: str | None
    """Picture and size, in words; None without pictures."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole answer."""

    facts: ModelFacts
    config: RunConfig
    work: Work
    card: Card
    memory: MemoryPlan
    time: TimePlan
    steps: tuple[Step, ...] | None = None
    """The changes that make it fit: none where it fits, None where none are enough."""
    fitting: RunConfig | None = None
    """The config with these changes; None where none are enough."""
    fitted: MemoryPlan | None = None
    """What that config needs."""
    faster: Step | None = None
    """Where there is room to spare: fewer layers recomputed."""
    total_steps: int | None = None
    worst: WorstPack | None = None
    way_out: str = ""
    """Where nothing is enough: the largest model for this card and the smallest card for this model."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.peak_gib <= self.card.usable_gib

    @property
    def run_h(self) -> float | None:
        """Hours of the whole run, where the data is known."""
        return None if self.total_steps is None else self.total_steps * self.time.step_s / 3600

    def to_json(self) -> dict[str, Any]:
        """Plain values, the first six keys a promise."""
        return {
            "fits": self.fits,
            "gpu_gib": self.card.gib,
            "peak_gib": round(self.memory.peak_gib, 3),
            "parts": {name: round(gib, 3) for name, gib in self.memory.parts.items()},
            "step_s": round(self.time.step_s, 4),
            "changes": None if self.steps is None else [_step_json(step) for step in self.steps],
            "faster": None if self.faster is None else _step_json(self.faster),
            "usable_gib": round(self.card.usable_gib, 3),
            "card": self.card.name,
            "model": self.facts.name,
            "moment": self.memory.moment,
            "moments": {name: round(gib, 3) for name, gib in self.memory.moments.items()},
            "host_gib": round(sum(self.memory.host.values()), 3),
            "step_parts_s": {name: round(seconds, 4) for name, seconds in self.time.parts.items()},
            "run_h": None if self.run_h is None else round(self.run_h, 3),
            "pack_tokens": self.work.tokens,
            "worst_pack": None if self.worst is None else list(self.worst.wheres),
            "worst_image": None if self.worst is None else self.worst.largest,
            "way_out": self.way_out or None,
            "notes": list(self.notes),
        }


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "settings": {path: plain(value) for path, value in step.change.settings.items()},
        "before": {path: plain(value) for path, value in step.change.before.items()},
        "peak_gib": round(step.peak_gib, 3),
        "slower": round(step.slower, 4),
        "time": step.change.time,
        "quality": step.change.quality,
    }


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with everything but the settings: they are what changes until a run fits."""

    facts: ModelFacts
    card: Card
    work_of: WorkOf = full_pack
    rollout: Rollout | None = None
    gpus: int = 1

    def memory(self, config: RunConfig) -> MemoryPlan:
        """What these settings need."""
        return plan_memory(self.facts, config, self.work_of(config), rollout=self.rollout, gpus=self.gpus)

    def time(self, config: RunConfig) -> TimePlan:
        """How long a step takes with them."""
        return plan_time(self.facts, config, self.work_of(config), self.card, rollout=self.rollout)

    def fits(self, config: RunConfig) -> bool:
        """Whether the card has room for them."""
        return self.memory(config).peak_gib <= self.card.usable_gib

    def step(self, config: RunConfig, changes: tuple[Change, ...]) -> Step:
        """The last of these changes, with what all of them come to."""
        changed = apply_changes(config, changes)
        return Step(changes[-1], self.memory(changed).peak_gib, self._sample_s(changed) / self._sample_s(config))

    def _sample_s(self, config: RunConfig) -> float:
        work = self.work_of(config)
        return self.time(config).step_s / (work.samples * work.packs_per_step)


def answer_plan(config: RunConfig, asked: Asked, situation: Situation | None = None) -> Plan:
    """The plan of a config, without looking at data: full packs, or those that `asked.work_of` makes.

    `situation` is what the ladder of changes may look at; None for what the pack tells.
    """
    work, memory = asked.work_of(config), asked.memory(config)
    situation = situation or Situation(asked.facts, sample_tokens=-(-work.tokens // work.samples))
    changes = find_changes(config, situation, asked.fits)
    spare = find_spare(config, situation, asked.fits)
    plan = Plan(
        asked.facts,
        config,
        work,
        asked.card,
        memory,
        asked.time(config),
        faster=None if spare is None else asked.step(config, (spare,)),
        notes=memory.notes,
    )
    if changes is None:
        return replace(plan, way_out=_way_out(config, asked))
    fitting = apply_changes(config, changes)
    steps = tuple(asked.step(config, changes[: count + 1]) for count in range(len(changes)))
    return replace(plan, steps=steps, fitting=fitting, fitted=asked.memory(fitting))


def ask_rollout(facts: ModelFacts, card: Card, prompt: PromptSize, rollout: Rollout, *, gpus: int = 1) -> Asked:
    """The question about a run of rewards whose prompts are all like this one; smaller pictures make them shorter."""
    if rollout.gpu_share is not None and rollout.engine == "vllm":
        rollout = replace(rollout, reserved_gib=rollout.gpu_share * card.gib)

    def work(changed: RunConfig) -> Work:
        seen = min(prompt.image_tokens, prompt.images * changed.data.image.max_tokens)
        return group_work(
            replace(rollout, prompt_tokens=prompt.text_tokens + seen),
            images=prompt.images,
            image_tokens=seen // max(1, prompt.images),
            budget_tokens=changed.pack.tokens or PACK_TOKENS["cuda"],
            effective_samples=changed.optim.effective_samples,
        )

    return Asked(facts, card, work, rollout, gpus)


def answer_rollout(config: RunConfig, card: Card, scan: Scan, *, rollout: Rollout | None = None, gpus: int = 1) -> Plan:
    """The plan of a run of rewards on a card for rows that have been scanned: all prompts as long as the longest.

    `rollout`: other than the settings' own, as flags ask for it.
    """
    prompt, longest = largest_prompt(scan)
    rollout = replace(rollout or rollout_of(config, prompt), prompt_tokens=prompt.tokens)
    plan = answer_plan(config, ask_rollout(read_facts(config.model), card, prompt, rollout, gpus=gpus))
    return replace(plan, worst=_describe(scan, [longest]))


def answer_scan(
    config: RunConfig, card: Card, scan: Scan, *, rescan: Callable[[RunConfig], Scan] | None = None, gpus: int = 1
) -> Plan:
    """The plan of a config on a card for rows that have been scanned: the worst pack, and the mean one for time.

    `rescan` looks at the rows again, with smaller pictures; without it no such change is proposed.
    """
    facts = read_facts(config.model)
    known: dict[object, ScannedWork] = {}

    def packed(changed: RunConfig) -> ScannedWork:
        key = (changed.data.image, changed.pack, changed.optim.effective_samples)
        if key not in known:
            again = rescan is not None and changed.data.image != config.data.image
            known[key] = scanned_work(rescan(changed) if rescan and again else scan, changed)
        return known[key]

    def worst(changed: RunConfig) -> Work:
        candidates = [pack.work for pack in worst_candidates(packed(changed).packs)]
        return max(candidates, key=lambda work: plan_memory(facts, changed, work, gpus=gpus).peak_gib)

    situation = Situation(facts, int(scan.tokens.max()), sees_smaller_images=rescan is not None)
    plan = answer_plan(config, Asked(facts, card, worst, gpus=gpus), situation)
    scanned = packed(config)
    return replace(
        plan,
        time=plan_time(facts, config, scanned.mean, card),
        total_steps=scanned.steps,
        worst=_describe(scan, next(pack.members.tolist() for pack in scanned.packs if pack.work == plan.work)),
    )


def _describe(scan: Scan, members: list[int]) -> WorstPack:
    """The rows of a pack by file and line, and its largest picture."""
    encoded = [scan.source.encoded(int(scan.rows[member])) for member in members]
    images = [(image, one.where) for one in encoded for image in one.images]
    largest = None
    if images:
        image, where = max(images, key=lambda found: found[0].tokens)
        height, width = image.seen_px
        largest = f"{image.ref} of {where}, {width} x {height} as seen: {image.tokens:,} tokens"
    return WorstPack(tuple(one.where for one in encoded), int(scan.tokens[members].sum()), largest)


def _way_out(config: RunConfig, asked: Asked) -> str:
    """The largest model that this card can train, and the smallest card that can train this model, changes included."""
    facts, card = asked.facts, asked.card
    smaller = [one for one in SIZES.values() if one.num_parameters < facts.num_parameters and one.experts is None]
    larger = [one for one in BY_SIZE.values() if one.gib > card.gib]

    def can_fit(one: Asked) -> bool:
        return find_changes(config, Situation(one.facts), one.fits) is not None

    model = next((one.name for one in reversed(smaller) if can_fit(replace(asked, facts=one))), None)
    size = next((one.gib for one in larger if can_fit(replace(asked, card=one))), None)
    ways = [f"the largest model that can be made to fit {card.gib:g} GiB is {model}"] if model else []
    ways += [f"the smallest card that can be made to do for {facts.name} has {size:g} GiB"] if size else []
    return "; ".join(ways) or f"no model of {', '.join(SIZES)} fits this card, and no listed card fits {facts.name}"


def check_fits(
    config: RunConfig,
    gib: float,
    scan: Scan | None = None,
    *,
    rescan: Callable[[RunConfig], Scan] | None = None,
) -> Plan:
    """The plan of a run on a card of `gib` (as CUDA counts it), for whoever is about to start it.

    Raises ConfigError where it does not fit, with the settings that make it fit, or the model or card that would.
    """
    card = card_of_size(gib)
    plan = (
        answer_plan(config, Asked(read_facts(config.model), card))
        if scan is None
        else answer_rollout(config, card, scan)
        if config.task == "grpo"
        else answer_scan(config, card, scan, rescan=rescan)
    )
    if plan.fits:
        return plan
    needed = (
        f"model={config.model}, tune.method={config.tune.method}: planned to reserve {plan.memory.peak_gib:.1f} GiB, and of "
        f"this card's {gib:.1f} GiB torch can have {usable_gib(gib):.1f}."
    )
    if plan.steps is None:
        raise ConfigError(f"{needed} No settings are enough: {plan.way_out}.")
    settings = " ".join(f"{path}={write_value(value)}" for path, value in fitting_settings(plan).items())
    raise ConfigError(f"{needed} It fits with {settings}; `lensmith plan` says what each of these costs.")


def fitting_settings(plan: Plan) -> dict[str, Any]:
    """Dotted settings that make the run fit, as they are in the end."""
    return {path: value for step in plan.steps or () for path, value in step.change.settings.items()}


def on_smallest_card(answer: Callable[[Card], Plan]) -> Plan:
    """The answer for the smallest listed card that the run fits as it is; for the largest where there is none."""
    *_, largest = BY_SIZE.values()
    plan = answer(largest)
    fitting = next((card for card in BY_SIZE.values() if plan.memory.peak_gib <= card.usable_gib), largest)
    return plan if fitting is largest else answer(fitting)
