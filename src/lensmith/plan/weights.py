"""What stays on the GPU through the whole run: weights by component and precision, adapters, optimizer states.

All functions return bytes. Fractions of a byte per weight are those of bitsandbytes' storage, worked out below.
"""

from __future__ import annotations

from dataclasses import dataclass

from lensmith.config.tree import RunConfig
from lensmith.model.components import states_of
from lensmith.plan.facts import TINY, ModelFacts, Shape
from lensmith.types import Component

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""4 bits; a byte of scale per block of 64; an fp32 scale per 256 of those (double quantisation, arXiv:2305.14314)."""
BLOCKWISE_8BIT_BYTES = 1 + 4 / 256
"""A byte, and an fp32 scale per block of 256 (arXiv:2110.02861): 8-bit heads and 8-bit optimizer states."""
ADAPTER_BYTES = 4
"""Adapters and their gradients are fp32, see lensmith.model.adapters."""
STATE_BYTES = 4
"""Of one AdamW state that is not in 8 bits, whatever the weight's own type."""
WIDE_BYTES = {"auto": 2, "bf16": 2, "fp16": 2, "fp32": 4}
"""Of a weight or an activation, by RunConfig.precision; a GPU that is planned for has 16-bit types."""
PLACES = 2
"""Layers that are on the GPU at a time where the rest is elsewhere: the one that computes and the next one."""


def value_bytes(config: RunConfig) -> int:
    """Bytes of one activation, and of a weight that is not quantised."""
    return WIDE_BYTES[config.precision]


def optimizer_name(facts: ModelFacts, config: RunConfig) -> str:
    """The optimizer that training will take where `optim.name` leaves it open."""
    return config.optim.name or ("adamw" if facts.name == TINY else "adamw_8bit")


def linear_bytes(config: RunConfig) -> tuple[str, float]:
    """Precision and bytes per weight of the decoder's linears."""
    wide = value_bytes(config)
    # int8 has an fp32 scale per output besides: a thousandth, and left out.
    stored = {"qlora": ("nf4", NF4_BYTES), "lora_8bit": ("int8", 1.0)}
    return stored.get(config.tune.method, (wide_name(config), float(wide)))


def wide_name(config: RunConfig) -> str:
    return "bf16" if config.precision == "auto" else config.precision


def layer_bytes(facts: ModelFacts, config: RunConfig) -> float:
    """One decoder layer. Experts are one 3-d weight per layer, which bitsandbytes leaves as it is."""
    wide, (_, narrow) = value_bytes(config), linear_bytes(config)
    linears = sum(inputs * outputs for inputs, outputs in facts.layer_linears)
    return linears * narrow + (facts.layer_norms + facts.layer_experts) * wide


def weight_parts(facts: ModelFacts, config: RunConfig, gpus: int = 1) -> dict[str, float]:
    """Frozen and trained weights on one GPU, by component. FSDP2 shards layers and tower, not embedding and head."""
    wide, memory = value_bytes(config), config.memory
    layer = layer_bytes(facts, config)
    streamed = min(memory.stream_layers, facts.layers)
    places = (PLACES if streamed else 0) + (PLACES if gpus > 1 else 0)
    parts = {f"decoder {linear_bytes(config)[0]}": (facts.layers - streamed) * layer / gpus + facts.width * wide}
    if places:
        parts["decoder layers passing by"] = places * layer
    on_host = memory.embedding == "host"
    parts[f"embedding {wide_name(config)}"] = 0 if on_host else facts.embedding * wide
    parts |= _head_part(facts, config)
    return parts | _tower_parts(facts, config, gpus)


def _head_part(facts: ModelFacts, config: RunConfig) -> dict[str, float]:
    memory, wide = config.memory, value_bytes(config)
    if memory.head_bits != 16:
        stored = NF4_BYTES if memory.head_bits == 4 else BLOCKWISE_8BIT_BYTES
        return {f"head {memory.head_bits} bits": facts.embedding * stored}
    return {f"head {wide_name(config)}": 0 if memory.head == "host" else facts.head * wide}


def _tower_parts(facts: ModelFacts, config: RunConfig, gpus: int) -> dict[str, float]:
    tower, wide = facts.tower, value_bytes(config)
    quantised = config.tune.method == "qlora" and config.tune.quantise_vision
    name, narrow = linear_bytes(config) if quantised else (wide_name(config), float(wide))
    if config.memory.tower == "host":
        # Blocks come with the deepstack merger behind them, so the largest visitor is one of each.
        visitor = (tower.block + tower.mergers / (tower.levels + 1)) * narrow
        return {f"tower {name}": tower.embeddings * wide + PLACES * visitor}
    return {
        f"tower {name}": (tower.depth * tower.block * narrow + tower.embeddings * wide) / gpus,
        f"mergers {name}": tower.mergers * narrow / gpus,
    }


@dataclass(frozen=True, slots=True)
class Trainable:
    """How many numbers train."""

    adapters: int
    """Of adapters, in fp32."""
    weights: int
    """Of the model itself, in the model's type."""
    largest: int
    """Of the largest single weight of the model that trains; 0 where none does."""


def trainable(facts: ModelFacts, config: RunConfig) -> Trainable:
    """What `tune` makes trainable, as lensmith.model.adapters does it."""
    states, tune, tower = states_of(config.tune), config.tune, facts.tower
    chosen = (facts.attention_linears if tune.attention else ()) + (facts.mlp_linears if tune.mlp else ())
    parts: dict[Component, tuple[tuple[Shape, ...], int]] = {
        "language": (chosen, facts.layers),
        "vision": (tower.block_linears, tower.depth),
        "merger": (tower.merger_linears, tower.levels + 1),
    }
    adapters = sum(
        tune.rank * repeats * sum(inputs + outputs for inputs, outputs in linears)
        for component, (linears, repeats) in parts.items()
        if states[component] == "adapted"
    )
    own = _own_weights(facts, config)
    return Trainable(adapters, sum(own.values()), _largest(facts, own))


def _own_weights(facts: ModelFacts, config: RunConfig) -> dict[str, int]:
    """Parameters of the components that train themselves."""
    states, tune, tower = states_of(config.tune), config.tune, facts.tower
    own: dict[str, int] = {}
    if states["language"] == "trained":
        left_out = () if tune.attention else facts.attention_linears
        left_out += () if tune.mlp else facts.mlp_linears
        layer = facts.layer - sum(inputs * outputs for inputs, outputs in left_out)
        own["language"] = facts.layers * layer + facts.embedding + facts.width + facts.head
    if states["vision"] == "trained":
        own["vision"] = tower.num_parameters
    if states["merger"] == "trained":
        own["merger"] = tower.mergers
    return own


def _largest(facts: ModelFacts, own: dict[str, int]) -> int:
    joined = facts.tower.patches_per_token * facts.tower.width
    sizes = {
        "language": max(facts.embedding, facts.layer_experts * 2 // 3),
        "vision": facts.tower.width * facts.tower.mlp_width,
        "merger": joined * max(joined, facts.tower.out_width),
    }
    return max((sizes[component] for component in own), default=0)


def optimizer_bytes(facts: ModelFacts, config: RunConfig) -> float:
    """States that stay on the GPU. AdamW keeps two numbers per weight; paged ones live in host memory."""
    train = trainable(facts, config)
    return {
        "adamw": 2 * (train.adapters + train.weights) * STATE_BYTES,
        "adamw_8bit": 2 * (train.adapters + train.weights) * BLOCKWISE_8BIT_BYTES,
        "paged_adamw_8bit": 0,
    }[optimizer_name(facts, config)]


def training_parts(facts: ModelFacts, config: RunConfig, gpus: int = 1) -> dict[str, float]:
    """Adapters and optimizer states on one GPU; gradients come and go, see lensmith.plan.memory."""
    adapters, wide = trainable(facts, config).adapters, value_bytes(config)
    copied = wide < ADAPTER_BYTES  # in the model's type, made once per pass
    return {
        "adapters fp32": adapters * ADAPTER_BYTES / gpus,
        f"adapter copies {wide_name(config)}": adapters * wide if copied else 0,
        "optimizer": optimizer_bytes(facts, config) / gpus,
    }


def scratch_bytes(facts: ModelFacts, config: RunConfig) -> float:
    """The dense form of one few-bit linear, the largest: lensmith.model.quant keeps one buffer for it."""
    if config.tune.method not in ("qlora", "lora_8bit"):
        return 0
    return max(inputs * outputs for inputs, outputs in facts.layer_linears) * value_bytes(config)


def host_parts(facts: ModelFacts, config: RunConfig) -> dict[str, float]:
    """What waits in page-locked host memory instead of on the GPU."""
    memory, wide, parts = config.memory, value_bytes(config), {}
    if memory.embedding == "host":
        parts["embedding"] = facts.embedding * wide
    if memory.head == "host" and not facts.tied:
        parts["head"] = facts.embedding * wide
    if memory.tower == "host":
        parts["tower"] = (facts.tower.depth * facts.tower.block + facts.tower.mergers) * wide
    if memory.stream_layers:
        parts["decoder layers"] = min(memory.stream_layers, facts.layers) * layer_bytes(facts, config)
    if memory.vision_cache_gib and memory.vision_cache_dir is None:
        parts["picture features"] = memory.vision_cache_gib * 2**30
    if optimizer_name(facts, config) == "paged_adamw_8bit":
        train = trainable(facts, config)
        parts["optimizer"] = 2 * (train.adapters + train.weights) * BLOCKWISE_8BIT_BYTES
    return parts
