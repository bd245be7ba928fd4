"""Whether vLLM can write a run's completions: asked before gigabytes of weights are read."""

from __future__ import annotations

import importlib.util
import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

import torch

from lensmith.config.tree import RunConfig
from lensmith.data.images import read_geometry
from lensmith.errors import ConfigError
from lensmith.model.names import read_architecture
from lensmith.model.quant import is_quantised_checkpoint
from lensmith.plan.facts import read_facts
from lensmith.train.grpo_alarms import LOGPROB_GAP

if TYPE_CHECKING:
    from lensmith.data.scan import Scan
    from lensmith.types import VisionGeometry

GIB = 2**30
ANSWER_S = 10.0
"""Patience with a server that should be up already."""
BUILTIN = "set rollout.engine=builtin, which needs no second copy of the weights"
LOGPROBS_MODE = "processed_logprobs"
"""vLLM's word for log-probabilities at the sampling temperature, which is what training computes."""


def check_vllm_installed(config: RunConfig) -> None:
    """Raises ConfigError where rollout.engine=vllm and vLLM is not here: before a run folder is made."""
    if config.rollout.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        also = " (TRL's client of a server needs it too)" if _is_server(config) else ""
        raise ConfigError(
            f"rollout.engine=vllm, rollout.vllm_mode={config.rollout.vllm_mode}: vLLM is not installed in this "
            f'environment{also}. pip install "lensmith[vllm]", or {BUILTIN}.'
        )


def check_vllm(config: RunConfig, device: torch.device, processor: Any) -> None:
    """Raises ConfigError where rollout.engine=vllm and the model, or the server, does not do for it."""
    if config.rollout.engine != "vllm":
        return
    if is_quantised_checkpoint(read_architecture(config.model)):
        raise ConfigError(
            f"rollout.engine=vllm, model={config.model}: stored in 4 bits, and vLLM is handed weights of 16. Name the 16-bit "
            f"checkpoint (tune.method=qlora stores it in 4 bits for training), or {BUILTIN}."
        )
    if _is_server(config):
        _check_server(config, device, processor)


def check_vllm_room(config: RunConfig, train: Scan, device: torch.device) -> None:
    """Raises ConfigError for rows that vLLM cannot be asked about, and for a share of the GPU in which it does not fit."""
    if config.rollout.engine != "vllm":
        return
    if train.videos.videos:
        raise ConfigError(
            f"rollout.engine=vllm: {train.videos.videos} videos in data.train, and TRL hands pictures alone to vLLM. Leave the "
            f"rows out, or {BUILTIN}."
        )
    longest = longest_sequence(config, train)
    if _is_server(config):
        served = _served(config)
        if (most := served.get("max_model_len")) is not None and most < longest:
            raise ConfigError(
                f"rollout.vllm_server={config.rollout.vllm_server}: serves {most:,} tokens at most, and the longest row with "
                f"grpo.max_new_tokens={config.grpo.max_new_tokens} has {longest:,}. Start it with --max-model-len {longest}."
            )
    elif device.type == "cuda":
        _check_share(config, longest, torch.cuda.get_device_properties(device).total_memory / GIB)


def longest_sequence(config: RunConfig, train: Scan) -> int:
    """Tokens of the longest prompt with a completion; the answers of rows are not asked for, but count here."""
    return int(train.tokens.max()) + config.grpo.max_new_tokens


def vllm_sentence(config: RunConfig, dtype: torch.dtype) -> str:
    """What writes the completions, and how it is watched."""
    rollout, gap = config.rollout, LOGPROB_GAP[dtype]
    if rollout.engine != "vllm":
        why = "rollout.engine=auto: " if rollout.engine == "auto" else ""
        return (
            f"{why}Completions come from the built-in engine: each prompt and its pictures once per group, on the weights that "
            "train; no second copy of them is needed."
        )
    where = (
        f"on the server {rollout.vllm_server}"
        if _is_server(config)
        else f"beside the training, in {rollout.vllm_gpu_share:.0%} of the GPU's memory"
    )
    return (
        f"Completions come from vLLM {where}; it gets the weights before each step's. Its log-probabilities are compared with "
        f"training's at every step, the first included, and over {gap:g} nats a token apart rings an alarm. What it draws is "
        "not the same again after a resume."
    )


def picture_limits(config: RunConfig, geometry: VisionGeometry) -> dict[str, Any]:
    """Arguments of the image processor under which a picture that training has resized is not resized again."""
    sources = config.data.train if isinstance(config.data.train, list) else []
    limits = [config.data.image, *(source.image for source in sources if source.image is not None)]
    area = geometry.token_px**2  # areas, despite the names
    return {"size": {"shortest_edge": area, "longest_edge": max(limit.max_tokens for limit in limits) * area}}


def serve_command(config: RunConfig, processor: Any) -> str:
    """What starts a server that this run can use."""
    limits = json.dumps(picture_limits(config, read_geometry(processor)))
    return (
        f'VLLM_SERVER_DEV_MODE=1 vllm serve {config.model} --weight-transfer-config \'{{"backend": "nccl"}}\' '
        f"--logprobs-mode {LOGPROBS_MODE} --max-logprobs -1 --mm-processor-kwargs '{limits}' --enable-scale-out"
    )


def _is_server(config: RunConfig) -> bool:
    return config.rollout.vllm_mode == "server"


def _check_server(config: RunConfig, device: torch.device, processor: Any) -> None:
    where, start = f"rollout.vllm_server={config.rollout.vllm_server}", serve_command(config, processor)
    if device.type != "cuda":
        raise ConfigError(
            f"rollout.vllm_mode=server: weights reach the server from GPU to GPU, and training would run on the {device.type} "
            f"here. Train on a GPU, or {BUILTIN}."
        )
    try:
        _open(config, "/health")
        server = _get_json(config, "/server_info?config_format=json")["vllm_config"]
    except urllib.error.HTTPError as cause:
        raise ConfigError(
            f"{where}: answers {cause.code} to {cause.url}, so it cannot take weights. Start it again with: {start}"
        ) from cause
    except (OSError, HTTPException, ValueError, KeyError) as cause:
        raise ConfigError(f"{where}: no vLLM answers there ({cause}). Start one with: {start}") from cause
    if server.get("weight_transfer_config") is None:
        raise ConfigError(f"{where}: it cannot take weights while it runs. Start it again with: {start}")
    mode = server.get("model_config", {}).get("logprobs_mode")
    if mode != LOGPROBS_MODE:
        raise ConfigError(
            f"{where}: tells {mode}, and training computes what vLLM calls {LOGPROBS_MODE}. Start it again with: {start}"
        )


def _served(config: RunConfig) -> dict[str, Any]:
    """What the server says of the model that it serves."""
    try:
        return _get_json(config, "/v1/models")["data"][0]
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as cause:
        raise ConfigError(
            f"rollout.vllm_server={config.rollout.vllm_server}: does not say which model it serves ({cause}). See whether it "
            f"still runs, or {BUILTIN}."
        ) from cause


def _check_share(config: RunConfig, longest: int, gib: float) -> None:
    facts, share = read_facts(config.model), config.rollout.vllm_gpu_share
    need_gib = (2 * facts.num_parameters + longest * facts.layers * 2 * facts.key_width * 2) / GIB
    if share * gib < need_gib:
        enough = -(-need_gib * 110 // gib) / 100  # a tenth more, for what it computes with
        way = f"Set rollout.vllm_gpu_share={enough:.2f} or more" if enough < 1 else "Serve it from other GPUs"
        raise ConfigError(
            f"rollout.vllm_gpu_share={share:g}: {share * gib:.1f} of this GPU's {gib:.1f} GiB, and vLLM's copy of the weights "
            f"with one sequence of {longest:,} tokens takes {need_gib:.1f}. {way}, or {BUILTIN}."
        )


def _open(config: RunConfig, path: str) -> bytes:
    with urllib.request.urlopen(
        config.rollout.vllm_server.rstrip("/") + path, timeout=ANSWER_S
    ) as answer:  # http(s), by the config
        return answer.read()


def _get_json(config: RunConfig, path: str) -> Any:
    return json.loads(_open(config, path))
