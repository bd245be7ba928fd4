"""FastVisionModel: load a model, give it adapters, switch its mode, save it; under Unsloth's names.

Everything that is chosen becomes a setting of the one RunConfig that the trainer runs with later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lensmith.errors import ConfigError
from lensmith.model.adapters import prepare_trainable
from lensmith.model.components import tower_warning
from lensmith.model.load import choose_device, load_model
from lensmith.model.names import TINY
from lensmith.model.residence import settle_inputs
from lensmith.recipe import saving
from lensmith.recipe.keywords import read_keywords
from lensmith.recipe.names_model import (
    FROM_PRETRAINED,
    FROM_PRETRAINED_RENAMED,
    GET_PEFT_MODEL,
    GET_PEFT_MODEL_RENAMED,
)
from lensmith.recipe.session import (
    Session,
    Settings,
    Wanted,
    free_settings,
    pixels_to_tokens,
    remember,
    session_of,
    to_config,
)
from lensmith.recipe.speech import quiet_libraries, say_once
from lensmith.recipe.tuned import processor_beside, tuned_settings

LOAD, PEFT = "FastVisionModel.from_pretrained", "FastVisionModel.get_peft_model"
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
PRECISIONS: Mapping[Any, str] = {
    torch.bfloat16: "bf16", "bfloat16": "bf16", "bf16": "bf16",
    torch.float16: "fp16", "float16": "fp16", "fp16": "fp16",
    torch.float32: "fp32", "float32": "fp32", "fp32": "fp32",
}  # fmt: skip


class FastVisionModel:
    """Unsloth's class of that name, on Lensmith's engine. See docs/recipe.md for each keyword."""

    @staticmethod
    def from_pretrained(model_name: str = TINY, **keywords: Any) -> tuple[Any, Any]:
        """The model, in eval mode and frozen, and its processor (which notebooks call tokenizer).

        The folder of an adapter or a run gives the base with that adapter, ready to answer or to be trained on.

        Raises:
            ConfigError: a keyword is unknown or cannot be honoured.
            ModelError: the name or folder is none that Lensmith can load.
        """
        given = read_keywords(LOAD, {"model_name": model_name, **keywords}, FROM_PRETRAINED, FROM_PRETRAINED_RENAMED)
        settings = _load_settings(given)
        start = settings.get("tune.start_from")
        with quiet_libraries():
            processor = processor_beside(start.value) if start is not None else None
            loaded = load_model(to_config(settings), processor=processor)
        for sentence in loaded.sentences:
            say_once(sentence)
        session = Session(loaded, settings)
        remember(loaded.model, session)
        saving.attach(loaded.model)
        if start is None:
            return loaded.model, loaded.processor
        return _prepare(session).eval(), loaded.processor

    @staticmethod
    def get_peft_model(model: Any, **keywords: Any) -> Any:
        """The model with fresh adapters, which change nothing until they are trained; all else is frozen.

        Raises:
            ConfigError: a keyword is unknown or cannot be honoured, or the model has adapters already.
        """
        session = session_of(model, PEFT)
        given = read_keywords(PEFT, keywords, GET_PEFT_MODEL, GET_PEFT_MODEL_RENAMED)
        if session.model is not None:
            raise ConfigError(f"{PEFT}: this model has adapters already. Load it again for others.")
        if session.settings["tune.method"].value == "full":
            raise ConfigError(
                f"{PEFT}: the model was loaded with full_finetuning=True, which trains its own weights and needs no adapter. "
                "Leave out one of the two."
            )
        session.settings |= _peft_settings(given)
        return _prepare(session)

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Eval mode. `generate` and evaluation are in it anyway, and leave every module in the mode it was in."""
        session_of(model, "FastVisionModel.for_inference")
        return model.eval()

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: bool | str | None = None) -> Any:
        """Training mode. `train()` of a trainer switches by itself."""
        session = session_of(model, "FastVisionModel.for_training")
        if use_gradient_checkpointing is not None:
            session.settings |= recompute_settings("FastVisionModel.for_training", use_gradient_checkpointing)
            settle_inputs(session.loaded.model, to_config(session.settings).memory, session.loaded.device)
        return model.train()

    save_pretrained_merged = staticmethod(saving.save_pretrained_merged)
    save_pretrained_gguf = staticmethod(saving.save_pretrained_gguf)
    push_to_hub_merged = staticmethod(saving.push_to_hub_merged)
    push_to_hub_gguf = staticmethod(saving.push_to_hub_gguf)


def _load_settings(given: Mapping[str, Any]) -> Settings:
    settings = free_settings(LOAD, given.get("settings"))
    written = f"{LOAD}(model_name=)"
    settings |= tuned_settings(given["model_name"], written) or {"model": Wanted(given["model_name"], written)}
    settings["tune.method"] = _method(given)
    settings |= recompute_settings(LOAD, given.get("use_gradient_checkpointing", "unsloth"))
    settings["seed"] = Wanted(
        given.get("random_state", FROM_PRETRAINED["random_state"].theirs), f"{LOAD}(random_state=)"
    )
    if (precision := _precision(given.get("dtype"))) is not None:
        settings["precision"] = precision
    if given.get("max_seq_length") is not None:
        settings["pack.tokens"] = Wanted(given["max_seq_length"], f"{LOAD}(max_seq_length=)")
    if given.get("offload_embedding"):
        settings["memory.embedding"] = Wanted("host", f"{LOAD}(offload_embedding=)")
    for name, path in (("max_pixels", "data.image.max_tokens"), ("min_pixels", "data.image.min_tokens")):
        if given.get(name) is not None:
            settings[path] = pixels_to_tokens(LOAD, name, given[name])
    return settings


def _method(given: Mapping[str, Any]) -> Wanted:
    asked = [name for name in ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning") if given.get(name)]
    widths = [name for name in asked if name != "full_finetuning"]
    if len(widths) > 1 or (asked[-1:] == ["full_finetuning"] and widths and widths != ["load_in_16bit"]):
        raise ConfigError(f"{LOAD}: {' and '.join(asked)} are true, and cannot be together. Give one of them.")
    methods = {"load_in_4bit": "qlora", "load_in_8bit": "lora_8bit", "load_in_16bit": "lora", "full_finetuning": "full"}
    if asked:
        return Wanted(methods[asked[-1]], f"{LOAD}({asked[-1]}=)")
    return Wanted("qlora" if given.get("load_in_4bit", True) else "lora", f"{LOAD}(load_in_4bit=)")


def _precision(dtype: Any) -> Wanted | None:
    """None is automatic; 16-bit types without a GPU become fp32, and that is said."""
    if dtype is None or dtype == "auto":
        return None
    if dtype not in PRECISIONS:
        raise ConfigError(
            f"{LOAD}: dtype is {dtype!r}, but must be None, bfloat16, float16 or float32. None is automatic."
        )
    precision = PRECISIONS[dtype]
    if precision != "fp32" and choose_device().type == "cpu":
        say_once(f"dtype={dtype}: there is no GPU here, so the model computes in float32 on the CPU.")
        return None
    return Wanted(precision, f"{LOAD}(dtype=)")


def recompute_settings(call: str, value: Any) -> Settings:
    """use_gradient_checkpointing as settings of memory."""
    if value not in ("unsloth", "True", "False", True, False):
        raise ConfigError(
            f'{call}: use_gradient_checkpointing is {value!r}, but must be "unsloth", True or False; "unsloth" saves the most.'
        )
    written = f"{call}(use_gradient_checkpointing=)"
    recompute = "none" if value in ("False", False) else "layers"
    offload = "inputs" if value == "unsloth" else "none"
    return {"memory.recompute": Wanted(recompute, written), "memory.offload": Wanted(offload, written)}


def _peft_settings(given: Mapping[str, Any]) -> Settings:
    def wanted(name: str, value: Any) -> Wanted:
        return Wanted(value, f"{PEFT}({name}=)")

    settings: Settings = {}
    for name, path in (("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        settings[f"tune.{path}"] = wanted(name, given.get(name, GET_PEFT_MODEL[name].theirs))
    for name, path in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if name in given:
            settings[f"tune.{path}"] = wanted(name, given[name])
    if "random_state" in given:
        settings["seed"] = wanted("random_state", given["random_state"])
    if "use_gradient_checkpointing" in given:
        settings |= recompute_settings(PEFT, given["use_gradient_checkpointing"])
    language = given.get("finetune_language_layers", True)
    attention, mlp = _projections(given)
    settings["tune.language"] = wanted("finetune_language_layers", "adapted" if language else "frozen")
    if language:
        settings["tune.attention"] = wanted("finetune_attention_modules", attention)
        settings["tune.mlp"] = wanted("finetune_mlp_modules", mlp)
    settings["tune.vision"] = wanted("finetune_vision_layers", "adapted" if _vision(given) else "frozen")
    return settings


def _vision(given: Mapping[str, Any]) -> bool:
    if "finetune_vision_layers" not in given:
        say_once("finetune_vision_layers is left out: the image tower stays frozen here (Unsloth would adapt it).")
        return False
    if given["finetune_vision_layers"]:
        say_once(tower_warning("adapted"))
    return bool(given["finetune_vision_layers"])


def _projections(given: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether attention and MLP are covered, by the two switches and by target_modules together."""
    attention, mlp = (bool(given.get(f"finetune_{part}_modules", True)) for part in ("attention", "mlp"))
    names = given.get("target_modules")
    if names is None or names == "all-linear":
        return attention, mlp
    chosen = set(names) if isinstance(names, Collection) and not isinstance(names, str) else {names}
    if not chosen or any(part & chosen and not part <= chosen for part in (ATTENTION, MLP)) or chosen - ATTENTION - MLP:
        raise ConfigError(
            f"{PEFT}: target_modules is {names!r}, but must be all of attention ({', '.join(sorted(ATTENTION))}), all of "
            f"the MLP ({', '.join(sorted(MLP))}), or both. Leave it out for both."
        )
    return attention and chosen >= ATTENTION, mlp and chosen >= MLP


def prepared_model(session: Session, call: str) -> nn.Module:
    """The trainable model of a session; one loaded for full fine-tuning is made so here.

    Raises:
        ConfigError: nothing of it would train.
    """
    if session.model is None:
        if session.settings["tune.method"].value != "full":
            raise ConfigError(
                f"{call}: this model has no adapter, so nothing would train. Call FastVisionModel.get_peft_model first, or "
                "load it with full_finetuning=True."
            )
        _prepare(session)
    assert session.model is not None, "_prepare made it"
    return session.model


def _prepare(session: Session) -> nn.Module:
    """Makes the model trainable as its settings say."""
    config = to_config(session.settings)
    settle_inputs(session.loaded.model, config.memory, session.loaded.device)
    with quiet_libraries():
        session.model = prepare_trainable(session.loaded.model, config.tune, seed=config.seed)
    if config.tune.method != "full":
        saving.attach_adapter(session.model)
    return session.model
