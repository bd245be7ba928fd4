"""Checks of tensors on disk, one at a time and without a model: what changed, and whether it is healthy.

changed    the tuned files hold exactly what the settings promise; of the merged model exactly those tensors differ from
           the base that the settings adapt or train. By SHA-256 of type, shape and bytes.
health     every tuned tensor is finite, no adapter is still at its start, none is larger than the weight it is added to.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensmith.config.tree import Tune
from lensmith.errors import ModelError
from lensmith.export.changes import read_changes
from lensmith.export.tensors import pieces
from lensmith.export.verify.check import Check, at_most, listed
from lensmith.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS, adapted_modules, trains_itself
from lensmith.model.components import PEFT_PREFIX
from lensmith.model.quant import BITS
from lensmith.model.stream import Shards
from lensmith.types import counted

LARGEST_UPDATE = 1.0
"""Norm of an adapter's product over the norm of its weight: past 1 the weight is replaced rather than adjusted. Runs that
went well stay far below: docs/verify.md has 0.02 to 0.1."""


def check_changed(
    base: Shards,
    merged: Shards,
    tuned: Path,
    tune: Tune,
    *,
    tied: bool,
    also: Collection[str] = (),
    into_dequantised: bool = False,
) -> Check:
    """Compare the merged model with the base, tensor by tensor, and the tuned files with what `tune` promises.

    Args:
        tied: whether the head is the embedding.
        also: tensors that the run that this one went on from had trained.
        into_dequantised: whether the merged model was made from the base as 4-bit storage rounds it, which moves every
            weight stored so.
    """
    names, theirs = set(base.names()), set(merged.names())
    adapted, trained = adapted_weights(names, tune), trained_weights(names, tune, tied=tied)
    may = adapted | trained | set(also) | (_few_bit_weights(names, tune) if into_dequantised else set())
    if tied and "model.language_model.embed_tokens.weight" in may:
        may.add("lm_head.weight")  # which some checkpoints store besides
    moved = {name for name in names & theirs if digest(base.get(name)) != digest(merged.get(name))}
    idle, lost, other = _compare_trained(base, merged, tuned / TRAINED_WEIGHTS, trained & theirs)
    idle |= (adapted & theirs) - moved
    promised = _tuned_faults(names, tuned, tune, tied=tied, also=also)
    if not promised and not into_dequantised:
        other |= _compare_adapted(base, merged, tuned, (adapted & theirs) - idle)
    faults = [
        *promised,
        *_fault(names - theirs, "of the base {} not in the merged model", "Export it again."),
        *_fault(theirs - names, "of the merged model {} not in the base", "Export it again."),
        *_fault(
            moved - may,
            "that the settings freeze {} different in the merged model",
            "The merged folder or the base was changed after training: export again from the base the run was trained on.",
        ),
        *_fault(
            idle,
            "that the settings tune {} the same as in the base",
            "Nothing was learned there, or it was rounded away: train longer or with a higher learning rate, and see that "
            "the export was made from this run.",
        ),
        *_fault(other, "of the merged model {} not what base and tuned files make of it", "Export it again."),
    ]
    rounded = f"; {len(lost)} by less than their type can hold" if lost else ""
    told = f"{len(moved):,} of {counted(len(names), 'tensor')} changed, {len(adapted | trained):,} are tuned{rounded}"
    return at_most("changed", sum(count for count, _ in faults), 0, told, " ".join(sentence for _, sentence in faults))


def check_promised(base: Shards, tuned: Path, tune: Tune, *, tied: bool, also: Collection[str] = ()) -> Check | None:
    """`changed`, failed, where the tuned files are not those that `tune` promises, so that nothing can be merged; else None."""
    if not (faults := _tuned_faults(set(base.names()), tuned, tune, tied=tied, also=also)):
        return None
    told = "the tuned files are not those of this run, and cannot be merged"
    return at_most("changed", sum(count for count, _ in faults), 0, told, " ".join(sentence for _, sentence in faults))


def _compare_trained(
    base: Shards, merged: Shards, file: Path, trained: Collection[str]
) -> tuple[set[str], set[str], set[str]]:
    """Names of tensors that trained nothing; that trained less than their type in the merged model holds; that are others."""
    idle, lost, other = set(), set(), set()
    for name, tensor in _tensors(file):
        if name not in trained:  # which `_tuned_faults` tells of
            continue
        before, stored = base.get(name), merged.get(name)
        if digest(tensor.to(stored.dtype)) != digest(stored):
            other.add(name)
        elif torch.equal(tensor, before.to(tensor.dtype)):
            idle.add(name)
        elif digest(before) == digest(stored):
            lost.add(name)
    return idle, lost, other


def _compare_adapted(base: Shards, merged: Shards, tuned: Path, adapted: Collection[str]) -> set[str]:
    """Names of merged weights that differ by more than a rounding from base plus adapter."""
    other = set()
    for name, change in read_changes(tuned).items():
        if name in adapted:
            before, stored = base.get(name), merged.get(name)
            for rows in pieces(stored.shape):
                wanted = change.apply(before[rows].to(torch.promote_types(before.dtype, torch.float32)), rows)
                apart = (stored[rows].to(wanted.dtype) - wanted).abs()
                # Not all(<=) of the opposite: NaN has to count as different.
                if not (apart <= torch.finfo(stored.dtype).eps * wanted.abs() + torch.finfo(stored.dtype).tiny).all():
                    other.add(name)
                    break
    return other


def digest(tensor: Tensor) -> str:
    """SHA-256 of type, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    found.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]
    return found.hexdigest()


def adapted_weights(names: Collection[str], tune: Tune) -> set[str]:
    """Those of the base's tensors that an adapter is added to."""
    pattern = adapted_modules(tune)
    if pattern is None:
        return set()
    return {name for name in names if name.endswith(".weight") and re.fullmatch(pattern, name.removesuffix(".weight"))}


def trained_weights(names: Collection[str], tune: Tune, *, tied: bool) -> set[str]:
    """Those that train themselves; a tied head counts as its embedding."""
    return {name for name in names if trains_itself(name, tune) and not (tied and name == "lm_head.weight")}


def _few_bit_weights(names: Collection[str], tune: Tune) -> set[str]:
    """Linears that the run kept in few bits."""
    if tune.method not in BITS:
        return set()
    also = {"vision": "adapted", "merger": "adapted"} if tune.quantise_vision else {}
    everything = Tune.model_validate({"method": tune.method, "language": "adapted", **also})
    return adapted_weights(names, everything)


def _tuned_faults(
    names: set[str], tuned: Path, tune: Tune, *, tied: bool, also: Collection[str]
) -> list[tuple[int, str]]:
    """What the tuned folder has too much or too little of."""
    leaves = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if tune.dora else ()))
    modules = [name.removesuffix(".weight") for name in adapted_weights(names, tune)]
    promised = {f"{PEFT_PREFIX}{module}.{leaf}" for module in modules for leaf in leaves}
    return [
        *_set_faults(tuned / ADAPTER_WEIGHTS, promised),
        *_set_faults(tuned / TRAINED_WEIGHTS, trained_weights(names, tune, tied=tied) | set(also)),
    ]


def _set_faults(file: Path, promised: set[str]) -> list[tuple[int, str]]:
    found = set(tensor_names(file))
    restore = f"{file} is not what this run saved: restore it, or resume the run, which saves it again."
    return [
        *_fault(promised - found, f"that the settings promise {{}} missing from {file.name}", restore),
        *_fault(found - promised, f"of {file.name} {{}} not promised by the settings", restore),
    ]


def _fault(names: Collection[str], what: str, remedy: str) -> list[tuple[int, str]]:
    if not names:
        return []
    are = what.format("is" if len(names) == 1 else "are")
    return [(len(names), f"{counted(len(names), 'tensor')} {are}: {listed(sorted(names))}. {remedy}")]


def check_health(base: Shards, tuned: Path) -> Check:
    """Look at every tuned tensor once: finite, no dead adapter, none absurdly large beside its weight in the base."""
    broken, dead, large, ratios, seen = [], [], [], [], 0
    stored = set(base.names())
    for module, parts, scale in _adapters(tuned):
        seen += len(parts)
        bad = [name for name, tensor in parts.items() if not torch.isfinite(tensor).all()]
        broken += [f"{module}.{name}" for name in bad]
        first, second = parts.get("lora_A.weight"), parts.get("lora_B.weight")
        if bad or first is None or second is None:  # a missing half is what `changed` and `reload` tell of
            continue
        if not second.any():
            dead.append(module)
        weight = base.get(f"{module}.weight") if f"{module}.weight" in stored else None
        if weight is not None and weight.is_floating_point():
            ratios.append(scale * _product_norm(first, second) / float(weight.float().norm()))
            if not ratios[-1] <= LARGEST_UPDATE:
                large.append(f"{module} ({ratios[-1]:.2g} x its weight)")
    for name, tensor in _tensors(tuned / TRAINED_WEIGHTS):
        seen += 1
        if not torch.isfinite(tensor).all():
            broken.append(name)
    sentences = [
        *_sentence(
            broken, "tuned tensor holds", "tuned tensors hold", "NaN or infinity", "Go back to an older checkpoint"
        ),
        *_sentence(
            dead, "adapter is", "adapters are", "still zero (B = 0), as before step 1", "Train longer, or freeze it"
        ),
        *_sentence(
            large, "adapter is", "adapters are", "larger than its weight", "Lower optim.learning_rate or tune.alpha"
        ),
    ]
    largest = f", largest update {max(ratios):.2g} of its weight" if ratios else ""
    told = (
        f"{counted(seen, 'tuned tensor')}: {len(broken)} not finite, {len(dead)} dead, {len(large)} too large{largest}"
    )
    return at_most("health", len(broken) + len(dead) + len(large), 0, told, " ".join(sentences))


def _sentence(names: list[str], one: str, many: str, what: str, remedy: str) -> list[str]:
    return [f"{len(names):,} {one if len(names) == 1 else many} {what}: {listed(names)}. {remedy}."] if names else []


def _product_norm(first: Tensor, second: Tensor) -> float:
    """Frobenius norm of second @ first by traces of rank x rank matrices: |BA|^2 = sum((B'B) * (AA'))."""
    first, second = first.double(), second.double()
    return math.sqrt(max(0.0, float(((second.T @ second) * (first @ first.T)).sum())))


def _adapters(tuned: Path) -> list[tuple[str, dict[str, Tensor], float]]:
    """Module, its adapter's tensors, and what their product is multiplied by."""
    if not (tuned / ADAPTER_CONFIG).is_file():
        return []
    config = json.loads((tuned / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    rank = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(tuned / ADAPTER_WEIGHTS):
        module, mark, leaf = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        modules.setdefault(module, {})[mark[1:] + leaf] = tensor
    return [(module, parts, config["lora_alpha"] / rank) for module, parts in modules.items()]


def _tensors(file: Path) -> Any:
    """Names and tensors of a safetensors file, one after the other; none where there is no such file."""
    from safetensors import safe_open

    if file.is_file():
        with safe_open(str(file), framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield name, opened.get_tensor(name)


def check_readable(tuned: Path) -> None:
    """Raises ModelError where a file of the tuned folder is missing or cut short."""
    from safetensors import SafetensorError

    wanted = (TRAINED_WEIGHTS,) if not (tuned / ADAPTER_CONFIG).is_file() else (ADAPTER_WEIGHTS, TRAINED_WEIGHTS)
    try:
        if not any(tensor_names(tuned / name) for name in wanted[:1]):
            raise ModelError(f"{tuned}: {wanted[0]} is not there or empty. Resume the run, which saves it again.")
        tensor_names(tuned / TRAINED_WEIGHTS)
    except SafetensorError as cause:
        raise ModelError(
            f"{tuned}: a file of tuned weights cannot be read ({cause}); it was probably cut off in a copy. Copy it again, or "
            "resume the run, which saves it again."
        ) from cause


def tensor_names(file: Path) -> list[str]:
    """Names in a safetensors file; none where there is no such file."""
    from safetensors import safe_open

    if not file.is_file():
        return []
    with safe_open(str(file), framework="pt", device="cpu") as opened:
        return list(opened.keys())
