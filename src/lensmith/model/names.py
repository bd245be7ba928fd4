"""From what a user types as `model` to something transformers can load, or a sentence that says what exists.

A wrong name is answered here, from a table, before anything asks the network: most come from tutorials that name a
size Qwen3-VL never had.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from lensmith.errors import ModelError

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig

TINY = "lensmith/tiny"
"""The model that ships inside the package."""

MODEL_TYPE = "qwen3_vl"
"""As written in config.json."""

SIZES = ("2B", "4B", "8B", "32B")
KINDS = ("Instruct", "Thinking")
KNOWN_NAMES = tuple(f"Qwen/Qwen3-VL-{size}-{kind}" for size in SIZES for kind in KINDS)
"""The dense checkpoints of https://huggingface.co/collections/Qwen/qwen3-vl."""

_REDISTRIBUTED = re.compile(
    rf"unsloth/Qwen3-VL-({'|'.join(SIZES)})-({'|'.join(KINDS)})(-(unsloth-)?bnb-4bit)?", re.IGNORECASE
)
_TABLED_OWNERS = ("qwen", "unsloth", "lensmith")
"""Their Qwen3-VL names are all known here, so any other is a slip."""
_SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z])", re.IGNORECASE)
_MOE = re.compile(r"-a\d+b", re.IGNORECASE)
_NUM_NEAR = 3


def resolve_model(name: str) -> str:
    """What `from_pretrained` should be given for `name`: a folder, or a hub name exactly as the hub writes it.

    Accepts `lensmith/tiny`, a local folder with a Qwen3-VL config.json, a hub name of the Qwen3-VL family (ready-made
    bnb-4bit ones too) and any other `owner/name`, whose own config.json is read by `read_architecture`.

    Raises ModelError: no such folder, a folder that is no model or another model, a size that does not exist.
    """
    if name == TINY:
        return str(_tiny_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or folder.exists():
        found = "is a file" if folder.exists() else "does not exist"
        raise ModelError(
            f"model={name}: {found}; a model is a folder with config.json and weights, or a hub name. "
            f"Give such a folder, or one of {', '.join(KNOWN_NAMES[:_NUM_NEAR])}, ... or {TINY}."
        )
    if name in KNOWN_NAMES or _REDISTRIBUTED.fullmatch(name):
        return name
    owner, _, repository = name.rpartition("/")
    if owner and repository and owner.lower() not in _TABLED_OWNERS:
        return name  # somebody's own fine-tune; its config.json says what it is
    raise ModelError(_near_miss(name))


def read_architecture(name: str) -> Qwen3VLConfig:
    """The model's configuration, without its weights: sizes, special tokens, and how it is quantised if it is.

    Raises ModelError: offline and not cached, not on the hub, or not a Qwen3-VL.
    """
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig

    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, HFValidationError) as cause:
        raise ModelError(not_loadable(name)) from cause
    except ValueError as cause:  # transformers knows no such model_type
        raise ModelError(
            f"model={name}: transformers does not know this kind of model; Lensmith trains {MODEL_TYPE}. "
            f"Name one of {', '.join(KNOWN_NAMES)}."
        ) from cause
    _check_type(name, config.model_type)
    return config  # pyright: ignore[reportReturnType]  AutoConfig's return type is the base class


def not_loadable(name: str) -> str:
    """The sentence for a hub name whose files could not be had, offline or online."""
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        return (
            f"model={name}: not in the local cache, and this process is offline (HF_HUB_OFFLINE is set). "
            f"Run `hf download {name}` where there is a network, or set model to a local folder or {TINY}."
        )
    return (
        f"model={name}: its files could not be had from the hub and are not in the local cache. "
        f"Check the name and the network (a private model needs `hf auth login`), "
        f"or set model to a local folder or {TINY}."
    )


def _tiny_folder() -> Path:
    folder = Path(str(resources.files("lensmith.model") / "tiny"))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model={TINY}: this installation of lensmith lacks the folder model/tiny that should be in it. "
            "Reinstall with `pip install --force-reinstall lensmith`."
        )
    return folder


def _check_folder(folder: Path) -> None:
    where = f"model={folder}"
    if not (config_file := folder / "config.json").is_file():
        if (adapter_file := folder / "adapter_config.json").is_file():
            base = json.loads(adapter_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
            raise ModelError(
                f"{where}: an adapter, not a model: it changes {base or 'a model it does not name'}. "
                f"Set model to that, and tune.start_from={folder} to go on from the adapter."
            )
        found = sorted(entry.name for entry in folder.iterdir())[:_NUM_NEAR]
        raise ModelError(
            f"{where}: no config.json in it, found {', '.join(found) or 'nothing'}. "
            "Give the folder that save_pretrained or `hf download` wrote."
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        raise ModelError(
            f"{where}: its config.json is not readable JSON ({cause}); the copy may be cut short. Copy it again."
        ) from cause
    _check_type(str(folder), config.get("model_type") if isinstance(config, dict) else None)


def _check_type(name: str, found: str | None) -> None:
    if found == f"{MODEL_TYPE}_moe":
        raise ModelError(
            f"model={name}: a mixture of experts ({found}), which Lensmith does not train yet; it trains {MODEL_TYPE}. "
            f"The dense sizes are {', '.join(SIZES)}: for example {KNOWN_NAMES[-2]}."
        )
    if found != MODEL_TYPE:
        raise ModelError(
            f"model={name}: its config.json says model_type {found or 'nothing'}, Lensmith trains {MODEL_TYPE}. "
            f"Name one of {', '.join(KNOWN_NAMES)}."
        )


def _near_miss(name: str) -> str:
    """The sentence for a name that is not on the hub, with those that are, nearest first."""
    if _MOE.search(name):
        return (
            f"model={name}: a mixture of experts, which Lensmith does not train yet. "
            f"The dense models are {', '.join(nearest_names(name))}."
        )
    if name.upper().endswith(("-GGUF", "-FP8", "-AWQ")):
        kind = name.rpartition("-")[2]
        return (
            f"model={name}: {kind} weights are for serving and cannot be trained. "
            f"Use {nearest_names(name)[0]}; tune.method=qlora stores it in 4 bits while training."
        )
    sizes = _SIZE.findall(name)
    asked = f"there is no Qwen3-VL of {sizes[0]}B" if sizes and f"{sizes[0]}B" not in SIZES else "no such model"
    return (
        f"model={name}: {asked}; the sizes are {', '.join(SIZES)}, each Instruct and Thinking. "
        f"Use one of {', '.join(nearest_names(name))}, a local folder or {TINY}."
    )


def nearest_names(name: str) -> list[str]:
    """KNOWN_NAMES by likeness to `name`: first the nearest size, then Instruct or Thinking as asked, then spelling."""
    sizes = _SIZE.findall(name)
    wanted = float(sizes[0]) if sizes else None

    def distance(known: str) -> tuple[float, bool, float]:
        size, kind = known.removeprefix("Qwen/Qwen3-VL-").split("-")
        ratio = abs(math.log(float(size[:-1]) / wanted)) if wanted else 0.0
        other_kind = (kind == "Thinking") != ("thinking" in name.lower())
        return ratio, other_kind, -difflib.SequenceMatcher(None, name.lower(), known.lower()).ratio()

    return sorted(KNOWN_NAMES, key=distance)
