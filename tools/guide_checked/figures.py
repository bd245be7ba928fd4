"""The figures of docs/guide-checked: every one from a result file, from arithmetic on the model's shapes, or planned.

A figure has a name, by which the claims in *.yaml hold its place, the text that takes that place, and where it comes from.
So no number that we answer with is typed, and the two languages cannot differ.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.table import read_results
from packaging.version import Version

from lensmith.cli import main as run_verb
from lensmith.config.read import read_config
from lensmith.data.images import fit_px
from lensmith.plan.cards import CONTEXT_GIB, usable_gib
from lensmith.plan.facts import SIZES
from lensmith.plan.weights import trainable
from lensmith.types import VisionGeometry

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
FACTS = SIZES["8B"]
BF16 = 2

MOST_TOKENS, LEAST_TOKENS = 16_384, 64
"""Of one picture, as the checkpoints ship: longest_edge 16,777,216 and shortest_edge 65,536 square pixels in the
preprocessor_config.json of Qwen/Qwen3-VL-8B-Instruct, by 32 x 32 a token."""
CAP_TOKENS = read_config(None).data.image.max_tokens
GUIDE_TOKENS = 4096
"""The guide's max_seq_length."""
QWEN25_PATCH_PX, QWEN25_LEAST_TOKENS = 14, 4
"""preprocessor_config.json of Qwen/Qwen2.5-VL-7B-Instruct: patches of 14 px, at least 3,136 square pixels."""
PICTURES = {
    # Width and height in pixels.
    "224x224": (224, 224),
    "512x512": (512, 512),
    "640x480": (640, 480),
    "1024x1024": (1024, 1024),
    "1280x960": (1280, 960),
    "1191x1684": (1191, 1684),
    "1920x1080": (1920, 1080),
    "4000x3000": (4000, 3000),
}

FULL = "--model 8b --method full --pack-tokens 4096 --images 4 --image-tokens 700"
GRPO = "--model 8b --method qlora --task grpo --completion-tokens 1024 --images 1 --image-tokens 1024"
PLANS = {
    "text": "--model 8b --method qlora --pack-tokens 4096 --images 0 --gpu 40",
    "pictures": "--model 8b --method qlora --pack-tokens 4096 --images 2 --image-tokens 1280 --gpu 40",
    "two": "--model 8b --method qlora --pack-tokens 8192 --images 2 --image-tokens 1280 --gpu 40",
    "w2": (
        "optim.effective_samples=8 --model 8b --method qlora --task grpo --completion-tokens 256 --images 1 "
        "--image-tokens 1024 --group 4 --gpu 80"
    ),
    "group4": f"{GRPO} --group 4 --gpu 80",
    "group16": f"{GRPO} --group 16 --gpu 80",
    "apart16": f"{GRPO} --group 16 --no-share-prefix --gpu 80",
    "adamw": f"optim.name=adamw {FULL} --gpu 80",
    "adamw2": f"optim.name=adamw {FULL} --gpu 80 --gpus 2",
}
"""Name -> arguments of `lensmith plan`, in the order in which the page numbers them."""

LOW = "memory.offload=inputs memory.embedding=host memory.tower=host"
FULL_LOW = "tune.method=full memory.offload=inputs memory.tower=host"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Name -> result of many cases, and what picks one of them.
    "small": ("memory-grid", {"size": "8b", "tokens": 1024, "settings": "tune.method=qlora"}),
    "eight": ("memory-grid", {"size": "8b", "tokens": 6144, "settings": "tune.method=qlora"}),
    "kept": ("memory-grid", {"size": "8b", "tokens": 4096, "settings": "tune.method=qlora memory.recompute=none"}),
    "lora": ("memory-grid", {"size": "8b", "tokens": 2048, "settings": "tune.method=lora"}),
    "apart": ("memory-grid", {"size": "8b", "group": 1, "settings": "tune.method=qlora"}),
    "shared": ("memory-grid", {"size": "8b", "group": 4, "settings": "tune.method=qlora"}),
    "low_small": ("memory-grid", {"size": "8b", "tokens": 1024, "settings": f"tune.method=qlora {LOW}"}),
    "low_large": ("memory-grid", {"size": "8b", "tokens": 16384, "settings": f"tune.method=qlora {LOW}"}),
    "head": ("memory-grid", {"size": "8b", "settings": f"tune.method=qlora {LOW} memory.head=host"}),
    "kept4096": (
        "memory-grid-h200",
        {"size": "8b", "tokens": 4096, "settings": "tune.method=qlora memory.recompute=none"},
    ),
    "tower_frozen": ("memory-grid", {"size": "8b", "tokens": 4096, "settings": "tune.method=qlora"}),
    "tower_adapted": ("memory-grid", {"size": "8b", "settings": "tune.method=qlora tune.vision=adapted"}),
    "tower_trained": (
        "memory-grid",
        {"size": "8b", "settings": "tune.method=qlora tune.vision=trained tune.merger=trained"},
    ),
    "rung_none": ("memory-ladder", {"settings": "tune.method=qlora memory.recompute=none"}),
    "rung_layers": ("memory-ladder", {"settings": "tune.method=qlora memory.recompute=layers"}),
    "rung_inputs": ("memory-ladder", {"settings": "tune.method=qlora memory.recompute=layers memory.offload=inputs"}),
    "rung_embedding": (
        "memory-ladder",
        {"settings": "tune.method=qlora memory.recompute=layers memory.offload=inputs memory.embedding=host"},
    ),
    "rung_tower": ("memory-ladder", {"settings": f"tune.method=qlora memory.recompute=layers {LOW}"}),
    "full": ("memory-ladder", {"settings": FULL_LOW}),
    "full_backward": (
        "memory-ladder",
        {"settings": f"{FULL_LOW} optim.in_backward=true optim.max_grad_norm=null"},
    ),
    "full_paged": (
        "memory-ladder",
        {"settings": f"{FULL_LOW} optim.in_backward=true optim.max_grad_norm=null optim.name=paged_adamw_8bit"},
    ),
}
SINGLE: dict[str, tuple[str, str, str]] = {
    # Figure -> result, its key (dotted), how it is written.
    "one.gib": ("8b-qlora-1", "peak_reserved_gib", ".1f"),
    "one.s": ("8b-qlora-1", "value", ".4g"),
    "one.tokens": ("8b-qlora-1", "most_tokens", ",.0f"),
    "one4b.gib": ("4b-qlora-1", "peak_reserved_gib", ".1f"),
    "one2b.gib": ("2b-qlora-1", "peak_reserved_gib", ".1f"),
    "w1.gib": ("w1-8b-qlora-recompute-layers", "peak_reserved_gib", ".1f"),
    "w1.s": ("w1-8b-qlora-recompute-layers", "value", ".4g"),
    "w1_none.gib": ("w1-8b-qlora-recompute-none", "peak_reserved_gib", ".1f"),
    "w1_none.s": ("w1-8b-qlora-recompute-none", "value", ".4g"),
    "w1_low.gib": ("w1-8b-qlora-low", "peak_reserved_gib", ".1f"),
    "w1_low.s": ("w1-8b-qlora-low", "value", ".4g"),
    "w1_unsloth.gib": ("w1-8b-qlora-unsloth", "peak_reserved_gib", ".1f"),
    "w1_unsloth.s": ("w1-8b-qlora-unsloth", "value", ".4g"),
    "w2.gib": ("grpo-w2-8b", "peak_reserved_gib", ".1f"),
    "w2.s": ("grpo-w2-8b", "value", ".4g"),
    "w2_trl.gib": ("grpo-w2-8b-trl", "peak_reserved_gib", ".1f"),
    "w2_trl.s": ("grpo-w2-8b-trl", "value", ".4g"),
    "long.gib": ("grpo-long-8b", "peak_reserved_gib", ".1f"),
    "long.s": ("grpo-long-8b", "value", ".4g"),
    "sharing.times": ("grpo-sharing-8b", "value", ".2f"),
    "sharing.tokens_apart": ("grpo-sharing-8b", "separate.tokens", ",.0f"),
    "sharing.tokens": ("grpo-sharing-8b", "shared.tokens", ",.0f"),
    "sharing.gib_apart": ("grpo-sharing-8b", "separate.peak_reserved_gib", ".1f"),
    "sharing.gib": ("grpo-sharing-8b", "shared.peak_reserved_gib", ".1f"),
    "w2.completion": ("grpo-w2-8b", "completion_tokens", ".0f"),
    "long.completion": ("grpo-long-8b", "completion_tokens", ".0f"),
    "sharing.prompt": ("grpo-sharing-8b", "prompt_tokens", ".0f"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a figure comes from: the name of a result, of a plan, or of what computes it."""

    kind: Literal["measured", "planned", "computed"]
    name: str


@dataclass(frozen=True, slots=True)
class Figure:
    """What stands on the page, and where it comes from."""

    text: str
    sources: tuple[Source, ...]


@functools.cache
def results() -> Mapping[str, dict[str, Any]]:
    """Name -> newest result of that name, from benchmarks/results."""
    return read_results()


@functools.cache
def all_figures() -> Mapping[str, Figure]:
    """Name -> figure."""
    return _single() | _of_cases() | _slopes() | _planned() | _tokens() | _computed() | _versions()


def measured_value(name: str, key: str) -> Any:
    """What a result says under a dotted key."""
    value: Any = results()[name]
    for part in key.split("."):
        value = value[part]
    return value


@functools.cache
def find_case(name: str) -> dict[str, Any]:
    """The one case of a result that CASES picks.

    Raises:
        ValueError: none or several cases are like that.
    """
    result, wanted = CASES[name]
    cases = [{**case, "settings": " ".join(case["settings"])} for case in results()[result]["cases"]]
    found = [case for case in cases if all(case.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{result}.json holds {len(found)} cases with {wanted}, and {name} means exactly one.")
    return found[0]


@functools.cache
def run_plan(name: str) -> dict[str, Any]:
    """The JSON object of `lensmith plan` with the arguments that PLANS has.

    Raises:
        ValueError: the verb answered with an error.
    """
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        code = run_verb(shlex.split(plan_command(name))[1:])
    if code:
        raise ValueError(f"{plan_command(name)}: exit code {code}, {said.getvalue()}")
    return json.loads(printed.getvalue())


def plan_command(name: str) -> str:
    """The command line of a plan."""
    return f"lensmith plan {PLANS[name]} --json"


def count_tokens(picture: str, patch_px: int, least: int, most: int) -> int:
    """Language tokens of a picture of PICTURES, by lensmith.data.images.fit_px."""
    width, height = PICTURES[picture]
    side = patch_px * FACTS.tower.merge
    geometry = VisionGeometry(patch_px, FACTS.tower.merge, FACTS.tower.frames, (0, 0, 0), (1, 1, 1), least)
    rows_px, columns_px = fit_px(height, width, geometry, least, most)
    return rows_px * columns_px // side**2


def _single() -> dict[str, Figure]:
    return {
        name: Figure(format(measured_value(result, key), form), (Source("measured", result),))
        for name, (result, key, form) in SINGLE.items()
    }


def _of_cases() -> dict[str, Figure]:
    """`<case>.gib`, `.loaded` (GiB), `.s` (seconds a step), `.tokens`, `.image` (tokens of one), `.rate` (tokens a second)."""
    figures = {}
    for name, (result, _) in CASES.items():
        case, source = find_case(name), (Source("measured", result),)
        figures |= {
            f"{name}.gib": Figure(f"{case['peak_gib']:.1f}", source),
            f"{name}.loaded": Figure(f"{case['loaded_gib']:.1f}", source),
            f"{name}.s": Figure(f"{case['step_s']:.2f}", source),
            f"{name}.tokens": Figure(f"{case['tokens']:,}", source),
            f"{name}.image": Figure(f"{case['image_tokens']:,}", source),
            f"{name}.rate": Figure(f"{case['tokens'] / case['step_s']:,.0f}", source),
        }
    return figures


def _slopes() -> dict[str, Figure]:
    """GiB that 1,024 more tokens in a pack cost: what two measured cases take beyond what was loaded, over their tokens."""
    pairs = {
        "slope.recompute": ("small", "apart"),
        "slope.offload": ("low_small", "low_large"),
        "slope.none": ("kept4096", "rung_none"),
    }
    figures = {}
    for name, (small, large) in pairs.items():
        one, other = find_case(small), find_case(large)
        gib = (_beyond_loaded(other) - _beyond_loaded(one)) / (other["tokens"] - one["tokens"]) * 1024
        results = dict.fromkeys((CASES[small][0], CASES[large][0]))
        figures[name] = Figure(f"{gib:.2f}", tuple(Source("measured", result) for result in results))
    before, after = find_case("rung_embedding"), find_case("rung_tower")
    saved = before["peak_gib"] - after["peak_gib"]
    return figures | _tower_costs() | {"tower.saved": Figure(f"{saved:.2f}", (Source("measured", "memory-ladder"),))}


def _tower_costs() -> dict[str, Figure]:
    """What a tower that is not frozen takes, as shares of the step with a frozen one."""
    figures, plain, source = {}, find_case("tower_frozen"), (Source("measured", "memory-grid"),)
    for name in ("adapted", "trained"):
        other = find_case(f"tower_{name}")
        figures[f"more.{name}"] = Figure(f"{other['peak_gib'] / plain['peak_gib'] - 1:.0%}", source)
        figures[f"slower.{name}"] = Figure(f"{other['step_s'] / plain['step_s'] - 1:.0%}", source)
    return figures


def _beyond_loaded(case: dict[str, Any]) -> float:
    # What was loaded differs by buffers that a process keeps from the cases before.
    return case["peak_gib"] - case["loaded_gib"]


def _planned() -> dict[str, Figure]:
    figures = {}
    for name in PLANS:
        figures[f"plan.{name}"] = Figure(f"{run_plan(name)['peak_gib']:.1f}", (Source("planned", name),))
    return figures


def _tokens() -> dict[str, Figure]:
    source, figures, patch = (Source("computed", "fit_px"),), {}, FACTS.tower.patch_px
    for name in PICTURES:
        counts = {
            "tokens": count_tokens(name, patch, LEAST_TOKENS, MOST_TOKENS),
            "capped": count_tokens(name, patch, LEAST_TOKENS, CAP_TOKENS),
            "qwen25": count_tokens(name, QWEN25_PATCH_PX, QWEN25_LEAST_TOKENS, MOST_TOKENS),
        }
        figures |= {f"{kind}.{name}": Figure(f"{count:,}", source) for kind, count in counts.items()}
    return figures | {
        "tokens.most": Figure(f"{MOST_TOKENS:,}", source),
        "tokens.least": Figure(f"{LEAST_TOKENS:,}", source),
        "tokens.cap": Figure(f"{CAP_TOKENS:,}", source),
        "cap.setting": Figure(str(CAP_TOKENS), source),
        "photo.times": Figure(
            f"{count_tokens('4000x3000', patch, LEAST_TOKENS, MOST_TOKENS) / GUIDE_TOKENS:.1f}", source
        ),
        "token.px": Figure(f"{patch * FACTS.tower.merge}", source),
    }


def _computed() -> dict[str, Figure]:
    tower = FACTS.tower.num_parameters + FACTS.tower.mergers
    cache = 2 * FACTS.layers * FACTS.key_width * BF16 * 1024
    adapters = trainable(FACTS, read_config(None, ["tune.method=qlora"])).adapters
    shapes = (Source("computed", "ModelFacts"),)
    cards = {
        f"usable.{size}": Figure(f"{usable_gib(size):.1f}", (Source("computed", "usable_gib"),))
        for size in (8, 12, 40, 48, 80)
    }
    return cards | {
        "context.gib": Figure(f"{CONTEXT_GIB:.1f}", (Source("computed", "usable_gib"),)),
        "model.parameters": Figure(f"{FACTS.num_parameters / 1e9:.2f}", shapes),
        "tower.parameters": Figure(f"{tower / 1e6:.0f}", shapes),
        "tower.gib": Figure(f"{tower * BF16 / GIB:.2f}", shapes),
        "cache.gib": Figure(f"{cache / GIB:.2f}", shapes),
        "adapters.parameters": Figure(f"{adapters / 1e6:.1f}", (Source("computed", "trainable"),)),
    }


def _versions() -> dict[str, Figure]:
    """Of the packages whose names the guide uses, as uv.lock has them; the newest where it holds several sets."""
    lock = tomllib.loads(re.sub(r"(?m)^sdist = .*$", "", (REPOSITORY / "uv.lock").read_text(encoding="utf-8")))
    locked = [(package["name"], Version(package.get("version", "0"))) for package in lock["package"]]
    return {
        f"version.{name}": Figure(str(max(version for other, version in locked if other == name)), ())
        for name in ("trl", "transformers", "datasets")
    }
