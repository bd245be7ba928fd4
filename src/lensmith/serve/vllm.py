"""vLLM's own server for a run or a model, where vLLM is installed: the command with the flags that this checkpoint needs."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NoReturn

from lensmith.config.tree import RunConfig
from lensmith.errors import ConfigError, ModelError
from lensmith.types import VisionGeometry

EngineName = Literal["auto", "vllm", "transformers"]
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be: MaxLoRARanks of vllm/config/lora.py (vLLM 0.14 to 0.22)."""
MAX_PICTURES = 64
"""--limit-mm-per-prompt, as `lensmith.serve.schema.MAX_PICTURES`."""


def choose_engine(wanted: EngineName, subject: str, say: Callable[[str], None]) -> Literal["vllm", "transformers"]:
    """What serves the subject; `auto` says why.

    Raises:
        ConfigError: vLLM is wanted and not installed.
        ModelError: vLLM is wanted and cannot serve these weights.
    """
    if wanted == "transformers":
        return "transformers"
    if importlib.util.find_spec("vllm") is None:
        if wanted == "vllm":
            raise ConfigError(
                "--engine vllm: vLLM is not installed here. pip install vllm, or use --engine transformers, which is slower."
            )
        say("Engine: transformers, because vLLM is not installed.")
        return "transformers"
    try:
        _check_servable(subject)
    except ModelError as cause:
        if wanted == "vllm":
            raise
        say(f"Engine: transformers, because vLLM cannot serve these weights: {cause}")
        return "transformers"
    say("Engine: vLLM, because it is installed; --engine transformers has the page with base and tuned side by side.")
    return "vllm"


def _check_servable(subject: str) -> None:
    """Raises ModelError where vLLM would serve something else than was trained, or nothing."""
    from lensmith.model.adapters import TRAINED_WEIGHTS

    config, source = _find(subject)
    if source is None:
        return
    if (source / TRAINED_WEIGHTS).is_file():
        raise ModelError(
            f"{source}: holds trained weights besides or instead of an adapter, and vLLM loads adapters only. "
            "Merge the run into a model of its own and serve that, or use --engine transformers."
        )
    adapted = [name for name in ("vision", "merger") if getattr(config.tune, name) == "adapted"]
    if adapted or config.tune.dora:
        what = f"adapts {' and '.join(adapted)}" if adapted else "is a DoRA adapter"
        raise ModelError(
            f"{source}: {what}, which vLLM's LoRA leaves out. "
            "Merge the run into a model of its own and serve that, or use --engine transformers."
        )


def exec_vllm(subject: str, *, host: str, port: int, token: str | None) -> NoReturn:
    """Become vLLM's server. Its address must have been checked as ours is (`lensmith.serve.start.bind_address`)."""
    from lensmith.data.images import read_geometry
    from lensmith.model.load import load_processor, local_folder

    config, source = _find(subject)
    geometry = read_geometry(load_processor(config.model))
    argv = vllm_command(config, geometry, folder=local_folder(config.model), adapter=source, host=host, port=port)
    os.execvpe(argv[0], argv, {**os.environ, **token_variable(token)})


def token_variable(token: str | None) -> Mapping[str, str]:
    """What vLLM reads as its --api-key: other users of a machine see command lines, not environments."""
    return {"VLLM_API_KEY": token} if token else {}


def vllm_command(
    config: RunConfig, geometry: VisionGeometry, *, folder: Path, adapter: Path | None, host: str, port: int
) -> list[str]:
    """The command line of vLLM's OpenAI-compatible server, with the picture limits of the run. Pure.

    Args:
        folder: of the base model's files.
        adapter: what PEFT saved; None serves the model alone.
    """
    area = geometry.token_px**2
    least = geometry.min_tokens if config.data.image.min_tokens is None else config.data.image.min_tokens
    # Areas in pixels, despite the names; read by vLLM when it counts tokens and by transformers when it resizes.
    pixels = {"size": {"shortest_edge": least * area, "longest_edge": config.data.image.max_tokens * area}}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "base"),
        *("--host", host, "--port", str(port)),
        *("--mm-processor-kwargs", json.dumps(pixels)),
        *("--limit-mm-per-prompt", json.dumps({"image": MAX_PICTURES, "video": 0})),
        # Else vLLM takes over the checkpoint's sampling, and a request without temperature is not greedy.
        *("--generation-config", "vllm"),
    ]
    if adapter is not None:
        rank = next(rank for rank in RANKS if rank >= config.tune.rank)
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"tuned={adapter}"]
    return command


def _find(subject: str) -> tuple[RunConfig, Path | None]:
    from lensmith.model.adapters import find_tuned
    from lensmith.rundir import find_run

    run, tuned = find_run(subject)
    if not run.exists:
        return RunConfig(model=subject), None
    return run.read_config(), find_tuned(tuned)
