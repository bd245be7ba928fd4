"""What one pass keeps and touches, in bytes: derived line by line from the engine's own forward and backward.

One decoder layer of the engine (lensmith.model.engine, .lora, .kernels), in numbers per token that its backward pass
needs; W, Q, K and I are the widths of hidden states, queries, keys and MLP:

    input              W     the norm reads it again
    normed             W     q, k and v read it
    q, k before norm   Q+K
    q, k rotated       Q+K   in place on the norm's result; attention keeps them
    v                  K
    attention's result Q     o reads it
    hidden             W     the second norm reads it
    normed             W     gate and up read it
    gate, up, product  3 I   the fused SwiGLU keeps two, down the third

So 4 W + 3 Q + 3 K + 3 I numbers: 137 KB in bf16 at 8B, where transformers' modules keep 189. Beside them in fp32 a
norm's scale per row and head and attention's log-sum per head, and the thin products of the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from lensmith.config.tree import RunConfig
from lensmith.model.components import states_of
from lensmith.plan.facts import ModelFacts
from lensmith.plan.weights import linear_bytes, value_bytes
from lensmith.plan.work import Work

FP32 = 4
INDEX = 8
HEAD_PIECE_BYTES = 128 * 2**20
"""lensmith.model.head.PIECE_BYTES: logits alive at a time, in fp32."""
HEAD_FEWEST_WORDS = 1024
"""lensmith.model.head.FEWEST_WORDS."""
FEW_BIT_WORDS = 8192
"""lensmith.model.quant.FEW_BIT_WORDS: words of a few-bit head widened together."""
HOSTED_PIECE_BYTES = 64 * 2**20
"""lensmith.model.hosted.PIECE_BYTES: a head in host memory crosses in pieces of this size, two at a time."""
INPUTS_IN_FLIGHT = 2
"""Layer inputs on the GPU while the others wait in host memory: the one in use and the one on its way."""
ATTENTION_SUMS = 2
"""Flash attention's backward adds up the queries' gradient in fp32: twice the width of 16-bit ones."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Sizes of one pass of one model over one pack; every property is in bytes."""

    facts: ModelFacts
    config: RunConfig
    work: Work

    @property
    def value(self) -> int:
        """Of one activation."""
        return value_bytes(self.config)

    # --- decoder ------------------------------------------------------------------------------------------------------

    @property
    def recomputed_layers(self) -> int:
        """Layers that keep their input only."""
        recompute, layers = self.config.memory.recompute, self.facts.layers
        if recompute == "none":
            return 0
        return layers if recompute == "layers" else min(recompute, layers)

    @property
    def recorded_layers(self) -> int:
        """Layers that keep all that their backward pass needs; the last one does little and is counted apart."""
        return max(0, self.facts.layers - 1 - self.recomputed_layers)

    @property
    def one_input(self) -> float:
        """Hidden states of all tokens."""
        return self.work.tokens * self.facts.width * self.value

    @property
    def kept_inputs(self) -> float:
        """Inputs of all layers but the last, which has done its backward pass when memory is at its highest."""
        inputs = self.facts.layers - 1
        if self.config.memory.offload == "inputs" and self.recomputed_layers:
            inputs = self.recorded_layers + min(INPUTS_IN_FLIGHT, inputs)
        return inputs * self.one_input

    @property
    def waiting_inputs(self) -> float:
        """Inputs in host memory."""
        return self.recomputed_layers * self.one_input if self.config.memory.offload == "inputs" else 0

    @property
    def layer(self) -> float:
        """What one layer keeps, without its input; see the table at the top."""
        facts, work = self.facts, self.work
        keys = self._key_values
        numbers = 3 * facts.width + 3 * facts.query_width + self._mlp_values
        statistics = (2 + 2 * facts.heads + facts.kv_heads) * FP32
        thin = len(facts.layer_linears) * self.config.tune.rank if self._adapted else 0
        return work.tokens * ((numbers + thin) * self.value + statistics) + keys * self.value + self._unfused

    @property
    def _mlp_values(self) -> int:
        experts = self.facts.experts
        if experts is None:
            return 3 * self.facts.mlp_width
        # Stock experts: gathered rows, gate and up, activation and product, result before and after its weight.
        return experts.used * (4 * experts.width + 3 * self.facts.width)

    @property
    def _key_values(self) -> int:
        """Keys before their norm; rotated keys and values, which are copied where branches share a prefix."""
        tokens, gathered = self.work.tokens, self.work.gathered_tokens
        return (tokens + 2 * (gathered or tokens)) * self.facts.key_width

    @property
    def _adapted(self) -> bool:
        return states_of(self.config.tune)["language"] == "adapted"

    @property
    def _unfused(self) -> float:
        """What PEFT's own way keeps besides: a dropped copy and its mask per linear, or DoRA's two results."""
        tune, linears = self.config.tune, self.facts.layer_linears
        if not self._adapted:
            return 0
        dropped = sum(inputs for inputs, _ in linears) * (self.value + 1) if tune.dropout else 0
        split = 2 * sum(outputs for _, outputs in linears) * self.value if tune.dora else 0
        return self.work.tokens * (dropped + split)

    @property
    def last_layer(self) -> float:
        """The last layer keeps keys and values of all rows, and the rest of learned rows only."""
        facts, work = self.facts, self.work
        rows = 2 * facts.width * work.tokens + self._key_values
        return (rows + work.learned * (3 * facts.width + 3 * facts.query_width + self._mlp_values)) * self.value

    @property
    def layer_scratch(self) -> float:
        """Gradients and results alive beside a layer in its backward pass, at the larger of two moments.

        At the start: the incoming gradient, the layer's result, the gradient of the product. In attention, when the MLP's
        part is free again: gradients of queries and result, and keys and values as wide as queries (grouped heads).
        """
        facts, tokens, value = self.facts, self.work.tokens, self.value
        mlp = tokens * (2 * facts.width + self._mlp_values / 3)
        keys = (self.work.gathered_tokens or tokens) * 2 * (facts.query_width + facts.key_width)
        attention = tokens * (2 * facts.width + (2 + ATTENTION_SUMS) * facts.query_width - self._mlp_values) + keys
        return max(mlp, attention) * value + self._int8_products

    @property
    def _int8_products(self) -> float:
        """bitsandbytes' 8-bit product: rows in int8 and results in int32, of the widest linear."""
        if linear_bytes(self.config)[0] != "int8":
            return 0
        widest = max(max(shape) for shape in self.facts.layer_linears)
        return self.work.tokens * widest * (1 + FP32)

    @property
    def forward_layer(self) -> float:
        """A layer that keeps nothing: residual, normed rows and the MLP."""
        return self.work.tokens * (3 * self.facts.width + self._mlp_values) * self.value

    # --- head ---------------------------------------------------------------------------------------------------------

    @property
    def head(self) -> float:
        """Logits of one piece of the vocabulary, in fp32 and rounded for the product with it; sums per learned row."""
        facts, rows, value = self.facts, self.work.learned, self.value
        trained = states_of(self.config.tune)["head"] == "trained"
        # As lensmith.model.head.whole_pieces cuts them.
        fitting = HEAD_PIECE_BYTES // (FP32 * max(1, rows)) // HEAD_FEWEST_WORDS * HEAD_FEWEST_WORDS
        words = min(facts.vocabulary, max(HEAD_FEWEST_WORDS, fitting))
        pieces = 0
        if self.config.memory.head_bits != 16:
            pieces = FEW_BIT_WORDS * facts.width * value
        elif self.config.memory.head == "host" or (facts.tied and self.config.memory.embedding == "host"):
            pieces = 2 * HOSTED_PIECE_BYTES
        logits = rows * words * ((2 * FP32 if trained else FP32) + value)
        # Sums and what becomes the gradient: one fp32 row, five in the model's type.
        return logits + rows * facts.width * (FP32 + 5 * value) + pieces

    # --- tower --------------------------------------------------------------------------------------------------------

    @property
    def patches(self) -> int:
        return self.work.image_tokens * self.facts.tower.patches_per_token

    @property
    def pixels(self) -> float:
        return self.patches * self.facts.tower.patch_values * self.value

    @property
    def features(self) -> float:
        """What the decoder takes from the tower: the tokens and one set of rows per deepstack level."""
        return self.work.image_tokens * (1 + self.facts.tower.levels) * self.facts.width * self.value

    @property
    def tower_forward(self) -> float:
        """One block that keeps nothing. Highest in the rotary embedding: qkv and hidden states, and in fp32 queries and
        keys, the rotated queries and three terms of the keys."""
        tower = self.facts.tower
        return self.patches * tower.width * (4 * self.value + 6 * FP32)

    @property
    def tower_kept(self) -> float:
        """What stays for the tower's own backward pass, from its forward pass to the end of the step."""
        states = states_of(self.config.tune)
        if states["vision"] == "frozen":
            return self._mergers_kept if states["merger"] != "frozen" else 0
        tower = self.facts.tower
        inputs = tower.depth * self.patches * tower.width * self.value
        recomputed = self.config.memory.recompute == "layers"
        return inputs + (0 if recomputed else tower.depth * self._block) + self._mergers_kept

    @property
    def tower_backward(self) -> float:
        """Beside `tower_kept`, while a block's backward pass runs: gradients, and the block itself if it ran again."""
        if states_of(self.config.tune)["vision"] == "frozen":
            return 0
        tower = self.facts.tower
        gradients = self.patches * (2 * tower.width + 2 * tower.mlp_width) * self.value
        return gradients + (self._block if self.config.memory.recompute == "layers" else 0)

    @property
    def _block(self) -> float:
        """What one block keeps, without its input: normed rows, qkv, rotated q and k, attention's result, hidden
        states, normed rows, and both sides of the activation."""
        tower = self.facts.tower
        return self.patches * ((9 * tower.width + 2 * tower.mlp_width) * self.value + tower.heads * FP32)

    @property
    def _mergers_kept(self) -> float:
        """Per merger: rows before and after its norm, and both sides of the activation."""
        tower = self.facts.tower
        return (tower.levels + 1) * 4 * self.patches * tower.width * self.value

    # --- the rest -----------------------------------------------------------------------------------------------------

    @property
    def routing(self) -> float:
        """Ids, positions, index tensors and the rotary angles of every token."""
        angles = 2 * self.facts.head_width * self.value
        return (
            self.work.tokens * (5 * INDEX + angles) + self.work.image_tokens * INDEX + self.work.gathered_tokens * INDEX
        )
