"""The shapes of a Qwen3-VL and what they add up to: parameters by component, as plain integers.

2B, 4B, 8B, 32B and 30B-A3B are written down here, so that a plan needs no download; any local config.json is read as
JSON. tests/reference/test_plan_counts.py builds each on torch's meta device and compares every sum.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from lensmith.errors import ModelError

TINY = "lensmith/tiny"
VOCABULARY = 151_936
HEAD_WIDTH = 128
CHANNELS = 3

Shape = tuple[int, int]
"""Inputs and outputs of a linear."""


@dataclass(frozen=True, slots=True)
class TowerFacts:
    """The image tower with its mergers."""

    depth: int
    width: int
    mlp_width: int
    heads: int
    out_width: int
    """The decoder's width."""
    levels: int
    """Deepstack mergers, besides the last one."""
    positions: int = 2304
    patch_px: int = 16
    frames: int = 2
    merge: int = 2

    @property
    def patch_values(self) -> int:
        """Numbers per patch: channels x frames x patch x patch."""
        return CHANNELS * self.frames * self.patch_px**2

    @property
    def patches_per_token(self) -> int:
        return self.merge**2

    @property
    def block_linears(self) -> tuple[Shape, ...]:
        """qkv, output, and the two of the MLP."""
        return (
            (self.width, 3 * self.width),
            (self.width, self.width),
            (self.width, self.mlp_width),
            (self.mlp_width, self.width),
        )

    @property
    def merger_linears(self) -> tuple[Shape, ...]:
        """The two of one merger, which reads all patches of a token side by side."""
        joined = self.patches_per_token * self.width
        return (joined, joined), (joined, self.out_width)

    @property
    def block(self) -> int:
        """Parameters of one block: linears with biases and two norms with scale and shift."""
        return sum(weights + outputs for weights, outputs in _sizes(self.block_linears)) + 4 * self.width

    @property
    def embeddings(self) -> int:
        """Parameters in front of the blocks: patches to vectors, and positions."""
        return self.patch_values * self.width + self.width + self.positions * self.width

    @property
    def merger(self) -> int:
        """Parameters of one merger without its norm."""
        return sum(weights + outputs for weights, outputs in _sizes(self.merger_linears))

    @property
    def mergers(self) -> int:
        """Parameters of all mergers; the last one normalises single patches, the deepstack ones whole tokens."""
        return (self.levels + 1) * self.merger + 2 * self.width * (1 + self.levels * self.patches_per_token)

    @property
    def num_parameters(self) -> int:
        """Of the tower without its mergers."""
        return self.depth * self.block + self.embeddings


@dataclass(frozen=True, slots=True)
class Experts:
    """The MLPs of a mixture: how many there are in a layer, how many serve a token, how wide each is."""

    count: int
    used: int
    width: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model; `mlp_width` is 0 where experts take the MLP's place."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    tied: bool
    """Whether the head is the input embedding."""
    tower: TowerFacts
    vocabulary: int = VOCABULARY
    head_width: int = HEAD_WIDTH
    experts: Experts | None = None
    four_bits: bool = False
    """Whether the checkpoint is stored in 4 bits already, whatever the method."""

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def attention_linears(self) -> tuple[Shape, ...]:
        """q, k, v and o of one layer."""
        query, key = (self.width, self.query_width), (self.width, self.key_width)
        return query, key, key, (self.query_width, self.width)

    @property
    def mlp_linears(self) -> tuple[Shape, ...]:
        """gate, up and down of one layer; none where experts take their place, which are no linears to PEFT."""
        if self.experts:
            return ()
        return (self.width, self.mlp_width), (self.width, self.mlp_width), (self.mlp_width, self.width)

    @property
    def layer_linears(self) -> tuple[Shape, ...]:
        return self.attention_linears + self.mlp_linears

    @property
    def layer_experts(self) -> int:
        """Parameters of one layer's experts."""
        return 3 * self.width * self.experts.width * self.experts.count if self.experts else 0

    @property
    def layer_norms(self) -> int:
        """Parameters of one layer that no method quantises: four norms, and the router of a mixture."""
        router = self.experts.count * self.width if self.experts else 0
        return 2 * self.width + 2 * self.head_width + router

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer."""
        return sum(weights for weights, _ in _sizes(self.layer_linears)) + self.layer_experts + self.layer_norms

    @property
    def layer_active(self) -> int:
        """Weights of one layer that one token is multiplied with."""
        active = sum(weights for weights, _ in _sizes(self.layer_linears))
        if self.experts:
            active += self.experts.used * 3 * self.width * self.experts.width + self.experts.count * self.width
        return active

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding; the head has as many."""
        return self.vocabulary * self.width

    @property
    def head(self) -> int:
        """Parameters of a head of its own."""
        return 0 if self.tied else self.embedding

    @property
    def num_parameters(self) -> int:
        decoder = self.layers * self.layer + self.embedding + self.width
        return decoder + self.head + self.tower.num_parameters + self.tower.mergers


def _sizes(linears: tuple[Shape, ...]) -> list[tuple[int, int]]:
    """Weights and outputs (so, biases) of each linear."""
    return [(inputs * outputs, outputs) for inputs, outputs in linears]


def _small_tower(width: int) -> TowerFacts:
    return TowerFacts(depth=24, width=1024, mlp_width=4096, heads=16, out_width=width, levels=3)


def _large_tower(width: int) -> TowerFacts:
    return TowerFacts(depth=27, width=1152, mlp_width=4304, heads=16, out_width=width, levels=3)


SIZES: dict[str, ModelFacts] = {
    # config.json of Qwen/Qwen3-VL-<size>-Instruct; Thinking has the same shapes.
    "2B": ModelFacts("2B", 28, 2048, 16, 8, 6144, tied=True, tower=_small_tower(2048)),
    "4B": ModelFacts("4B", 36, 2560, 32, 8, 9728, tied=True, tower=_small_tower(2560)),
    "8B": ModelFacts("8B", 36, 4096, 32, 8, 12288, tied=False, tower=_large_tower(4096)),
    "30B-A3B": ModelFacts(
        "30B-A3B", 48, 2048, 32, 4, 0, tied=False, tower=_large_tower(2048), experts=Experts(128, 8, 768)
    ),
    "32B": ModelFacts("32B", 64, 5120, 64, 8, 25600, tied=False, tower=_large_tower(5120)),
}
"""Shapes by size, smallest first."""
_SIZE = re.compile(rf"(?:^|[-/_])({'|'.join(SIZES)})(?:$|[-_])", re.IGNORECASE)


def read_facts(model: str) -> ModelFacts:
    """Shapes of a model: a size such as `8b`, a hub name with a size in it, lensmith/tiny, or a local folder.

    Raises ModelError for a name without a size, and for a folder without a readable config.json of a Qwen3-VL.
    """
    if model == TINY:
        return _from_folder(Path(str(resources.files("lensmith.model") / "tiny")), TINY)
    if (folder := Path(model).expanduser()).is_dir():
        return _from_folder(folder, model)
    if found := _SIZE.search(model):
        return replace(SIZES[found[1].upper()], four_bits="bnb-4bit" in model)
    raise ModelError(
        f"model={model}: no folder of that name, and no size in it that Qwen3-VL has ({', '.join(SIZES)}). "
        "Give one of these, a hub name such as Qwen/Qwen3-VL-8B-Instruct, or a folder with a config.json."
    )


def _from_folder(folder: Path, name: str) -> ModelFacts:
    file = folder / "config.json"
    try:
        return facts_from_config(json.loads(file.read_text(encoding="utf-8")), name)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise ModelError(f"model={name}: {file} cannot be read ({cause}). Give a folder that holds a model.") from cause
    except KeyError as cause:
        raise ModelError(
            f"model={name}: {file} has no {cause}, so it is not the config of a Qwen3-VL. "
            f"Give the folder of one, or a size: {', '.join(SIZES)}."
        ) from cause


def facts_from_config(config: dict[str, Any], name: str) -> ModelFacts:
    """Shapes from a parsed config.json. Raises KeyError for one that is not of a Qwen3-VL."""
    text, vision = config["text_config"], config["vision_config"]
    experts = None
    # transformers writes its own name for what Qwen's file calls num_experts.
    if count := text.get("num_experts") or text.get("num_local_experts"):
        experts = Experts(count, text["num_experts_per_tok"], text["moe_intermediate_size"])
    heads = text["num_attention_heads"]
    return ModelFacts(
        name,
        layers=text["num_hidden_layers"],
        width=text["hidden_size"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        mlp_width=0 if experts else text["intermediate_size"],
        tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        tower=TowerFacts(
            depth=vision["depth"],
            width=vision["hidden_size"],
            mlp_width=vision["intermediate_size"],
            heads=vision["num_heads"],
            out_width=vision["out_hidden_size"],
            levels=len(vision["deepstack_visual_indexes"]),
            positions=vision["num_position_embeddings"],
            patch_px=vision["patch_size"],
            frames=vision["temporal_patch_size"],
            merge=vision["spatial_merge_size"],
        ),
        vocabulary=text["vocab_size"],
        head_width=text.get("head_dim") or text["hidden_size"] // heads,
        experts=experts,
        four_bits=bool(config.get("quantization_config", {}).get("load_in_4bit")),
    )
