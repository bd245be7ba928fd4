"""What a check needs before it can read: an encoder, the data of both sides, a token budget; and what is assumed."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies

from lensmith.config.tree import PACK_TOKENS
from lensmith.data.encode import Encoder
from lensmith.data.source import Samples, read_samples
from lensmith.errors import ModelError
from lensmith.rundir import RunDir

if TYPE_CHECKING:
    from lensmith.check.report import Side
    from lensmith.config.tree import RunConfig

HUB_WAIT_S, HTTPS_PORT = 5.0, 443
"""A hub that does not answer within that is not waited for: asking it for each file would take minutes."""
RATE_STEPS = 20
"""Newest steps of the run folder whose speed is taken for that of the steps to come."""


def open_encoder(config: RunConfig) -> tuple[Encoder, list[str]]:
    """The encoder of config.model, and what to say about it; the tiny one's where that model is not at hand.

    Raises:
        ModelError: config.model is a folder without a usable processor, or the name of no Qwen3-VL.
    """
    from lensmith.model.load import load_processor
    from lensmith.model.names import TINY, resolve_model

    name, told = config.model, []
    is_remote = resolve_model(name) == name
    try:
        processor = load_processor(name, cached_only=is_remote and not hub_answers())
    except ModelError:
        if not is_remote:  # a folder, which is there and broken
            raise
        processor = load_processor(TINY)
        told = [f"{name} is not on this machine and cannot be fetched, so its tokenizer is not known here."]
    if told or name == TINY:
        told += [
            f"Token counts: images as every Qwen3-VL counts them, texts by the tokenizer of {TINY}, which knows fewer words "
            "than Qwen3-VL's and needs more tokens. Set model to the folder of yours for exact counts."
        ]
    return Encoder.from_processor(processor, config.data.image), told


def hub_answers() -> bool:
    """Whether the Hugging Face Hub can be reached; through a proxy, it is believed to be."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or HTTPS_PORT), HUB_WAIT_S).close()
    except OSError:
        return False
    return True


def open_sides(config: RunConfig) -> dict[Side, Samples]:
    """The files of data.train, and those of data.test unless it is a share of them.

    Raises:
        ConfigError, DataError: there is no data file, or it is missing or empty as a whole.
    """
    sides: tuple[Side, ...] = ("train", "test") if isinstance(config.data.test, str) else ("train",)
    return {side: read_samples(config.data, which=side) for side in sides}


def choose_budget(config: RunConfig) -> tuple[int, list[str]]:
    """Tokens of the longest row that fits a pack, and what is assumed about it."""
    from lensmith.model.load import choose_device

    if config.pack.tokens is not None:
        return config.pack.tokens, []
    device = choose_device().type
    other = next(kind for kind in PACK_TOKENS if kind != device)
    return PACK_TOKENS[device], [
        f"Token budget: pack.tokens is not set, so {PACK_TOKENS[device]:,}, as on this machine ({device}); "
        f"on {other} it would be {PACK_TOKENS[other]:,}."
    ]


def known_rate(config: RunConfig) -> float | None:
    """Tokens per second that the run folder's newest steps made; None before the first step."""
    steps = RunDir(config.run).read_metrics()[-RATE_STEPS:]
    took_s = sum(step["step_s"] for step in steps)
    return sum(step["tokens"] for step in steps) / took_s if took_s else None
