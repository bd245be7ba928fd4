"""Saving under Unsloth's names: each is an export of the run that trained the model, checked as `lensmith export` is."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from lensmith.console import say
from lensmith.errors import ConfigError, RunError
from lensmith.export.run import Asked, export_run
from lensmith.model.adapters import save_tuned
from lensmith.recipe.keywords import Keyword, idle, read_keywords, refused
from lensmith.recipe.session import session_of

_SHARED: dict[str, Keyword] = {
    "tokenizer": Keyword(None, "the processor is always saved beside the model, with the image limits of training"),
    "max_shard_size": idle("5GB", "shards are cut as the base's are"),
    "safe_serialization": idle(True, "weights are always safetensors"),
    "maximum_memory_usage": idle(0.75, "tensors are merged one by one"),
    "temporary_location": idle("", "nothing half is left behind"),
    "is_main_process": idle(True, "the first process writes"),
    "tags": idle(None, "the model card is written from the run"),
    "private": idle(None, "repositories are always made private; publish them by hand"),
    "state_dict": refused(None, "The weights are the run's."),
    "variant": refused(None, "Files have their usual names."),
    "token": refused(
        None, "Run `hf auth login`, or set the variable HF_TOKEN; a token in a script is soon in a repository."
    ),
    "push_to_hub": refused(False, "Call push_to_hub_merged or push_to_hub_gguf."),
}
MERGED: dict[str, Keyword] = {
    "save_method": Keyword("merged_16bit", "merged_16bit, or lora for the adapter alone"),
    **_SHARED,
}
GGUF: dict[str, Keyword] = {
    "quantization_method": Keyword(
        "fast_quantized", "one of f16, bf16, q8_0, q4_k_m ..., or a list; q8_0 where left out"
    ),
    "llama_cpp": Keyword(None, "of our own: the folder of llama.cpp; by default the variable LLAMA_CPP"),
    "first_conversion": idle(None, "the converter starts from the merged model"),
    **_SHARED,
}
KINDS = {"merged_16bit": "merged", "merged": "merged", "16bit": "merged", "lora": "adapter"}
QUANTS = {"fast_quantized": "q8_0", "quantized": "q4_k_m", "not_quantized": "f16"}
"""Unsloth's words for three of llama.cpp's types."""


def save_pretrained_merged(model: Any, save_directory: str | Path, *rest: Any, **keywords: Any) -> None:
    """The whole model with the adapter merged into its base, or the adapter alone with save_method="lora"."""
    _merged("save_pretrained_merged", model, Path(save_directory), None, rest, keywords)


def push_to_hub_merged(model: Any, repo_id: str, *rest: Any, **keywords: Any) -> None:
    """As save_pretrained_merged, into the run folder, and from there to the private repository `repo_id`."""
    _merged("push_to_hub_merged", model, None, repo_id, rest, keywords)


def save_pretrained_gguf(model: Any, save_directory: str | Path, *rest: Any, **keywords: Any) -> None:
    """Files for llama.cpp and Ollama."""
    _gguf("save_pretrained_gguf", model, Path(save_directory), None, rest, keywords)


def push_to_hub_gguf(model: Any, repo_id: str, *rest: Any, **keywords: Any) -> None:
    """As save_pretrained_gguf, into the run folder, and from there to the private repository `repo_id`."""
    _gguf("push_to_hub_gguf", model, None, repo_id, rest, keywords)


def attach(engine: nn.Module) -> None:
    """The four functions above as methods; PEFT's wrapper passes them on."""
    for function in (save_pretrained_merged, save_pretrained_gguf, push_to_hub_merged, push_to_hub_gguf):
        vars(engine)[function.__name__] = functools.partial(function, engine)


def attach_adapter(model: nn.Module) -> None:
    """save_pretrained writes what PEFT writes, and never asks the Hub about it."""
    vars(model)["save_pretrained"] = functools.partial(save_pretrained, model)


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], **keywords: Any) -> None:
    """adapter_config.json and adapter_model.safetensors, with trained.safetensors where whole components trained."""
    read_keywords("save_pretrained", keywords, _SHARED, {})
    save_tuned(model, Path(save_directory))


def _merged(
    call: str, model: Any, out: Path | None, push: str | None, rest: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    given = read_keywords(
        call, _with_positional(call, rest, keywords, "save_method"), MERGED, {"merge_method": "save_method"}
    )
    method = given.get("save_method", "merged_16bit")
    if method not in KINDS:
        raise ConfigError(
            f"{call}: save_method is {method!r}, but must be one of {', '.join(KINDS)}. For 4 bits use save_pretrained_gguf."
        )
    _export(call, model, Asked(KINDS[method], out, push=push))  # pyright: ignore[reportArgumentType]


def _gguf(
    call: str, model: Any, out: Path | None, push: str | None, rest: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    given = read_keywords(
        call,
        _with_positional(call, rest, keywords, "quantization_method"),
        GGUF,
        {"quantization": "quantization_method"},
    )
    methods = given.get("quantization_method", "fast_quantized")
    listed = [methods] if isinstance(methods, str) or not isinstance(methods, Iterable) else list(methods)
    folder = given.get("llama_cpp")
    _export(
        call,
        model,
        Asked(
            "gguf",
            out,
            quants=tuple(QUANTS.get(str(one), str(one)) for one in listed),
            llama_cpp=None if folder is None else Path(folder),
            push=push,
        ),
    )


def _with_positional(call: str, rest: tuple[Any, ...], keywords: dict[str, Any], second: str) -> dict[str, Any]:
    """Notebooks write `save_pretrained_merged("folder", tokenizer, ...)`."""
    if len(rest) > 2:
        raise ConfigError(f"{call}: takes the folder, the tokenizer and {second} without names; name the others.")
    return dict(zip(("tokenizer", second), rest, strict=False)) | keywords


def _export(call: str, model: Any, asked: Asked) -> None:
    session = session_of(model, call)
    if session.run is None:
        raise RunError(
            f"{call}: this model has not been trained yet, so there is no run to export. Train it first; "
            "model.save_pretrained(folder) writes the adapter as it is."
        )
    export_run(str(session.run), asked, say=say)
