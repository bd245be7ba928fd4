"""Checkpoints of the true architectures with random weights: tensors drawn when they are asked for, nothing on disk.

Speed and memory are those of trained weights. `write_shell` makes a folder with everything of a checkpoint but weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INITIAL_STD = 0.02


class RandomShards:
    """Every weight of a model, normal with the usual deviation (norms near one), drawn on the device."""

    def __init__(self, architecture: Any, device: torch.device) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(architecture)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._device = device

    def names(self) -> Iterable[str]:
        return self._shapes

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self._device).normal_(std=INITIAL_STD)
        return drawn.add_(1) if "norm" in name and name.endswith("weight") else drawn


def write_shell(kit: Path, size: str, folder: Path) -> Path:
    """config.json, tokenizer and processor of a size, from the kit that knows the published architectures."""
    sys.path.insert(0, str(kit))
    from common import config, processor  # pyright: ignore[reportMissingImports]

    config(size).save_pretrained(folder)
    processor(str(kit / "qwen3-tokenizer.json.gz")).save_pretrained(folder)
    return folder
