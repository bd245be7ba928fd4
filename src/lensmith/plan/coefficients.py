"""What arithmetic cannot know, in one place: how far formulas are from measurements, fitted by tools/fit_plan.py.

Shares are 1 where the formula is taken as it stands. The values, when and on what they were fitted, and the errors on
the half of the grid that the fit has not seen are in coefficients.json beside this file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Multipliers and constants of memory and time."""

    # Memory
    kept_activations: float = 1.0
    """Of what recorded layers keep, and of the inputs of recomputed ones."""
    live_layer: float = 1.0
    """Of the layer whose backward pass runs."""
    tower: float = 1.0
    """Of the image tower's activations."""
    head: float = 1.0
    """Of what reading the head takes."""
    fragmentation_gib: float = 0.25
    """Reserved beyond what is in use, in any run: library workspaces and gaps."""
    fragmentation_share: float = 0.01
    """The same, per GiB of activations."""
    # Time
    matmul: float = 0.55
    """Share of the card's bf16 rate that the decoder's products reach."""
    tower_matmul: float = 0.35
    """The same for the tower, whose products are narrower."""
    bandwidth: float = 0.7
    """Share of the card's memory bandwidth."""
    pcie: float = 0.75
    """Share of the bus."""
    layer_launch_ms: float = 1.0
    """The least time of one decoder layer in one direction: its kernels have to be given to the GPU one by one."""
    few_bit_launch_ms: float = 0.2
    """The same, on top, where a layer's linears are widened first."""
    tower_launch_ms: float = 0.4
    """The least time of one block of the image tower in one direction."""
    update_launch_ms: float = 1.0
    """The least time of an update by lensmith.train.rounded: of a weight, or of a piece of a large one."""

    decode: float = 0.203
    """Share of the card's memory bandwidth that one token of the built-in rollout reaches, with its CUDA graph."""
    rollout_start_s: float = 0.3
    """The first steps of a rollout, which run without a graph, and capturing it. Both from the two shapes of
    grpo-w2-8b.json and grpo-long-8b.json (8B, H100): 256 tokens in 2.33 s, 64 in 0.84."""


@cache
def load_coefficients() -> Coefficients:
    """The fitted values that ship."""
    text = resources.files("lensmith.plan").joinpath("coefficients.json").read_text(encoding="utf-8")
    return Coefficients(**json.loads(text)["values"])
