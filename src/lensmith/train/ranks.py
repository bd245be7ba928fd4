"""Which process this is, as torchrun says it; alone without torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from lensmith.errors import ModelError


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def speaker(say: Callable[[Any], None] | None) -> Callable[[Any], None]:
    """One process speaks for all."""
    return say if say is not None and rank() == 0 else lambda _: None


def refuse_data_parallel() -> None:
    """Raises ModelError where transformers would fall into nn.DataParallel: several GPUs, one process."""
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ:
        raise ModelError(
            f"{torch.cuda.device_count()} GPUs are visible to one process, which transformers would train with "
            "nn.DataParallel; packs cannot be scattered like that. Use all of them with `torchrun --nproc-per-node="
            f"{torch.cuda.device_count()} -m lensmith train ...`, or one with CUDA_VISIBLE_DEVICES=0."
        )
