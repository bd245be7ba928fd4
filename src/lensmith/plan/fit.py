"""The smallest change that makes a run fit: one setting after the other, in a fixed order, cheapest first.

The order is that of LADDER: what costs nothing, then what costs time, then what costs a little quality, then what makes
it another run. Each rung is taken on top of those before it until the run fits; then every rung that turned out not to
be needed is left out again, the dearest first. docs/plan.md has the order with its reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lensmith.config.rules import contradictions
from lensmith.config.schema import read_value
from lensmith.config.tree import PACK_TOKENS, RunConfig
from lensmith.model.components import states_of
from lensmith.plan.facts import ModelFacts
from lensmith.plan.weights import optimizer_name

SMALLEST_PACK = 1024
"""Packs are not made smaller than this, nor than the longest row: below, products become too thin to be worth it."""
SMALLEST_IMAGE = 256
"""Language tokens of a picture of 512 x 512; less and most print can no longer be read."""
LAYER_STEP = 4
"""Layers that are recomputed or streamed are tried in fours."""

Settings = Mapping[str, Any]
Fits = Callable[[RunConfig], bool]


@dataclass(frozen=True, slots=True)
class Situation:
    """What a rung may look at."""

    facts: ModelFacts
    sample_tokens: int | None = None
    """Of the longest row, or of the sample that flags describe; None where nothing is known."""
    sees_smaller_images: bool = True
    """Whether smaller pictures can be reckoned with; rows that have been scanned would have to be scanned again."""


@dataclass(frozen=True, slots=True)
class Rung:
    """One kind of change: its settings, mildest first, for a config in which all rungs before it have been taken."""

    settings: Callable[[RunConfig, Situation], Iterator[Settings]]
    time: str
    quality: str


@dataclass(frozen=True, slots=True)
class Change:
    """A rung as taken."""

    settings: Settings
    before: Settings
    """The values that they replace."""
    time: str
    """What it costs, in words; the plan adds what it costs by number."""
    quality: str


def with_settings(config: RunConfig, settings: Settings) -> RunConfig:
    """The config with dotted settings replaced."""
    for path, value in settings.items():
        config = _replaced(config, path.split("."), value)
    return config


def _replaced(section: Any, names: list[str], value: Any) -> Any:
    assert isinstance(section, BaseModel), f"{names[0]} is inside no section"
    first, *rest = names
    return section.model_copy(update={first: _replaced(getattr(section, first), rest, value) if rest else value})


def find_changes(config: RunConfig, situation: Situation, fits: Fits) -> tuple[Change, ...] | None:
    """The changes after which `fits` is true of the config; empty where it is already, None where none are enough."""
    if fits(config):
        return ()
    changes: list[Change] = []
    changed = config
    for rung in LADDER:
        mildest = next((s for s in _usable(rung, changed, situation) if fits(with_settings(changed, s))), None)
        settings = mildest or next(reversed([*_usable(rung, changed, situation)]), None)
        if settings is None:
            continue
        before = {path: read_value(config, path) for path in settings}
        changes.append(Change(settings, before, rung.time, rung.quality))
        changed = with_settings(changed, settings)
        if mildest is not None:
            return _needed(config, changes, fits)
    return None


def _usable(rung: Rung, config: RunConfig, situation: Situation) -> Iterator[Settings]:
    """Settings of a rung that do not contradict the rest."""
    for settings in rung.settings(config, situation):
        if not contradictions(with_settings(config, settings)):
            yield settings


def _needed(config: RunConfig, changes: list[Change], fits: Fits) -> tuple[Change, ...]:
    """Without the changes that the later ones made superfluous."""
    for change in reversed(changes[:-1]):
        rest = [other for other in changes if other is not change]
        tried = apply_changes(config, rest)
        if fits(tried) and not contradictions(tried):
            changes = rest
    return tuple(changes)


def apply_changes(config: RunConfig, changes: list[Change] | tuple[Change, ...]) -> RunConfig:
    """The config with all changes made, in order."""
    for change in changes:
        config = with_settings(config, change.settings)
    return config


def find_spare(config: RunConfig, situation: Situation, fits: Fits) -> Change | None:
    """Where all layers are recomputed and fewer would do: how few. None where that is not so."""
    if config.memory.recompute != "layers" or not fits(config):
        return None
    fewest = max(config.memory.stream_layers, 0)
    for count in range(fewest, situation.facts.layers - 1, LAYER_STEP):
        settings: dict[str, Any] = {"memory.recompute": count or "none"}
        if not count and config.memory.offload == "inputs":
            settings["memory.offload"] = "none"
        if fits(with_settings(config, settings)):
            return Change(settings, {"memory.recompute": "layers"}, "fewer layers run twice", "none")
    return None


# --- the ladder -------------------------------------------------------------------------------------------------------


def _embedding_to_host(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    trains = states_of(config.tune)["language"] == "trained"
    if config.memory.embedding == "gpu" and not trains and not situation.facts.tied:
        yield {"memory.embedding": "host"}


def _small_optimizer(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    if optimizer_name(situation.facts, config) == "adamw":
        yield {"optim.name": "adamw_8bit"}


def _tower_to_host(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    states = states_of(config.tune)
    if config.memory.tower == "gpu" and states["vision"] == states["merger"] == "frozen":
        yield {"memory.tower": "host"}


def _recompute(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    recompute, layers = config.memory.recompute, situation.facts.layers
    if recompute == "layers":
        return
    done = 0 if recompute == "none" else int(recompute)
    yield from ({"memory.recompute": count} for count in range(done + LAYER_STEP, layers, LAYER_STEP))
    yield {"memory.recompute": "layers"}


def _offload(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    if config.memory.offload == "none" and config.memory.recompute != "none":
        yield {"memory.offload": "inputs"}


def _smaller_packs(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    tokens = (config.pack.tokens or PACK_TOKENS["cuda"]) // 2
    while tokens >= max(SMALLEST_PACK, situation.sample_tokens or config.data.image.max_tokens):
        yield {"pack.tokens": tokens, **_one_pack_per_step(config, situation, tokens)}
        tokens //= 2


def _one_pack_per_step(config: RunConfig, situation: Situation, tokens: int) -> Settings:
    """What an optimizer that steps inside the backward pass needs: no more samples in a step than one pack holds."""
    most = max(1, tokens // (situation.sample_tokens or config.data.image.max_tokens))
    if not config.optim.in_backward or config.optim.effective_samples <= most:
        return {}
    return {"optim.effective_samples": most}


def _head_to_host(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    memory, trains = config.memory, states_of(config.tune)["head"] == "trained"
    if memory.head == "gpu" and memory.head_bits == 16 and not trains:
        yield {"memory.head": "host", **({"memory.embedding": "host"} if situation.facts.tied else {})}


def _step_in_backward(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    if config.tune.method == "full" and not config.optim.in_backward:
        changed = with_settings(config, {"optim.in_backward": True})
        smaller = _one_pack_per_step(changed, situation, config.pack.tokens or PACK_TOKENS["cuda"])
        yield {"optim.in_backward": True, "optim.max_grad_norm": None, **smaller}


def _paged_optimizer(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    if optimizer_name(situation.facts, config) == "adamw_8bit" and config.tune.method == "full":
        yield {"optim.name": "paged_adamw_8bit"}


def _four_bits(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    own = "trained" in (config.tune.language, config.tune.vision if config.tune.quantise_vision else "frozen")
    if config.tune.method in ("lora", "lora_8bit") and not own:
        yield {"tune.method": "qlora"}


def _stream(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    if states_of(config.tune)["language"] == "trained":
        return
    done, layers = config.memory.stream_layers, situation.facts.layers
    # Two layers are on the GPU in any case, so streaming fewer saves nothing.
    for count in (*range(max(done, 2) + LAYER_STEP, layers, LAYER_STEP), layers):
        yield {"memory.stream_layers": count, "memory.recompute": "layers"}


def _smaller_images(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    tokens = config.data.image.max_tokens // 2
    while situation.sees_smaller_images and tokens >= max(SMALLEST_IMAGE, config.data.image.min_tokens or 0):
        # Packs become smaller with their pictures, since no row is as long as before.
        pack = max(SMALLEST_PACK, tokens)
        smaller = (config.pack.tokens or PACK_TOKENS["cuda"]) > pack
        yield {"data.image.max_tokens": tokens, **({"pack.tokens": pack} if smaller else {})}
        tokens //= 2


def _adapters_instead(config: RunConfig, situation: Situation) -> Iterator[Settings]:
    if config.tune.method != "full":
        return
    # What only full training takes goes back to its default.
    rest = {"optim.in_backward": False, "optim.max_grad_norm": 1.0, "memory.embedding": "host", "memory.head": "host"}
    yield {"tune.method": "qlora", **rest}


LADDER: tuple[Rung, ...] = (
    Rung(_embedding_to_host, "each pack fetches its rows: under 1 %", "none"),
    Rung(_small_optimizer, "none", "none measured: states in 8 bits (arXiv:2110.02861)"),
    Rung(_tower_to_host, "the tower crosses the bus once per pack", "none"),
    Rung(_recompute, "recomputed layers run their forward pass twice: up to a third more", "none"),
    Rung(_offload, "hidden behind the arithmetic, where packs are large", "none"),
    Rung(_step_in_backward, "none", "no clipping of gradients, and steps of one pack"),
    Rung(_smaller_packs, "products become thinner", "none: the loss of a step does not depend on its packs"),
    Rung(_head_to_host, "the head crosses the bus once per pack", "none"),
    Rung(_paged_optimizer, "optimizer states cross the bus in each step", "none"),
    Rung(_four_bits, "weights are widened for each product", "small: weights in 4 bits (arXiv:2305.14314)"),
    Rung(_stream, "streamed layers cross the bus twice per pack: slow where packs are small", "none"),
    Rung(_smaller_images, "less work", "small print becomes unreadable: look at `lensmith check` first"),
    Rung(_adapters_instead, "less work", "adapters instead of all weights: another kind of run"),
)
"""The order in which settings are changed."""
