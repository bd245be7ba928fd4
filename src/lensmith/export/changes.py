"""What training did to each tensor of the base, ready to be applied to some of its rows.

LoRA adds scale * B @ A, with scale alpha / rank or, for rsLoRA, alpha / sqrt(rank) (arXiv:2106.09685, arXiv:2312.03732);
DoRA then gives each row the learned length (arXiv:2402.09353, equation 5); a tensor trained itself takes the base's place.
All of it goes row by row, so that no matrix is ever widened to fp32 as a whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lensmith.errors import ModelError
from lensmith.export.tensors import Rows, TensorFile, piece_of
from lensmith.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS
from lensmith.model.components import PEFT_PREFIX

Kind = Literal["lora", "dora", "trained"]

MAGNITUDE = ".lora_magnitude_vector"
_UNSUPPORTED = (
    "modules_to_save",
    "alpha_pattern",
    "rank_pattern",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
)
"""Fields of PEFT's LoraConfig that change what merging means; Lensmith's own adapters leave them unset."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scale * B @ A, its rows then given the lengths in `magnitude`, where there is one."""

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]
    scale: float
    magnitude: Float[Tensor, " outputs"] | None

    @property
    def kind(self) -> Kind:
        return "lora" if self.magnitude is None else "dora"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    def apply(self, base: Float[Tensor, "rows inputs"], rows: slice) -> Float[Tensor, "rows inputs"]:
        """Those rows of the merged weight, in the type of `base`: fp32 at least."""
        merged = torch.addmm(base, self.up[rows].to(base.dtype), self.down.to(base.dtype), alpha=self.scale)
        if self.magnitude is None:
            return merged
        lengths = torch.linalg.vector_norm(merged, dim=1)
        return merged * (self.magnitude[rows].to(base.dtype) / lengths)[:, None]


@dataclass(frozen=True, slots=True)
class Replacement:
    """The tensor as it was trained."""

    rows: Rows
    shape: tuple[int, ...]
    kind: Kind = "trained"

    def apply(self, base: Tensor, rows: slice) -> Tensor:
        return piece_of(self.rows, rows).to(base.dtype)


@dataclass(frozen=True, slots=True)
class OnTop:
    """An adapter on a tensor that an earlier run had trained itself."""

    earlier: Replacement
    own: LowRank

    @property
    def kind(self) -> Kind:
        return self.own.kind

    @property
    def shape(self) -> tuple[int, ...]:
        return self.own.shape

    def apply(self, base: Tensor, rows: slice) -> Tensor:
        return self.own.apply(self.earlier.apply(base, rows), rows)


Change = LowRank | Replacement | OnTop


def read_changes(tuned: Path) -> dict[str, Change]:
    """What a folder of tuned weights does to the base, by the base's tensor names.

    Raises ModelError for an adapter of another kind than LoRA and DoRA on linears.
    """
    adapted = _read_adapter(tuned) if (tuned / ADAPTER_CONFIG).is_file() else {}
    trained = _read_trained(tuned / TRAINED_WEIGHTS) if (tuned / TRAINED_WEIGHTS).is_file() else {}
    both = {name: OnTop(trained[name], adapted[name]) for name in trained.keys() & adapted.keys()}
    return {**adapted, **trained, **both}


def _read_trained(path: Path) -> dict[str, Replacement]:
    """The tensors of a `trained.safetensors`, read when their rows are asked for."""
    file = TensorFile(path)
    return {name: Replacement(file.rows(name), file.entry(name).shape) for name in file.names}


def _read_adapter(tuned: Path) -> dict[str, LowRank]:
    config = json.loads((tuned / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    _check_kind(tuned, config)
    file = TensorFile(tuned / ADAPTER_WEIGHTS)
    changes: dict[str, LowRank] = {}
    for key in file.names:
        module, mark, _ = key.partition(".lora_A.")
        if not mark:
            continue
        down, up = file.whole(key), file.whole(f"{module}.lora_B.weight")
        magnitude = file.whole(module + MAGNITUDE) if config.get("use_dora") else None
        rank = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
        changes[f"{module.removeprefix(PEFT_PREFIX)}.weight"] = LowRank(
            down, up, config["lora_alpha"] / rank, magnitude
        )
    read = sum(3 if change.kind == "dora" else 2 for change in changes.values())
    if read != len(file.names):
        strange = [key for key in file.names if ".lora_" not in key] or file.names
        raise ModelError(
            f"{tuned}: {len(file.names) - read} of its {len(file.names)} adapter tensors are neither A, B nor a "
            f"magnitude, first {strange[0]}. Give an adapter that Lensmith trained."
        )
    return changes


def _check_kind(tuned: Path, config: dict[str, Any]) -> None:
    found = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type {config.get('peft_type')}")
    if config.get("bias", "none") != "none":
        found.append(f"bias {config['bias']}")
    if found:
        raise ModelError(
            f"{tuned / ADAPTER_CONFIG}: has {', '.join(found)}, and Lensmith merges plain LoRA, rsLoRA and DoRA only. "
            "Merge it with the library that made it (PEFT: merge_and_unload)."
        )
