"""The base of a run as it is on disk: its tensors one by one, also from NF4, and the files around them.

The decoder that a qlora run trained beside is not the one in the checkpoint: it is what comes back from NF4. Quantising
the checkpoint again, in the type the run computed in, gives those very weights.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lensmith.config.tree import RunConfig, Tune
from lensmith.data.encode import Encoder
from lensmith.data.images import write_policy
from lensmith.data.video import write_video_policy
from lensmith.errors import ModelError
from lensmith.export.tensors import Entry, Rows, TensorFile
from lensmith.model.adapters import TUNED_FOLDER, adapted_modules
from lensmith.model.load import choose_device, choose_precision, load_processor, local_folder
from lensmith.model.names import read_architecture
from lensmith.model.quant import is_quantised_checkpoint, quantisation
from lensmith.model.stream import INDEX, SINGLE
from lensmith.rundir import RunDir

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".onnx")
PROCESSOR, TEMPLATE = "processor_config.json", "chat_template.jinja"
OLDER_CONFIGS = {"preprocessor_config.json": "image_processor", "video_preprocessor_config.json": "video_processor"}
"""Where transformers before 5, and so older vLLM, look for what PROCESSOR holds in these sections."""
LIMITS = ("size", "fps", "min_frames", "max_frames", "cap_pixels_per_frame")
"""Keys of those sections that a run sets."""
STATE = ".quant_state.bitsandbytes__nf4"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Base:
    """The checkpoint that a run started from."""

    name: str
    folder: Path
    tied: bool
    """Whether the head is the embedding."""
    stored_in_four_bits: bool
    """The checkpoint itself, so that there is no full precision to merge into."""
    tune: Tune
    dtype: torch.dtype
    """What the run computed in."""

    @cached_property
    def _files(self) -> dict[str, TensorFile]:
        files = weight_files(self.folder)
        return {name: file for file in files for name in file.names}

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every tensor in the order of the files; one stored in 4 bits as the matrix it stands for."""
        packed = {name.removesuffix(STATE) for name in self._files if name.endswith(STATE)}
        parts = tuple(f"{name}." for name in packed)
        whole = [name for name in self._files if not name.startswith(parts)] if packed else list(self._files)
        return tuple(self._matrix(name) if name in packed else self._files[name].entry(name) for name in whole)

    def _matrix(self, name: str) -> Entry:
        from bitsandbytes.utils import unpack_tensor_to_dict

        state = unpack_tensor_to_dict(self._files[name].whole(name + STATE))
        return Entry(name, tuple(state["shape"]), _DTYPES[state["dtype"]])

    @cached_property
    def _linears(self) -> re.Pattern[str] | None:
        if self.tune.method != "qlora" or self.stored_in_four_bits:
            return None
        tower = "adapted" if self.tune.quantise_vision else "frozen"
        names = adapted_modules(Tune(language="adapted", vision=tower, merger=tower))
        return re.compile(rf"({names})\.weight")

    def was_four_bit(self, name: str) -> bool:
        """Whether training had this tensor in NF4 while the checkpoint has it in full."""
        return self._linears is not None and self._linears.fullmatch(name) is not None

    def rows(self, name: str) -> Rows:
        """A tensor as the checkpoint has it, widened where it is stored in 4 bits."""
        return self._widened(name) if name + STATE in self._files else self._files[name].rows(name)

    def dequantised(self, name: str) -> Tensor:
        """What a linear was while it was trained beside: the checkpoint's weight to NF4 and back, in the run's type."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        quant: Any = quantisation(self.tune, read_architecture(self.name), dtype=self.dtype)
        packed, state = quantize_4bit(
            self._files[name].whole(name).to(self.dtype),
            blocksize=64,
            compress_statistics=quant.bnb_4bit_use_double_quant,
            quant_type=quant.bnb_4bit_quant_type,
        )
        return dequantize_4bit(packed, state)

    def _widened(self, name: str) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {
            key.removeprefix(f"{name}."): self._files[key].whole(key)
            for key in self._files
            if key.startswith(f"{name}.")
        }
        return dequantize_4bit(self._files[name].whole(name), QuantState.from_dict(parts, device=torch.device("cpu")))


def open_base(run: RunDir, config: RunConfig) -> Base:
    """The base that `run` started from.

    Raises ModelError where the checkpoint is not there, not whole or not a Qwen3-VL.
    """
    architecture: Any = read_architecture(config.model)
    # environment.json tells what precision=auto meant on the machine that trained.
    found = _DTYPES.get(run.read_environment().get("precision", "")) if config.precision == "auto" else None
    return Base(
        name=config.model,
        folder=local_folder(config.model),
        tied=bool(architecture.tie_word_embeddings),
        stored_in_four_bits=is_quantised_checkpoint(architecture),
        tune=config.tune,
        dtype=found or choose_precision(config.precision, choose_device()),
    )


def weight_files(folder: Path) -> Sequence[TensorFile]:
    if (folder / INDEX).is_file():
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    else:
        names = [SINGLE]
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(
            f"model={folder}: {absent[0]} is not there, one of {len(names)} files with its weights. "
            "Copy model.safetensors, or all of its numbered parts and their index, into the folder."
        )
    return [TensorFile(folder / name) for name in names]


def copy_files(base: Base, run: RunDir, config: RunConfig, to: Path) -> list[str]:
    """Everything of the base but weights and its card, then what the run changes; returns the names of all files.

    The tokenizer stays the base's own, byte for byte: no run changes it, and rewriting it with today's transformers names
    classes that older ones do not know. The processor's limits become those of training, so that serving sees the same
    pixels.
    """
    for file in sorted(base.folder.iterdir()):
        skipped = file.name.startswith(".") or file.name == "README.md" or file.name.endswith(WEIGHT_SUFFIXES)
        if file.is_file() and not skipped:
            shutil.copyfile(file, to / file.name)  # copyfile: not the link into the hub's cache, nor its rights
    settings = json.loads((to / "config.json").read_text(encoding="utf-8"))
    if settings.pop("quantization_config", None) is not None:
        (to / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    copy_processor(run, config, to)
    return sorted(file.name for file in to.iterdir())


def copy_processor(run: RunDir, config: RunConfig, to: Path) -> None:
    """Processor settings and chat template as the run used them, also in the files that older readers look at."""
    saved = run.path / TUNED_FOLDER
    if (saved / PROCESSOR).is_file():  # a finished run has saved them
        for name in (PROCESSOR, TEMPLATE):
            if (saved / name).is_file():
                shutil.copyfile(saved / name, to / name)
    else:
        _save_processor(config, to)
    ours = json.loads((to / PROCESSOR).read_text(encoding="utf-8"))
    for name, section in OLDER_CONFIGS.items():
        if (to / name).is_file() and section in ours:
            theirs = json.loads((to / name).read_text(encoding="utf-8"))
            theirs |= {key: ours[section][key] for key in LIMITS if key in ours[section] and key in theirs}
            (to / name).write_text(json.dumps(theirs, indent=2) + "\n", encoding="utf-8")


def _save_processor(config: RunConfig, to: Path) -> None:
    """As the end of a run does it, for a checkpoint of one that has not come there."""
    processor = load_processor(config.model)
    encoder = Encoder.from_processor(processor, config.data.image, config.data.video)
    write_policy(processor, encoder.min_tokens, encoder.max_tokens)
    if encoder.video is not None:
        write_video_policy(processor, encoder.video)
    apart = to / ".processor"
    processor.save_pretrained(str(apart))
    for name in (PROCESSOR, TEMPLATE):
        if (apart / name).is_file():
            (apart / name).replace(to / name)
    shutil.rmtree(apart)
