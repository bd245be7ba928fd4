"""Seconds per optimizer step: operations over the card's rate, bytes over its bandwidth, and what does not overlap.

Operations of a product are 2 x weights x tokens per pass; training takes a forward pass, a backward pass for the inputs,
one more for weights that train, and a second forward pass for layers that are recomputed. Attention's backward is 2.5
forwards (it computes the scores again: arXiv:2205.14135, section 3). Divided by FlopCounterMode's count these formulas
give 1.0000 on eight shapes. Copies to and from host memory run beside the arithmetic, so the longer of the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lensmith.config.tree import RunConfig
from lensmith.model.components import states_of
from lensmith.plan.activations import Pass
from lensmith.plan.cards import Card
from lensmith.plan.coefficients import Coefficients, load_coefficients
from lensmith.plan.facts import ModelFacts
from lensmith.plan.memory import UPDATED_TOGETHER
from lensmith.plan.weights import (
    ADAPTER_BYTES,
    layer_bytes,
    linear_bytes,
    optimizer_bytes,
    optimizer_name,
    trainable,
    value_bytes,
)
from lensmith.plan.work import Rollout, Work, written_at_once
from lensmith.types import Component

TERA, GIGA = 1e12, 1e9
ATTENTION_BACKWARD = 2.5
BACKWARD_LAUNCHES = 2
"""Kernels of a layer's backward pass, in those of its forward pass."""
ROUNDED_BYTES = 70
"""Read and written per bf16 weight that trains: weight, gradient, two states, and their fp32 copies from step to step of
lensmith.train.rounded."""
TENSORS: Mapping[Component, int] = {"language": 11, "vision": 12, "merger": 6}
"""Of a decoder layer (seven linears, four norms), a block of the tower (four linears and two norms, with biases), a merger."""
LAUNCHES = "launching kernels"
OVERLAP = 3
"""Power of the mean of GPU and host: 1 would be one after the other, infinity the longer of the two."""


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Seconds of one optimizer step on one GPU, by part; copies only as far as nothing hides them."""

    parts: Mapping[str, float]

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())


def plan_time(
    facts: ModelFacts,
    config: RunConfig,
    work: Work,
    card: Card,
    *,
    rollout: Rollout | None = None,
    coefficients: Coefficients | None = None,
) -> TimePlan:
    """A step of `work.packs_per_step` packs like `work`; with GRPO the completions and their scoring too."""
    clock = _Clock(Pass(facts, config, work), card, coefficients or load_coefficients())
    packs = work.packs_per_step
    parts = {name: packs * seconds for name, seconds in clock.pack().items()}
    if rollout is not None:
        parts |= {"completions": clock.completions(rollout), "scoring": packs * clock.scoring(rollout)}
    return TimePlan({name: seconds for name, seconds in (parts | {"optimizer": clock.optimizer()}).items() if seconds})


@dataclass(frozen=True, slots=True)
class _Clock:
    """Turns the sizes of one pass into seconds on one card."""

    sizes: Pass
    card: Card
    found: Coefficients

    @property
    def _passes(self) -> float:
        """Of the decoder's weights over all tokens: forward, inputs' gradients, weights' gradients, recomputed part."""
        trained = states_of(self.sizes.config.tune)["language"] == "trained"
        return 2 + trained + self._again

    @property
    def _again(self) -> float:
        """Share of the layers that run twice."""
        return self.sizes.recomputed_layers / self.sizes.facts.layers

    def pack(self) -> dict[str, float]:
        """One pack, forward and backward."""
        parts = {
            "decoder": self._products() + self._attention() + self._elementwise() + self._widening(),
            "head": self._head(),
            "tower": self._tower(),
        }
        parts |= self._copies(parts)
        return parts | {LAUNCHES: self._launches(parts)}

    def _launches(self, parts: Mapping[str, float]) -> float:
        """What the host adds to the GPU's own seconds by giving it kernels one at a time, to tower and decoder in turn.

        Neither side waits for the other all of the time, so the longer one counts most, and near a tie both do.
        """
        facts, config, found = self.sizes.facts, self.sizes.config, self.found
        few_bit = found.few_bit_launch_ms if config.tune.method in ("qlora", "lora_8bit") else 0
        layers = facts.layers * (1 + self._again + BACKWARD_LAUNCHES) * (found.layer_launch_ms + few_bit)
        blocks = facts.tower.depth * self._tower_passes * found.tower_launch_ms if self.sizes.work.image_tokens else 0
        tower = sum(seconds for name, seconds in parts.items() if name.startswith("tower"))
        decoder = sum(parts.values()) - tower
        return _host_adds(decoder, layers / 1e3) + _host_adds(tower, blocks / 1e3)

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def _products(self) -> float:
        facts, work = self.sizes.facts, self.sizes.work
        adapters = trainable(facts, self.sizes.config).adapters
        # The last layer runs on learned rows, but for its keys and values.
        layers = facts.layers - 1 + work.learned / work.tokens
        weights = layers * facts.layer_active
        operations = 2 * work.tokens * (weights * self._passes + adapters * (3 + self._again))
        return max(self._compute(operations), self._move(weights * value_bytes(self.sizes.config) * self._passes))

    def _attention(self) -> float:
        facts = self.sizes.facts
        forward = 4 * facts.query_width * self.sizes.work.pairs * facts.layers
        return self._compute(forward * (1 + self._again + ATTENTION_BACKWARD))

    def _elementwise(self) -> float:
        """What a layer keeps is written once and read once in each forward pass, and twice that in the backward pass."""
        touched = 2 * self.sizes.layer * self.sizes.facts.layers
        return self._move(touched * (1 + self._again + 2))

    def _widening(self) -> float:
        """Few-bit weights read and written in 16 bits, in each pass."""
        facts, config = self.sizes.facts, self.sizes.config
        if config.tune.method not in ("qlora", "lora_8bit"):
            return 0.0
        linears = facts.layers * sum(inputs * outputs for inputs, outputs in facts.layer_linears)
        return self._move(linears * (linear_bytes(config)[1] + value_bytes(config)) * self._passes)

    def _head(self) -> float:
        """Logits and the direction of their gradient, in one walk; a head that trains is walked again."""
        facts, rows = self.sizes.facts, self.sizes.work.learned
        products = 5 if states_of(self.sizes.config.tune)["head"] == "trained" else 2
        return self._compute(products * 2 * rows * facts.embedding)

    def _tower(self) -> float:
        facts, tower, work = self.sizes.facts, self.sizes.facts.tower, self.sizes.work
        linears = self.sizes.patches * (tower.depth * tower.block + tower.patch_values * tower.width)
        pairs = 2 * tower.depth * tower.width * work.image_pairs(facts.tower.patches_per_token)
        operations = 2 * (linears + pairs + work.image_tokens * tower.mergers)
        return self._tower_passes * operations / (self.card.bf16_tflops * TERA * self.found.tower_matmul)

    @property
    def _tower_passes(self) -> float:
        """Of the tower's weights over all patches."""
        state = states_of(self.sizes.config.tune)["vision"]
        again = state != "frozen" and self.sizes.config.memory.recompute == "layers"
        return {"frozen": 1.0, "adapted": 2.0, "trained": 3.0}[state] + again

    def optimizer(self) -> float:
        """Gradients, weights and states read and written once; paged states cross the bus both ways."""
        facts, config = self.sizes.facts, self.sizes.config
        train, wide = trainable(facts, config), value_bytes(config)
        adapters = 3 * train.adapters * ADAPTER_BYTES + 2 * optimizer_bytes(facts, config) * (not train.weights)
        seconds = self._move(adapters + train.weights * (ROUNDED_BYTES if wide == 2 else 7 * wide))
        if wide == 2:
            seconds += _host_adds(seconds, self._updates() * self.found.update_launch_ms / 1e3)
        if optimizer_name(facts, config) == "paged_adamw_8bit":
            seconds += self._cross(4 * (train.adapters + train.weights))
        return seconds

    def _updates(self) -> int:
        """Weights that train themselves, each as often as it has pieces."""
        facts, states = self.sizes.facts, states_of(self.sizes.config.tune)
        repeats: Mapping[Component, int] = {
            "language": facts.layers,
            "vision": facts.tower.depth,
            "merger": facts.tower.levels + 1,
        }
        tensors = sum(count * TENSORS[part] for part, count in repeats.items() if states[part] == "trained")
        return tensors + trainable(facts, self.sizes.config).weights // UPDATED_TOGETHER

    # --- copies -------------------------------------------------------------------------------------------------------

    def _copies(self, parts: Mapping[str, float]) -> dict[str, float]:
        """What copies take beyond the arithmetic that they run beside."""
        facts, config, wide = self.sizes.facts, self.sizes.config, value_bytes(self.sizes.config)
        memory, decoder = config.memory, 0.0
        decoder += 2 * min(memory.stream_layers, facts.layers) * layer_bytes(facts, config)
        if memory.offload == "inputs":
            decoder += 2 * self.sizes.recomputed_layers * self.sizes.one_input
        head = (memory.head == "host" or (facts.tied and memory.embedding == "host")) and memory.head_bits == 16
        crossing = {
            "decoder": decoder,
            "head": facts.embedding * wide if head else 0.0,
            "tower": (facts.tower.depth * facts.tower.block + facts.tower.mergers) * wide
            if memory.tower == "host"
            else 0.0,
        }
        if not self.sizes.work.image_tokens:
            crossing["tower"] = 0.0
        return {f"{name}, copies": max(0.0, self._cross(size) - parts[name]) for name, size in crossing.items()}

    # --- GRPO ---------------------------------------------------------------------------------------------------------

    def completions(self, rollout: Rollout) -> float:
        """All of a step, a token at a time for all that are written at once."""
        facts, config, wide = self.sizes.facts, self.sizes.config, value_bytes(self.sizes.config)
        own = rollout.engine == "builtin"
        weights = facts.layers * (layer_bytes(facts, config) if own else 2 * facts.layer) + facts.embedding * wide
        prompts, completions = written_at_once(rollout, config)
        # Each token of each completion reads its prompt and half of a completion.
        read = prompts * rollout.prompt_tokens + completions * rollout.completion_tokens / 2
        cache = read * facts.layers * 2 * facts.key_width * wide
        token = self._move(weights + cache)
        if own:
            token *= self.found.bandwidth / self.found.decode
        if own and (config.memory.stream_layers or "host" in (config.memory.embedding, config.memory.head)):
            # What is fetched from the host stands in no CUDA graph: each kernel is launched again for each token.
            token = max(token, facts.layers * self.found.layer_launch_ms / 1e3)
        prefill = self._compute(2 * prompts * rollout.prompt_tokens * facts.layers * facts.layer_active)
        times = math.ceil(max(1, config.optim.effective_samples // rollout.group) / prompts)
        start = self.found.rollout_start_s if own else 0.0
        return times * (start + prefill + rollout.completion_tokens * token)

    def scoring(self, rollout: Rollout) -> float:
        """Passes without gradients over one pack."""
        facts = self.sizes.facts
        return rollout.passes * self._compute(2 * self.sizes.work.tokens * facts.layers * facts.layer_active)

    # --- rates --------------------------------------------------------------------------------------------------------

    def _compute(self, operations: float) -> float:
        return operations / (self.card.bf16_tflops * TERA * self.found.matmul)

    def _move(self, size: float) -> float:
        return size / (self.card.memory_gbps * GIGA * self.found.bandwidth)

    def _cross(self, size: float) -> float:
        return size / (self.card.pcie_gbps * GIGA * self.found.pcie)


def _host_adds(busy_s: float, host_s: float) -> float:
    """Seconds beyond those of the GPU, for a part in which the host needs `host_s` to give it its kernels."""
    return (busy_s**OVERLAP + host_s**OVERLAP) ** (1 / OVERLAP) - busy_s
