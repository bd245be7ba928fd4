"""Completions for prompts with pictures: one pass per prompt, whose keys and values all of its completions read.

    prompts ──> prefill ──> caches ──> one token per sequence and step ──> completions
                one pack    prefix: one per group · own: one per sequence

Everything of a step lies in buffers that stay where they are, so that on a GPU one CUDA graph holds the whole step and the
host gives it one launch per token. Finished sequences leave the batch when that halves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lensmith.model.attention import build_layout, kept_runs, segment_runs
from lensmith.model.decode_attention import attend_decode, reads_to_length, write_decode
from lensmith.model.engine import Engine, evaluating, run_layer
from lensmith.model.kernels import rms_norm
from lensmith.model.lora import project
from lensmith.model.quant import has_triton
from lensmith.model.sampling import Sampler, Sampling
from lensmith.types import Pack

LOOK_EVERY = 16
"""Steps between looks at which sequences have finished: each look waits for the device."""
FIRST_CAPACITY = 64
"""Tokens of the sequences' own cache that attention reads at first; it doubles when they are full."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer."""

    ids: tuple[int, ...]
    """With its end token, where it ended itself."""
    logprobs: tuple[float, ...]
    """Of each token, in nats, at the sampling temperature; before top-k, top-p and min-p."""
    stopped: bool
    """Whether it ended itself; False where max_new_tokens cut it off."""


@dataclass(slots=True)
class _Caches:
    """Keys and values, one tensor per layer."""

    prefix_k: list[Float[Tensor, "groups prefix kv_heads width"]]
    prefix_v: list[Float[Tensor, "groups prefix kv_heads width"]]
    own_k: list[Float[Tensor, "sequences capacity kv_heads width"]]
    own_v: list[Float[Tensor, "sequences capacity kv_heads width"]]
    prefix_lengths: Int[Tensor, " groups"]

    def keep(self, groups: Tensor, slots: Tensor) -> None:
        """Only those groups and sequences, in that order; layer by layer, so that little is there twice."""
        for index in range(len(self.own_k)):
            if len(groups) < len(self.prefix_lengths):
                self.prefix_k[index] = self.prefix_k[index].index_select(0, groups)
                self.prefix_v[index] = self.prefix_v[index].index_select(0, groups)
            self.own_k[index] = self.own_k[index].index_select(0, slots)
            self.own_v[index] = self.own_v[index].index_select(0, slots)
        self.prefix_lengths = self.prefix_lengths.index_select(0, groups)


@dataclass(slots=True)
class _State:
    """What a step reads and writes; device tensors that keep their places."""

    last: Int[Tensor, " sequences"]
    """The newest token of each."""
    first_positions: Int[Tensor, " sequences"]
    """Position of each one's first token."""
    length: Int[Tensor, " one"]
    """Tokens that each has so far."""
    finished: Tensor
    ids: Int[Tensor, "sequences most"]
    logprobs: Float[Tensor, "sequences most"]
    noise: Float[Tensor, "sequences vocab"]

    def keep(self, slots: Tensor) -> None:
        for name in ("last", "first_positions", "finished", "ids", "logprobs"):
            setattr(self, name, getattr(self, name).index_select(0, slots))
        self.noise = self.noise[: len(slots)].clone()


class Decoder:
    """Samples completions from an Engine as it is now, adapters and all."""

    def __init__(self, engine: Engine, sampling: Sampling, *, end_ids: Sequence[int], never_ids: Sequence[int]) -> None:
        """`end_ids`: tokens that end an answer; `never_ids`: tokens that are never drawn."""
        self.engine, self.end_ids = engine, tuple(end_ids)
        device = engine.place
        self._ends = torch.tensor(sorted(end_ids), device=device)
        self._sampler = Sampler(sampling, torch.tensor(sorted(never_ids), device=device, dtype=torch.int64))
        self._layers: list[RowsThrough] = []
        """The decoder's layers for a few rows; made at the first rollout, when adapters are in place."""

    @property
    def uses_graphs(self) -> bool:
        """Whether a step is one launch: on a GPU, with all weights there."""
        return self.engine.place.type == "cuda" and not self.engine.fetches_weights

    @torch.no_grad()
    def complete(
        self, prompts: Pack, members: int, *, max_new_tokens: int, generator: torch.Generator
    ) -> list[list[Completion]]:
        """`members` completions for each prompt of the pack, whose segments are the prompts, each standing alone.

        `generator` lies on the engine's device. A token never depends on whether graphs are used. Dropout and the like rest
        meanwhile, and every module is in the mode that it was in afterwards.
        """
        with evaluating(self.engine):
            return self._complete(prompts, members, max_new_tokens, generator)

    def _complete(
        self, prompts: Pack, members: int, max_new_tokens: int, generator: torch.Generator
    ) -> list[list[Completion]]:
        if self.engine.shadows is not None:
            self.engine.shadows.refresh()
        self._layers = self._layers or [RowsThrough(layer) for layer in self.engine.model.language_model.layers]
        for layer in self._layers:
            layer.refresh()
        caches, hidden = self._prefill(prompts, members, max_new_tokens)
        state = self._start(prompts, hidden, members, max_new_tokens, generator)
        groups = len(prompts.segments)
        run = _Batch(self, caches, state, groups, members, max_new_tokens)
        run.decode(generator)
        return [run.completions[group * members : (group + 1) * members] for group in range(groups)]

    def _prefill(self, pack: Pack, members: int, max_new_tokens: int) -> tuple[_Caches, Float[Tensor, "groups width"]]:
        """The prompts' keys and values in caches with room for completions; the normed last hidden state of each."""
        engine, decoder, device = self.engine, self.engine.model.language_model, self.engine.place
        lengths = [segment.length for segment in pack.segments]
        config: Any = engine.config.text_config
        dtype = decoder.norm.weight.dtype
        heads = (config.num_key_value_heads, config.head_dim)
        empty = lambda *shape: [torch.zeros(*shape, *heads, dtype=dtype, device=device) for _ in decoder.layers]  # noqa: E731
        prefix, own = (len(lengths), max(lengths)), (len(lengths) * members, max_new_tokens)
        lengths_tensor = torch.tensor(lengths, dtype=torch.int32, device=device)
        caches = _Caches(empty(*prefix), empty(*prefix), empty(*own), empty(*own), lengths_tensor)
        rows = np.concatenate([n * prefix[1] + np.arange(length) for n, length in enumerate(lengths)])
        rows_tensor = torch.from_numpy(rows).to(device)

        def keep(index: int) -> Callable[[Tensor, Tensor], None]:
            def copy(key: Tensor, value: Tensor) -> None:
                caches.prefix_k[index].flatten(0, 1).index_copy_(0, rows_tensor, key)
                caches.prefix_v[index].flatten(0, 1).index_copy_(0, rows_tensor, value)

            return copy

        return caches, prompt_hidden(engine, pack, keep)

    def _start(
        self, pack: Pack, hidden: Tensor, members: int, max_new_tokens: int, generator: torch.Generator
    ) -> _State:
        """The state behind the first token of every sequence."""
        logits = self.engine.head_logits(hidden).repeat_interleave(members, 0)
        count, device = len(logits), logits.device
        wide = torch.promote_types(logits.dtype, torch.float32)
        stops = torch.tensor([segment.stop - 1 for segment in pack.segments])
        after = pack.positions[1:].max(0).values[stops] + 1  # M-RoPE goes on behind the largest of the three
        state = _State(
            last=torch.zeros(count, dtype=torch.int64, device=device),
            first_positions=after.to(device).repeat_interleave(members),
            length=torch.zeros(1, dtype=torch.int64, device=device),
            finished=torch.zeros(count, dtype=torch.bool, device=device),
            ids=torch.zeros(count, max_new_tokens, dtype=torch.int64, device=device),
            logprobs=torch.zeros(count, max_new_tokens, dtype=wide, device=device),
            noise=torch.ones(logits.shape, dtype=wide, device=device),
        )
        self.draw_noise(state, generator)
        self.append(state, logits)
        return state

    def draw_noise(self, state: _State, generator: torch.Generator) -> None:
        if not self._sampler.greedy:
            state.noise.exponential_(generator=generator)

    def append(self, state: _State, logits: Float[Tensor, "sequences vocab"]) -> None:
        """Draw a token for every sequence and write it down."""
        tokens, logprobs = self._sampler.draw(logits, state.noise)
        state.ids.index_copy_(1, state.length, tokens[:, None])
        state.logprobs.index_copy_(1, state.length, logprobs[:, None])
        state.last.copy_(tokens)
        state.finished.logical_or_((tokens[:, None] == self._ends).any(1))  # isin waits for the device
        state.length.add_(1)

    def step(self, caches: _Caches, state: _State, capacity: int) -> None:
        """One token more for every sequence; no tensor leaves the device and no shape depends on one."""
        engine, decoder = self.engine, self.engine.model.language_model
        length = state.length.int()  # as the kernels read it
        place = length - 1  # where this token's keys and values go
        hidden = engine.embed(state.last)
        positions = (state.first_positions + place).expand(3, 1, -1)
        cos, sin = decoder.rotary_emb(hidden[None], positions)
        for index, layer in enumerate(self._layers):
            engine.visit(index, "forward")
            own = (caches.own_k[index], caches.own_v[index])
            prefix = (caches.prefix_k[index], caches.prefix_v[index], caches.prefix_lengths)
            hidden = layer.step(hidden, (cos[0], sin[0]), prefix, own, place, length, capacity)
        self.append(state, engine.head_logits(rms_norm(decoder.norm, hidden)))


class _Batch:
    """The sequences that are still being written, step after step."""

    def __init__(
        self, decoder: Decoder, caches: _Caches, state: _State, groups: int, members: int, max_new_tokens: int
    ) -> None:
        self.decoder, self.caches, self.state = decoder, caches, state
        self.groups, self.members, self.most = groups, members, max_new_tokens
        self.completions: list[Any] = [None] * (groups * members)
        self._numbers = list(range(groups * members))
        """Which completion each slot writes; None for a slot that only fills the shape."""
        self._graph: Any = None
        # The kernel ends at the length, whatever the capacity; the plain form reads all of what it is given.
        whole = reads_to_length(caches.own_k[0])
        self._capacity = max_new_tokens if whole else min(FIRST_CAPACITY, max_new_tokens)

    def decode(self, generator: torch.Generator) -> None:
        length = 1
        while length < self.most:
            if (length - 1) % LOOK_EVERY == 0 and self._leave(length):
                break
            if length > self._capacity:
                self._capacity = min(2 * self._capacity, self.most)
                self._graph = None
            self.decoder.draw_noise(self.state, generator)
            self._step()
            length += 1
        self._take(range(len(self._numbers)), length)
        self._graph = None

    def _step(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        # The first step of a shape runs as it is: it is a real one, and what kernels set up at their first call must not
        # be inside a graph.
        self.decoder.step(self.caches, self.state, self._capacity)
        if self.decoder.uses_graphs:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.decoder.step(self.caches, self.state, self._capacity)

    def _leave(self, length: int) -> bool:
        """Take finished sequences out where that at least halves the batch; True where none is left."""
        finished = self.state.finished.tolist()
        slots = [slot for slot, done in enumerate(finished) if not done and self._numbers[slot] is not None]
        if not slots:
            return True
        by_group = [[slot for slot in slots if slot // self.members == group] for group in range(self.groups)]
        groups = [group for group, left in enumerate(by_group) if left]
        members = max(len(by_group[group]) for group in groups)
        if 2 * len(groups) * members > len(finished):
            return False
        self._take([slot for slot, done in enumerate(finished) if done], length)
        chosen = [by_group[group][n % len(by_group[group])] for group in groups for n in range(members)]
        numbers = [
            self._numbers[by_group[group][n]] if n < len(by_group[group]) else None
            for group in groups
            for n in range(members)
        ]
        device = self.state.last.device
        picked = torch.tensor(chosen, device=device)
        self._graph = None
        self.caches.keep(torch.tensor(groups, device=device), picked)
        self.state.keep(picked)
        self.groups, self.members, self._numbers = len(groups), members, numbers
        return False

    def _take(self, slots: Sequence[int], length: int) -> None:
        """Write down what those slots have come to."""
        ids, logprobs = self.state.ids[:, :length].tolist(), self.state.logprobs[:, :length].tolist()
        ends = set(self.decoder.end_ids)
        for slot in slots:
            if (number := self._numbers[slot]) is None or self.completions[number] is not None:
                continue
            end = next((place for place, token in enumerate(ids[slot]) if token in ends), None)
            stop = length if end is None else end + 1
            self.completions[number] = Completion(
                tuple(ids[slot][:stop]), tuple(logprobs[slot][:stop]), stopped=end is not None
            )


def prompt_hidden(
    engine: Engine, pack: Pack, keep: Callable[[int], Callable[[Tensor, Tensor], None]]
) -> Float[Tensor, "prompts width"]:
    """The normed last hidden state of each segment; `keep(layer)` is given that layer's keys and values."""
    decoder, device = engine.model.language_model, engine.place
    dtype = decoder.norm.weight.dtype
    last = np.array([segment.stop - 1 for segment in pack.segments])
    build = {"num_keys": pack.num_tokens, "causal": True, "device": device, "dtype": dtype}
    layout = build_layout(segment_runs(pack.segments), **build)
    last_layout = build_layout(kept_runs(pack.segments, last), **build)
    hidden, deepstack, image_rows = engine.embed_pack(pack)
    rope = tuple(part[0] for part in decoder.rotary_emb(hidden[None], pack.positions[1:, None].to(device)))
    rows = torch.from_numpy(last).to(device)
    for index, layer in enumerate(decoder.layers):
        engine.visit(index, "forward")
        if index < len(decoder.layers) - 1:
            hidden = run_layer(layer, hidden, rope, layout, None, keep(index))
        else:
            hidden = run_layer(layer, hidden, rope, last_layout, rows, keep(index))
        if index < len(deepstack):
            hidden = hidden.index_add(0, image_rows, deepstack[index].to(hidden.dtype))
    return rms_norm(decoder.norm, hidden)


class RowsThrough:
    """One decoder layer on one token per sequence, for as many tokens as a rollout writes."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        self._qkv = few_rows((attention.q_proj, attention.k_proj, attention.v_proj))
        self._out, self._down = few_rows((attention.o_proj,)), few_rows((mlp.down_proj,))
        self._gate_up = few_rows((mlp.gate_proj, mlp.up_proj), gated=True)

    def refresh(self) -> None:
        """Read the adapters as they are now."""
        for linears in (self._qkv, self._out, self._gate_up, self._down):
            linears.refresh()

    def step(
        self,
        hidden: Float[Tensor, "sequences width"],
        rope: tuple[Tensor, Tensor],
        prefix: tuple[Tensor, Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        place: Int[Tensor, " one"],
        length: Int[Tensor, " one"],
        capacity: int,
    ) -> Float[Tensor, "sequences width"]:
        """The layer's output; its keys and values are written at `place` of the `own` caches."""
        layer, attention = self._layer, self._layer.self_attn
        heads = lambda rows: rows.unflatten(-1, (-1, attention.head_dim))  # noqa: E731
        query, key, value = map(heads, self._qkv.run(rms_norm(layer.input_layernorm, hidden)))
        query = write_decode(query, key, value, attention.q_norm, attention.k_norm, rope, *own, place)
        mixed = attend_decode(query, *prefix, own[0][:, :capacity], own[1][:, :capacity], length, attention.scaling)
        (hidden,) = self._out.run(mixed.flatten(1), hidden)
        (inner,) = self._gate_up.run(rms_norm(layer.post_attention_layernorm, hidden))
        return self._down.run(inner, hidden)[0]


def few_rows(linears: Sequence[Any], *, gated: bool = False) -> Any:
    """The linears for a few rows: fused where Triton is, otherwise as everywhere."""
    if not has_triton():
        return PlainRows(linears, gated=gated)
    from lensmith.model.few_rows import FewRows

    return FewRows(linears, gated=gated)


class PlainRows:
    """What FewRows does, by `lora.project`, for any number of rows."""

    def __init__(self, linears: Sequence[Any], *, gated: bool = False) -> None:
        self._linears, self._gated = tuple(linears), gated

    def refresh(self) -> None:
        """Nothing is kept."""

    def run(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """See `FewRows.run`."""
        outputs = project(self._linears, x)
        if self._gated:
            return (F.silu(outputs[0]) * outputs[1],)
        return outputs if residual is None else (residual + outputs[0],)
