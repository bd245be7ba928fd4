"""Qwen3-VL over packs: transformers' own model with the same modules and weights, and one more way through them.

`engine(pack=pack)` returns the log-probability of every learned token. The pack stays in host memory and the engine copies
what it needs, so that nothing ever waits for the GPU to learn where things stand. Against the stock forward it leaves out what
changes nothing: padding (packs have none), copies of a shared prefix, the head on rows that predict nothing learned, and
the last layer's queries and MLP on those rows. Without a pack it is the stock forward, so generation, saving, PEFT and
every other tool see an ordinary Qwen3VLForConditionalGeneration.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from lensmith.errors import ModelError
from lensmith.model.attention import Layout, attend, build_layout, kept_runs, segment_runs
from lensmith.model.features import FeatureStore, image_features
from lensmith.model.head import token_logprobs, token_logprobs_and_entropies
from lensmith.model.hosted import HostHead, Visitors
from lensmith.model.kernels import rms_norm, rotate, swiglu
from lensmith.model.layer import FusedLayers
from lensmith.model.lora import Shadows, project
from lensmith.model.quant import FewBitHead
from lensmith.model.recompute import HostBuffers, Waiting, recomputed
from lensmith.types import IGNORE, Pack, Segment

Recompute = Literal["none", "layers"] | int


@dataclass(frozen=True, slots=True)
class Route:
    """Where things stand in one pack, as index tensors on its device: made once per forward pass, read by every layer."""

    layout: Layout
    """Attention of every row."""
    last_layout: Layout
    """Attention of the kept rows in the last layer."""
    kept: Int[Tensor, " kept"]
    """Rows whose last hidden state predicts something."""
    predictors: Int[Tensor, " learned"]
    """For each learned token the index into `kept` of the row that predicts it."""
    targets: Int[Tensor, " learned"]


def find_engine(model: torch.nn.Module) -> Engine | None:
    """The Engine that a model is, or that PEFT is wrapped around; None for one that transformers loaded."""
    return next((module for module in model.modules() if isinstance(module, Engine)), None)


class Engine(Qwen3VLForConditionalGeneration):
    """Loads any Qwen3-VL checkpoint; modules and parameter names are transformers' own."""

    recompute: Recompute = "none"
    """`layers` keeps each layer's input only and runs the layer again in the backward pass; a number does so for that many
    layers, from the first: what the others keep is gone by the time that these run again."""
    host_buffers: HostBuffers | None = None
    """Where the inputs of recomputed layers wait; None for the device."""
    features: FeatureStore | None = None
    """What a frozen tower made of pictures, kept for the next time; None to compute it each time."""
    visitors: Visitors | None = None
    """The first layers, where their frozen weights live in host memory."""
    keeps_random: bool = False
    """Whether layers draw random numbers (adapter dropout), which their second run must draw again."""
    shadows: Shadows | None = None
    """The adapters in the type that the model computes in, where that is not their own."""
    fused_layers: bool = True
    """Whether layers that fit are one step of the graph each (see lensmith.model.layer); off to compare the two."""
    stays: bool = False
    """Whether weights have been given their places, so that nobody moves the model as a whole any more."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        deepstack, layers = len(config.vision_config.deepstack_visual_indexes), config.text_config.num_hidden_layers
        if deepstack >= layers:
            raise ModelError(
                f"config.json: {deepstack} deepstack levels for {layers} decoder layers; there must be at least one layer "
                "more than levels, because the last layer runs on the learned rows only. Use a deeper model."
            )
        self._fused = FusedLayers()

    # generate() validates its keyword arguments against this signature.
    @functools.wraps(Qwen3VLForConditionalGeneration.forward)
    def forward(self, *args: Any, pack: Pack | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if pack is None:
            return super().forward(*args, **kwargs)
        return self.pack_logprobs(pack)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Answers never come from a model in training mode; afterwards each module has its own mode back."""
        with evaluating(self):
            return super().generate(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]  its protocol

    def _apply(self, fn: Any, recurse: bool = True) -> Engine:
        # Trainers call model.to(device), which would bring everything that lives in host memory back.
        return self if self.stays else super()._apply(fn, recurse)

    @property
    def place(self) -> torch.device:
        """The device that computes; some weights may live elsewhere."""
        return self.model.language_model.norm.weight.device

    def pack_logprobs(self, pack: Pack) -> Float[Tensor, " learned"]:
        """Log-probability of each learned token of the pack, in the order of the tokens; fp32 (float64 in float64)."""
        hidden, targets = self._learned_hidden(pack)
        return token_logprobs(hidden, self._head_weight(), targets)

    def pack_scores(
        self, pack: Pack, *, temperature: float = 1.0
    ) -> tuple[Float[Tensor, " learned"], Float[Tensor, " learned"]]:
        """As `pack_logprobs`, of the distribution at `temperature`, with its entropy in nats (which has no gradient)."""
        hidden, targets = self._learned_hidden(pack)
        hidden = hidden if temperature == 1.0 else hidden / temperature  # logits are linear in it
        return token_logprobs_and_entropies(hidden, self._head_weight(), targets)

    def _learned_hidden(self, pack: Pack) -> tuple[Float[Tensor, "learned width"], Int[Tensor, " learned"]]:
        """The normed hidden state that predicts each learned token, and the tokens."""
        decoder, device = self.model.language_model, self.place
        route = self._route(pack)
        if self.shadows is not None:
            self.shadows.refresh()
        hidden, deepstack, image_rows = self.embed_pack(pack)
        rope = tuple(part[0] for part in decoder.rotary_emb(hidden[None], pack.positions[1:, None].to(device)))
        waiting = Waiting(self.host_buffers) if torch.is_grad_enabled() else None
        for index, layer in enumerate(decoder.layers):
            is_last = index == len(decoder.layers) - 1
            layout, kept = (route.last_layout, route.kept) if is_last else (route.layout, None)
            waits = waiting if self._recomputes(index) else None
            fused = self._fused.find(index, layer, self.shadows) if self.fused_layers and not is_last else None
            if fused is not None:
                hidden = fused.run(hidden, rope, layout, waits, functools.partial(self.visit, index))
            else:
                run = functools.partial(self._run_layer, index, layer, rope, layout, kept)
                once = waits is None
                hidden = (
                    run(hidden, "forward") if once else recomputed(run, hidden, waits, keeps_random=self.keeps_random)
                )
            if index < len(deepstack):
                hidden = hidden.index_add(0, image_rows, deepstack[index].to(hidden.dtype))
        return rms_norm(decoder.norm, hidden)[route.predictors], route.targets

    def embed_pack(
        self, pack: Pack
    ) -> tuple[Float[Tensor, "tokens width"], Sequence[Tensor], Int[Tensor, " image_tokens"]]:
        """Hidden states before the first layer, features in the places of image tokens; deepstack levels; those places."""
        media_ids = (self.config.image_token_id, self.config.video_token_id)
        rows = torch.from_numpy(np.flatnonzero(np.isin(pack.input_ids.numpy(), media_ids)))
        rows, hidden = rows.to(self.place, non_blocking=True), self.embed(pack.input_ids)
        if not len(pack.grids):
            return hidden, (), rows
        recompute = self.recompute == "layers"
        features = image_features(self.model.visual, pack, self.place, self.features, recompute=recompute)
        return hidden.index_copy(0, rows, features.tokens.to(hidden.dtype)), features.deepstack, rows

    def embed(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens width"]:
        """Rows of the input embedding, on the device, wherever the ids and the embedding are."""
        embed = self.model.language_model.embed_tokens
        return embed(ids.to(embed.weight.device, non_blocking=True))

    def head_logits(self, hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows vocab"]:
        """Logits of normed hidden states. For a few rows: all words at once."""
        return self.lm_head(hidden)

    @property
    def fetches_weights(self) -> bool:
        """Whether a forward pass copies weights from host memory."""
        embedding = self.model.language_model.embed_tokens.weight
        return self.visitors is not None or isinstance(self.lm_head, HostHead) or embedding.device.type == "cpu"

    def _head_weight(self) -> Any:
        return self.lm_head if isinstance(self.lm_head, HostHead | FewBitHead) else self.lm_head.weight

    def _recomputes(self, index: int) -> bool:
        return self.recompute == "layers" or (self.recompute != "none" and index < self.recompute)

    def _run_layer(
        self,
        index: int,
        layer: Any,
        rope: tuple[Tensor, Tensor],
        layout: Layout,
        kept: Int[Tensor, " kept"] | None,
        hidden: Float[Tensor, "tokens width"],
        direction: Literal["forward", "backward"],
    ) -> Float[Tensor, "rows width"]:
        self.visit(index, direction)
        return run_layer(layer, hidden, rope, layout, kept)

    def visit(self, index: int, direction: Literal["forward", "backward"]) -> None:
        """Have a layer's weights on the device, and the next one's on their way."""
        if self.visitors is not None and index < len(self.visitors.groups):
            self.visitors.bring(index, index + 1 if direction == "forward" else index - 1)

    def _route(self, pack: Pack) -> Route:
        device, dtype = self.place, self.model.language_model.norm.weight.dtype
        labels = pack.labels.numpy()
        learned = np.flatnonzero(labels != IGNORE)
        kept, predictors = np.unique(predecessors(pack.segments)[learned], return_inverse=True)
        tensor = lambda array: torch.from_numpy(array).to(device, non_blocking=True)  # noqa: E731
        build = functools.partial(build_layout, num_keys=pack.num_tokens, causal=True, device=device, dtype=dtype)
        return Route(
            layout=build(segment_runs(pack.segments)),
            last_layout=build(kept_runs(pack.segments, kept)),
            kept=tensor(kept),
            predictors=tensor(predictors),
            targets=tensor(labels[learned]),
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; afterwards each is in the mode it was in."""
    # Not model.train() at the end: a frozen tower may have been in eval mode while the rest trained.
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def predecessors(segments: Sequence[Segment]) -> Int[np.ndarray, " tokens"]:
    """For every row the row that predicts it: the one before it, or for a branch's first row its prefix's last one.

    A segment without parent has nothing before its first row; that row's entry is -1 and must carry no label.
    """
    before = np.arange(-1, segments[-1].stop - 1)
    for segment in segments:
        before[segment.start] = -1 if segment.parent is None else segments[segment.parent].stop - 1
    return before


def run_layer(
    layer: Any,
    hidden: Float[Tensor, "tokens width"],
    rope: tuple[Tensor, Tensor],
    layout: Layout,
    kept: Int[Tensor, " kept"] | None,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> Float[Tensor, "rows width"]:
    """One decoder layer: keys and values of every row; queries, output and MLP of the `kept` rows (None: all).

    `keep` is given keys and values, [tokens, kv_heads, width], rotated as attention reads them.
    """
    attention = layer.self_attn
    normed = rms_norm(layer.input_layernorm, hidden)
    asking, residual = (normed, hidden) if kept is None else (normed[kept], hidden[kept])
    heads = lambda rows: rows.unflatten(-1, (-1, attention.head_dim))  # noqa: E731
    if kept is None:
        query, key, value = project((attention.q_proj, attention.k_proj, attention.v_proj), normed)
    else:
        (query,), (key, value) = (
            project((attention.q_proj,), asking),
            project((attention.k_proj, attention.v_proj), normed),
        )
    query, key = rms_norm(attention.q_norm, heads(query)), rms_norm(attention.k_norm, heads(key))
    query, key = rotate(query, key, rope, kept)
    if keep is not None:
        keep(key, heads(value))
    mixed = attend(query, key, heads(value), layout, attention.scaling)
    hidden = residual + project((attention.o_proj,), mixed.reshape(len(mixed), -1))[0]
    return hidden + swiglu(layer.mlp, rms_norm(layer.post_attention_layernorm, hidden))
