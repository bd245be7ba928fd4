"""Checkpoints of the true architectures with random weights: tensors drawn when they are asked for, nothing on disk.

Speed and memory are those of trained weights. `write_shell` makes a folder with everything of a checkpoint but weights,
`write_checkpoint` one with weights, for what has to read a file.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensmith.model.names import read_architecture
from lensmith.model.stream import SINGLE

INITIAL_STD = 0.02
BLOCK = 2**25
"""Numbers drawn for a file."""


class RandomShards:
    """Every weight of a model, normal with the usual deviation (norms near one), drawn on the device."""

    def __init__(self, architecture: Any, device: torch.device) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(architecture)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._device = device

    def names(self) -> Iterable[str]:
        return self.shapes

    def get(self, name: str) -> Tensor:
        shape = self.shapes[name]
        # The same numbers each time it is asked for, so that a model in memory can be compared with one on disk.
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        drawn.normal_(std=INITIAL_STD, generator=generator)
        return drawn.add_(1) if "norm" in name and name.endswith("weight") else drawn


def write_shell(kit: Path, size: str, folder: Path) -> Path:
    """config.json, tokenizer and processor of a size, from the kit that knows the published architectures."""
    sys.path.insert(0, str(kit))
    from common import config, processor  # pyright: ignore[reportMissingImports]

    config(size).save_pretrained(folder)
    processor(str(kit / "qwen3-tokenizer.json.gz")).save_pretrained(folder)
    return folder


def write_checkpoint(kit: Path, size: str, folder: Path) -> Path:
    """A whole checkpoint, unless it is there already: 17.5 GB at 8B."""
    if not (folder / SINGLE).is_file():
        write_shell(kit, size, folder)
        write_weights(read_architecture(str(folder)), folder)
    return folder


def write_weights(architecture: Any, folder: Path) -> None:
    """All weights in one bf16 file, which repeat one block of random numbers: it costs no more than writing them."""
    shapes = RandomShards(architecture, torch.device("cpu")).shapes
    header, stop = {}, 0
    for name, shape in shapes.items():
        start, stop = stop, stop + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    drawn = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(INITIAL_STD)
    blocks = {near: (drawn + near).bfloat16().view(torch.uint8).numpy().data for near in (0, 1)}
    partial = folder / f"{SINGLE}.partial"
    with partial.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            block, left = blocks["norm" in name and name.endswith("weight")], 2 * shape.numel()
            while left:
                left -= out.write(block[: min(left, len(block))])
    partial.rename(folder / SINGLE)
