"""Unsloth's model and kernels in the place of ours (`engine: unsloth`), with everything around them unchanged.

Unsloth's are: loading, its ready-made 4-bit checkpoints, PEFT's adapters as its `get_peft_model` makes them, its gradient
checkpointing, its loss, and `for_inference` around generation. Ours stay: rows and pixels, which linears are adapted, the
order and size of the steps, the optimizer, checkpoints, evaluation, verification and export. Pictures are not shrunk.

Unsloth rewrites transformers, PEFT and TRL when it is imported, and wants to come before them: `import_unsloth` is for
programs to call first.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lensmith.config.tree import PACK_TOKENS, RunConfig, Tune
from lensmith.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Qwen3VLProcessor

    from lensmith.model.load import Loaded

PACKAGE = "unsloth"


def import_unsloth() -> Any:
    """The package. Raises ConfigError where it is not installed, or there is no GPU, without which it
    trains no model of pictures."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            "engine=unsloth: Unsloth is not installed in this environment. Install it with "
            '`pip install "lensmith[unsloth]"`, which pins the versions that it needs, or set engine=lensmith.'
        )
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            f"engine=unsloth: Unsloth {version(PACKAGE)} needs a GPU for models of pictures, and torch {torch.__version__} "
            "sees none here. Set engine=lensmith, which runs on a CPU as well."
        )
    # It would ask a server for a file to be counted.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    return importlib.import_module(PACKAGE)


def load_unsloth(config: RunConfig, *, device: torch.device, processor: Qwen3VLProcessor) -> Loaded:
    """As `lensmith.model.load.load_model`, by Unsloth's FastVisionModel.

    Raises ConfigError where it cannot run here, ModelError for a model that is not there.
    """
    unsloth = import_unsloth()

    from lensmith.model.load import Loaded, choose_precision, local_folder, precision_sentence

    dtype, method = choose_precision(config.precision, device), config.tune.method
    model, _ = unsloth.FastVisionModel.from_pretrained(
        str(local_folder(config.model)),
        max_seq_length=config.pack.tokens or PACK_TOKENS["cuda"],
        dtype=dtype,
        load_in_4bit=method == "qlora",
        load_in_8bit=method == "lora_8bit",
        load_in_16bit=method == "lora",
        use_gradient_checkpointing=_checkpointing(config),
        # Otherwise another checkpoint, quantised by others, is taken for the one that was named.
        use_exact_model_name=True,
    )
    model.name_or_path = config.model
    # What the trainer asks an Engine for.
    model.place, model.features = device, None
    sentences = (
        f"{config.model}: {precision_sentence(dtype, config.precision, device)}",
        f"Unsloth {version(PACKAGE)} trains: its model, kernels and loss. Each sample is a row of its own, padded to the "
        f"longest of its pass, pictures as large as ever; {_stored(model)}.",
    )
    return Loaded(model, processor, device, dtype, config.model, sentences)


def adapt_unsloth(model: Any, config: RunConfig) -> nn.Module:
    """The PeftModel that Unsloth's get_peft_model makes, with adapters on just the linears that `config.tune` names."""
    from lensmith.model.adapters import adapted_modules, lora_alpha, start_from

    tune: Tune = config.tune
    tuned = import_unsloth().FastVisionModel.get_peft_model(
        model,
        r=tune.rank,
        lora_alpha=lora_alpha(tune),
        lora_dropout=tune.dropout,
        bias="none",
        target_modules=adapted_modules(tune),
        finetune_vision_layers="adapted" in (tune.vision, tune.merger),
        finetune_language_layers=tune.language == "adapted",
        use_rslora=tune.rslora,
        use_dora=tune.dora,
        random_state=config.seed,
        use_gradient_checkpointing=_checkpointing(config),
    )
    if tune.start_from is not None:
        start_from(tuned, tune)
    tuned.answering = answering
    return tuned


@contextmanager
def answering(model: Any) -> Iterator[None]:
    """Unsloth's `for_inference`, and `for_training` afterwards. Nothing is computed in torch's inference mode, whose
    tensors Unsloth would keep in its buffers for training."""
    import torch

    fast = import_unsloth().FastVisionModel
    fast.for_inference(model)
    try:
        with torch.no_grad():
            yield
    finally:
        # Whatever the mode was: the first questions come before the first step, and only this turns checkpointing on again.
        fast.for_training(model)


def _checkpointing(config: RunConfig) -> str | bool:
    """ "unsloth": layers are recomputed, and their inputs wait in host memory."""
    return False if config.memory.recompute == "none" else "unsloth"


def _stored(model: Any) -> str:
    """In how many bits it chose to store what."""
    from lensmith.model.quant import quantised_linears

    counts = quantised_linears(model).items()
    few = [f"{stored} of {linears} linears of {component}" for component, (stored, linears) in counts if stored]
    return "in few bits are " + ", ".join(few) if few else "nothing is stored in few bits"
