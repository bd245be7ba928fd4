"""What a run reserves on a GPU, by part, at the moment when it is most. Integers and floats; no torch, no GPU.

Weights, adapters and optimizer states are there all the time. The rest comes and goes, so a plan looks at each moment
when memory may be at its highest, adds up what is alive then, and takes the largest:

    tower        pictures become features; nothing of the decoder is alive yet
    head         the forward pass is over; every kept activation is alive, and pieces of logits
    backward     the topmost layer's backward pass; every kept activation below it is alive
    last layers  its end: all gradients exist, no activation but one layer's
    tower back   the tower's own backward pass, where it trains
    optimizer    all gradients, and what the optimizer needs on the way
    rollout      GRPO: keys and values of a group's completions
    scoring      GRPO: passes under the old policy and the reference, which keep nothing
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lensmith.config.tree import RunConfig
from lensmith.model.components import states_of
from lensmith.plan.activations import FP32, Pass
from lensmith.plan.cards import CONTEXT_GIB
from lensmith.plan.coefficients import Coefficients, load_coefficients
from lensmith.plan.facts import ModelFacts
from lensmith.plan.weights import (
    ADAPTER_BYTES,
    host_parts,
    scratch_bytes,
    trainable,
    training_parts,
    value_bytes,
    weight_parts,
)
from lensmith.plan.work import Rollout, Work, written_at_once

GIB = 2**30
CONTEXT = "CUDA context"
FRAGMENTATION = "fragmentation"

UPDATED_TOGETHER = 2**24
"""lensmith.train.rounded.PIECE: numbers of a weight that is trained itself which are updated together."""
UPDATE_COPIES = 6
"""Of such a piece in fp32: weight, gradient, step, noise, and the sum of two before and after rounding."""

Parts = dict[str, float]


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run needs of one GPU, in GiB."""

    parts: Mapping[str, float]
    """What is alive at the peak, by name; `CUDA context`, which torch does not count, is the last one."""
    moment: str
    """When the peak is."""
    moments: Mapping[str, float]
    """Peak of each moment; `peak_gib` is the largest."""
    host: Mapping[str, float]
    """What waits in page-locked host memory meanwhile, by name; each process has this of its own."""
    notes: tuple[str, ...] = ()
    """What the arithmetic leaves out, in sentences."""

    @property
    def peak_gib(self) -> float:
        """What torch reserves; the CUDA context is not in it."""
        return self.moments[self.moment]


def plan_memory(
    facts: ModelFacts,
    config: RunConfig,
    work: Work,
    *,
    rollout: Rollout | None = None,
    gpus: int = 1,
    coefficients: Coefficients | None = None,
) -> MemoryPlan:
    """Reserved memory of one GPU while it trains on packs like `work`.

    With `gpus` > 1, FSDP2 shards layers, tower, adapters, gradients and optimizer states; each GPU has packs of its own,
    and the embedding, the head and all activations whole. On paper: lensmith trains on several GPUs by copies (DDP).
    """
    found = coefficients or load_coefficients()
    one = Pass(facts, config, work)
    steady = weight_parts(facts, config, gpus) | training_parts(facts, config, gpus)
    steady |= {"dequantised scratch": scratch_bytes(facts, config)} | _rollout_copy(facts, config, rollout)
    moments = {name: parts for name, parts in _moments(one, rollout, gpus, found).items() if sum(parts.values())}
    peaks = {name: _reserved(steady, parts, found) for name, parts in moments.items()}
    moment = max(peaks, key=lambda name: sum(peaks[name].values()))
    parts = {name: value / GIB for name, value in peaks[moment].items() if value}
    return MemoryPlan(
        parts | {CONTEXT: CONTEXT_GIB},
        moment,
        {name: sum(parts.values()) / GIB for name, parts in peaks.items()},
        {name: value / GIB for name, value in _host(one).items() if value},
        _notes(facts, config, gpus),
    )


def _host(one: Pass) -> Parts:
    return host_parts(one.facts, one.config) | {"layer inputs": one.waiting_inputs}


def _reserved(steady: Parts, parts: Parts, found: Coefficients) -> Parts:
    gaps = found.fragmentation_gib * GIB + found.fragmentation_share * sum(parts.values())
    return steady | parts | {FRAGMENTATION: gaps}


def _moments(one: Pass, rollout: Rollout | None, gpus: int, found: Coefficients) -> dict[str, Parts]:
    kept = found.kept_activations * (one.kept_inputs + one.recorded_layers * one.layer)
    # Where every layer runs again, one at a time is as large as if it had been recorded.
    again = 0 if one.recorded_layers else one.layer
    live = found.live_layer * (again + one.layer_scratch)
    tower = found.tower * one.tower_kept
    pictures = {"pixels": one.pixels, "image features": one.features}
    packs = {"packs": one.routing}
    early, late, stepping = _gradients(one, gpus)
    moments: dict[str, Parts] = {
        "tower": pictures | packs | {"tower activations": found.tower * (one.tower_forward + one.tower_kept)},
        "head": pictures
        | packs
        | early
        | {
            "kept activations": kept + found.kept_activations * (one.one_input + one.last_layer * (again == 0)),
            "tower activations": tower,
            "head": found.head * one.head,
        },
        "backward": packs | early | {"kept activations": kept, "live layer": live, "tower activations": tower},
        "last layers": packs
        | late
        | {
            "kept activations": one.one_input,
            "live layer": found.live_layer * (one.layer + one.layer_scratch),
            "tower activations": tower,
        },
        "optimizer": stepping,
    }
    if one.tower_backward:
        backward = found.tower * (one.tower_kept + one.tower_backward)
        moments["tower back"] = packs | late | {"tower activations": backward}
    if rollout is not None:
        moments |= _rollout_moments(one, rollout, pictures | packs, found)
    return moments


def _gradients(one: Pass, gpus: int) -> tuple[Parts, Parts, Parts]:
    """Gradients when the backward pass starts, when it ends, and with what the optimizer adds when it steps.

    A step of several packs has all of them from its second pack on. With optim.in_backward there is one weight's at a
    time, except that of a tied head, which waits for the embedding's.
    """
    facts, config, wide = one.facts, one.config, value_bytes(one.config)
    train = trainable(facts, config)
    adapters = train.adapters * ADAPTER_BYTES / gpus
    language = states_of(config.tune)["language"] == "trained"
    head = facts.embedding * wide if language else 0
    updating = UPDATE_COPIES * FP32 * min(UPDATED_TOGETHER, train.largest)
    if config.optim.in_backward:
        waiting = head if facts.tied else 0
        late = adapters + waiting + train.largest * wide
        early = adapters + train.largest * wide
        both = [{"gradients": size, "optimizer's steps": updating} for size in (early, late)]
        return both[0], both[1], {}
    late = adapters + train.weights * wide / gpus
    early = late if one.work.packs_per_step > 1 else head
    late += head if facts.tied else 0  # the embedding's own, until it is added to the head's
    stepping = {"gradients": late, "optimizer's steps": updating}
    return {"gradients": early}, {"gradients": late}, stepping


def _rollout_copy(facts: ModelFacts, config: RunConfig, rollout: Rollout | None) -> Parts:
    """vLLM in the same process keeps weights of its own in 16 bits, and the cache of a group beside the training: what is left
    of the share of the card that it was given, where that is more than it needs."""
    if rollout is None or rollout.engine != "vllm":
        return {}
    copy = 2 * facts.num_parameters
    return {
        "rollout copy": copy,
        "KV cache": max(_cache_bytes(facts, config, rollout, 2), rollout.reserved_gib * GIB - copy),
    }


def _cache_bytes(facts: ModelFacts, config: RunConfig, rollout: Rollout, value: int) -> float:
    """Keys and values of all layers: each prompt once, and the completions that are written at the same time."""
    prompts, completions = written_at_once(rollout, config)
    tokens = prompts * rollout.prompt_tokens + completions * rollout.completion_tokens
    return tokens * facts.layers * 2 * facts.key_width * value


def _rollout_moments(one: Pass, rollout: Rollout, before: Parts, found: Coefficients) -> dict[str, Parts]:
    facts, value = one.facts, one.value
    moments = {"scoring": before | {"live layer": found.live_layer * one.forward_layer, "head": found.head * one.head}}
    if rollout.engine == "builtin":
        _, completions = written_at_once(rollout, one.config)
        logits = completions * facts.vocabulary * 3 * FP32  # their softmax, and the noise they are drawn with
        cache = _cache_bytes(facts, one.config, rollout, value)
        moments["rollout"] = before | {"KV cache": cache, "head": logits}
    return moments


def _notes(facts: ModelFacts, config: RunConfig, gpus: int) -> tuple[str, ...]:
    notes = []
    if facts.experts:
        notes.append(
            f"{facts.name} is a mixture of experts, which Lensmith plans and does not train yet; its experts stay in 16 bits, "
            "because bitsandbytes quantises linears only."
        )
    if facts.four_bits and config.tune.method != "qlora":
        notes.append(
            f"{config.model} is stored in 4 bits already, and these are the figures for 16: plan with tune.method=qlora, "
            "which such a checkpoint amounts to."
        )
    if gpus > 1:
        notes.append(
            f"On paper, FSDP2 over {gpus} GPUs: layers, tower, adapters, gradients and optimizer states are sharded; "
            "embedding, head, activations and two whole layers passing by are not. Lensmith itself trains by copies (DDP)."
        )
    if config.tune.dora or config.tune.dropout:
        notes.append(
            "Adapter dropout and DoRA take PEFT's own way, whose memory is an estimate that no run has confirmed."
        )
    return tuple(notes)
