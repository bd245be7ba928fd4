"""From a RunConfig to a model and its processor on the device, in one type, without a second copy on the way.

Nothing is chosen silently: every choice made here is a sentence in `Loaded.sentences`, and a checkpoint that lacks
weights is refused, where transformers would draw them at random.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from lensmith.config.tree import RunConfig
from lensmith.errors import ConfigError, ModelError
from lensmith.model.components import states_of
from lensmith.model.names import TINY, not_loadable, read_architecture, resolve_model
from lensmith.model.quant import BITS, check_quantised, is_quantised_checkpoint, quantisation, settle_linears
from lensmith.model.residence import settle_weights

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig, Qwen3VLProcessor

    from lensmith.model.engine import Engine
    from lensmith.model.stream import Shards

BF16_CAPABILITY = (8, 0)
"""Compute capability from which NVIDIA cards have bf16 units (Ampere); older ones emulate it, slowly."""

LARGEST_ON_CPU = 1_000_000_000
"""Parameters above which 4-bit training without a GPU is refused: the smallest Qwen3-VL has 2.1e9, lensmith/tiny 5e6."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to be prepared for training or asked."""

    model: Engine
    processor: Qwen3VLProcessor
    device: torch.device
    dtype: torch.dtype
    """Of weights and activations; 4-bit weights are widened to it for each product."""
    name: str
    """As the user wrote it."""
    sentences: tuple[str, ...]
    """What was chosen and why, to be printed."""


def load_model(
    config: RunConfig,
    *,
    device: torch.device | None = None,
    processor: Qwen3VLProcessor | None = None,
    shards: Shards | None = None,
) -> Loaded:
    """Model and processor of `config.model`, in eval mode, all parameters as loaded; `prepare_trainable` comes next.

    `device`: None for this process's GPU, or the CPU where there is none. `processor`: where it has been loaded
    already. `shards`: weights from elsewhere than the model's files, for benchmarks.

    Raises ModelError for names, files and processors that do not serve, ConfigError for a precision or method that
    this device does not have.
    """
    from lensmith.model.adapters import check_tune

    check_tune(config.tune)
    device = device or choose_device()
    dtype = choose_precision(config.precision, device)
    architecture = read_architecture(config.model)
    sentences = [f"{config.model}: {precision_sentence(dtype, config.precision, device)}"]
    sentences += _own_weights_sentences(config, dtype)
    ready_made = is_quantised_checkpoint(architecture)
    if ready_made or config.tune.method == "qlora":
        sentences += _check_four_bit(config, architecture, device, ready_made=ready_made)
    processor = processor or load_processor(config.model)
    model = _load_weights(config, architecture, shards, device, dtype)
    if ready_made or config.tune.method == "qlora":
        settle_linears(model, dtype)
    if config.tune.method in BITS and not ready_made:
        check_quantised(model, config.tune)
    sentences += settle_weights(model, config.memory, device)
    return Loaded(model, processor, device, dtype, config.model, tuple(sentences))


def choose_device() -> torch.device:
    """This process's GPU (torchrun's LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type of weights and activations for RunConfig.precision on this device.

    auto: bf16 where the GPU has it, fp16 on older ones, fp32 on a CPU. Raises ConfigError for one it does not have.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return precision_for(precision, capability)


def precision_for(precision: str, capability: tuple[int, int] | None) -> torch.dtype:
    """As `choose_precision`, from the GPU's compute capability alone; None is a CPU. Pure."""
    if precision == "auto":
        if capability is None:
            return torch.float32
        return torch.bfloat16 if capability >= BF16_CAPABILITY else torch.float16
    if precision == "fp16" and capability is None:
        raise ConfigError(
            "precision=fp16: a CPU has no fp16 arithmetic to speak of. Set precision=auto (fp32 here), or use a GPU."
        )
    if precision == "bf16" and capability is not None and capability < BF16_CAPABILITY:
        raise ConfigError(
            f"precision=bf16: this GPU has compute capability {_dotted(capability)}, bf16 starts at "
            f"{_dotted(BF16_CAPABILITY)}. Set precision=auto (fp16 with a loss scaler here)."
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


def precision_sentence(dtype: torch.dtype, setting: str, device: torch.device) -> str:
    """What was chosen, and why."""
    chosen = {torch.bfloat16: "bf16", torch.float16: "fp16 with a loss scaler", torch.float32: "fp32"}[dtype]
    if setting != "auto":
        return f"{chosen}, as set."
    if device.type != "cuda":
        return f"{chosen} on the CPU."
    capability = torch.cuda.get_device_capability(device)
    return f"{chosen} on {torch.cuda.get_device_name(device)} (compute capability {_dotted(capability)})."


def _own_weights_sentences(config: RunConfig, dtype: torch.dtype) -> list[str]:
    """What a 16-bit type means for components that train their own weights; docs/components.md has the numbers."""
    trained = [name for name, state in states_of(config.tune).items() if state == "trained" and name != "head"]
    if not trained or dtype is torch.float32:
        return []
    names = " and ".join(trained)
    if dtype is torch.float16:
        widened = "the whole model is" if "language" in trained else "tower and mergers are"
        return [f"Training {names} itself: {widened} widened to fp32, because a loss scaler needs fp32 weights."]
    if config.optim.rounding == "stochastic":
        return [f"Training {names} itself in bf16: updates are computed in fp32 and rounded stochastically."]
    adapt = "tune.method=lora" if config.tune.method == "full" else f"tune.{trained[0]}=adapted"
    return [
        f"Warning: {names} trains its own weights in bf16, where most updates of 1e-5 round to nothing. "
        f"Set optim.rounding=stochastic, {adapt} (adapters are fp32), or precision=fp32 where memory allows."
    ]


def count_parameters(architecture: Qwen3VLConfig) -> int:
    """Parameters of a model with this configuration, tied ones once; takes no memory."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(architecture)
    return sum(parameter.numel() for parameter in model.parameters())


def load_processor(name: str, *, cached_only: bool = False) -> Qwen3VLProcessor:
    """The checkpoint's own processor: tokenizer, image processor and chat template.

    `cached_only`: ask no hub, which may take minutes to not answer.

    Raises ModelError if it is not there, of another kind, or without a chat template.
    """
    from transformers import AutoProcessor, Qwen3VLProcessor

    try:
        processor = AutoProcessor.from_pretrained(resolve_model(name), local_files_only=cached_only)
    except (OSError, ValueError) as cause:
        raise ModelError(
            f"model={name}: its processor (tokenizer, image processor, chat template) could not be loaded: "
            f"{_first_line(cause)} Copy preprocessor_config.json, tokenizer files and chat_template.jinja "
            "of the base model into the folder."
        ) from cause
    if not isinstance(processor, Qwen3VLProcessor):
        raise ModelError(
            f"model={name}: its processor is a {type(processor).__name__}, a Qwen3VLProcessor is needed. "
            "Copy preprocessor_config.json and video_preprocessor_config.json of the base model into the folder."
        )
    if not processor.chat_template:
        raise ModelError(
            f"model={name}: its processor has no chat template, so turns cannot be told apart. "
            "Copy chat_template.jinja of the base model into the folder."
        )
    return processor


def _check_four_bit(
    config: RunConfig, architecture: Qwen3VLConfig, device: torch.device, *, ready_made: bool
) -> list[str]:
    """What to say about 4-bit weights on this device; raises ConfigError where they would take for ever."""
    method, sentences = config.tune.method, []
    if ready_made and method == "full":
        raise ConfigError(
            f"model={config.model}: stored in 4 bits, which tune.method=full cannot train. "
            "Set tune.method=qlora, or name the 16-bit checkpoint."
        )
    if ready_made:
        sentences.append(f"{config.model}: stored in 4 bits already, loaded as it is.")
    if device.type == "cuda":
        return sentences
    count = count_parameters(architecture)
    if count > LARGEST_ON_CPU:
        raise ConfigError(
            f"tune.method={method}: there is no GPU here, and {config.model} has {count / 1e9:.1f} billion parameters; "
            f"4-bit weights on a CPU are for models up to {LARGEST_ON_CPU / 1e9:.0f} billion. "
            f"Run it on a GPU, or try your data with model={TINY}."
        )
    sentences.append("Warning: 4-bit weights on a CPU are slower than fp32 ones; tune.method=lora is quicker here.")
    return sentences


def _load_weights(
    config: RunConfig, architecture: Qwen3VLConfig, shards: Shards | None, device: torch.device, dtype: torch.dtype
) -> Engine:
    from transformers import GenerationConfig

    from lensmith.model.stream import FileShards, stream_weights

    folder = local_folder(config.model)
    try:
        streamed = stream_weights(
            architecture,
            FileShards(folder) if shards is None else shards,
            device=device,
            dtype=dtype,
            quant=quantisation(config.tune, architecture, dtype=dtype),
            memory=config.memory,
        )
    except (OSError, SafetensorError) as cause:
        raise ModelError(
            f"model={config.model}: its weights could not be read: {_first_line(cause)} "
            "Copy model.safetensors, or all of its numbered parts and their index, into the folder."
        ) from cause
    if missing := sorted(streamed.missing):
        raise ModelError(
            f"model={config.model}: {len(missing)} weights are not in its files, first {missing[0]}; they would be "
            "random numbers. The copy is incomplete, or of another kind of model: download it again."
        )
    if mismatched := sorted(streamed.mismatched):
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"model={config.model}: {name} is {list(stored)} in its weights and {list(expected)} by its config.json; "
            "the two are of different models. Copy both from the same place."
        )
    model = streamed.model
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    # An adapter names its base, not a path on this machine.
    model.name_or_path = config.model
    return model


def local_folder(name: str) -> Path:
    """The folder with the model's files; a hub name is downloaded, or found in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    resolved = Path(source := resolve_model(name))
    if resolved.is_dir():
        return resolved
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"]))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as cause:
        raise ModelError(not_loadable(name)) from cause


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _first_line(cause: Exception) -> str:
    line = str(cause).strip().partition("\n")[0]
    return line if line.endswith(".") else f"{line}."
