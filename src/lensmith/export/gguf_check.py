"""Whether a GGUF file holds the merged model: how many tensors, of which architecture, and the numbers in one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lensmith.errors import RunError
from lensmith.export.base import weight_files
from lensmith.export.tensors import TensorFile
from lensmith.export.whole import size

LANGUAGE, PROJECTOR = "qwen3vl", "clip"
"""general.architecture of the two files."""
TOWER = "model.visual."
SAMPLE = "model.language_model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight"
TOWER_SAMPLE = "model.visual.blocks.0.attn.proj.weight", "v.blk.0.attn_out.weight"
LARGEST_ERROR = 0.25
"""Relative, of the sampled tensor: q2_k's is about 0.2, another model's above 1."""


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """One GGUF file, read back."""

    name: str
    nbytes: int
    tensors: int
    types: tuple[str, ...]
    error: float
    """|in the file - merged| / |merged| of one linear, as Frobenius norms."""

    @property
    def sentence(self) -> str:
        return (
            f"{self.name}: {size(self.nbytes)}, {self.tensors} tensors ({', '.join(self.types)}); one linear, "
            f"read back, is within {self.error:.2%} of the merged one."
        )


def check_language(file: Path, model: Path) -> CheckedFile:
    """The file of the decoder against the merged model in `model`. Raises RunError where they differ."""
    expected = sum(not name.startswith(TOWER) for found in weight_files(model) for name in found.names)
    return _check(file, model, LANGUAGE, expected, SAMPLE)


def check_projector(file: Path, model: Path) -> CheckedFile:
    """The file of the image tower and its mergers; the converter cuts the patch embedding in two, one per frame."""
    expected = sum(name.startswith(TOWER) for found in weight_files(model) for name in found.names) + 1
    return _check(file, model, PROJECTOR, expected, TOWER_SAMPLE)


def _check(file: Path, model: Path, architecture: str, expected: int, sample: tuple[str, str]) -> CheckedFile:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    field = reader.get_field("general.architecture")
    found = field.contents() if field else "none"
    if found != architecture or len(tensors) < expected or sample[1] not in tensors:
        raise RunError(
            f"{file.name}: read back, it is of architecture {found} with {len(tensors)} tensors, where {architecture} with "
            f"{expected} and {sample[1]} among them were expected. llama.cpp's converter may be too old: update it."
        )
    error = _error(tensors[sample[1]], _whole(model, sample[0]))
    if not error < LARGEST_ERROR:
        raise RunError(
            f"{file.name}: {sample[1]}, read back, differs from the merged {sample[0]} by {error:.0%}, more than "
            f"{LARGEST_ERROR:.0%}. The file is not this model; please report it with llama.cpp's version."
        )
    types = tuple(sorted({tensor.tensor_type.name for tensor in tensors.values()}))
    return CheckedFile(file.name, file.stat().st_size, len(tensors), types, error)


def _error(stored: Any, merged: torch.Tensor) -> float:
    from gguf.quants import dequantize

    values = np.asarray(dequantize(stored.data, stored.tensor_type), dtype=np.float64).reshape(merged.shape)
    expected = merged.double().numpy()
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def _whole(model: Path, name: str) -> torch.Tensor:
    file: TensorFile = next(file for file in weight_files(model) if name in file.names)
    return file.whole(name)
