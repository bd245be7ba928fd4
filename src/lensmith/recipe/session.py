"""What a model of the recipe remembers: how it was loaded and prepared, as settings, and which run trained it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lensmith.config.read import COMMAND_LINE, read_config
from lensmith.config.tree import RunConfig
from lensmith.config.write import write_value
from lensmith.errors import ConfigError
from lensmith.model.engine import find_engine
from lensmith.model.load import Loaded

ATTRIBUTE = "_recipe_session"
"""Of the engine: it goes wherever the model goes, and ends with it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A setting, and where somebody wrote it."""

    value: Any
    written: str
    """`SFTConfig(learning_rate=)`."""


Settings = dict[str, Wanted]
"""Dotted path -> what is wanted."""


@dataclass(slots=True)
class Session:
    """One loaded model, from from_pretrained on."""

    loaded: Loaded
    settings: Settings
    """Those of the model itself: model, precision, tune, memory, and what from_pretrained was told of rows."""
    model: nn.Module | None = None
    """Made trainable, once it is."""
    run: Path | None = None
    """The run that trained it last."""


def remember(engine: nn.Module, session: Session) -> None:
    # nn.Module's own __setattr__ is for tensors and modules.
    vars(engine)[ATTRIBUTE] = session


def session_of(model: Any, call: str) -> Session:
    """The session of a model.

    Raises:
        ConfigError: it does not come from FastVisionModel.from_pretrained.
    """
    engine = find_engine(model) if isinstance(model, nn.Module) else None
    session = vars(engine).get(ATTRIBUTE) if engine is not None else None
    if session is None:
        shown = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise ConfigError(
            f"{call}: model is {shown}, but must come from FastVisionModel.from_pretrained, so that it is known how it "
            "was loaded. Load it so, and call FastVisionModel.get_peft_model."
        )
    return session


def free_settings(call: str, given: Mapping[str, Any] | None) -> Settings:
    """The keyword `settings`: any setting by its dotted path."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(
            f"{call}: settings is {given!r}, but must be like {{'memory.head': 'host'}}; docs/config.md lists them."
        )
    return {path: Wanted(value, f"{call}(settings=)") for path, value in (given or {}).items()}


def to_config(settings: Mapping[str, Wanted]) -> RunConfig:
    """The one RunConfig that the settings amount to.

    Raises:
        ConfigError: a value is wrong, or two contradict; the sentences name the keywords they were written as.
    """
    try:
        return read_config(None, [f"{path}={write_value(wanted.value)}" for path, wanted in settings.items()])
    except ConfigError as cause:
        raise ConfigError(_in_their_words(str(cause), settings)) from None


def _in_their_words(sentence: str, settings: Mapping[str, Wanted]) -> str:
    """A sentence about settings, each with the keyword that it was written as."""
    for path, wanted in settings.items():
        pattern = rf"{COMMAND_LINE}: (there is no setting )?{re.escape(path)}(?![\w.])"
        sentence = re.sub(pattern, lambda found, w=wanted, p=path: f"{w.written}: {found[1] or ''}{p}", sentence)
    return sentence


def pixels_to_tokens(call: str, name: str, pixels: Any) -> Wanted:
    """max_pixels or min_pixels as tokens of 32 x 32 pixels."""
    from lensmith.recipe.names_model import PIXELS_PER_TOKEN
    from lensmith.recipe.speech import say_once

    if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < PIXELS_PER_TOKEN:
        raise ConfigError(
            f"{call}: {name} is {pixels!r}, but must be a number of pixels from {PIXELS_PER_TOKEN} on: "
            "a token is 32 x 32 of them."
        )
    tokens = pixels // PIXELS_PER_TOKEN
    least = "most" if name == "max_pixels" else "least"
    say_once(
        f"{name}={pixels:,} is {tokens:,} tokens per image at {least} (data.image.{name.replace('pixels', 'tokens')})."
    )
    return Wanted(tokens, f"{call}({name}=)")


def only(paths: Iterable[str], settings: Mapping[str, Wanted]) -> Settings:
    """Those of the settings that are, or lie below, one of the paths."""
    return {
        path: wanted
        for path, wanted in settings.items()
        if any(path == start or path.startswith(f"{start}.") for start in paths)
    }
