"""All weights of a model in training as another engine takes them: under the checkpoint's names, whole, adapters added.

TRL's own way merges adapters in place and takes them out again: in bf16 (W + BA) - BA is not W, so that frozen weights would
drift a little with every step, and weights in 4 bits would be rounded anew. Here each merged weight is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lensmith.model.adapters import weight_dtype
from lensmith.model.components import is_adapter, plain_name
from lensmith.model.quant import dense_weight, is_four_bit

WRAPPED = ".base_layer.weight"
"""How the name of a weight ends that PEFT has put an adapter around."""


@torch.no_grad()
def merged_tensors(model: nn.Module, place: torch.device) -> Generator[tuple[str, Tensor], None, None]:
    """Name and values of each weight, on `place`, one at a time; nothing of the model is changed."""
    dtype = weight_dtype(model)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        values = _whole(owner, dtype) if name.endswith(".weight") else parameter.detach()
        if name.endswith(WRAPPED):
            layer = model.get_submodule(name.removesuffix(WRAPPED))
            assert isinstance(layer, LoraLayer), f"{name} is inside a {type(layer).__name__}"
            values = _merged(values, layer)
        yield plain_name(name), values.to(place)


def _whole(owner: Any, dtype: torch.dtype) -> Tensor:
    """The weight of a module, widened where it is stored in 4 bits."""
    if is_four_bit(owner):
        return dense_weight(owner, dtype).clone()  # the buffer is the next one's; a server is sent several at a time
    return owner.weight.detach()


def _merged(base: Float[Tensor, "outputs inputs"], layer: Any) -> Float[Tensor, "outputs inputs"]:
    """W + scale B A for the adapters in use, summed in fp32 at least."""
    wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    for name in layer.active_adapters:
        if name in layer.lora_A and not layer.disable_adapters:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            wide.addmm_(up.to(wide), down.to(wide), alpha=layer.scaling[name])
    return wide.to(base.dtype)
