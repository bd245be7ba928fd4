"""Where the weights live: each part of a loaded model at the place that the settings name, once and for all.

On the device: whatever trains, norms, and all that is not named below. In host memory, if asked: the input embedding, the
language head, the image tower, the first decoder layers. Only frozen weights can live there, and each choice says what it
saves and what it costs. Values do not change: a model with every part in host memory computes the same numbers
(tests/reference/test_residence.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lensmith.config.tree import Memory
from lensmith.errors import ConfigError
from lensmith.model.hosted import Hosted, HostEmbedding, HostHead, Visitors, pin
from lensmith.model.quant import FewBitHead, is_four_bit
from lensmith.model.recompute import HostBuffers

if TYPE_CHECKING:
    from lensmith.model.engine import Engine

GIB = 2**30


def let_segments_grow() -> None:
    """Have torch's CUDA memory in segments that grow, from here on; without CUDA nothing.

    Packs differ in length from step to step; fixed segments would leave gaps that no other length fits (W1 without
    recomputation: 109 GiB reserved for 43 in use).
    """
    if torch.cuda.is_available():
        # torch.cuda.memory._set_allocator_settings, by the name that its own warning asks for.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def settle_weights(model: Engine, memory: Memory, device: torch.device) -> tuple[str, ...]:
    """Move parts of a frozen, loaded model as `memory` says; returns what to tell the user.

    Before anything is made trainable: `check_frozen` refuses afterwards what trains and lives elsewhere.

    Raises ConfigError where a setting would save nothing, because two weights are one.
    """
    settle_inputs(model, memory, device)
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    told = []
    if memory.head_bits != 16:
        told.append(_narrow_head(model, memory, tied=tied))
    if memory.head == "host" or (tied and memory.embedding == "host" and memory.head_bits == 16):
        told.append(_host_head(model, memory, device, tied=tied))
    if memory.embedding == "host":
        told.append(_host_embedding(model, device))
    if memory.tower == "host":
        told.append(_host_tower(model, device))
    if memory.stream_layers:
        told.append(_host_layers(model, memory, device))
    model.stays = bool(told)
    return tuple(told)


def settle_inputs(model: Engine, memory: Memory, device: torch.device) -> None:
    """Which layers run again, and where their inputs wait meanwhile; unlike places of weights, this may change later."""
    model.recompute = memory.recompute
    model.host_buffers = HostBuffers(device) if memory.offload == "inputs" else None


def check_frozen(model: nn.Module) -> None:
    """Raise ConfigError where a weight trains that lives in host memory."""
    places = {parameter.device.type for parameter in model.parameters() if parameter.requires_grad}
    if len(places) > 1:
        name = next(n for n, p in model.named_parameters() if p.requires_grad and p.device.type == "cpu")
        raise ConfigError(
            f"{name} trains, and memory settings keep it in host memory; only frozen weights can live there. "
            "Set memory.embedding, memory.head and memory.tower to gpu and memory.stream_layers to 0 for what trains."
        )


def _host_embedding(model: Any, device: torch.device) -> str:
    decoder = model.model.language_model
    size = decoder.embed_tokens.weight.nbytes
    pin(decoder.embed_tokens.weight)
    decoder.embed_tokens = HostEmbedding.of(decoder.embed_tokens, device)
    return (
        f"The input embedding lives in host memory: {size / GIB:.2f} GiB less on the GPU; each pack fetches its rows."
    )


def _host_head(model: Any, memory: Memory, device: torch.device, *, tied: bool) -> str:
    weight = model.lm_head.weight
    if tied and memory.embedding == "gpu":
        raise ConfigError(
            "memory.head=host, memory.embedding=gpu: in this model the two are one weight, so nothing would be saved. "
            "Set memory.embedding=host as well, or memory.head=gpu."
        )
    pin(weight)
    model.lm_head = HostHead(weight, device)
    what = "The language head, which is the input embedding in this model," if tied else "The language head"
    return f"{what} lives in host memory: {weight.nbytes / GIB:.2f} GiB cross to the GPU once per pack."


def _narrow_head(model: Any, memory: Memory, *, tied: bool) -> str:
    if tied and memory.embedding == "gpu":
        raise ConfigError(
            f"memory.head_bits={memory.head_bits}, memory.embedding=gpu: in this model head and embedding are one weight, "
            "so a second copy in few bits would only add to it. Set memory.embedding=host, or memory.head_bits=16."
        )
    if memory.head == "host":
        raise ConfigError(
            f"memory.head_bits={memory.head_bits}, memory.head=host: a head in few bits stays on the GPU. Set one of the two."
        )
    assert memory.head_bits != 16, "asked for by the caller"
    before = model.lm_head.weight.nbytes
    model.lm_head = FewBitHead(model.lm_head.weight.detach(), memory.head_bits)
    return (
        f"The language head is stored in {memory.head_bits} bits: {before * memory.head_bits / 16 / GIB:.2f} GiB "
        f"instead of {before / GIB:.2f}; docs/memory.md has the error."
    )


def _host_tower(model: Engine, device: torch.device) -> str:
    """Each block with the deepstack merger behind it, and the last merger; patch and position embedding stay."""
    tower: Any = model.model.visual
    owners: list[list[nn.Module]] = [[block] for block in tower.blocks]
    for merger, index in zip(tower.deepstack_merger_list, tower.deepstack_visual_indexes, strict=True):
        owners[index].append(merger)
    owners.append([tower.merger])
    tower.visitors = _visitors(owners, device)
    size = sum(group.nbytes for group in tower.visitors.groups)
    return f"The image tower lives in host memory: {size / GIB:.2f} GiB cross to the GPU once per pack, block by block."


def _host_layers(model: Engine, memory: Memory, device: torch.device) -> str:
    layers: Any = model.model.language_model.layers
    count = min(memory.stream_layers, len(layers))
    if memory.recompute == "none" or (memory.recompute != "layers" and memory.recompute < count):
        raise ConfigError(
            f"memory.stream_layers={memory.stream_layers}, memory.recompute={memory.recompute}: a layer whose weights come and "
            "go has to run again in the backward pass. Set memory.recompute=layers, or stream no more layers than it names."
        )
    model.visitors = _visitors([[layer] for layer in layers[:count]], device)
    size = sum(group.nbytes for group in model.visitors.groups)
    return (
        f"{count} of {len(layers)} decoder layers live in host memory: {size / GIB:.2f} GiB less two layers on the GPU; "
        "they cross twice per pack, while the layer before computes."
    )


def _visitors(owners: Sequence[Sequence[nn.Module]], device: torch.device) -> Visitors:
    """One group per entry; a module that runs on its own, as in generation, fetches its group first."""
    groups = [Hosted([t for module in modules for t in _frozen_tensors(module, device)], device) for modules in owners]
    visitors = Visitors(groups, device)
    for index, modules in enumerate(owners):
        for module in modules:
            module.register_forward_pre_hook(lambda *_, index=index: visitors.bring(index, index + 1))
    return visitors


def _frozen_tensors(module: nn.Module, device: torch.device) -> list[Tensor]:
    """All weights of a module, with what belongs to its 4-bit ones: scales and the scales of scales.

    The few numbers that codes stand for are the same for all; they stay on the device.
    """
    tensors: list[Tensor] = list(module.parameters())
    for linear in module.modules():
        if isinstance(linear, nn.Linear) and is_four_bit(linear):
            weight: Any = linear.weight
            state = weight.quant_state
            state.code = state.code.to(device)
            tensors.append(state.absmax)
            if state.nested:
                state.state2.code = state.state2.code.to(device)
                tensors += [state.state2.absmax, state.offset]
    return tensors
