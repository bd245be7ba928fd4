"""A folder of tuned weights by name: what model.save_pretrained, a run or a checkpoint left, loaded beside its base."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from lensmith.config.tree import Tune
from lensmith.errors import ModelError
from lensmith.model.adapters import ADAPTER_CONFIG, adapted_modules, find_tuned
from lensmith.recipe.session import Settings, Wanted
from lensmith.rundir import find_run

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def tuned_settings(name: str, written: str) -> Settings | None:
    """Base model and tune settings of a folder with an adapter, which `tune.start_from` names; None for any other name.

    Raises:
        ModelError: the adapter is not one of ours.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() or (folder / "config.json").is_file():  # a whole model
        return None
    run, tuned = find_run(folder)
    if not run.exists and not (folder / ADAPTER_CONFIG).is_file():
        return None
    source = find_tuned(tuned)
    if not (source / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{name}: the run trained its own weights, so there is no adapter to load beside its base. Export it with "
            f"`lensmith export {name} --to merged`, and load what that writes."
        )
    adapter = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    wanted: dict[str, Any] = {"model": adapter["base_model_name_or_path"], "tune.start_from": str(source.resolve())}
    wanted |= {f"tune.{name}": value for name, value in _tune(adapter, name).items()}
    return {path: Wanted(value, written) for path, value in wanted.items()}


def _tune(adapter: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings that would make such an adapter."""
    states = ("frozen", "adapted")
    for attention, mlp, language, vision, merger in itertools.product(
        (True, False), (True, False), states, states, states
    ):
        places = {"language": language, "vision": vision, "merger": merger}
        if language == "adapted":
            places |= {"attention": attention, "mlp": mlp}
        if adapted_modules(Tune.model_validate(places)) == adapter["target_modules"]:
            shape = {"rank": adapter["r"], "alpha": adapter["lora_alpha"], "dropout": adapter["lora_dropout"]}
            return {**places, **shape, "rslora": adapter["use_rslora"], "dora": adapter["use_dora"]}
    raise ModelError(
        f"{name}: its adapter covers other modules than Lensmith adapts, so it was made by another tool. Merge it there, and "
        "load the result."
    )


def processor_beside(source: str) -> Any | None:
    """The processor saved with the weights, which resizes as training did; None where there is none."""
    from transformers import AutoProcessor

    folder = Path(source)
    if not any((folder / file).is_file() for file in PROCESSOR_FILES):
        return None
    return AutoProcessor.from_pretrained(folder)
