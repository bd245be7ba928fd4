"""The four components of a Qwen3-VL by name: whose weights are whose, what trains, in which precision, at what rate.

Everything here goes by parameter names, as transformers has them, with or without PEFT around the model: it is the one
seam to those names, pinned by tests/unit/test_components.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from lensmith.config.tree import Optim, Tune
from lensmith.errors import ModelError
from lensmith.types import Component

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

COMPONENTS: tuple[Component, ...] = get_args(Component)
PEFT_PREFIX = "base_model.model."
ADAPTER_MARK = ".lora_"
"""In the name of every parameter that PEFT's LoRA and DoRA add."""

_PLACES: tuple[tuple[str, Component], ...] = (
    # The mergers live inside the tower's module, so they come first.
    ("model.visual.merger", "merger"),
    ("model.visual.deepstack_merger_list", "merger"),
    ("model.visual", "vision"),
    ("model.language_model", "language"),
    ("lm_head", "head"),
)

DEFAULT_LEARNING_RATES = {"lora": 2e-4, "qlora": 2e-4, "lora_8bit": 2e-4, "full": 1e-5}
"""By tune.method. 2e-4: QLoRA, arXiv:2305.14314, table 9; 1e-5: Qwen-VL, arXiv:2308.12966; docs/components.md says more."""
VISION_SHARE = 0.1
"""A tower that is tuned moves at a tenth of the rate: it serves all tasks, and its features are what the rest reads."""

TOWER_COST = {"adapted": (0.11, 0.56), "trained": (0.26, 0.66)}
"""More memory and more time of a step than with a frozen tower, as shares: QLoRA of the 8B, four pictures of 700 tokens in
4,096, on an H100 (memory-grid.json; `trained` is tower and mergers)."""


def tower_warning(state: str) -> str:
    """What a tower that is not frozen costs, as was measured."""
    more, longer = TOWER_COST[state]
    return (
        f"Warning: the image tower is {state}. It then runs forward and backward in every step, and its features cannot be "
        f"kept from one to the next: {more:.0%} more memory and {longer:.0%} longer steps, measured at 8B with pictures of "
        "700 tokens. Where optim.vision_learning_rate is not set, it moves at a tenth of the decoder's. Leave it frozen "
        "unless your pictures are of a kind it never saw."
    )


def component_of(name: str) -> Component:
    """The component a parameter or module belongs to, by its full name, with PEFT's prefix or without.

    Raises ModelError for a name outside the four, such as that of another model.
    """
    plain = plain_name(name)
    for place, component in _PLACES:
        if plain == place or plain.startswith(place + "."):
            return component
    raise ModelError(
        f"{name}: not a part of a Qwen3-VL, whose parts are {', '.join(place for place, _ in _PLACES)}. "
        "Give the model that load_model returned."
    )


def plain_name(name: str) -> str:
    """The name in the model without PEFT: its prefix and the wrapper around an adapted layer taken out."""
    return name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter and not of the model itself."""
    return ADAPTER_MARK in name


@dataclass(frozen=True, slots=True)
class CensusRow:
    """What one component is made of, just before step 1."""

    component: Component
    modules: int
    """Modules of the model that hold weights of their own."""
    adapted: int
    """How many of them carry an adapter."""
    parameters: int
    """True count, adapters included: a 4-bit weight counts as the numbers it stands for."""
    trainable: int
    precision: str
    """Frozen and trained types, largest first: `nf4+bf16+fp32`. Empty for a head that is the embedding itself."""


def take_census(model: nn.Module) -> tuple[CensusRow, ...]:
    """One row per component, in the order of COMPONENTS; a tied head has no parameters of its own."""
    modules: dict[Component, set[str]] = {component: set() for component in COMPONENTS}
    adapted: dict[Component, set[str]] = {component: set() for component in COMPONENTS}
    sizes: dict[Component, dict[str, int]] = {component: {} for component in COMPONENTS}
    trainable: dict[Component, int] = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        component, count = component_of(name), num_parameters(parameter)
        if is_adapter(name):
            adapted[component].add(name.partition(ADAPTER_MARK)[0])
        else:
            modules[component].add(plain_name(name).rpartition(".")[0])
        kind = precision_of(parameter)
        sizes[component][kind] = sizes[component].get(kind, 0) + count
        trainable[component] += count if parameter.requires_grad else 0
    return tuple(
        CensusRow(
            component,
            len(modules[component]),
            len(adapted[component]),
            sum(sizes[component].values()),
            trainable[component],
            "+".join(sorted(sizes[component], key=lambda kind: -sizes[component][kind])),
        )
        for component in COMPONENTS
    )


def num_parameters(parameter: Tensor) -> int:
    """How many numbers a parameter stands for; bitsandbytes packs two 4-bit ones into a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def precision_of(parameter: Tensor) -> str:
    """`nf4`, `bf16`, `fp16`, `fp32`, else torch's own name of the type."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return state.quant_type
    name = str(parameter.dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def census_table(rows: tuple[CensusRow, ...]) -> Table:
    """The census for a terminal, with its sum."""
    from rich.table import Table

    table = Table(title="What trains", title_justify="left")
    for heading in ("component", "modules", "adapted", "parameters", "trainable", "precision"):
        table.add_column(heading, justify="left" if heading in ("component", "precision") else "right")
    for row in rows:
        counts = (row.modules, row.adapted, row.parameters, row.trainable)
        note = row.precision or "tied to language"
        table.add_row(row.component, *(f"{count:,}" for count in counts), note, style=None if row.trainable else "dim")
    total, trainable = (sum(getattr(row, key) for row in rows) for key in ("parameters", "trainable"))
    table.add_section()
    table.add_row("all", "", "", f"{total:,}", f"{trainable:,}", f"{trainable / total:.2%} trains")
    return table


def gradient_norms(model: nn.Module) -> dict[Component, float]:
    """Euclidean norm of each trained component's gradient; 0.0 where nothing arrived. Call it before they are cleared.

    Components without trainable parameters are left out. One wait for the device per component.
    """
    import torch

    squares: dict[Component, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = squares.setdefault(component_of(name), [])
            if parameter.grad is not None:
                # fp32 at least: squares of 16-bit gradients underflow.
                dtype = torch.promote_types(parameter.grad.dtype, torch.float32)
                found.append(torch.linalg.vector_norm(parameter.grad, dtype=dtype).square())
    return {
        component: float(torch.stack(squares[component]).sum().sqrt()) if squares[component] else 0.0
        for component in COMPONENTS
        if component in squares
    }


def untouched_sentences(norms: Mapping[Component, float]) -> list[str]:
    """One sentence for each component that is meant to train and got no gradient in step 1."""
    hints: dict[Component, str] = {
        "vision": "does any sample of this step hold an image?",
        "merger": "does any sample of this step hold an image?",
    }
    return [
        f"After step 1 the gradient of {component} is zero, so it does not train: "
        f"{hints.get(component, 'are there learned tokens in this step?')} "
        f"If this is meant, set tune.{component}=frozen and save its memory."
        for component, norm in norms.items()
        if norm == 0
    ]


def learning_rates(optim: Optim, method: str) -> dict[Component, float]:
    """The rate of each component, with the defaults filled in; the head goes with the decoder."""
    rate = optim.learning_rate or DEFAULT_LEARNING_RATES[method]
    return {
        "vision": optim.vision_learning_rate or VISION_SHARE * rate,
        "merger": optim.merger_learning_rate or rate,
        "language": rate,
        "head": rate,
    }


def parameter_groups(model: nn.Module, optim: Optim, method: str) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: one learning rate per component, no weight decay on 1-d parameters.

    Each group has `params`, `lr`, `weight_decay` and `component`; only trainable parameters, each exactly once.
    Norms, biases and DoRA's magnitudes are the 1-d ones: decay would pull a scale of 1 towards 0.
    """
    rates = learning_rates(optim, method)
    groups: dict[tuple[Component, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((component_of(name), parameter.dim() > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[component],
            "weight_decay": optim.weight_decay if decays else 0.0,
            "component": component,
        }
        for (component, decays), parameters in sorted(
            groups.items(), key=lambda item: (COMPONENTS.index(item[0][0]), not item[0][1])
        )
    ]


def states_of(tune: Tune) -> dict[Component, str]:
    """Frozen, adapted or trained, for each component. With method `full`, adapted is read as trained.

    The head is trained with a decoder that is trained, else frozen; a tied head is the decoder's embedding anyway.
    """
    full = tune.method == "full"
    states = {name: getattr(tune, name) for name in ("vision", "merger", "language")}
    read = {name: "trained" if full and state == "adapted" else state for name, state in states.items()}
    return {
        "vision": read["vision"],
        "merger": read["merger"],
        "language": read["language"],
        "head": "trained" if read["language"] == "trained" else "frozen",
    }
