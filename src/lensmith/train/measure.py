"""What one pack really costs: a few optimizer steps on a made-up pack, with peak memory and seconds.

The planner's counterpart: `lensmith plan --measure` runs the worst pack of a plan here, and benchmarks/memory_grid.py runs
a grid of settings to fit its coefficients and to say how far off it is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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
from lensmith.model.residence import check_frozen
from lensmith.train.rounded import RoundedAdamW, States
from lensmith.types import IGNORE, Pack, Segment, VisionGeometry

if TYPE_CHECKING:
    from lensmith.model.stream import Shards
    from lensmith.plan.work import Work

GIB = 2**30
WARM_UP_STEPS, TIMED_STEPS = 2, 3
WORD_IDS = (1000, 100_000)
"""Half-open range of ids that stand for words in any Qwen tokenizer."""


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
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Pack:
    """A pack of `samples` equal samples that share `tokens`, `images` pictures of `image_tokens` each, and `learned` labels.

    Raises ConfigError where the pictures leave no room for text.
    """
    rng = np.random.default_rng(seed)
    per_sample, pictures = tokens // samples, images // samples
    text = per_sample - pictures * (image_tokens + 2)
    answers = learned // samples
    if text <= answers:
        raise ConfigError(
            f"{images} images of {image_tokens} tokens and {learned} learned tokens do not fit {tokens} tokens. "
            "Give the pack more tokens, or fewer or smaller images."
        )
    rows, columns = _sides(image_tokens)
    grid = (1, rows * geometry.merge, columns * geometry.merge)
    picture = [
        architecture.vision_start_token_id,
        *[architecture.image_token_id] * image_tokens,
        architecture.vision_end_token_id,
    ]
    ids, labels, positions, segments = [], [], [], []
    for _ in range(samples):
        own = np.concatenate([picture * pictures, rng.integers(*WORD_IDS, text)]).astype(np.int64)
        segments.append(Segment(sum(map(len, ids)), len(own)))
        ids.append(own)
        labels.append(np.where(np.arange(len(own)) >= len(own) - answers, own, IGNORE))
        positions.append(
            mrope_positions(
                own, [grid] * pictures, image_token_id=architecture.image_token_id, merge=geometry.merge
            ).astype(np.int64)
        )
    count = pictures * samples
    pixels = torch.randn(
        count * grid[1] * grid[2], geometry.patch_values, generator=torch.Generator().manual_seed(seed)
    )
    return Pack(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        labels=torch.from_numpy(np.concatenate(labels)),
        positions=torch.from_numpy(np.concatenate(positions, axis=1)),
        segments=tuple(segments),
        pixels=pixels.to(dtype),
        grids=torch.tensor([grid] * count, dtype=torch.int64).reshape(-1, 3),
        wheres=tuple(f"made up #{number}" for number in range(samples)),
    )


def _sides(tokens: int) -> tuple[int, int]:
    """Height and width in tokens of the squarest picture that costs exactly so many."""
    rows = next(rows for rows in range(int(tokens**0.5), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


def measure_steps(
    config: RunConfig,
    make: Callable[[Loaded], Pack],
    *,
    device: torch.device | None = None,
    shards: Shards | None = None,
) -> Measured:
    """Load the model as `config` says, take a few steps on the pack that `make` returns, forget both again."""
    loaded = load_model(config, device=device, shards=shards)
    pack = make(loaded)
    model = prepare_trainable(loaded.model, config.tune, seed=config.seed)
    check_frozen(model)
    model.train()
    optimizer = make_optimizer(model, config)
    gpu = loaded.device.type == "cuda"
    if gpu:
        pack = pack.pin_memory()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    loaded_gib = torch.cuda.memory_allocated() / GIB if gpu else 0.0
    seconds = [_step(model, optimizer, pack, config, gpu) for _ in range(WARM_UP_STEPS + TIMED_STEPS)]
    return Measured(
        peak_gib=torch.cuda.max_memory_reserved() / GIB if gpu else 0.0,
        allocated_gib=torch.cuda.max_memory_allocated() / GIB if gpu else 0.0,
        loaded_gib=loaded_gib,
        step_s=statistics.median(seconds[WARM_UP_STEPS:]),
    )


def measure_plan(config: RunConfig, work: Work) -> Measured:
    """A few steps on a pack of the size that a plan was made for.

    Raises ModelError and ConfigError as training does, and torch.OutOfMemoryError where the plan was wrong.
    """

    def make(loaded: Loaded) -> Pack:
        return make_pack(
            read_geometry(loaded.processor),
            loaded.model.config,
            tokens=work.tokens,
            images=work.images,
            image_tokens=work.image_tokens // max(1, work.images),
            learned=work.learned,
            samples=work.samples,
            dtype=loaded.dtype,
        )

    return measure_steps(config, make)


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
