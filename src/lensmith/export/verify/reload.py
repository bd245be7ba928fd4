"""The tuned weights as a stranger loads them: plain transformers and PEFT, nothing of ours around the model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lensmith.export.verify.check import Check, at_most, listed
from lensmith.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAINED_WEIGHTS
from lensmith.types import counted


def load_plain(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Any:
    """A model folder as AutoModelForImageTextToText loads it, in eval mode."""
    from transformers import AutoModelForImageTextToText

    # A device map fills the device tensor by tensor; without one there would be a copy in host memory first.
    places: Any = None if device.type == "cpu" else {"": device}
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map=places).eval()


def reload_tuned(base: Any, tuned: Path) -> tuple[Any, Check]:
    """The base with the tuned weights in it, and how many of their keys did not fit; None where nothing could be loaded."""
    missing: set[str] = set()
    unexpected: set[str] = set()
    count, model = 0, base
    try:
        if (tuned / TRAINED_WEIGHTS).is_file():
            count += _load_trained(base, tuned / TRAINED_WEIGHTS, unexpected)
        if (tuned / ADAPTER_CONFIG).is_file():
            model, adapter = _load_adapter(base, tuned, missing, unexpected)
            count += adapter
    except (RuntimeError, ValueError, OSError) as cause:  # shapes that differ; a config or file that PEFT cannot read
        line = str(cause).strip().partition("\n")[0]
        return None, Check(
            "reload", False, None, 0, "PEFT refuses the tuned files", f"{tuned}: {line} {_restore(tuned)}"
        )
    sentences = [
        f"{counted(len(names), 'key')} {what}: {listed(sorted(names))}."
        for names, what in ((missing, "missing"), (unexpected, "without a place in the model"))
        if names
    ]
    told = f"{count:,} keys, {len(missing)} missing, {len(unexpected)} unexpected"
    fix = " ".join([*sentences, _restore(tuned)])
    return model, at_most("reload", len(missing) + len(unexpected), 0, told, fix)


def _restore(tuned: Path) -> str:
    return (
        f"Plain PEFT would leave these at their start and say so in a warning only. Restore {tuned}, or resume the run, "
        "which saves it again; an adapter made by other tools needs their key names mapped first."
    )


def _load_trained(base: Any, file: Path, unexpected: set[str]) -> int:
    from safetensors.torch import load_file

    tensors = load_file(file)
    unexpected |= set(base.load_state_dict(tensors, strict=False).unexpected_keys)
    return len(tensors)


def _load_adapter(base: Any, tuned: Path, missing: set[str], unexpected: set[str]) -> tuple[Any, int]:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT warns of missing keys; they are counted below
        model = PeftModel.from_pretrained(base, str(tuned))
    with safe_open(str(tuned / ADAPTER_WEIGHTS), framework="pt", device="cpu") as opened:
        stored = set(opened.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing |= wanted - stored
    unexpected |= stored - wanted
    return model.eval(), len(stored)
