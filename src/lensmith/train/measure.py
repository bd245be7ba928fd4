"""What one pack really costs: a few optimizer steps on a made-up pack, with peak memory and seconds.

The planner's counterpart: `lensmith plan --measure` runs the worst pack of a plan here, and benchmarks/memory_grid.py runs
a grid of settings to fit its coefficients and to say how far off it is.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lensmith.config.tree import RunConfig
from lensmith.data.images import read_geometry
from lensmith.data.positions import mrope_positions
from lensmith.errors import ConfigError
from lensmith.model.adapters import prepare_trainable
from lensmith.model.components import learning_rates, parameter_groups
from lensmith.model.load import Loaded, load_model
from lensmith.model.residence import check_frozen, let_segments_grow, settle_inputs
from lensmith.train.rounded import RoundedAdamW, States
from lensmith.types import IGNORE, Pack, Segment, VisionGeometry

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

    from lensmith.model.stream import Shards
    from lensmith.plan.work import Work

GIB = 2**30
WARM_UP_STEPS, TIMED_STEPS = 2, 3
WORD_SHARE = 0.6
"""Of the vocabulary, from its start: words in any Qwen tokenizer, and in lensmith/tiny's; marks stand at the end."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of the steps alone, without loading."""

    peak_gib: float
    """torch's reserved memory, 2**30 bytes; 0 on a CPU."""
    allocated_gib: float
    """Peak of what is in use within it."""
    loaded_gib: float
    """Allocated by the model before the first step, adapters included."""
    step_s: float
    """Median of TIMED_STEPS steps after WARM_UP_STEPS."""


def make_pack(
    geometry: VisionGeometry,
    architecture: Any,
    *,
    tokens: int,
    images: int,
    image_tokens: int,
    learned: int,
    samples: int = 1,
    group: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Pack:
    """A pack of `samples` equal samples that share `tokens`, `images` pictures of `image_tokens` each, and `learned` labels.

    With `group` > 1 it is a pack of GRPO: each prompt with its pictures stands once, and `group` completions, which are
    all that is learned, branch off it.

    Raises ConfigError where the pictures leave no room for text, or samples do not come in such groups.
    """
    prompts, answers = samples // group, learned // samples
    if prompts * group != samples:
        raise ConfigError(f"{samples} samples are no whole number of groups of {group}. Give a multiple of {group}.")
    text = (tokens - samples * answers - images * (image_tokens + 2)) // prompts
    if text <= 0:
        raise ConfigError(
            f"{images} images of {image_tokens} tokens and {learned} learned tokens do not fit {tokens} tokens. "
            "Give the pack more tokens, or fewer or smaller images."
        )
    rng = np.random.default_rng(seed)
    words = int(WORD_SHARE * architecture.text_config.vocab_size)
    rows, columns = _sides(image_tokens)
    grid = (1, rows * geometry.merge, columns * geometry.merge)
    picture = [
        architecture.vision_start_token_id,
        *[architecture.image_token_id] * image_tokens,
        architecture.vision_end_token_id,
    ]
    made = _Made(architecture.image_token_id, geometry.merge)
    for number in range(prompts):
        pictures = images // prompts + (number < images % prompts)
        prompt = np.concatenate([picture * pictures, rng.integers(words, size=text)]).astype(np.int64)
        made.add_prompt(prompt, [rng.integers(words, size=answers) for _ in range(group)], [grid] * pictures)
    pixels = torch.randn(
        images * grid[1] * grid[2], geometry.patch_values, generator=torch.Generator().manual_seed(seed)
    )
    return Pack(
        input_ids=torch.from_numpy(np.concatenate(made.ids)),
        labels=torch.from_numpy(np.concatenate(made.labels)),
        positions=torch.from_numpy(np.concatenate(made.positions, axis=1)),
        segments=tuple(made.segments),
        pixels=pixels.to(dtype),
        grids=torch.tensor([grid] * images, dtype=torch.int64).reshape(-1, 3),
        wheres=tuple(f"made up #{number}" for number in range(samples)),
    )


class _Made:
    """The growing row of a made-up pack."""

    def __init__(self, image_token_id: int, merge: int) -> None:
        self._image_token_id, self._merge = image_token_id, merge
        self.ids: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []

    def add_prompt(self, prompt: np.ndarray, answers: list[np.ndarray], grids: list[tuple[int, int, int]]) -> None:
        """A sample of its own with one answer; a prefix with a branch for each of several."""
        parent = None
        for answer in answers:
            whole = np.concatenate([prompt, answer])
            labels = np.concatenate([np.full(len(prompt), IGNORE), answer])
            places = mrope_positions(whole, grids, image_token_id=self._image_token_id, merge=self._merge)
            if len(answers) > 1 and parent is None:
                parent = self._add(prompt, labels[: len(prompt)], places[:, : len(prompt)], None)
            start = 0 if parent is None else len(prompt)
            self._add(whole[start:], labels[start:], places[:, start:], parent)

    def _add(self, ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, parent: int | None) -> int:
        start = self.segments[-1].stop if self.segments else 0
        self.segments.append(Segment(start, len(ids), parent))
        self.ids.append(ids)
        self.labels.append(labels)
        self.positions.append(positions.astype(np.int64))
        return len(self.segments) - 1


def _sides(tokens: int) -> tuple[int, int]:
    """Height and width in tokens of the squarest picture that costs exactly so many."""
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


@dataclass(frozen=True, slots=True)
class Prepared:
    """A loaded model with its adapters and optimizer, on which packs can be measured one after the other."""

    loaded: Loaded
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loaded_gib: float

    @property
    def geometry(self) -> VisionGeometry:
        return read_geometry(self.loaded.processor)

    @property
    def architecture(self) -> Any:
        return self.loaded.model.config


def prepare_model(
    config: RunConfig,
    *,
    device: torch.device | None = None,
    shards: Shards | None = None,
    processor: Qwen3VLProcessor | None = None,
) -> Prepared:
    """Load the model as `config` says, with adapters and optimizer. Arguments are those of `load_model`."""
    let_segments_grow()
    loaded = load_model(config, device=device, shards=shards, processor=processor)
    model = prepare_trainable(loaded.model, config.tune, seed=config.seed)
    check_frozen(model)
    model.train()
    loaded_gib = torch.cuda.memory_allocated() / GIB if loaded.device.type == "cuda" else 0.0
    return Prepared(loaded, model, make_optimizer(model, config), loaded_gib)


def measure_pack(prepared: Prepared, pack: Pack, config: RunConfig) -> Measured:
    """A few steps on this pack. `config` may differ from that of the model in memory.recompute and memory.offload."""
    settle_inputs(prepared.loaded.model, config.memory, prepared.loaded.device)
    gpu = prepared.loaded.device.type == "cuda"
    if gpu:
        pack = pack.pin_memory()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = range(WARM_UP_STEPS + TIMED_STEPS)
    seconds = [_step(prepared.model, prepared.optimizer, pack, config, gpu) for _ in steps]
    return Measured(
        peak_gib=torch.cuda.max_memory_reserved() / GIB if gpu else 0.0,
        allocated_gib=torch.cuda.max_memory_allocated() / GIB if gpu else 0.0,
        loaded_gib=prepared.loaded_gib,
        step_s=statistics.median(seconds[WARM_UP_STEPS:]),
    )


def measure_plan(config: RunConfig, work: Work, *, shards: Shards | None = None) -> Measured:
    """A few steps on a pack of the size that a plan was made for, in GRPO with completions that share their prompts.

    Raises ModelError and ConfigError as training does, and torch.OutOfMemoryError where the plan was wrong.
    """
    prepared = prepare_model(config, shards=shards)
    pack = make_pack(
        prepared.geometry,
        prepared.architecture,
        tokens=work.tokens,
        images=work.images,
        image_tokens=work.image_tokens // max(1, work.images),
        learned=work.learned,
        samples=work.samples // work.group * work.group,
        group=work.group,
        dtype=prepared.loaded.dtype,
    )
    return measure_pack(prepared, pack, config)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, pack: Pack, config: RunConfig, gpu: bool) -> float:
    start = time.perf_counter()
    logprobs = model(pack=pack)
    (-logprobs.sum() / len(logprobs)).backward()
    if config.optim.max_grad_norm is not None:
        nn.utils.clip_grad_norm_((p for p in model.parameters() if p.requires_grad), config.optim.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    """The optimizer that training would use for these weights."""
    own = own_optimizer(model, config)
    if own is not None:
        return own
    groups = parameter_groups(model, config.optim, config.tune.method)
    if config.optim.name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    return (PagedAdamW8bit if config.optim.name == "paged_adamw_8bit" else AdamW8bit)(groups)


STATES: dict[str | None, States] = {
    None: "8bit",
    "adamw": "fp32",
    "adamw_8bit": "8bit",
    "paged_adamw_8bit": "paged_8bit",
}
"""optim.name to the states of our own optimizer."""


def own_optimizer(model: nn.Module, config: RunConfig) -> RoundedAdamW | None:
    """Ours where weights train themselves in bf16, or inside the backward pass; None for transformers' choice by name."""
    trains_bf16 = any(p.dtype is torch.bfloat16 for p in model.parameters() if p.requires_grad)
    if not (trains_bf16 or config.optim.in_backward):
        return None
    return RoundedAdamW(
        parameter_groups(model, config.optim, config.tune.method),
        lr=learning_rates(config.optim, config.tune.method)["language"],
        states=STATES[config.optim.name],
        rounding=config.optim.rounding,
        in_backward=config.optim.in_backward,
        seed=config.seed,
    )
