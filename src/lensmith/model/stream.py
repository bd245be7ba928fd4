"""Weights from disk to where they live, tensor by tensor: never a second copy of the model, on the GPU or in host memory.

Files are memory-mapped, so that their pages are the system's cache and not ours; a tensor that goes to the GPU crosses
once, and one that is stored in few bits is quantised there, next to nothing but itself. transformers' own loader keeps
several tensors in flight and knows no weights that stay in host memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lensmith.config.tree import Memory
from lensmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, Qwen3VLConfig

    from lensmith.model.engine import Engine

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Shards(Protocol):
    """Tensors by name."""

    def names(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor: ...


class FileShards:
    """The safetensors files of a folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError where there are none, or where the index names a file that is not there."""
        from safetensors import safe_open

        if (folder / INDEX).is_file():
            places: Mapping[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SINGLE).is_file():
            places = {}
        else:
            raise ModelError(
                f"model={folder}: neither {SINGLE} nor {INDEX} in it. Copy model.safetensors, or all of its numbered "
                "parts and their index, into the folder."
            )
        files = sorted(set(places.values())) or [SINGLE]
        if absent := [name for name in files if not (folder / name).is_file()]:
            raise ModelError(
                f"model={folder}: its index names {len(files)} files and {absent[0]} is not there. "
                "Copy model.safetensors, or all of its numbered parts and their index, into the folder."
            )
        self._handles: dict[str, Any] = {}
        for file in files:
            handle = safe_open(str(folder / file), framework="pt", device="cpu")
            self._handles |= dict.fromkeys(handle.keys(), handle)

    def names(self) -> Iterable[str]:
        return self._handles

    def get(self, name: str) -> Tensor:
        return self._handles[name].get_tensor(name)


@dataclass(frozen=True, slots=True)
class Streamed:
    """A filled model, and what did not fit."""

    model: Engine
    missing: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """Name, shape in the file, shape by the configuration."""


def stream_weights(
    architecture: Qwen3VLConfig,
    shards: Shards,
    *,
    device: torch.device,
    dtype: torch.dtype,
    quant: BitsAndBytesConfig | None,
    memory: Memory,
) -> Streamed:
    """A model with this architecture and these weights; those that `memory` keeps in host memory never leave it.

    `quant`: how to store linears in few bits; None for a checkpoint that is stored so already, or not at all.
    """
    model, quantizer = _skeleton(architecture, dtype, device, quant)
    stays_home = _homes(memory, tied=architecture.tie_word_embeddings)
    stored, mismatched = set(shards.names()), []
    missing = []
    for name, parameter in list(model.named_parameters()):
        if name not in stored:
            missing.append(name)
            continue
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        tensor = shards.get(name)
        filled: Any = None
        if quantizer is not None and quantizer.param_needs_quantization(model, name):
            filled = _few_bits(module, parameter, name, tensor, shards, stored, device, dtype)
            if filled is not None and stays_home(name):
                filled = filled.to("cpu")
        elif tensor.shape == parameter.shape:
            place = torch.device("cpu") if stays_home(name) else device
            filled = nn.Parameter(tensor.to(place, dtype), requires_grad=parameter.requires_grad)
        if filled is None:
            mismatched.append((name, tuple(tensor.shape), tuple(parameter.shape)))
        else:
            module._parameters[leaf] = filled
    if architecture.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    if not missing and not mismatched:
        _finish(model, quantizer, device)
    return Streamed(model, tuple(missing), tuple(mismatched))


def _skeleton(
    architecture: Qwen3VLConfig, dtype: torch.dtype, device: torch.device, quant: BitsAndBytesConfig | None
) -> tuple[Engine, Any]:
    """The model without weights, its linears exchanged for those in few bits, and transformers' quantizer, if any."""
    from accelerate import init_empty_weights
    from transformers.quantizers.auto import AutoHfQuantizer

    from lensmith.model.engine import Engine

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            model = Engine(architecture)
    finally:
        torch.set_default_dtype(before)
    stored = getattr(architecture, "quantization_config", None)
    if quant is None and stored is None:
        return model, None
    settings: Any = stored if quant is None else quant
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=quant is None)
    quantizer.validate_environment(device_map={"": device})
    quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": device})
    return model, quantizer


def _few_bits(
    module: Any,
    parameter: Any,
    name: str,
    tensor: Tensor,
    shards: Shards,
    stored: set[str],
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Parameter | None:
    """The weight of a 4- or 8-bit linear, quantised on the device or as stored; None where its shape is wrong."""
    from bitsandbytes.nn import modules

    kinds: Any = modules  # bitsandbytes' own annotations call these modules; they are parameters
    if isinstance(parameter, kinds.Int8Params):
        if tuple(tensor.shape) != tuple(parameter.shape):
            return None
        return kinds.Int8Params(tensor.to(dtype), requires_grad=False, has_fp16_weights=False).to(device)
    if parts := {key.removeprefix(f"{name}."): shards.get(key) for key in stored if key.startswith(f"{name}.")}:
        return kinds.Params4bit.from_prequantized(tensor, parts, device=device, module=module)
    if tuple(tensor.shape) != (module.out_features, module.in_features):
        return None
    fresh = kinds.Params4bit(
        tensor.to(dtype),
        compress_statistics=parameter.compress_statistics,
        quant_type=parameter.quant_type,
        quant_storage=parameter.quant_storage,
        module=module,
    )
    return fresh.to(device)


def _homes(memory: Memory, *, tied: bool) -> Callable[[str], bool]:
    """Which weights stay in host memory, by name; must agree with lensmith.model.residence, which then places them."""
    prefixes = []
    if memory.embedding == "host":
        prefixes.append("model.language_model.embed_tokens.")
    if memory.head == "host" and not tied:
        prefixes.append("lm_head.")
    if memory.tower == "host":
        prefixes += [f"model.visual.{part}." for part in ("blocks", "merger", "deepstack_merger_list")]
    prefixes += [f"model.language_model.layers.{index}." for index in range(memory.stream_layers)]
    return lambda name: name.startswith(tuple(prefixes)) if prefixes else False


def _finish(model: Engine, quantizer: Any, device: torch.device) -> None:
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    if quantizer is not None:
        model.hf_quantizer = quantizer  # pyright: ignore[reportAttributeAccessIssue]
        quantizer.postprocess_model(model)
    model.eval()
